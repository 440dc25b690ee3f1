"""The house rules that a program can hold: lines and cells that can be read, modules that depend downwards only."""
import ast
import json
import re
import statistics
from pathlib import Path

import pytest

HOME = Path(__file__).parent.parent
LIBRARY = sorted(p for p in (HOME/'nbs').glob('*.ipynb') if p.stem != 'index')
NOTEBOOKS = sorted(p for p in (HOME/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
PYTHON = sorted(p for folder in ('lad_nb', 'tests', 'tools') for p in (HOME/folder).glob('*.py') if p.stem != '_modidx')
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
    lines = ((c['id'], line) for c in cells(path) for line in ''.join(c['source']).splitlines())
    assert [f'{i}: {line[:60]}... ({len(line)})' for i, line in lines if len(line) > LINE] == []


@pytest.mark.parametrize('path', PYTHON, ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_lines_of_a_module_fit_on_a_screen(path):
    lines = enumerate(path.read_text(encoding='utf-8').splitlines(), start=1)
    assert [f'{n}: {len(line)}' for n, line in lines if len(line) > LINE and '__all__' not in line] == []


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
