"""What somebody sent is opened, scored and read; nothing outside is written, nothing of one's own is lost."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest

from transformers import TrainerCallback

from lad_nb import cli
from lad_nb.cache import teacher_cache
from lad_nb.data import encode, load_task
from lad_nb.durable import append_line, check_links, write_text
from lad_nb.encoders import load_classifier, random_bert
from lad_nb.evaluation import costs, evaluate, score_checkpoints
from lad_nb.experiment import open_run, run
from lad_nb.models import load_tokenizer
from lad_nb.recipes import Recipe
from lad_nb.results import append_result, read_results
from lad_nb.runs import find_checkpoint
from lad_nb.similarity import teacher_agreement
from lad_nb.study import Study, run_study
from lad_nb.tasks import open_task, tasks, write_task

pytestmark = pytest.mark.faults
LABELS = ['bad', 'neither', 'good']


def frames(rows=24):
    texts, labels = [f'alice walked {i}' for i in range(rows)], [LABELS[i % 3] for i in range(rows)]
    table = pd.DataFrame(dict(text=texts, mood=labels))
    return dict(train=table, dev=table[:9], test=table[['text']][:6])


@pytest.fixture
def mood(tmp_path):
    """A folder of one's own task; the task is known while the test runs."""
    write_task('mood', tmp_path / 'data', LABELS, ['text'], 'mood', **frames())
    yield tmp_path / 'data'
    tasks.pop('mood', None)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A classifier of that task, fine-tuned for two updates; it was told to leave malformed lines out."""
    root = tmp_path_factory.mktemp('gifts')
    write_task('mood', root / 'data', LABELS, ['text'], 'mood', **frames())
    recipe = Recipe(
        't',
        task='mood',
        method='fine_tune',
        ptrain_ver=str(random_bert(root / 'encoder', num_attention_heads=12)),
        data_dir=str(root / 'data'),
        bad_rows='skip',
        max_seq_len=16,
        batch_size=8,
        total_step=2,
        warmup_step=1,
        ckpt_step=1,
        soft_weight=0.0,
        hard_weight=1.0,
        mu=0.0,
        device_id=-1,
    )
    run(recipe, root, progress=False)
    tasks.pop('mood')
    return root


@pytest.fixture
def done(finished, mood):
    """A copy of that run, beside a folder of its task: the run, and what stands outside and is to stay."""
    root = mood.parent
    shutil.copytree(finished / 't_bert_mood', root / 't_bert_mood')
    path = root / 't_bert_mood' / 'recipe.json'
    path.write_text(path.read_text().replace(str(finished / 'data'), str(mood)))
    outside = root / 'outside'
    outside.mkdir()
    (outside / 'train.tsv').write_text('mine')
    return root / 't_bert_mood', outside


def command(name, root, *flags):
    """What `lad-nb NAME` answers about that run: its exit status."""
    about = ['--experiment', 't', '--task', 'mood', '--root', str(root), '--device_id', '-1']
    return cli.main([name, *about, *flags])


def files_of(folder):
    return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}


HARM = {
    'folder': lambda o: dict(folder=str(o / 'train')),
    'folder up': lambda o: dict(folder='../../../outside/train'),
    'name': lambda o: dict(name='../x'),
    'name of a built-in task': lambda o: dict(name='rte'),
    'dev': lambda o: dict(dev=['../outside/train']),
    'test': lambda o: dict(test=['../outside/train']),
    'one label': lambda o: dict(labels=['bad']),
    'labels twice': lambda o: dict(labels=['bad', 'bad']),
    'labels no texts': lambda o: dict(labels=[1, 2, 3]),
    'label of two lines': lambda o: dict(labels=['bad', 'neither', 'go\nod']),
    'metrics': lambda o: dict(metrics=['luck']),
    'columns': lambda o: dict(columns=[]),
    'folder a number': lambda o: dict(folder=5),
    'written': lambda o: dict(written=['0']),
}


@pytest.mark.parametrize('harm', HARM)
def test_a_task_that_names_what_is_not_its_own(done, mood, capsys, harm):
    """A task.json in a run's data folder: it is refused, and nothing is written anywhere."""
    folder, outside = done
    path = mood / 'task.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | HARM[harm](outside)))
    before = files_of(mood.parent)
    tasks.pop('mood')
    with pytest.raises(ValueError, match='task.json describes no task of your own: '):
        open_task(mood)
    assert command('generate_test_prediction', mood.parent) == 2
    said = capsys.readouterr().err
    assert 'describes no task of your own' in said and 'Traceback' not in said
    assert 'mood' not in tasks and files_of(mood.parent) == before


