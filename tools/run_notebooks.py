"""Run notebooks, and say where their committed outputs are not what the code gives now.

    python tools/run_notebooks.py                       # all of them, as a reader runs them
    python tools/run_notebooks.py nbs/20_gates.ipynb    # or those you name, or all of a folder
    python tools/run_notebooks.py --quick               # as CI does
    python tools/run_notebooks.py --write               # store the new outputs where something differs

Each notebook runs in a fresh kernel with its own folder as working directory (with --quick, one that has
imported the libraries already; see tools/warm_kernels.py). Text is compared after
durations, addresses, temporary paths, dates and progress bars are taken out; decimals may differ by rounding.
Pictures are compared pixel by pixel. A training's last digits depend on the processor: --quick compares words
alone where it is not the one that tools/outputs_made_on.json names, which --write keeps. A cell that
gives something else each time (a table of latencies) says so and why, with `#| varies: the times are this
machine's`; it has to have an output, but any will do.

A notebook whose code asks for IN_TEST runs smaller in tests. With --quick it does so here, and its outputs
are only looked at (see `find_flaws`), since the small form gives others. All others are compared, with
--quick or without. The exit code is 1 if a notebook stops with an error, has a flaw, or differs.
"""
import argparse
import ast
import base64
import difflib
import io
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image
from warm_kernels import WarmKernel

ROOT = Path(__file__).parents[1]
MADE_ON = ROOT/'tools'/'outputs_made_on.json'  # {notebook: the processor that its stored outputs are from}
FEW = 3  # so many notebooks are done before the libraries have been imported for all

# ---------------------------------------------------------------- what a cell is

def has(cell, directive):
    "Has a code cell this `#|` directive?"
    return re.search(rf'^#\|\s*{directive}', cell.source, re.M) is not None


def is_run(cell):
    "Is this a code cell that runs? nbdev's tests skip the same ones."
    return cell.cell_type == 'code' and not has(cell, r'eval:\s*false') and not has(cell, r'slow\b')


def has_switch(nb):
    "Does the notebook run smaller in tests?"
    return any(cell.cell_type == 'code' and 'IN_TEST' in cell.source for cell in nb.cells)


# ---------------------------------------------------------------- text

VARIES = [  # what differs from run to run, and what stands for it
    (r'\x1b\[[0-9;]*m', ''),
    (r'^.*\d+%\|.*$', '<progress>'),
    (r'\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?)?(?:Z|[+-]\d\d:?\d\d)?', '<date>'),
    (r'\b\d{1,2}:\d\d(?::\d\d)?\b', '<time>'),
    (r'\b\d[\d,]*(?:\.\d+)?\s?(?:ns|µs|us|ms|s|seconds?|min|minutes?|h|hours?)\b', '<time>'),
    (r'\b0x[0-9a-f]+\b', '<address>'),
    (r'\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b', '<id>'),
    (r'\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*\d)[0-9a-f]{12,64}\b', '<hash>'),  # of weights, say
    (r'(?:/[\w.-]+)*/tmp[a-z0-9_]{8}(?![a-z0-9_])', '<tmp>'),
    (r'ipykernel_\d+/\d+', 'ipykernel'),
    (r'\bT_[0-9a-f]{5}', 'T_'),  # pandas' styled tables
]
NUMBER = re.compile(r'(?<![\w.])[-+−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?(?!\w)')


def normal(text):
    "Text without what differs from run to run; of an overwritten line, what was written last."
    text = re.sub(r'^.*\r(?!\n)', '', text, flags=re.M)
    for pattern, word in VARIES:
        text = re.sub(pattern, word, text, flags=re.M)
    return text


def is_close(a, b):
    "Are two numbers equal? Whole numbers exactly, decimals within a unit of the last place, or 1e-4."
    if a == b or not all(re.search(r'[.e]', x) for x in (a, b)):
        return a == b
    x, y = (float(n.replace(',', '').replace('−', '-')) for n in (a, b))
    mantissa, _, exponent = a.partition('e')
    unit = 10.**(int(exponent or 0) - len(mantissa.partition('.')[2]))
    return abs(x - y) <= max(1.01*unit, 1e-4*abs(x), 1e-5)


