"""Commands as a person types them: what they print, what they refuse, and that a refusal writes nothing."""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
from conftest import FEW, ROOT, names_in, program
from transformers import BertConfig, BertForSequenceClassification
from two_processes import study

from lad_nb import cli, quickstart
from lad_nb.encoders import random_bert
from lad_nb.experiment import run
from lad_nb.models import SMALL, load_tokenizer
from lad_nb.recipes import Recipe, recipe_from_dict
from lad_nb.run_books import run_books
from lad_nb.study import run_study

FLAGS = ('--task toy --max_seq_len 32 --batch_size 16 --total_step 4 --warmup_step 1 --ckpt_step 2 '
         '--log_step 2 --device_id -1')
LAD = f'run_lad_distil --experiment new --teacher_exp teacher --tckpt 4 --num_hidden_layers 3 {FLAGS}'
UNTAUGHT = LAD.replace('--teacher_exp teacher --tckpt 4 ', '')  # for a teacher that is named by its folder


def lad_nb(line, root, capsys):
    code = cli.main([*line.split(), '--root', str(root)] if root else line.split())
    out = capsys.readouterr()
    return code, out.out, out.err


REFUSED = [  # what is typed after LAD's usual flags (the last of a flag wins), what the message says
    ('--task rtee', "no task 'rtee'. Tasks are: rte"),
    ('--num_hidden_layers 4', 'Take an M that divides 6 (1, 2, 3, 6)'),
    ('--gate_indices 2,7 --student_indices 1,2', 'gates are counted from 1 to 6'),
    ('--gate_indices 2,2 --student_indices 1,1', 'gate 2 twice'),
    ('--gate_indices 2,4 --student_indices 1,4', 'student layers are counted from 1 to 3'),
    ('--gate_indices 2,4 --student_indices 1', 'must be of one length'),
    ('--student_indices 1,2', 'student_indices without gate_indices'),
    ('--gate_indices 2 --teacher_indices 2 --student_indices 1', 'give one'),
    ('--gate_indices two', 'is not a list of layers'),
    ('--teacher_exp nobody', 'There are: teacher_bert_toy'),
    ('--tckpt 3', 'There are: 2, 4'),
    ('--teacher nowhere/at/all', 'no folder nowhere/at/all'),
    ('--teacher bert-base-uncased', 'which works offline'),
    ('--tckpt 4 --teacher a/folder', "teacher is 'a/folder', and tckpt is 4 as well"),
    ('--ptrain_ver bert-base-uncased', 'which works offline'),
    ('--data_dir nowhere', 'no folder nowhere'),
    ('--batch_size 30 --accum_step 4', 'batch_size 30 is not divisible by accum_step 4'),
    ('--batch_size 4096', 'only 3000 training rows'),
    ('--softmax_temp 0', 'softmax_temp is 0.0; a number from 0.001 up to 10,000 was expected'),
    ('--soft_weight -1', 'soft_weight is -1.0; a number from 0 up'),
    ('--soft_weight 0 --hard_weight 0', 'both 0'),
    ('--mu nan', 'mu is nan'),
    ('--lr 0', 'lr is 0.0; a number above 0'),
    ('--total_step 0', 'total_step is 0'),
    ('--warmup_step 5', 'warmup_step 5 is more than total_step 4'),
    ('--epoch 0', 'epoch is 0.0'),
    ('--warmup_rate 2', 'warmup_rate is 2.0'),
    ('--beta1 1', 'beta1 is 1.0'),
    ('--dropout 1', 'dropout is 1.0'),
    ('--device_id -2', 'device_id is -2'),
    ('--max_seq_len 1000', '4 to 512 is allowed'),
    ('--model gpt', "model is 'gpt', which transformers does not know"),
    ('--experiment ../out', 'letters, digits'),
    ('--student_init last', "'even', 'first'"),
    ('--d_model 100', 'not a multiple of num_attention_heads 12'),
    ('--norm batch', "'sequence' or 'token'"),
    ('--padding longest', "norm='sequence' needs padding='max_length'"),
    ('--num_class 3', 'the task toy has 2'),
    ('--gate_learning_rate 1', 'Did you mean --gate_weight_decay?'),
    ('--softmax_tmp 5', 'Did you mean --softmax_temp?'),
    ('--num_hidden_layers three', "'three' is not a whole number"),
]


