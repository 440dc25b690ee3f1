"""Make a site from the notebooks, the library's sources and the project's own pages: `_docs/index.html`.

    pip install -c constraints.txt sphinx myst-nb furo
    python tools/make_site.py                          # all pages
    python tools/make_site.py index 20_gates           # these notebooks, and their modules' pages

Notebooks are shown with the outputs that they store: nothing is run, and nothing of the library is imported.
A warning of Sphinx is an error. Then every link within the site is followed.
"""
import argparse
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from api_pages import PACKAGE, Module, api_page
from make_badges import settings
from nbformat.v4 import new_markdown_cell

ROOT = Path(__file__).parents[1]
GROUPS = ['the ground', 'data', 'the method', 'models', 'training', 'seeing', 'asking', 'using']
PROJECT = {'CONTRIBUTING.md': 'How it is made', 'CHANGELOG.md': 'What changed',
           'SECURITY.md': 'What is promised'}
# What stands where, and first; notebooks that are not named here come behind, in their folder's section.
FIRST = {
    'Tutorials': ['your_first_distillation', 'step_through_training', 'inside_one_update',
                  'methods_side_by_side'],
    'How to': ['your_own_method', 'your_own_gate', 'your_own_data', 'your_own_encoder', 'from_student_to_use',
               'on_a_cluster', 'run_book', 'faster', 'what_holds'],
    'Results': ['results', 'section_5_in_one_table', 'do_gates_help', 'do_gates_help_on_pairs',
                'do_the_gates_learn', 'how_sure_can_we_be', 'speed']}
FOLDERS = {'tutorials': 'Tutorials', 'guides': 'How to', 'analyses': 'Results', 'benchmarks': 'Results'}


def repository():
    "The address of the project's files on the web."
    said = settings()
    return f"{said['git_url']}/blob/{said['branch']}"


# What is on the site

def notebooks(only=()):
    "The notebooks' places in the project; `only`: names without folder and .ipynb."
    found = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    if lost := set(only) - {p.stem for p in found}:
        raise SystemExit(f"There is no notebook {', '.join(sorted(lost))} in nbs/. Names are as in 20_gates.")
    return [p.relative_to(ROOT).as_posix() for p in found if not only or p.stem in only]


def on_site(paths):
    "{a file of the project: its place on the site}"
    pages = {path: path.removeprefix('nbs/') for path in paths} | {'README.md': 'index.ipynb'}
    return pages | {name: f'project/{name.lower()}' for name in PROJECT}


def sections(paths):
    "{section: notebooks in the order of the sidebar}, modules left out."
    found = {section: [] for section in FIRST}
    for path in paths:
        folder, stem = Path(path).parent.name, Path(path).stem
        section = next((s for s, names in FIRST.items() if stem in names), FOLDERS.get(folder))
        if section: found[section].append(path)
    def place(section, path):
        names, stem = FIRST[section], Path(path).stem
        return (names.index(stem) if stem in names else len(names), path)
    return {section: sorted(of, key=lambda path: place(section, path)) for section, of in found.items()}


def modules(paths):
    "{module: its notebook}"
    numbered = {path: re.fullmatch(r'nbs/\d\d_(\w+)\.ipynb', path) for path in paths}
    return {'__main__' if m[1] == 'main' else m[1]: path for path, m in numbered.items() if m}


def telling_names(named):
    "{public name: module}; not those of two modules, and no plain words, which may mean something else."
    found = [(name, module) for module in named for name in Module(PACKAGE/f'{module}.py').public]
    names = [name for name, _ in found]
    return {name: module for name, module in found if names.count(name) == 1 and re.search('[A-Z_]', name)}


# Pages as Sphinx reads them

class Pages:
    "Where pages are put, and how links lead from one to another."

    def __init__(self, folder, paths):
        self.folder, self.paths, self.places, self.web = folder, paths, on_site(paths), repository()
        self.module_of = telling_names(modules(paths))

    def link(self, target, source):
        "A link of the file `source` as the site has it: to a page, or to the file in the repository."
        file, hash_, anchor = target.partition('#')
        if not file: return f'#{anchor.lower()}'
        if re.match(r'[a-z]+:', target): return target
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), file))
        if path in self.places:
            here = posixpath.dirname(self.places[source]) or '.'
            return posixpath.relpath(self.places[path], here) + hash_ + anchor.lower()
        return f'{self.web}/{path}{hash_}{anchor}'

    def markdown(self, text, source):
        "Markdown with its links as the site has them, and links from names; pictures come along."
        def moved(m):
            if m[1] and not re.match(r'[a-z]+:', m[3]):
                self.picture(posixpath.join(posixpath.dirname(source), m[3]), source, m[3])
                return m[0]
            return f'{m[1]}[{m[2]}]({self.link(m[3], source)})'
        text = self.named(text)
        text = re.sub(r'(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)', moved, text)
        for name in re.findall(r'<(?:img|source|video)[^>]* (?:src|srcset)="(?!https?:)([^"]+)"', text):
            self.picture(posixpath.join(posixpath.dirname(source), name), source, name)
        return text

    def named(self, text):
        "Markdown with links from `names` in backticks to what the API says of them; headings and links stay."
        def linked(m):
            name = m[2] and m[2].partition('.')[0]
            if name not in self.module_of: return m[0]
            return f'{{py:obj}}`{m[2]} <lad_nb.{self.module_of[name]}.{m[2]}>`'
        kept = r'```[\s\S]*?```|\[[^\]]*\]\([^)]*\)|^#[^\n]*$'
        return re.sub(rf'({kept})|(?<![`}}])`([A-Za-z]\w*(?:\.\w+)?)`(?!`)', linked, text, flags=re.M)

    def picture(self, path, source, name):
        "Copy a picture to where the page `source` looks for it."
        to = self.folder/posixpath.dirname(self.places[source])/name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/path, to)

    def write(self, place, text):
        file = self.folder/place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding='utf-8')


