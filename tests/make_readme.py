"""Makes README.md from nbs/index.ipynb: hidden cells and directives left out, links as seen from the project's top."""
import posixpath
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]


def readme():
    nb = nbformat.read(ROOT/'nbs'/'index.ipynb', as_version=4)
    nb.metadata['language_info'] = {'name': 'python'}   # for the colours of code blocks
    nb.cells = [c for c in nb.cells if not re.match(r'#\|\s*hide', c.source)]
    nb.cells = [nbformat.v4.new_markdown_cell('\n'.join(o.data.get('text/markdown', '') for o in c.outputs)) if re.match(r'#\|\s*echo: false', c.source) else c for c in nb.cells]
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs = [o for o in cell.outputs if 'image/png' not in o.get('data', {}) and o.get('name') != 'stderr']
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'\]\((?!https?:|#)([^)]+)\)', lambda m: f"]({posixpath.normpath('nbs/' + m[1])})", text)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


if __name__ == '__main__': (ROOT/'README.md').write_text(readme())
