"""Make README.md from nbs/index.ipynb, and CONTRIBUTING.md's table of modules from the library's notebooks.

    python tools/make_readme.py

Hidden cells and directives are left out of the README, and links are as seen from the project's top.
A module's row is its number, its name and the line that its notebook opens with.
"""
import posixpath
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
START, END = '<!-- modules: made by tools/make_readme.py -->', '<!-- end of modules -->'


def as_page(cell):
    "A cell as the README has it: no hidden source, no directives, no pictures, no warnings."
    if re.match(r'#\|\s*echo: false', cell.source):
        return nbformat.v4.new_markdown_cell('\n'.join(o.data.get('text/markdown', '') for o in cell.outputs))
    if cell.cell_type == 'code':
        cell.source = re.sub(r'^#\|.*\n', '', cell.source, flags=re.M)
        cell.outputs = [o for o in cell.outputs
                        if 'image/png' not in o.get('data', {}) and o.get('name') != 'stderr']
    return cell


def readme():
    "README.md as nbs/index.ipynb makes it."
    nb = nbformat.read(ROOT/'nbs'/'index.ipynb', as_version=4)
    nb.metadata['language_info'] = {'name': 'python'}  # for the colours of code blocks
    nb.cells = [as_page(cell) for cell in nb.cells if not re.match(r'#\|\s*hide', cell.source)]
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'\]\((?!https?:|#)([^)]+)\)', lambda m: f"]({posixpath.normpath('nbs/' + m[1])})", text)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


def module_row(path):
    "A notebook's row in the table of modules."
    number, _, _ = path.stem.partition('_')
    name, line = re.match(r'# (\w+)\n\n> (.+)', nbformat.read(path, as_version=4).cells[0].source).groups()
    return f'| {number} | [`{name}`](nbs/{path.name}) | {line} |'


def contributing():
    "CONTRIBUTING.md with the table of modules as the notebooks say it, and links with their present numbers."
    text = (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')
    notebooks = sorted(p for p in (ROOT/'nbs').glob('*.ipynb') if p.stem != 'index')
    now = {path.stem.partition('_')[2]: path.name for path in notebooks}
    text = re.sub(r'\(nbs/\d\d_(\w+)\.ipynb\)', lambda m: f'(nbs/{now.get(m[1], m[1])})', text)
    table = ['| number | module | what it is about |', '|---|---|---|', *map(module_row, notebooks)]
    before, _, rest = text.partition(START)
    return '\n'.join([before + START, *table, END]) + rest.partition(END)[2]


if __name__ == '__main__':
    (ROOT/'README.md').write_text(readme(), encoding='utf-8')
    (ROOT/'CONTRIBUTING.md').write_text(contributing(), encoding='utf-8')