def outputs_to_show(cell):
    "A cell's outputs without what needs a kernel: widgets, and the progress bars that they draw."
    shown = []
    for output in cell.get('outputs', []):
        data = output.get('data', {})
        widget = data.pop('application/vnd.jupyter.widget-view+json', None)
        if not widget or set(data) - {'text/plain'}: shown.append(output)
    return shown


def cells_to_show(cell, pages, source):
    "A cell as the site has it, or none: what is hidden is left out, and so are nbdev's directives."
    if re.match(r'#\|\s*(hide|default_exp)', cell.source): return []
    if cell.cell_type == 'markdown':
        cell.source = pages.markdown(cell.source, source)
        return [cell]
    cell.outputs = outputs_to_show(cell)
    silent = re.match(r'#\|\s*echo:\s*false', cell.source)
    texts = [o.data['text/markdown'] for o in cell.outputs if 'text/markdown' in o.get('data', {})]
    if silent and texts: return [new_markdown_cell(pages.markdown('\n\n'.join(texts), source))]
    if silent: cell.metadata['tags'] = ['remove-input']
    cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip('\n')
    return [new_markdown_cell(f'(cell-{cell.id})='), cell] if cell.source else []


def notebook_page(source, pages, module=None):
    "A notebook of the project as a page: where it comes from, and its cells."
    nb = nbformat.read(ROOT/source, as_version=4)
    language = dict(name='python', pygments_lexer='ipython3')
    nb.metadata = nbformat.from_dict(dict(language_info=language,
                                          kernelspec=dict(name='python3', display_name='Python 3')))
    nb.cells = [shown for cell in nb.cells for shown in cells_to_show(cell, pages, source)]
    about = f'[The notebook]({pages.web}/{source})'
    if module: about = f'[Names and signatures](api/{module}.md) · {about}'
    if source != 'nbs/index.ipynb': nb.cells[0].source += f'\n\n{about}'
    nb.nbformat_minor = 5
    pages.write(pages.places[source], nbformat.writes(nb))


def toctree(places, caption=None, hidden=False, titles=None):
    "Sphinx's list of pages."
    options = [f':caption: {caption}'] * bool(caption) + [':hidden:'] * hidden + [':maxdepth: 1']
    names = [f'{titles[p]} <{p}>' if titles and p in titles else p for p in places]
    return '\n'.join(['```{toctree}', *options, '', *names, '```', ''])


def by_group(named):
    "[(heading, notebooks)]: modules by their tens."
    for ten, group in enumerate(GROUPS):
        if of := {m: path for m, path in named.items() if Path(path).name[0] == str(ten)}:
            yield f'{ten}x: {group}', of


def list_pages(pages, named):
    "The two lists of modules, as notebooks and as names and signatures."
    told = ['# Modules, told', '', 'Each module is a notebook that gives its reasons and shows what it does. '
            'Modules import lower numbers only.', '']
    api = ['# API', '', 'Every public name of every module: signature, shapes, what it gives back. '
           'The letters of shapes are [in the glossary](glossary.md), '
           '{ref}`all names from A to Z <genindex>` in one list.', '']
    for heading, of in by_group(named):
        lines = {m: Module(PACKAGE/f'{m}.py').about for m in of}
        told += [f'## {heading}', '', *(f'- [{m}]({pages.places[of[m]]}): {lines[m]}' for m in of), '']
        api += [f'## {heading}', '', *(f'- [`{m}`](api/{m}.md): {lines[m]}' for m in of), '']
    told.append(toctree([pages.places[path] for path in named.values()], hidden=True))
    api.append(toctree([f'api/{m}.md' for m in named], hidden=True))
    pages.write('modules.md', '\n'.join(told))
    pages.write('api.md', '\n'.join(api))


def rows_of(text):
    "[(word, meaning)] of a Markdown table with these two columns."
    table = text.partition('| word | meaning |\n|---|---|\n')[2].partition('\n\n')[0]
    return [[part.strip() for part in line.strip('| ').split(' | ', 1)] for line in table.splitlines()]