@pytest.mark.parametrize('flags, says', REFUSED, ids=[f for f, _ in REFUSED])
def test_refused(experiments, capsys, monkeypatch, flags, says):
    if 'gate_learning_rate' in flags: says = 'Did you mean --gate_'
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    before = names_in(experiments)
    usual = UNTAUGHT if '--teacher ' in flags else LAD
    code, out, err = lad_nb(f'{usual} {flags}', experiments, capsys)
    assert code == 2 and says in err and out == '', err
    assert 'Traceback' not in err and err.strip().splitlines()[-1].count('error: ') == 1
    assert names_in(experiments) == before


NOT_COMMANDS = [
    ('run_lad_distl', 'Did you mean run_lad_distil?'),
    ('run_alp_distil --experiment x --task rte --alp_exp alp', 'invalid choice'),
    ('run_probing_lad --experiment x --task rte', 'required: --probing_exp'),
    ('rerun nowhere', 'no run folder'),
    ('run_fine_tune --task rte', 'required: --experiment'),
    ('run_fine_tune --experiment x --task toy', 'ptrain_ver'),
    ('run_fine_tune --experiment x --task toy --gate_lr 1', 'no flag --gate_lr'),
    ('distil --experiment x --task toy --method lda', 'Methods are: fine_tune, undistilled, lad'),
    ('generate_test_prediction --experiment nobody --task rte', 'no experiment nobody_bert_rte'),
]


def test_commands_refused(tmp_path, capsys):
    for line, says in NOT_COMMANDS:
        code, out, err = lad_nb(line, None if line.startswith('rerun') else tmp_path, capsys)
        assert code == 2 and says in err and 'Traceback' not in err, err
    assert not names_in(tmp_path)


def teacher_of(folder, labels, vocab_size=30522):
    """A small teacher that is not this task's, and the command that would learn from it."""
    sizes = dict(hidden_size=24, num_hidden_layers=6, num_attention_heads=12, intermediate_size=24)
    named = dict(id2label=dict(enumerate(labels)), label2id={l: i for i, l in enumerate(labels)})
    config = BertConfig(vocab_size=vocab_size, num_labels=len(labels), **sizes, **named)
    BertForSequenceClassification(config).save_pretrained(folder)
    load_tokenizer(SMALL).save_pretrained(folder)
    return f'{UNTAUGHT} --ptrain_ver {SMALL} --teacher {folder}'


OTHER_TEACHERS = [  # labels, further arguments, what the message says
    (['a', 'b', 'c'], [], 'has 3 labels (a, b, c), the task toy has 2'),
    (['no', 'yes'], [], "answers ['no', 'yes']"),
    (['not_entailment', 'entailment'], [], "the task toy means ['entailment', 'not_entailment']"),
    (['entailment', 'not_entailment'], [40000], "teacher's 40000"),
]


def test_other_labels_and_other_vocabularies(experiments, tmp_path, capsys):
    """Teachers that would train without complaint and teach nonsense."""
    for i, (labels, vocab_size, says) in enumerate(OTHER_TEACHERS):
        code, out, err = lad_nb(teacher_of(tmp_path/str(i), labels, *vocab_size), experiments, capsys)
        assert code == 2 and says in err, err
    tokenizer = load_tokenizer(SMALL)
    line = teacher_of(tmp_path/'tokens', ['entailment', 'not_entailment'])
    vocab = tmp_path/'tokens'/'tokenizer.json'
    vocab.write_text(vocab.read_text().replace('"dog"', '"dogdogdog"'))
    code, out, err = lad_nb(line, experiments, capsys)
    assert code == 2 and 'have different tokenizers' in err and len(tokenizer) == 30522
    assert not (experiments/'new_bert_toy').exists()


def test_a_folder_that_exists_and_a_device_that_does_not(experiments, capsys):
    line = LAD.replace('new', 'twice').replace('--device_id -1', '--device_id 7')
    code, out, err = lad_nb(line, experiments, capsys)
    assert code == 0 and 'warning: There is no CUDA device 7' in err, err
    before = names_in(experiments)
    code, out, err = lad_nb(line, experiments, capsys)
    assert code == 2 and '--resume' in err and names_in(experiments) == before
    assert lad_nb(line + ' --resume', experiments, capsys)[0] == 0


