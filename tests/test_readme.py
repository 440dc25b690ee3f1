"""The README is the index notebook, and what it and the notebooks point at is there."""
import json
import re
import subprocess
import sys

from conftest import ROOT, program
from make_readme import readme


def test_readme_is_made_from_the_index():
    what = 'README.md is not what nbs/index.ipynb makes: run python tools/make_readme.py'
    assert (ROOT/'README.md').read_text() == readme(), what


def test_links_lead_somewhere():
    links = re.findall(r'\]\((?!http)([^)#]+)\)', (ROOT/'README.md').read_text())
    assert len(links) > 12 and not [link for link in links if not (ROOT/link).exists()]


def markdown(path):
    """The markdown cells of a notebook."""
    cells = json.loads(path.read_text())['cells']
    return '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


def test_links_of_notebooks_lead_somewhere():
    lost, found = [], 0
    for path in (ROOT/'nbs').rglob('*.ipynb'):
        for link in re.findall(r'\]\((?!https?:|#)([^)#\s]+)', markdown(path)):
            found += 1
            if not (path.parent/link).exists(): lost.append(f'{path.name}: {link}')
    assert found > 100 and not lost


def test_commands_of_the_readme_parse():
    """Every lad-nb line is taken as typed (up to what is not there yet), so no flag in it is misspelt."""
    text = (ROOT/'README.md').read_text().replace('\\\n', ' ')  # a command may go on in the next line
    lines = re.findall(r'^lad-nb (run_(?!fine_tune_eval).*)$', text, re.M)
    assert len(lines) == 2
    for line in lines:
        command = [sys.executable, '-m', 'lad_nb', *line.split(), '--dry_run']
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_package_needs_no_nbdev():
    assert program('without_nbdev.py').returncode == 0
