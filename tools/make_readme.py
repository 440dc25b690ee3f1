"""Make README.md from nbs/index.ipynb, CONTRIBUTING.md's table of modules, and llms.txt, from the notebooks.

    python tools/make_readme.py

Hidden cells and directives are left out of the README, and links are as seen from the project's top.
A module's row is its number, its name and the line that its notebook opens with. llms.txt says so of all
pages of the site, for programs that read (llmstxt.org).
"""
import posixpath
import re
from pathlib import Path

import nbformat
from make_badges import settings
from make_site import notebooks, on_site, sections
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


def opening(path):
    "A notebook's title, and the line below it."
    source = nbformat.read(path, as_version=4).cells[0].source
    title, line = re.match(r'# (.+)\n\n> (.+(?:\n.+)*)', source).groups()
    return title, ' '.join(line.replace('\n>', ' ').split())


def module_row(path):
    "A notebook's row in the table of modules."
    number, _, _ = path.stem.partition('_')
    name, line = opening(path)
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


def llms():
    "llms.txt: what the project is, and a line for each page of its site."
    said, paths = settings(), notebooks()
    site, places = f"{said['doc_host']}{said['doc_baseurl']}/", on_site(paths)
    def row(path):
        title, line = opening(ROOT/path)
        return f"- [{title}]({site}{places[path].removesuffix('.ipynb')}.html): {line}"
    told = sections([path for path in paths if path != 'nbs/index.ipynb'])
    told['Modules'] = [path for path in paths if re.fullmatch(r'nbs/\d\d_\w+\.ipynb', path)]
    lines = [f"# {said['lib_name']}", '', f"> {said['description']}.", '',
             'A method is a value (a `Mapping`), a run is a `Recipe`, and a run folder holds a model that',
             f"transformers loads. To install it: `pip install {said['lib_name']}`; to train in minutes:",
             '`lad-nb quickstart`.']
    for section, found in told.items(): lines += ['', f'## {section}', '', *map(row, found)]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    (ROOT/'README.md').write_text(readme(), encoding='utf-8')
    (ROOT/'CONTRIBUTING.md').write_text(contributing(), encoding='utf-8')
    (ROOT/'llms.txt').write_text(llms(), encoding='utf-8')