HEADER, GOOD = 'index\tsentence1\tsentence2\tlabel', '0\tIt rains.\tIt is wet.\tentailment'
BAD_TSV = {  # what the message says: the file's lines
    'line 3: 3 fields; 4 were expected': [HEADER, GOOD, '1\tonly one\tentailment'],
    'line 3: 5 fields': [HEADER, GOOD, '1\ta\tb\tc\tentailment'],
    "line 3: the label is 'maybe'": [HEADER, GOOD, '1\ta\tb\tmaybe'],
    'no rows': [HEADER],
    "no column 'sentence2'": ['index\tsentence1\tlabel', GOOD],
    'no file': None,
}


@pytest.mark.parametrize('says', BAD_TSV)
def test_bad_tsv(experiments, tmp_path, capsys, says):
    lines = BAD_TSV[says]
    if lines is not None: (tmp_path/'train.tsv').write_text('\n'.join(lines) + '\n')
    code, out, err = lad_nb(f'{LAD} --data_dir {tmp_path}', experiments, capsys)
    assert code == 2 and says in err and 'train.tsv' in err, err
    assert not (experiments/'new_bert_toy').exists()


def test_a_run_is_scored_and_predicts(experiments, lad, capsys):
    folder = run(lad.replace(experiment='scored'), experiments, progress=False)
    score = 'run_fine_tune_eval --experiment scored --task toy --dataset dev --device_id -1'
    code, out, err = lad_nb(score, experiments, capsys)
    assert code == 0 and 'best on dev: checkpoint' in out
    table = pd.read_csv(folder/'eval-dev.csv')
    assert list(table.columns) == ['step', 'accuracy'] and list(table.step) == [2, 4]
    predict = 'generate_test_prediction --experiment scored --task toy'
    code, out, err = lad_nb(f'{predict} --ckpt 2 --device_id -1', experiments, capsys)
    lines = (folder/'predictions'/'checkpoint-2'/'toy.tsv').read_text().splitlines()
    assert lines[0] == 'index\tprediction' and len(lines) == 1001
    assert {x.split('\t')[1] for x in lines[1:]} <= {'entailment', 'not_entailment'}
    code, out, err = lad_nb(f'{predict} --ckpt 3', experiments, capsys)
    assert code == 2 and 'There are: 2, 4' in err


def test_a_dry_run_refuses_what_a_run_would(experiments, lad, capsys):
    run(lad.replace(experiment='there', total_step=2, warmup_step=1), experiments, progress=False)
    there = f"{LAD.replace('--experiment new', '--experiment there')} --total_step 2 --no-faithful"
    for dry in ('', '--dry_run'):
        code, out, err = lad_nb(f'{there} {dry}', experiments, capsys)
        assert (code, out) == (2, '') and 'Resume it' in err
        code, out, err = lad_nb(f'{LAD} --batch_size 100000 {dry}', experiments, capsys)
        assert code == 2 and 'batch_size is 100000, but there are only 3000 training rows' in err


def test_faithful_or_ours(experiments, capsys):
    planned = lambda more: json.loads(lad_nb(f'{LAD} --dry_run {more}', experiments, capsys)[1])
    faithful, ours = planned(''), planned('--no-faithful')
    names = ('norm', 'padding', 'mask_padding', 'copy_embeddings')
    found = [tuple(p['recipe'][name] for name in names) for p in (faithful, ours)]
    assert found == [('sequence', 'max_length', False, False), ('token', 'longest', True, True)]
    assert planned('--copy_embeddings')['recipe']['copy_embeddings'] and faithful['missing'] == []
    assert planned('--hidden_mse_weight 7')['recipe']['mu'] == 7
    assert planned('--reverse_gate')['mapping']['segments'] == [[6, 5, 4, 3, 2, 1]]
    in_epochs = planned('--epoch 2 --warmup_rate .25')['schedule']['student']
    assert in_epochs == dict(warmup_step=94, total_step=375)  # rounded, of 3,000 rows
    assert not (experiments/'new_bert_toy').exists()


@pytest.mark.parametrize('flags, rows, counted', [
    ('--epoch 10 --warmup_rate .1', 2490, (778, 78)),  # RTE as the later release trains it
    ('--epoch 10 --batch_size 2490', 2490, (10, 1)),
    ('--epoch .001 --warmup_rate 0', 2490, (1, 1)),
    ('--epoch 3 --warmup_rate .5', 64, (6, 3))])
