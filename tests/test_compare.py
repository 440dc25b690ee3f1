"""Runs side by side, and figures for papers."""
import re

import matplotlib.pyplot as plt
import pytest

from lad_nb.compare import compare, curves_of
from lad_nb.durable import append_line
from lad_nb.experiment import run
from lad_nb.runs import read_log
from lad_nb.style import COLUMN, save


@pytest.fixture(scope='module')
def two(quick, tmp_path_factory):
    """Two students of one teacher; the second was scored as it went."""
    root = tmp_path_factory.mktemp('compared')
    other = quick.replace(experiment='other', lr=1e-3, seed=1)
    folders = [run(r, root, progress=False) for r in (quick, other)]
    for step in (2, 4, 6):
        append_line(folders[1]/'log.jsonl', dict(step=step, eval_loss=.7, eval_accuracy=step/10))
    return folders


def test_what_differs_and_where_curves_end(two):
    found = compare(two)
    assert list(found.table.columns[:2]) == ['lr', 'seed']
    assert list(found.table.index) == [f.name for f in two]
    assert list(found.table.updates) == [6, 6]
    losses = [[line['loss'] for line in read_log(f) if 'loss' in line] for f in two]
    assert list(found.table.loss) == [values[-1] for values in losses]
    assert found.table['dev accuracy'].isna().tolist() == [True, False]
    assert curves_of(two[1]).query("what == 'dev accuracy'").value.tolist() == [.2, .4, .6]


def test_every_curve_is_drawn(two):
    """A panel for each, a line for each run that has it, through the very numbers of the log."""
    before, found = plt.get_fignums(), compare(two)
    panels = {ax.get_title(): ax for ax in found.figure.axes}
    assert list(panels) == ['loss', 'hard loss', 'dev loss', 'dev accuracy']
    drawn = [list(line.get_ydata()) for line in panels['loss'].lines]
    assert drawn == [[line['loss'] for line in read_log(f) if 'loss' in line] for f in two]
    html = found._repr_html_()
    assert '<table' in html and 'data:image/png;base64,' in html and plt.get_fignums() == before


def test_a_figure_for_a_paper(two, tmp_path):
    """TrueType fonts alone, a column wide."""
    figure = compare(two).figure
    raw = save(figure, tmp_path/'fig.pdf', width='column').read_bytes()
    assert b'/FontFile2' in raw and b'/Type3' not in raw
    assert float(re.search(rb'/MediaBox \[ 0 0 ([\d.]+)', raw)[1]) == pytest.approx(72*COLUMN)


@pytest.mark.slow  # of a smaller figure: nbs/52_style.ipynb
def test_a_figure_is_the_same_bytes_twice(two, tmp_path):
    figure = compare(two).figure
    first, second = (save(figure, tmp_path/name, width='column').read_bytes() for name in ('a.pdf', 'b.pdf'))
    assert first == second
