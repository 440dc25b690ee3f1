"""The README is the index notebook, and what it and the notebooks point at is there."""
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, program
from make_readme import llms, readme

from lad_nb import cli
from lad_nb.recipes import recommended


def test_readme_is_made_from_the_index():
    what = 'README.md is not what nbs/index.ipynb makes: run python tools/make_readme.py'
    assert (ROOT/'README.md').read_text() == readme(), what


def test_llms_txt_names_every_page():
    text = (ROOT/'llms.txt').read_text()
    assert text == llms(), 'llms.txt is not what the notebooks say: run python tools/make_readme.py'
    pages = [p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]
    assert text.count('.html): ') == len(pages) - 1  # the index is the site itself


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


def test_it_is_short():
    text = (ROOT/'README.md').read_text()
    assert len(text.split()) <= 1200 and max(map(len, text.splitlines())) <= 200


def test_commands_of_the_run_book_page_parse(capsys):
    """Every lad-nb line is taken as typed (up to what is not there yet), so no flag in it is misspelt."""
    text = markdown(ROOT/'nbs'/'guides'/'run_book.ipynb').replace('\\\n', ' ')  # a command may go on
    lines = re.findall(r'^lad-nb (run_(?!fine_tune_eval).*)$', text, re.M)
    assert len(lines) == 2
    for line in lines: assert cli.main([*line.split(), '--dry_run']) == 0, capsys.readouterr().err


def test_the_recipe_of_choice_as_flags():
    text = markdown(ROOT/'nbs'/'guides'/'run_book.ipynb')
    flags, = re.findall(r'and here `([^`]+)`', text)
    command = f'run_lad_distil --experiment x --task toy --num_hidden_layers 3 {flags}'
    recipe = cli.recipe_of(cli.parse(command.split()))
    assert {name: getattr(recipe, name) for name in recommended} == recommended


@pytest.mark.slow
def test_the_ten_lines_print_what_is_stored(tmp_path):
    """The README's Python, as a newcomer pastes it: to two digits, since processors differ in the third."""
    cells = json.loads((ROOT/'nbs'/'index.ipynb').read_text())['cells']
    cell, = (c for c in cells if ''.join(c['source']).startswith('#| slow'))
    done = subprocess.run([sys.executable, '-c', ''.join(cell['source'])], capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stored = ''.join(cell['outputs'][0]['text'])
    now, then = ([float(x) for x in re.findall(r'[\d.]+(?=})', text)] for text in (done.stdout, stored))
    assert len(now) == 3 and now == pytest.approx(then, abs=.03)


def test_package_needs_no_nbdev():
    assert program('without_nbdev.py').returncode == 0
