"""tools/run_notebooks.py tells outputs that are the present code's from others; badges are what is made."""
import base64
import io

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from make_badges import EXTRAS, with_badges
from matplotlib.figure import Figure
from PIL import Image
from run_notebooks import MADE_ON, changes, find_flaws, is_close, main, picture_change, same_text

NEW = nbformat.v4


def png(array):
    file = io.BytesIO()
    Image.fromarray(array.astype('uint8')).save(file, format='png')
    return base64.b64encode(file.getvalue()).decode()


def notebook(*cells):
    """A notebook of code cells, each a source and its stored outputs."""
    return NEW.new_notebook(
        metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}},
        cells=[NEW.new_code_cell(source, id=f'cell{i}', outputs=outputs)
               for i, (source, outputs) in enumerate(cells)])


def stdout(text): return NEW.new_output('stream', name='stdout', text=text)


def shown(**data):
    return NEW.new_output('display_data', data={k.replace('_', '/'): v for k, v in data.items()})


@pytest.mark.parametrize('old, new', [
    ('20 updates in 3.2 s', '20 updates in 14 s'),
    ('<Gate at 0x7f01aa>', '<Gate at 0x7f99bc>'),
    ("'/tmp/tmpab12cd_3/LAD/gates.safetensors'", "'/var/folders/x/tmpzz99zz_9/LAD/gates.safetensors'"),
    ('saved 2026-01-02 10:11:12', 'saved 2026-11-24T09:00:00Z'),
    (' 10%|#     | 1/10 [00:01<00:09]\r100%|######| 10/10 [00:10<00:00]\n',
     '100%|######| 10/10 [00:02<00:00]\n'),
    ('a  0.5012\nb -0.1', 'a   0.5013\nb  -0.1'),
    ('differs by 3e-06 at most', 'differs by 8e-06 at most'),
])
def test_text_is_equal_but_for_times_places_and_rounding(old, new): assert same_text(old, new)


@pytest.mark.parametrize('old, new', [
    ('gate 1', 'gate 2'), ('accuracy 0.884', 'accuracy 0.881'), ('1,000 rows', '1,001 rows'),
    ('one line', 'another line'),
    ('loss 0.5', 'loss -0.5'), ('a\n1', 'a\n1\n2'), ("'LAD/student.safetensors'", "'LAD/gates.safetensors'"),
])
def test_text_that_says_something_else_differs(old, new): assert not same_text(old, new)


def test_on_another_processor_words_are_compared_and_numbers_are_not():
    assert same_text('loss 0.51 in bf16', 'loss 0.73 in fp32', numbers=False)
    assert not same_text('loss 0.51', 'lost 0.51', numbers=False)
    assert not same_text('loss 0.51', 'loss 0.73')


def test_whole_numbers_are_compared_exactly():
    assert is_close('1000', '1000') and not is_close('1000000', '1000001')
    assert is_close('0.1234', '0.1235') and not is_close('0.1234', '0.1237')
    assert is_close('-2.5e-3', '−2.5e-3')


def test_pictures_are_compared_by_their_pixels():
    white = np.full((40, 60, 3), 255)
    faint, drawn = white.copy(), white.copy()
    faint[:20] -= 5
    drawn[:20] = 0
    assert picture_change(png(white), png(faint)) == ''
    assert picture_change(png(white), png(drawn)) == '1,200 of 2,400 pixels differ (50.00%)'
    assert picture_change(png(white), png(white[:30])) == '60 x 40 pixels, now 60 x 30'


def plotted(label, *, by=1.):
    """A curve over an axis of this name, in base64."""
    figure = Figure((6, 3), dpi=140)
    axes = figure.subplots()
    axes.plot(by*np.cumsum(np.random.default_rng(0).normal(size=200)))
    axes.set(xlabel=label, ylim=(-20, 20))
    file = io.BytesIO()
    figure.savefig(file, format='png')
    return base64.b64encode(file.getvalue()).decode()


def test_another_letter_of_an_axis_is_a_change_and_rounding_is_none():
    assert picture_change(plotted('update'), plotted('update', by=1.0001)) == ''
    for another in (plotted('updates'), plotted('updatc'), plotted('update', by=1.01)):
        assert 'pixels differ' in picture_change(plotted('update'), another)


def test_an_output_that_comes_or_goes_is_a_change():
    picture = shown(image_png=png(np.zeros((4, 4, 3))), text_plain='<Figure size 400x400 with 1 Axes>')
    assert changes([stdout('a\n')], [stdout('a\n')]) == changes([picture], [picture]) == []
    assert changes([], [picture]) == ['image/png: not stored']
    assert changes([stdout('a\n')], []) == ['stdout: not given any more']
    assert changes([stdout('a\nb\n')], [stdout('a\nc\n')]) == ['stdout:', '-b', '+c']


