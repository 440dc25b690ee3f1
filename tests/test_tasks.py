"""Tasks of another shape than two sentences and two labels, from TSV files to the submission file."""
import json

import numpy as np
import pandas as pd
import pytest

from lad_nb import cli
from lad_nb.data import load_task
from lad_nb.evaluation import score_checkpoints, write_predictions
from lad_nb.experiment import open_run, run
from lad_nb.models import SMALL
from lad_nb.recipes import Recipe
from lad_nb.tasks import tasks, write_task

WORDS = 'a man runs fast while the old dog sleeps under his red table and nobody looks'.split()


def columns_of(task, labelled):
    """The columns of a task's file, whether or not they stand in a header."""
    if labelled and task.headless: return [*task.headless]
    return ['index', *task.columns, *([task.label_column] if labelled else [])]


def line_of(task, columns, i, rng):
    """Row i: a label, sentences of random words, and numbers elsewhere."""
    label = f'{rng.uniform(0, 5):.2f}' if task.regression else task.spelling[i % len(task.labels)]
    sentence = lambda: ' '.join(rng.choice(WORDS, 6))
    said = lambda c: label if c == task.label_column else sentence() if c in task.columns else str(i)
    return '\t'.join(map(said, columns))


def write_folder(folder, name, rows=24):
    """A GLUE folder of generated rows in the real layout of the task."""
    rng, task = np.random.default_rng(0), tasks[name]
    for split in ('train', *task.dev, *task.test):
        labelled = split not in task.test
        columns = columns_of(task, labelled)
        lines = [] if labelled and task.headless else ['\t'.join(columns)]
        lines += [line_of(task, columns, i, rng) for i in range(rows)]
        (folder/f'{split}.tsv').write_text('\n'.join(lines) + '\n')


def test_best_by_each_metric(tmp_path, capsys):
    """MRPC and QQP have two, and each names its own best checkpoint."""
    write_folder(tmp_path, 'mrpc')
    few = dict(task='mrpc', data_dir=str(tmp_path), max_seq_len=32, batch_size=8, total_step=4, ckpt_step=1)
    few |= dict(warmup_step=1, device_id=-1)
    recipe = Recipe('teacher', method='fine_tune', ptrain_ver=SMALL, lr=1e-3, **few)
    folder = run(recipe, tmp_path/'e', progress=False)
    flags = f'--experiment teacher --task mrpc --device_id -1 --root {tmp_path/"e"}'
    assert cli.main(['run_fine_tune_eval', *flags.split()]) == 0
    table, said = pd.read_csv(folder/'eval-dev.csv'), capsys.readouterr().out
    for metric in ('f1', 'accuracy'):
        best = table.step[table[metric].to_numpy().argmax()]   # the earlier of equals
        assert f'best {metric} on dev: checkpoint {best}, ' in said


@pytest.mark.parametrize('task, columns, files', [
    pytest.param('stsb', ['step', 'pearson', 'spearman'], ['STS-B.tsv'], marks=pytest.mark.slow),
    ('mnli', ['step', 'accuracy_matched', 'accuracy_mismatched'], ['MNLI-m.tsv', 'MNLI-mm.tsv']),
    pytest.param('cola', ['step', 'matthews_correlation'], ['CoLA.tsv'], marks=pytest.mark.slow)])
def test_from_files_to_submission(tmp_path, task, columns, files):
    write_folder(tmp_path, task)
    few = dict(task=task, data_dir=str(tmp_path), max_seq_len=32, batch_size=8, total_step=2, warmup_step=1,
               ckpt_step=2, log_step=1, device_id=-1)
    teacher = Recipe('teacher', method='fine_tune', ptrain_ver=SMALL, lr=5e-5, **few)
    student = Recipe('lad', method='lad', num_hidden_layers=3, teacher_exp='teacher', **few)
    run(teacher, tmp_path/'e', progress=False)
    folder = run(student, tmp_path/'e', progress=False)
    assert open_run(folder)[0].objective.regression == (task == 'stsb')
    table = score_checkpoints(folder, task, device_id=-1)
    assert list(table.columns) == columns and list(table.step) == [2]
    written = write_predictions(folder, task, tmp_path/'out', str(tmp_path), 32, device_id=-1)
    assert [f.name for f in written] == files
    for f in written:
        answers = pd.read_csv(f, sep='\t')
        assert list(answers.columns) == ['index', 'prediction'] and len(answers) == 24
        if task == 'stsb': assert answers.prediction.between(0, 5).all()
        else: assert set(answers.prediction.astype(str)) <= set(tasks[task].spelling)


DRY = {  # other commands of the paper's scripts: what student layers read for 12 -> 6
    'run_probing_lad --probing_exp lad_cls': ('cls', ['1 <- gate 2', '6 <- gate 12']),
    'run_probing --probing_exp pkd_hidden_user_defined --teacher_indices 12,3 --student_indices 6,1':
        ('hidden', ['6 <- layer 12', '1 <- layer 3']),
    'run_probing --probing_exp pkd_cls_user_defined --teacher_indices 12,3 --student_indices 6,1':
        ('cls', ['6 <- layer 12', '1 <- layer 3']),
    'run_pkd_distill': ('hidden', ['1 <- layer 2', '6 <- layer 12']),
    'run_pkd_distill --kd_algo pkd-odd': ('hidden', ['1 <- layer 1', '6 <- layer 11']),
    'run_alp_distil --alp_exp alp-kd': ('cls', ['1 <- attention by cls', '6 <- attention by cls']),
    'run_alp_distil --alp_exp alp-kd-hidden':
        ('hidden', ['1 <- attention by token', '6 <- attention by token']),
    'run_lad_distil --gate_indices 12,4 --student_indices 6,2': ('hidden', ['6 <- gate 12', '2 <- gate 4']),
    'distil --method lad_reversed': ('hidden', ['1 <- gate 2', '6 <- gate 12']),
}