def test_a_task_of_an_old_folder_still_opens(mood):
    """What write_task wrote, and what a person may have changed in it: a metric, a spelling of the labels."""
    path = mood / 'task.json'
    changes = dict(metrics=['accuracy', 'f1'], written=['0', '1', '2'])
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert open_task(mood).spelling == ('0', '1', '2')


DEEP = [
    'predictions/checkpoint-2/mine.tsv.part',
    'predictions/checkpoint-2',
    'predictions',
    'checkpoint-2/deeper/still/config.json',
    'a/b/c/d/e/f',
    '.writing',
    '.final',
    '.removing',
]


@pytest.mark.parametrize('name', DEEP)
def test_a_link_at_any_depth(done, name):
    """Found by whoever opens the run; what it leads to stays."""
    folder, outside = done
    link = folder / name
    link.parent.mkdir(parents=True, exist_ok=True)
    is_file = '.' in link.name.lstrip('.')
    link.symlink_to(outside / 'train.tsv' if is_file else outside)
    for deed in (
        lambda: check_links(folder),
        lambda: find_checkpoint(folder),
        lambda: open_run(folder),
        lambda: load_classifier(folder, 'mood'),
        lambda: score_checkpoints(folder, 'mood'),
    ):
        with pytest.raises(ValueError, match='is a link that leads out of its folder'):
            deed()
    assert command('generate_test_prediction', folder.parent) == 2
    assert [p.name for p in outside.iterdir()] == ['train.tsv']
    assert (outside / 'train.tsv').read_text() == 'mine'


def test_links_of_the_hubs_cache_are_known(tiny, tmp_path):
    """A snapshot made of links to blobs loads, with folders in it as well."""
    model = tmp_path / 'models--a--b'
    snapshot, blobs = model / 'snapshots' / 'c0ffee', model / 'blobs'
    (snapshot / 'onnx' / 'deep').mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(p for p in tiny.iterdir() if p.is_file()):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / str(i), snapshot))
    (snapshot / 'onnx' / 'deep' / 'model.onnx').symlink_to('../../../../blobs/0')
    load_classifier(snapshot, 'toy')
    (tmp_path / 'mine').touch()
    (snapshot / 'onnx' / 'deep' / 'out').symlink_to(tmp_path / 'mine')
    with pytest.raises(ValueError, match='leads out'):
        load_classifier(snapshot, 'toy')


def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(tmp_path):
    if not os.geteuid():
        pytest.skip('root lists every folder')
    (tmp_path / 'run' / 'closed').mkdir(parents=True)
    (tmp_path / 'run' / 'closed').chmod(0o100)
    with pytest.raises(PermissionError):
        check_links(tmp_path / 'run')


@pytest.mark.parametrize('link', ['none', 'file', 'folder', 'nothing'])
def test_what_stands_where_something_is_written_aside(tmp_path, link):
    """A leftover, a link to a file, to a folder, to nothing: not written through, and replaced."""
    outside = tmp_path / 'outside'
    if link == 'file':
        outside.write_text('mine')
    if link == 'folder':
        outside.mkdir()
    place = tmp_path / 'run' / 'recipe.json'
    place.parent.mkdir()
    for name in (place, tmp_path / 'run' / 'recipe.json.part'):
        if link == 'none':
            name.write_text('left by a process that died')
        else:
            name.symlink_to(outside)
    write_text(place, 'ours')
    assert place.read_text() == 'ours' and not place.is_symlink()
    if link in ('none', 'nothing'):
        assert not outside.exists()
    if link == 'file':
        assert outside.read_text() == 'mine'
    if link == 'folder':
        assert not list(outside.iterdir())


def test_lines_are_not_appended_through_a_link(tmp_path):
    (tmp_path / 'mine').write_text('mine')
    for name in ('log.jsonl', 'runs.jsonl'):
        (tmp_path / name).symlink_to('mine')
    with pytest.raises(OSError, match='log.jsonl could not get its next line .*it is a link'):
        append_line(tmp_path / 'log.jsonl', dict(step=1))
    with pytest.raises(OSError, match='runs.jsonl could not get its next line .*it is a link'):
        append_result(tmp_path, dict(study='s'))
    assert (tmp_path / 'mine').read_text() == 'mine'