def test_epochs_count_as_in_the_later_release(glue, tmp_path, monkeypatch, capsys, flags, rows, counted):
    monkeypatch.setenv('LAD_NB_GLUE', str(glue)); monkeypatch.chdir(tmp_path)
    lad = 'run_lad_distil --experiment e --task rte --num_hidden_layers 6 --teacher_exp t --warmup_step 1'
    code, out, err = lad_nb(f'{lad} --dry_run --train_size {rows} {flags}', None, capsys)
    assert code == 0, err
    schedule = json.loads(out)['schedule']
    assert (schedule['student']['total_step'], schedule['student']['warmup_step']) == counted
    assert schedule['gates'] == schedule['student']


def test_quickstart_leaves_what_it_says(tmp_path, monkeypatch, capsys):
    few = dict(total_step=2, warmup_step=1, ptrain_ver=str(random_bert(tmp_path/'encoder')))
    few = {name: recipe.replace(**few) for name, recipe in quickstart.quickstart_recipes.items()}
    monkeypatch.setattr(quickstart, 'quickstart_recipes', few)
    code, out, err = lad_nb('quickstart', tmp_path/'q', capsys)
    assert code == 0, err
    table = pd.read_csv(tmp_path/'q'/'table.csv', index_col=0)
    assert list(table.index) == ['teacher', 'student', 'undistilled']
    assert list(table.columns) == ['dev accuracy', 'parameters', 'MB on disk', 'ms a sentence']
    assert (tmp_path/'q'/'gate_shares.png').stat().st_size > 10_000
    code, out, err = lad_nb('quickstart', tmp_path/'q', capsys)
    assert code == 2 and '--resume' in err


def test_installed_command():
    command = [sys.executable, '-m', 'lad_nb', 'run_lad_distil', '--helpp']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and 'Traceback' not in done.stderr


STUDY = "from two_processes import study\n\nmine = study({!r}, 40)\n"
STOPS = dict(ctrl_c=(signal.SIGINT, True, 3), hangup=(signal.SIGHUP, True, 1),
             batch_system=(signal.SIGTERM, False, 1))  # what is sent; to all of the terminal; how often


def stopped(command, folder, sent, to_all, times, env):
    """A study of two worker processes, stopped after its first run has begun: exit code, what it said, and
    how long its last process lived on."""
    process = subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)
    try:
        end = time.time() + 200
        while not list(folder.glob('experiments/two_*/log.jsonl')):
            assert process.poll() is None and time.time() < end
            time.sleep(.02)
        everyone = psutil.Process(process.pid).children(recursive=True)
        assert len(everyone) >= 2
        began = time.time()
        for _ in range(times): os.killpg(process.pid, sent) if to_all else process.send_signal(sent)
        out, err = process.communicate(timeout=60)
        gone, left = psutil.wait_procs(everyone, timeout=30)
        assert not left
        return process.returncode, err, time.time() - began
    finally:
        with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_study_that_is_stopped(tiny, tmp_path):
    """By Ctrl-C, by a batch system, by a terminal that is gone: one line, no worker is left, and the same
    command goes on to the same bytes."""
    whole = tmp_path/'whole'
    run_study(study(tiny, 40), whole/'experiments', whole/'results', threads=1, say=lambda line: None)
    paths = os.pathsep.join([os.environ.get('PYTHONPATH', str(ROOT)), str(ROOT/'tests')])
    command = [sys.executable, '-m', 'lad_nb', 'study', 'this:mine', '--processes', '2', '--threads', '1']
    took = {}
    for name, how in STOPS.items():
        folder = tmp_path/name
        folder.mkdir()
        (folder/'this.py').write_text(STUDY.format(str(tiny)))
        env = os.environ | dict(PYTHONPATH=paths)
        code, err, took[name] = stopped(command, folder, *how, env)
        assert code == 128 + how[0] and 'Traceback' not in err and 'Warning' not in err, err
        assert err.count('lad-nb: ') == 1 and 'goes on where it was' in err.splitlines()[-1], err
    subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
    for student in (whole/'experiments').glob('two_*/model.safetensors'):
        assert (folder/'experiments'/student.parent.name/student.name).read_bytes() == student.read_bytes()
    print({name: round(seconds, 1) for name, seconds in took.items()})