@pytest.mark.parametrize('line', DRY)
def test_other_commands(tmp_path, capsys, line):
    flags = f'--experiment x --task toy --num_hidden_layers 6 --teacher_exp t --root {tmp_path} --dry_run'
    assert cli.main([*line.split(), *flags.split()]) == 0
    mapping = json.loads(capsys.readouterr().out)['mapping']
    on, reads = DRY[line]
    assert mapping['on'] == on and [mapping['reads'][0], mapping['reads'][-1]] == reads
    assert not list(tmp_path.iterdir())


MOODS = ['bad', 'neither', 'good']
FEW_STEPS = '--max_seq_len 16 --batch_size 8 --warmup_step 1 --lr 5e-5'


def own_frames(rows=24):
    """Frames with what CSV files bring along: quotes, commas, tabs, line breaks."""
    texts = ['He said "no", and left.', 'a\ttab', 'two\nlines', 'a lone " quote', "naïve café"]
    text = [f'{texts[i % 5]} {i}' for i in range(rows)]
    table = pd.DataFrame(dict(text=text, mood=[MOODS[i % 3] for i in range(rows)]))
    return dict(train=table, dev=table[:9], test=table[['text']][:6])


def test_a_task_of_ones_own(tmp_path, monkeypatch, capsys):
    """From frames to predictions at the command line, which learns of the task from its folder, or from a run
    that names it."""
    monkeypatch.chdir(tmp_path)
    frames = own_frames()
    write_task('mood', 'data', MOODS, ['text'], 'mood', **frames)
    assert [load_task('mood', s, 'data').num_rows for s in ('train', 'dev', 'test')] == [24, 9, 6]
    first = load_task('mood', 'train', 'data')['sentence1'][:3]
    assert first == ['He said "no", and left. 0', 'a tab 1', 'two lines 2']
    del tasks['mood']  # another process does not know it
    teacher = f'run_fine_tune --experiment t --task mood --device_id -1 --ptrain_ver {SMALL}'
    assert cli.main(f'{teacher} --data_dir data {FEW_STEPS} --total_step 2 --ckpt_step 2'.split()) == 0
    capsys.readouterr()
    for command in ('run_fine_tune_eval --experiment t --task mood --device_id -1',
                    'rerun experiments/t_bert_mood',
                    'generate_test_prediction --experiment t --task mood --out answers --device_id -1'):
        del tasks['mood']
        assert cli.main(command.split()) == 0, capsys.readouterr().err
    answers = pd.read_csv('answers/mood.tsv', sep='\t')
    assert len(answers) == 6 and set(answers.prediction) <= {'bad', 'neither', 'good'}
    del tasks['mood']
    capsys.readouterr()
    assert cli.main(f'{teacher} --data_dir answers'.split()) == 2
    assert 'write_task or open_task' in capsys.readouterr().err


def test_lines_with_a_wrong_number_of_fields(tmp_path, monkeypatch, capsys):
    """QQP has some: refused with the way out, which is a flag. To predict a test split that is not there is
    refused, too."""
    monkeypatch.chdir(tmp_path)
    frames = own_frames()
    del frames['test']
    write_task('mood', 'data', MOODS, ['text'], 'mood', **frames)
    with open('data/train.tsv', 'a') as f: f.write('no label\n')
    common = (f'run_fine_tune --task mood --data_dir data --device_id -1 --ptrain_ver {SMALL} --epoch 1 '
              f'{FEW_STEPS}')
    assert cli.main(f'{common} --experiment t'.split()) == 2 and '--bad_rows skip' in capsys.readouterr().err
    assert cli.main(f'{common} --experiment t --bad_rows skip'.split()) == 0
    out = capsys.readouterr()
    assert 'left out 1 lines' in out.err and 'fine_tune, 3 updates' in out.out
    assert cli.main('generate_test_prediction --experiment t --task mood --device_id -1'.split()) == 2
    assert 'mood has no test split. Its splits are: train, dev' in capsys.readouterr().err
    del tasks['mood']


@pytest.mark.parametrize('change, said', [
    (lambda f: f['train'].assign(mood='Bad'),
     "train, row 0: the label is 'Bad'; 'bad' or 'neither' or 'good' was expected"),
    (lambda f: f['train'].assign(mood=[None, *f['train'].mood[1:]]), "train, row 0: the label is"),
    (lambda f: f['train'].assign(text=[*f['train'].text[:-1], '\t ']), "train, row 23: 'text' is"),
    (lambda f: f['train'].assign(text=3), "'text' is 3; a text was expected"),
    (lambda f: f['train'].drop(columns='mood'), "train has no column 'mood'"),
    (lambda f: f['train'][:0], 'train has no rows')])
def test_frames_that_would_go_wrong_quietly(tmp_path, change, said):
    frames = own_frames()
    frames['train'] = change(frames)
    with pytest.raises(ValueError, match=said):
        write_task('mood', tmp_path/'d', MOODS, ['text'], 'mood', **frames)
    assert not (tmp_path/'d').exists() and 'mood' not in tasks