def same_text(old, new, numbers=True):
    "Are two texts equal, but for what differs from run to run, rounding and the width of blanks and rules?"
    old, new = normal(old), normal(new)
    if not numbers:  # on another processor, which may have no bf16 units
        old, new = (re.sub(r'\b(?:bf16|fp32)\b', '<precision>', text) for text in (old, new))
    frames = [re.sub(r'[\s-]+', ' ', NUMBER.sub('#', text)).strip() for text in (old, new)]
    found = [NUMBER.findall(text) for text in (old, new)]
    close = all(is_close(a, b) for a, b in zip(*found)) if numbers else True
    return frames[0] == frames[1] and close


def text_changes(old, new, most=12):
    "The lines that differ, as in a diff; no more than `most` of them."
    lines = difflib.unified_diff(normal(old).splitlines(), normal(new).splitlines(), lineterm='', n=0)
    lines = [line for line in lines if not line.startswith(('---', '+++', '@@'))]
    return [line[:160] for line in lines[:most]] + [f'({len(lines) - most} more lines)']*(len(lines) > most)


# ---------------------------------------------------------------- pictures

def pixels(png):
    "A PNG in base64 as an array (height, width, 3), on white."
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGBA')
    white = Image.new('RGBA', picture.size, 'white')
    return np.asarray(Image.alpha_composite(white, picture).convert('RGB')).astype(int)


def picture_change(
    old, new,  # PNG in base64
    apart=24,  # a pixel differs where a colour is further apart than this, of 255
    few=8,     # so many pixels may differ: another letter of a label moves dozens, rounding none
):
    "What differs between two pictures, in words; '' for nothing."
    if old == new:
        return ''
    a, b = pixels(old), pixels(new)
    if a.shape != b.shape:
        return f'{a.shape[1]} x {a.shape[0]} pixels, now {b.shape[1]} x {b.shape[0]}'
    differ = (abs(a - b).max(-1) > apart).sum()
    total = a.shape[0]*a.shape[1]
    return f'{differ:,} of {total:,} pixels differ ({differ/total:.2%})' if differ > few else ''


# ---------------------------------------------------------------- outputs of a cell

def plain(outputs):
    "Outputs as {kind: text}. Parts of a stream are joined; of what is displayed, the richest form is taken."
    found, counts = {}, {}
    for out in outputs:
        if out.output_type == 'stream':
            found[out.name] = found.get(out.name, '') + out.text
        elif out.output_type == 'error':
            found['error'] = f'{out.ename}: {out.evalue}'
        else:
            kind = richest(out.data)
            counts[kind] = counts.get(kind, 0) + 1
            found[kind if counts[kind] == 1 else f'{kind} {counts[kind]}'] = str(out.data.get(kind, ''))
    return found


def richest(data):
    "The form that a reader sees without a kernel: so no widget."
    kinds = ('image/png', 'image/svg+xml', 'text/html', 'text/markdown', 'text/plain')
    return next((kind for kind in kinds if kind in data), 'widget')


def changes(old, new, numbers=True):
    "What differs between the stored and the new outputs of a cell, as lines to read."
    old, new, found = plain(old), plain(new), []
    for kind in dict.fromkeys([*old, *new]):
        if kind not in new or kind not in old:
            found.append(f"{kind}: {'not given any more' if kind in old else 'not stored'}")
        elif kind.startswith('image/png'):
            said = picture_change(old[kind], new[kind]) if numbers else ''
            found += [f'{kind}: {said}'] if said else []
        elif not same_text(old[kind], new[kind], numbers):
            found += [f'{kind}:', *text_changes(old[kind], new[kind])]
    return found


# ---------------------------------------------------------------- flaws that show without running

FORBIDDEN = [
    (r'(?:/home|/root|/Users)(?:/\w|\b)|[A-Z]:\\\\?Users', "somebody's home folder"),
    (r'Looking in (?:indexes|links)|--(?:extra-)?index-url|\bpip\.conf\b', 'where packages come from'),
]