def glossary_page(pages):
    "The site's words and CONTRIBUTING.md's, in one list."
    own = (ROOT/'docs'/'glossary.md').read_text(encoding='utf-8')
    rows = rows_of(own) + rows_of((ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8'))
    as_rst = {word: re.sub('`([^`]+)`', r'``\1``', meaning) for word, meaning in rows}
    lines = [line for word, meaning in as_rst.items() for line in (word, f'  {meaning}', '')]
    head = own.partition('| word')[0]
    pages.write('glossary.md', '\n'.join([head, '```{eval-rst}', '.. glossary::', '',
                                          *(f'   {line}'.rstrip() for line in lines), '```', '']))


def project_pages(pages):
    "CONTRIBUTING.md and its like."
    for name in PROJECT:
        text = re.sub(r'<!--.*?-->\n?', '', (ROOT/name).read_text(encoding='utf-8'), flags=re.S)
        pages.write(pages.places[name], pages.markdown(text, name))


def index_page(pages):
    "The README's notebook, and behind it the sidebar."
    notebook_page('nbs/index.ipynb', pages)
    file = pages.folder/'index.ipynb'
    nb = nbformat.read(file, as_version=4)
    trees = [toctree([pages.places[p] for p in of], section, hidden=True)
             for section, of in sections(pages.paths).items() if of]
    trees.append(toctree(['api.md', 'modules.md', 'glossary.md'], 'Reference', hidden=True))
    places = {pages.places[name]: title for name, title in PROJECT.items()}
    trees.append(toctree(places, 'The project', hidden=True, titles=places))
    nb.cells.append(new_markdown_cell('\n'.join(trees)))
    nbformat.write(nb, file)


def stage(folder, only=()):
    "Write what Sphinx reads; the number of pages."
    paths = notebooks({*only, 'index'} if only else ())
    pages, named = Pages(folder, paths), modules(paths)
    of_notebook = {path: module for module, path in named.items()}
    for path in paths:
        if path != 'nbs/index.ipynb': notebook_page(path, pages, of_notebook.get(path))
    for module, path in named.items():
        pages.write(f'api/{module}.md', api_page(PACKAGE/f'{module}.py', pages.places[path]))
    list_pages(pages, named)
    glossary_page(pages)
    project_pages(pages)
    index_page(pages)
    return sum(1 for p in folder.rglob('*') if p.suffix in ('.md', '.ipynb'))


# What came of it

class Links(HTMLParser):
    "The links and anchors of a page."

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        self.links += [attrs[k] for k in ('href', 'src', 'srcset') if attrs.get(k)]


def follow_links(folder):
    "(how many links lead to a page, picture or anchor of the site, [those that lead nowhere])"
    pages = {p: Links(p.read_text(encoding='utf-8')) for p in sorted(folder.rglob('*.html'))}
    followed, lost = 0, []
    for page, found in pages.items():
        for link in found.links:
            to = urlsplit(link)
            if to.scheme or to.netloc: continue
            file = Path(os.path.normpath(page.parent/unquote(to.path))) if to.path else page
            if file.is_dir(): file = file/'index.html'
            there = file.is_file() and folder in file.parents
            anchored = not to.fragment or file not in pages or unquote(to.fragment) in pages[file].anchors
            followed += 1
            if not (there and anchored): lost.append(f'{page.relative_to(folder)}: {link}')
    return followed, lost


def build(out, only=()):
    "Make the site in `out`; (pages, Sphinx's warnings)."
    with tempfile.TemporaryDirectory() as space:
        folder = Path(space).resolve()/'pages'
        pages, made = stage(folder, only), Path(space)/'site'  # Sphinx leaves a folder of its own beside it
        command = [sys.executable, '-m', 'sphinx', '-b', 'html', '-q', '-W', '--keep-going', '-j', '2',
                   '-c', ROOT/'docs', '-d', Path(space)/'doctrees', folder, made]
        done = subprocess.run([*map(str, command)], stderr=subprocess.PIPE, text=True)
        warnings = [line.replace(f'{folder}/', '') for line in done.stderr.splitlines() if line.strip()]
        if done.returncode and not warnings: warnings = [f'sphinx ended with {done.returncode}']
        if out.exists(): shutil.rmtree(out)
        if made.exists(): shutil.move(made, out)
    return pages, warnings


def check_place(out):
    "`ValueError` for a folder that holds something else than an earlier site, which would be lost"
    if out.exists() and any(out.iterdir()) and not (out/'.buildinfo').exists():
        raise ValueError(f'{out} holds something that is no site, and would be replaced: name another --out.')


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('only', nargs='*', help='names of notebooks; by default all')
    parser.add_argument('--out', type=Path, default=ROOT/'_docs', help='where the site goes (_docs)')
    asked = parser.parse_args()
    begin, out = time.perf_counter(), asked.out.resolve()
    check_place(out)
    pages, warnings = build(out, asked.only)
    followed, lost = follow_links(out) if (out/'index.html').exists() else (0, [])  # Sphinx gave up before
    print(*warnings, *(f'dead link in {link}' for link in lost), sep='\n')
    print(f'{pages} pages, {len(warnings)} lines of warnings, {followed} links followed, {len(lost)} of them '
          f'dead, {time.perf_counter() - begin:.0f} s: {out}/index.html')
    return bool(warnings or lost)


if __name__ == '__main__':
    sys.exit(main())