def cpu_seconds():
    """Of the processes that this one has waited for."""
    times = os.times()
    return times.children_user + times.children_system


ANSWERED = [  # what is typed, its exit code, what is said
    ('--help', 0, 'score every checkpoint of an experiment'),
    ('--version', 0, 'transformers '),
    ('run_lad_distil --softmax_tmp 5', 2, 'Did you mean --softmax_temp?'),
    ('run_lad_distil --help', 0, 'temperature of the soft loss'),
    ('study --help', 0, '--job'),
    ('benchmark --help', 0, '--shape'),
]


@pytest.mark.parametrize('line, code, says', ANSWERED, ids=[line for line, *_ in ANSWERED])
def test_a_question_is_answered_at_once(line, code, says):
    """Without the libraries that training needs: their imports alone take more than three seconds."""
    before = cpu_seconds()
    done = program('starts_lightly.py', *line.split(), cwd=ROOT)
    took = cpu_seconds() - before
    assert done.returncode == code and says in ' '.join((done.stdout + done.stderr).split())
    assert done.stdout.endswith('[]\n'), 'slow libraries were imported'
    assert took < 1.5, f'{took:.1f} s'


def test_the_versions_are_those_of_the_libraries():
    import torch
    import transformers
    out = program('starts_lightly.py', '--version', cwd=ROOT).stdout
    said = dict(line.split() for line in out.splitlines()[:-1])
    assert (said['torch'], said['transformers']) == (torch.__version__, transformers.__version__)
    assert said['lad_nb'] and said['python'] == sys.version.split()[0]


@pytest.mark.parametrize('typed, completed', [
    ('lad-nb run_l', ['run_lad_distil', 'run_lad_no_distil']),
    ('lad-nb run_lad_distil --gate_e', ['--gate_eps']),
    ('lad-nb run_fine_tune --gate_e', [])])
def test_the_tab_key(tmp_path, typed, completed):
    pytest.importorskip('argcomplete')
    shell = dict(_ARGCOMPLETE='1', _ARGCOMPLETE_IFS='\n', COMP_LINE=typed, COMP_POINT=str(len(typed)),
                 _ARGCOMPLETE_STDOUT_FILENAME=str(tmp_path/'completed'))
    done = subprocess.run([sys.executable, '-m', 'lad_nb'], env=os.environ | shell, capture_output=True,
                          text=True)
    found = (tmp_path/'completed').read_text().split('\n') if (tmp_path/'completed').exists() else []
    assert sorted(f.strip() for f in found if f) == completed, done.stderr


ONE_LINE = "    pause: int = setting(3, 'seconds that a training rests between two updates', COUNT)\n"
TRAINING = ['run_fine_tune', 'run_lad_distil', 'run_probing_lad', 'run_lad_no_distil', 'run_alp_distil',
            'run_pkd_distill', 'run_probing', 'distil']


@pytest.fixture(scope='module')
def new_field(tmp_path_factory):
    """What a copy of the library says of a field that was added to it, in one line of one file."""
    folder = tmp_path_factory.mktemp('new_field')
    shutil.copytree(ROOT/'lad_nb', folder/'lad_nb', ignore=shutil.ignore_patterns('__pycache__'))
    recipes = folder/'lad_nb'/'recipes.py'
    before, seed, after = recipes.read_text().partition('    seed: int = ')
    recipes.write_text(before + ONE_LINE + seed + after)
    there = os.environ | dict(PYTHONPATH=str(folder))
    done = program('new_field.py', cwd=folder, env=there)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_new_field_is_a_checked_flag_with_help_and_in_the_tables(new_field):
    assert list(new_field['help']) == TRAINING
    what = 'seconds that a training rests between two updates'
    assert all(f'{what} (default 3)' in said for said in new_field['help'].values())
    code, out, err = new_field['refused']
    assert code == 2 and 'pause is 0; a whole number from 1' in err and out == ''
    assert new_field['row'] == [5, 3, what]
    assert new_field['columns'] == ['pause']


def test_a_new_field_is_in_the_plan(new_field):
    code, out, err = new_field['planned']
    assert code == 0 and '"pause": 5' in out, err


def test_recipes_travel():
    for book in run_books.values():
        for recipe in [r for r in book.values() if isinstance(r, Recipe)]:
            assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert FEW['task'] == 'toy'