def test_links_that_appear_while_a_run_goes_on(quick, tmp_path):
    """Nobody looked for them, and still nothing is written through them."""
    outside = tmp_path / 'outside'
    outside.mkdir()
    (outside / 'mine').write_text('mine')

    class Harm(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            folder = Path(args.output_dir)
            if state.global_step == 1:
                for name in ('.writing', '.final', '.removing', 'checkpoint-4'):
                    (folder / name).symlink_to(outside)

    folder = run(quick.replace(keep_ckpt=1), tmp_path / 'experiments', progress=False, callbacks=[Harm()])
    assert [p.name for p in outside.iterdir()] == ['mine'] and (outside / 'mine').read_text() == 'mine'
    assert not [p for p in folder.rglob('*') if p.is_symlink()]
    assert (folder / 'model.safetensors').is_file() and (folder / 'checkpoint-6').is_dir()


def test_a_cache_writes_through_no_link(tiny, tmp_path):
    teacher, tokenizer = load_classifier(tiny, 'toy').eval(), load_tokenizer(tiny)
    data = encode(load_task('toy', size=32), tokenizer, 32)
    cache = teacher_cache(teacher, data, tokenizer, tmp_path / 'cache', progress=False)

    def kept():
        written = (p for p in cache.folder.iterdir() if p.suffix in ('.safetensors', '.json'))
        return {p: p.read_bytes() for p in written}

    files = kept()
    for path in files:
        path.unlink()
        path.with_suffix('.part').symlink_to(tmp_path / f'mine {path.name}')
        if path.suffix == '.json':
            path.symlink_to(tmp_path / f'mine {path.name}')
    teacher_cache(teacher, data, tokenizer, tmp_path / 'cache', progress=False)
    assert files and kept() == files
    assert not list(tmp_path.glob('mine*'))


def test_a_leftover_of_a_killed_run_goes_with_the_next(quick, tmp_path):
    folder = run(quick, tmp_path, progress=False)
    shutil.rmtree(folder / 'checkpoint-6')
    (folder / 'model.safetensors').unlink()
    for name in ('.recipe.json.0123abcd.part', '.final'):
        (folder / name).write_text('half')
    run(quick, tmp_path, resume=True, progress=False)
    assert (folder / 'model.safetensors').is_file()
    assert not list(folder.glob('.*.part')) and not (folder / '.final').exists()


def test_a_folder_with_files_of_ones_own(tmp_path):
    """Data of one's own is not written over, unless that is said; what write_task wrote, it writes again."""

    def give(name='mood', **how):
        write_task(name, tmp_path, LABELS, ['text'], 'mood', **frames(), **how)

    for name in ('train.tsv', 'dev.tsv', 'notes.txt'):
        (tmp_path / name).write_text('mine')
        says = f'holds {name}, which write_task did not write.*overwrite=True'
        with pytest.raises(FileExistsError, match=says):
            give()
        assert (tmp_path / name).read_text() == 'mine'
        (tmp_path / name).unlink()
    try:
        give()
        give()
        with pytest.raises(FileExistsError, match='did not write for the task other'):
            give('other')
        (tmp_path / 'notes.txt').write_text('mine')
        with pytest.raises(FileExistsError, match='notes.txt'):
            give()
        give(overwrite=True)
        assert (tmp_path / 'notes.txt').read_text() == 'mine'
    finally:
        tasks.pop('mood', None)


def spoil(folder, split, lines=('torn', 'too\tmany\tfields\there')):
    """Lines with a wrong number of fields at the end of a file."""
    with open(folder / f'{split}.tsv', 'a') as f:
        f.write(''.join(f'{line}\n' for line in lines))


def told(folder, bad_rows):
    """The run, told otherwise than it was."""
    path = folder / 'recipe.json'
    said = json.loads(path.read_text())
    said['recipe']['bad_rows'] = bad_rows
    path.write_text(json.dumps(said))


def test_bad_dev_lines_are_left_out_and_counted(done, mood, capsys):
    """A run that was told to skip them is scored so, without a flag; the count stands beside the score."""
    folder, _ = done
    whole = evaluate(folder, 'mood', 'dev', mood, 16, device_id=-1)
    spoil(mood, 'dev')
    with pytest.warns(UserWarning, match='left out 2 lines'):
        assert evaluate(folder, 'mood', 'dev', mood, 16, device_id=-1) == whole | dict(left_out=2)
    assert evaluate(folder / 'checkpoint-1', 'mood', 'dev', mood, 16, device_id=-1)['left_out'] == 2
    assert score_checkpoints(folder, 'mood', device_id=-1).left_out.tolist() == [2, 2]
    assert pd.read_csv(folder / 'eval-dev.csv').columns.tolist() == ['step', 'accuracy', 'left_out']
    costs(dict(t=folder), 'mood', mood, 16, rounds=1)
    assert len(agreement(folder)) == 2
    capsys.readouterr()
    assert command('run_fine_tune_eval', folder.parent) == 0
    said = capsys.readouterr()
    assert said.out.count(', 2 lines left out') == 3 and 'left out 2 lines' in said.err


def agreement(folder, **how):
    return teacher_agreement(folder, teacher=str(folder), device_id=-1, **how)


def test_a_run_that_was_not_told_refuses_them_and_the_flag_is_there(done, mood, capsys):
    """As training: the way out that the error names is one that the command has."""
    folder, _ = done
    told(folder, 'raise')
    spoil(mood, 'dev')
    says = r"dev.tsv, line 11: 1 fields; .*bad_rows='skip' \(--bad_rows skip"
    for deed in (
        lambda **how: evaluate(folder, 'mood', 'dev', mood, 16, device_id=-1, **how),
        lambda **how: score_checkpoints(folder, 'mood', device_id=-1, **how),
        lambda **how: costs(dict(t=folder), 'mood', mood, 16, rounds=1, **how),
        lambda **how: agreement(folder, **how),
    ):
        with pytest.raises(ValueError, match=says):
            deed()
        deed(bad_rows='skip')
    capsys.readouterr()
    score = ('run_fine_tune_eval', folder.parent)
    assert command(*score) == 2 and '--bad_rows skip' in capsys.readouterr().err
    assert command(*score, '--bad_rows', 'skip') == 0 and '2 lines left out' in capsys.readouterr().out
    told(folder, 'skip')
    assert command(*score, '--bad_rows', 'raise') == 2


@pytest.mark.parametrize('bad_rows', [[], ['--bad_rows', 'skip'], ['--bad_rows', 'raise']])
@pytest.mark.parametrize('split', ['test', 'dev'])
def test_a_file_of_predictions_leaves_no_line_out(done, mood, capsys, bad_rows, split):
    """Every answer after it would stand at another line's number."""
    folder, _ = done
    spoil(mood, split)
    assert command('generate_test_prediction', folder.parent, '--dataset', split, *bad_rows) == 2
    said = capsys.readouterr().err
    if 'raise' in bad_rows:
        assert 'line 9:' in said or 'line 11:' in said
    else:
        assert 'would move all answers after it' in said
    assert not (folder / 'predictions').exists()


def test_a_study_counts_what_was_left_out(mood, tmp_path):
    """Beside the scores, not among them: no metric of that name."""
    encoder = str(random_bert(tmp_path / 'encoder', num_attention_heads=12))
    few = dict(
        task='mood',
        data_dir=str(mood),
        bad_rows='skip',
        max_seq_len=16,
        batch_size=8,
        total_step=1,
        warmup_step=0,
        ckpt_step=1,
        device_id=-1,
        ptrain_ver=encoder,
    )
    plain = Study(
        's',
        Recipe('s', num_hidden_layers=2, **few),
        teachers=dict(mood=Recipe('teacher', method='fine_tune', **few)),
        tasks=dict(mood={}),
        methods=dict(undistilled=dict(method='undistilled')),
        seeds=(1,),
        snapshots=(),
    )
    spoil(mood, 'dev')
    said = []
    table = run_study(plain, tmp_path / 'root', tmp_path / 'results', say=said.append)
    lines = read_results(tmp_path / 'results')
    assert table.metric.tolist() == ['accuracy'] and [line['left_out'] for line in lines] == [2, 2]
    assert ', 2 lines left out in' in said[-1]