def calls(source):
    "The names of what a cell calls when it runs: not inside functions, branches or `with` blocks."
    try:
        waiting = list(ast.parse(source).body)
    except SyntaxError:  # a magic
        return
    while waiting:
        statement = waiting.pop()
        if isinstance(statement, ast.For):
            waiting += statement.body
        value = getattr(statement, 'value', None)
        if isinstance(statement, (ast.Expr, ast.Assign)) and isinstance(value, ast.Call):
            yield getattr(value.func, 'id', getattr(value.func, 'attr', ''))


def ends_in_value(source):
    "Does a cell end in a name, an attribute or an item that Jupyter shows?"
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return False
    shown = (ast.Name, ast.Attribute, ast.Subscript, ast.Dict, ast.List, ast.Tuple, ast.ListComp)
    if not body or not isinstance(body[-1], ast.Expr):
        return False
    return isinstance(body[-1].value, shown) and not source.rstrip().endswith(';')


def find_flaws(nb):
    "What is wrong with stored outputs, as far as shows without running: [(cell id, what)]."
    found = []
    for cell in filter(is_run, nb.cells):
        kinds, text = plain(cell.outputs), '\n'.join(plain(cell.outputs).values())
        called = set() if 'close(' in cell.source else set(calls(cell.source))
        if 'error' in kinds:
            found.append((cell.id, f"a stored error: {kinds['error']}"))
        if 'print' in called and 'stdout' not in kinds:
            found.append((cell.id, 'prints, and has no output'))
        plots = any(re.match('(plot|draw)_|(plot|draw|display|show)$', name) for name in called)
        if plots and not kinds and not has(cell, 'hide'):
            found.append((cell.id, 'plots, and has no output'))
        if (ends_in_value(cell.source) or has(cell, 'varies')) and not kinds:
            found.append((cell.id, 'shows a value, and has no output'))
        found += [(cell.id, f'shows {what}') for pattern, what in FORBIDDEN if re.search(pattern, text)]
    return found


# ---------------------------------------------------------------- a notebook

@dataclass
class Result:
    "What came of one notebook."
    path: Path
    mode: str = 'compared'
    seconds: float = 0.
    lines: list = field(default_factory=list)  # what is wrong: lines to read
    failed: bool = False                       # it stopped with an error
    written: bool = False

    def __str__(self):
        said = 'stopped with an error' if self.failed else 'differs' if self.lines else 'fine'
        said += ', new outputs stored' if self.written else ''
        head = f'{os.path.relpath(self.path)}: {said} ({self.mode}, {self.seconds:.0f} s)'
        return '\n'.join([head, *('    ' + line for line in self.lines)])


def run(nb, folder, testing, kernels=None):
    "Run a notebook in a fresh kernel, of these kernels if given; give back a copy with the new outputs."
    new = nbformat.from_dict(nb)
    new.cells = [cell for cell in new.cells if is_run(cell)]
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | ({'IN_TEST': '1'} if testing else {})
    kind = dict(kernel_manager_class=kernels) if kernels else {}
    client = NotebookClient(new, timeout=None, store_widget_state=False, record_timing=False, **kind,
                            resources={'metadata': {'path': str(folder)}},
                            extra_arguments=['--IPKernelApp.log_level=40',
                                             '--InlineBackend.figure_formats=retina'])  # sharp pictures
    client.execute(env=env)
    return new


def processor():
    "What the last digits of a training depend on: the processor, and the instructions that torch uses of it"
    from torch.backends.cpu import get_cpu_capability

    from lad_nb.results import processor_name
    return f'{processor_name().partition(",")[0]}, {get_cpu_capability()}'


def compare(nb, new, numbers=True):
    "Where the stored outputs of a notebook differ from the new ones, as lines to read."
    stored, lines = {cell.id: cell for cell in nb.cells}, []
    for cell in new.cells:
        found = [] if has(cell, 'varies') else changes(stored[cell.id].outputs, cell.outputs, numbers)
        lines += [f'cell {cell.id}', *('  ' + line for line in found)] if found else []
    return lines


