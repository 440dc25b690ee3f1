"""The house rules that a program can hold: readable lines and cells, modules that depend downwards only."""
import ast
import importlib
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from make_readme import contributing
from run_notebooks import find_flaws

HOME = Path(__file__).parent.parent
LIBRARY = sorted(p for p in (HOME/'nbs').glob('*.ipynb') if p.stem != 'index')
NOTEBOOKS = sorted(p for p in (HOME/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
MODULES = [p for p in (HOME/'lad_nb').glob('*.py') if p.stem != '_modidx']
PYTHON = sorted([*MODULES, *(HOME/'tests').glob('*.py'), *(HOME/'tools').glob('*.py')])
PAGES = sorted(HOME.glob('*.md'))
LINE, LONGEST, MEDIAN = 110, 45, 10  # characters of a line; lines of an exported cell


def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']


def exported(path):
    """The exported cells of a notebook, without their directive."""
    for cell in cells(path):
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code' and re.match(r'#\|\s*exporti?\b', source):
            yield cell['id'], source.partition('\n')[2].splitlines()


def module_of(path): return re.search(r'#\|\s*default_exp (\w+)', path.read_text(encoding='utf-8'))[1]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_lines_of_a_notebook_fit_on_a_screen(path):
    """All but where a link leads, which can't be broken."""
    lines = ((c['id'], line) for c in cells(path) for line in ''.join(c['source']).splitlines())
    lines = ((i, line) for i, line in lines if not re.fullmatch(r'\[[^]]+\]: https://\S+', line))
    assert [f'{i}: {line[:60]}... ({len(line)})' for i, line in lines if len(line) > LINE] == []


STORIES = [path for path in NOTEBOOKS if path.parent != HOME/'nbs']  # tutorials, analyses, guides


@pytest.mark.parametrize('path', STORIES, ids=lambda p: p.stem)
def test_plumbing_is_folded_in_jupyter(path):
    """What the site leaves out does not stand in a reader's way in JupyterLab either."""
    plumbing = [c for c in cells(path) if re.match(r'#\|\s*hide', ''.join(c['source']))]
    folded = dict(source_hidden=True)
    assert [c['id'] for c in plumbing if c['metadata'].get('jupyter') != folded] == []


@pytest.mark.parametrize('path', PYTHON, ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_lines_of_a_module_fit_on_a_screen(path):
    text = path.read_text(encoding='utf-8')
    listed = re.search(r"^__all__ = \[[^]]*\]", text, re.M) if path.parent.name == 'lad_nb' else None
    if listed:  # nbdev wraps that list itself
        text = text.replace(listed[0], '\n'*listed[0].count('\n'))
    lines = enumerate(text.splitlines(), start=1)
    assert [f'{n}: {len(line)}' for n, line in lines if len(line) > LINE] == []


@pytest.mark.parametrize('path', [p for p in PAGES if p.stem != 'README'], ids=lambda p: p.stem)
def test_lines_of_a_page_fit_on_a_screen(path):
    """All but tables, which can't be broken; the README's are the index notebook's, with longer links."""
    lines = enumerate(path.read_text(encoding='utf-8').splitlines(), start=1)
    assert [f'{n}: {len(line)}' for n, line in lines if len(line) > LINE and line[0] != '|'] == []


@pytest.mark.parametrize('path', LIBRARY, ids=lambda p: p.stem)
def test_an_exported_cell_has_one_idea(path):
    assert [f'{i}: {len(lines)} lines' for i, lines in exported(path) if len(lines) > LONGEST] == []


def test_most_exported_cells_are_short():
    assert statistics.median(len(lines) for path in LIBRARY for _, lines in exported(path)) <= MEDIAN


@pytest.mark.parametrize('path', LIBRARY, ids=lambda p: p.stem)
def test_a_notebook_says_why_and_where_to_read_on(path):
    first, *_, last = (''.join(c['source']) for c in cells(path))
    assert re.match(r'# \w+\n\n> \S', first), 'it opens with its name and one line'
    assert path == LIBRARY[-1] or '.ipynb)' in last, 'it ends with a link to the next'


@pytest.mark.parametrize('path', LIBRARY, ids=lambda p: p.stem)
def test_modules_depend_on_lower_numbers_only(path):
    number = {module_of(p): p.stem for p in LIBRARY}
    upwards, private = [], []
    for _, lines in exported(path):
        for node in ast.walk(ast.parse('\n'.join(lines))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or '').startswith('lad_nb.'):
                continue
            where = node.module.removeprefix('lad_nb.')
            if number[where] >= path.stem:
                upwards.append(where)
            private += [a.name for a in node.names if a.name.startswith('_')]
    assert (upwards, private) == ([], [])


def test_ruff_finds_nothing():
    """Unused imports and variables, undefined names, and the like; pyproject.toml has the list."""
    command = [sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format', 'concise']
    done = subprocess.run([*command, 'lad_nb', 'tests', 'tools'], cwd=HOME, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_contributing_says_where_everything_lives():
    text = (HOME/'CONTRIBUTING.md').read_text(encoding='utf-8')
    assert text == contributing(), 'run python tools/make_readme.py'


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_pages_lead_somewhere(path):
    links = re.findall(r'\]\((?!https?:|#)([^)#\s]+)', path.read_text(encoding='utf-8'))
    assert [link for link in links if not (HOME/link).exists()] == []


def test_names_of_the_changelog_are_there():
    """Every name that the table of moves sends somewhere is in that module."""
    text = (HOME/'CHANGELOG.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| `\w+` \| `(\w+)` \| (.+) \|$', text, re.M)
    moved = [(module, name) for module, names in rows for name in re.findall(r'`(\w+)`', names)]
    lost = [f'{module}.{name}' for module, name in moved
            if not hasattr(importlib.import_module(f'lad_nb.{module}'), name)]
    assert len(moved) > 100 and lost == []


def test_one_version_everywhere():
    version = re.search(r'^version = (.+)$', (HOME/'settings.ini').read_text(), re.M)[1]
    assert re.search(r'^version: (.+)$', (HOME/'CITATION.cff').read_text(), re.M)[1] == version


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_have_no_flaws(path):
    """No error, nothing printed or plotted without an output, no home folders."""
    assert find_flaws(nbformat.read(path, as_version=4)) == []
