"""The README is the index notebook, and what it and the notebooks point at is there."""
import json
import re
import subprocess
import sys

from conftest import ROOT
from make_readme import readme


def test_readme_is_made_from_the_index():
    same = (ROOT/'README.md').read_text() == readme()
    assert same, 'README.md is not what nbs/index.ipynb makes: run python tools/make_readme.py'


def test_links_lead_somewhere():
    links = [link for link in re.findall(r'\]\(([^)#]+)\)', (ROOT/'README.md').read_text()) if not link.startswith('http')]
    assert len(links) > 12 and not [link for link in links if not (ROOT/link).exists()]
    lost, found = [], 0
    for path in (ROOT/'nbs').rglob('*.ipynb'):
        text = '\n'.join(''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'markdown')
        for link in re.findall(r'\]\((?!https?:|#)([^)#\s]+)', text):
            found += 1
            if not (path.parent/link).exists(): lost.append(f'{path.name}: {link}')
    assert found > 100 and not lost


def test_commands_of_the_readme_parse():
    """Every lad-nb line is taken as typed (up to what is not there yet), so no flag in it is misspelt."""
    text = (ROOT/'README.md').read_text().replace('\\\n', ' ')  # a command may go on in the next line
    lines = re.findall(r'^lad-nb (run_(?!fine_tune_eval).*)$', text, re.M)
    assert len(lines) == 2
    for line in lines:
        done = subprocess.run([sys.executable, '-c', 'import sys; from lad_nb.cli import main; sys.exit(main())', *line.split(), '--dry_run'], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_package_needs_no_nbdev():
    code = "import sys; sys.modules['nbdev'] = None\nimport lad_nb.cli"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