def store(nb, new, path):
    "Write the new outputs into the notebook, and give it nbdev's clean form."
    given = {cell.id: cell for cell in new.cells}
    for cell in nb.cells:
        if cell.id in given:
            cell.outputs = given[cell.id].outputs
    nbformat.write(nb, path)
    subprocess.run(['nbdev_clean', '--fname', str(path)], check=True)


def check(path, quick=False, write=False, numbers=True, kernels=None):
    "Look at one notebook, run it, compare its outputs, and store the new ones if asked to."
    nb, start = nbformat.read(path, as_version=4), time.monotonic()
    testing = quick and has_switch(nb)
    result = Result(path, 'small form, outputs only looked at' if testing else 'compared')
    try:
        new = run(nb, path.parent, testing, kernels)
    except (CellExecutionError, RuntimeError) as error:  # a kernel that died is a RuntimeError
        result.failed = True
        result.lines = normal(str(error)).splitlines()[-25:]
        return result
    finally:
        result.seconds = time.monotonic() - start
    result.lines = [] if testing else compare(nb, new, numbers)
    if write and not testing and (result.lines or find_flaws(nb)):
        store(nb, new, path)
        result.written = True
    result.lines += [f'cell {i}: {what}' for i, what in find_flaws(nb)]
    return result


def name(path):
    "A notebook's name in `MADE_ON`"
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def find_notebooks(names):
    """The notebooks of files and folders: stories first, then modules from the last to the first.

    The first modules are short: so no worker is left with a long notebook at the end.
    """
    paths = [Path(name).resolve() for name in names]
    found = [p for path in paths for p in (sorted(path.rglob('*.ipynb')) if path.is_dir() else [path])]
    found = [path for path in found if '.ipynb_checkpoints' not in path.parts]
    stories = [path for path in found if not path.name[0].isdigit() or path.parent.name == 'analyses']
    return stories + sorted((path for path in found if path not in stories), reverse=True)


def main(args=None):
    "The command line; gives back the exit code."
    about, _, more = __doc__.partition('\n\n')
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('notebooks', nargs='*', default=[ROOT/'nbs'], help='files and folders (default: nbs)')
    parser.add_argument('--workers', type=int, default=(os.cpu_count() or 1) + 1,
                        help='how many run at the same time (default: one more than there are cores)')
    parser.add_argument('--quick', action='store_true', help='as in CI: test switches are on')
    parser.add_argument('--write', action='store_true', help='store new outputs where they differ')
    args = parser.parse_args(args)
    if args.quick and args.write:
        parser.error('--write needs the full outputs, and --quick does not compute all of them')

    paths, here, made_on = find_notebooks(args.notebooks), processor(), json.loads(MADE_ON.read_text())
    alike = {path: not args.quick or made_on.get(name(path), here) == here for path in paths}
    if elsewhere := len(paths) - sum(alike.values()):
        print(f'Outputs of {elsewhere} notebooks were stored on another processor than this ({here}): '
              'of those words are compared, numbers and pictures are not.')
    kernels = WarmKernel if args.quick and len(paths) > FEW else None
    with ThreadPoolExecutor(args.workers) as pool:  # the work is in the kernels
        waiting = [pool.submit(check, path, args.quick, args.write, alike[path], kernels) for path in paths]
        results = [told(future.result()) for future in as_completed(waiting)]
    if written := {name(r.path): here for r in results if r.written and r.path.is_relative_to(ROOT)}:
        made_on = json.loads(MADE_ON.read_text()) | written  # others may have written since
        MADE_ON.write_text(json.dumps(made_on, indent=1, sort_keys=True) + '\n')
    wrong = [result for result in results if result.lines and (result.failed or not result.written)]
    print(f'{len(results) - len(wrong)} of {len(results)} notebooks are as they should be')
    return 1 if wrong else 0


def told(result):
    "Print a result as soon as it is there."
    print(result, flush=True)
    return result


if __name__ == '__main__':
    sys.exit(main())