@pytest.mark.parametrize('source, outputs, said', [
    ("print('a')", [], 'prints, and has no output'),
    ("for x in 'ab': print(x)", [], 'prints, and has no output'),
    ('ax = plot_gate_shares(shares)', [], 'plots, and has no output'),
    ('table', [], 'shows a value, and has no output'),
    ('#| varies: times\nrace()', [], 'shows a value, and has no output'),
    ('1/0', [NEW.new_output('error', ename='ZeroDivisionError', evalue='division by zero')],
     'a stored error: ZeroDivisionError: division by zero'),
    ('where', [stdout('/home/anna/lad_nb/nbs')], "shows somebody's home folder"),
    ('%pip list', [stdout('Looking in indexes: https://example.org/simple')],
     'shows where packages come from'),
])
def test_flaws_show_without_running(source, outputs, said):
    assert [what for _, what in find_flaws(notebook((source, outputs)))] == [said]


@pytest.mark.parametrize('source', [
    "def f(): print('a')", "with redirect_stdout(io.StringIO()): print('a')",
    'ax = plot_x(y)\nplt.close(ax.figure)',
    'table;', "#| eval: false\nprint('a')", "if wrong: print('a')", 'x = 1'])
def test_cells_that_need_no_output(source): assert find_flaws(notebook((source, []))) == []


@pytest.fixture
def stale(tmp_path):
    """A notebook whose second cell gives 2, and stored 1."""
    path = tmp_path/'stale.ipynb'
    cells = [("import os; print(os.getcwd())", [stdout(f'{tmp_path}\n')]), ('print(1 + 1)', [stdout('1\n')]),
             ("#| varies: time\nimport time; print(time.time())", [stdout('0\n')]), ("#| slow\n1/0", [])]
    nbformat.write(notebook(*cells), path)
    return path


def test_a_stale_output_is_found_and_can_be_replaced(stale, capsys):
    assert main([str(stale)]) == 1
    told, made_on = capsys.readouterr().out, MADE_ON.read_text()
    assert 'cell cell1\n' in told and '-1\n' in told and '+2\n' in told
    assert main([str(stale), '--write']) == 0 == main([str(stale), '--workers', '1'])
    nb = nbformat.read(stale, as_version=4)
    assert [''.join(o.text for o in c.outputs) for c in nb.cells][1] == '2\n'
    assert all(cell.execution_count is None for cell in nb.cells)
    assert MADE_ON.read_text() == made_on  # that is about the project's own notebooks


def test_a_notebook_with_a_switch_runs_small_when_it_has_to_be_quick(tmp_path, capsys):
    path = tmp_path/'switch.ipynb'
    source = "import os\nTESTING = 'IN_TEST' in os.environ\nprint('small' if TESTING else 'full')"
    nbformat.write(notebook((source, [stdout('full\n')])), path)
    assert main([str(path)]) == main([str(path), '--quick']) == 0
    assert 'small form' in capsys.readouterr().out


def test_a_notebook_that_stops_says_where(tmp_path, capsys):
    path = tmp_path/'stops.ipynb'
    nbformat.write(notebook(('1/0', [])), path)
    assert main([str(path), '--write']) == 1
    assert 'ZeroDivisionError' in capsys.readouterr().out
    assert nbformat.read(path, as_version=4).cells[0].outputs == []


@pytest.mark.parametrize('path', sorted((ROOT/'nbs'/'tutorials').glob('*.ipynb')), ids=lambda p: p.stem)
def test_badges_are_what_their_tool_makes(path):
    nb = nbformat.read(path, as_version=4)
    what = f'{path.name}: run python tools/make_badges.py'
    assert [c.source for c in nb.cells] == [c.source for c in with_badges(nb, path)], what


def test_binder_installs_what_tutorials_need():
    """The model's line is the README's, versions are those of the README's commands, extras are all there."""
    asked = (ROOT/'binder'/'requirements.txt').read_text().split()
    assert asked[:2] == ['-c', '../constraints.txt'] and (ROOT/'constraints.txt').is_file()
    assert asked[2:] == ['-e', f".[{','.join(EXTRAS.values())}]"]
    line = (ROOT/'binder'/'postBuild').read_text().splitlines()[-1]
    assert line.startswith('pip install --no-deps ') and line in (ROOT/'README.md').read_text()
