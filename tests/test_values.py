"""Settings of a wrong type or size are refused in words when they are given, before anything is built;
what is meant is taken."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from dataclasses import fields
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT, names_in, program

from lad_nb.benchmark import benchmark
from lad_nb.cli import main, parse, recipe_of
from lad_nb.data import load_task, read_tsv
from lad_nb.encoders import load_encoder
from lad_nb.experiment import open_run, rerun, run
from lad_nb.models import SMALL, load_tokenizer
from lad_nb.panel import Panel
from lad_nb.settings import kind_of
from lad_nb.recipes import Recipe, recipe_from_dict
from lad_nb.runs import experiment_folder, find_checkpoint
from lad_nb.sources import training_bytes
from lad_nb.stepper import Stepper
from lad_nb.students import make_student
from lad_nb.tasks import open_task
from lad_nb.values import Range, shown

pytestmark = pytest.mark.faults

TYPES = [(dict(length_groups='no'), 'True or False'), (dict(copy_embeddings='false'), 'True or False'),
         (dict(reverse_gate='yes'), 'True or False'), (dict(mask_padding=0), 'True or False'),
         (dict(batch_size=True), 'a whole number from 1'), (dict(batch_size=32.), 'a whole number from 1'),
         (dict(seed='42'), 'a whole number from 0'), (dict(tckpt='2'), 'a whole number from 1'),
         (dict(lr='3e-4'), 'a number above 0'), (dict(mu=True), 'a number from 0'),
         (dict(lr=None), 'a number above 0'), (dict(experiment=5), 'text'), (dict(teacher=['a']), 'text'),
         (dict(gate_indices='246'), 'a list of whole numbers'),
         (dict(gate_indices=(2, 4.)), 'a list of whole numbers'),
         (dict(student_init={1: 'two'}), 'a whole number from 1'),
         (dict(student_init=3), "'even', 'first', "), (dict(bad_rows='drop'), "'raise' or 'skip'"),
         (dict(precision='fp16'), "'fp32', 'bf16' or 'auto'"),
         (dict(init_from='gate'), "'pretrained' or 'teacher'")]


@pytest.mark.parametrize('change, says', TYPES, ids=[str(c) for c, _ in TYPES])
def test_a_wrong_type_is_refused(quick, tmp_path, change, says):
    name = next(iter(change))
    with pytest.raises(ValueError, match=f'{name} is .*{says}.* was expected'):
        run(quick.replace(**change), tmp_path, progress=False)
    with pytest.raises(ValueError, match=f'{name} is .*{says}'): recipe_from_dict(quick.to_dict() | change)
    assert not names_in(tmp_path)


def test_what_is_meant_is_taken(quick, tiny):
    """Numbers of numpy, arrays and paths become Python's own."""
    recipe = quick.replace(seed=np.int64(7), lr=np.float32(.5), mask_padding=np.bool_(False),
                           teacher=Path(tiny), ptrain_ver=Path(tiny), data_dir=Path('x'),
                           gate_indices=np.array([2, 4]), student_indices=[1, 2])
    assert (recipe.seed, recipe.lr, recipe.mask_padding, recipe.gate_indices) == (7, .5, False, (2, 4))
    assert (type(recipe.seed), type(recipe.lr), type(recipe.mask_padding)) == (int, float, bool)
    assert (recipe.teacher, recipe.ptrain_ver, recipe.data_dir) == (str(tiny), str(tiny), 'x')
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


NUMBERS = [f for f in fields(Recipe) if kind_of(f) in (int, float)]


@pytest.mark.parametrize('field', NUMBERS, ids=lambda f: f.name)
def test_every_number_has_bounds(field):
    """A field that comes later has them, too: its metadata says what is allowed; the message repeats it."""
    allowed, kind = field.metadata['allowed'], kind_of(field)
    assert isinstance(allowed, Range) and (field.default is None or field.default in allowed)
    step = 1 if kind is int else 1e-6
    beside = allowed.low - step, allowed.high*(1 + step) + step
    for value in (*beside, 10**20, 10**5000, -10**20, float('nan'), float('inf')):
        if kind is int and isinstance(value, float) and value.is_integer(): value = int(value)
        with pytest.raises(ValueError, match=f'{field.name} is .*number {allowed.__str__()[:4]}'):
            Recipe(**{field.name: value})
    inside = kind(allowed.high if not allowed.below else allowed.low)
    assert getattr(Recipe(**{field.name: inside}), field.name) == inside


SIZES = [(dict(max_seq_len=-1), 'max_seq_len is -1; a whole number from 4'),
         (dict(max_seq_len=65), 'max_seq_len is 65; 4 to 64 is allowed by .* so many positions'),
         (dict(d_ff=10**9), 'd_ff is 1000000000; a whole number from 1'),
         (dict(d_ff=99999999999999999999), 'd_ff is 99999999999999999999; a whole number'),
         (dict(softmax_temp=1e300), 'softmax_temp is 1e.300; a number from'),
         (dict(softmax_temp=1e-300), 'softmax_temp is 1e-300; a number from'),
         (dict(num_hidden_layers=10**9), 'num_hidden_layers is 1000000000; a whole number from 1'),
         (dict(method='undistilled', num_hidden_layers=1000, d_ff=10**6, d_model=10**6),
          f'needs [0-9,]{{15,}} bytes at least .* this machine has {psutil.virtual_memory().total:,}')]


@pytest.mark.parametrize('change, says', SIZES, ids=[str(c) for c, _ in SIZES])
def test_sizes_that_cannot_work(quick, tmp_path, change, says):
    before = psutil.Process().memory_info().rss
    with pytest.raises(ValueError, match=says): run(quick.replace(**change), tmp_path, progress=False)
    assert not names_in(tmp_path) and psutil.Process().memory_info().rss < before + 2**28


DISTIL = dict(model_type='distilbert', dim=16, n_heads=2, hidden_dim=32)
BEYOND = [(dict(num_hidden_layers=10**9), 'num_hidden_layers 1000000000'),
          (dict(hidden_size=10**7), 'hidden_size 10000000'),
          (DISTIL | dict(n_layers=10**9), 'n_layers 1000000000'),
          (DISTIL | dict(n_layers=1001), 'n_layers is 1,001; a number from 1 up to 1,000'),
          (dict(num_hidden_layers=1001), 'num_hidden_layers is 1,001; a number from 1 up to 1,000'),
          (dict(model_type='albert', num_hidden_layers=10**6), 'num_hidden_layers'),
          (dict(num_labels=10**7), 'num_labels is 10,000,000; a number from 1 up to 100,000')]


@pytest.mark.parametrize('said, says', BEYOND, ids=[str(s)[:50] for s, _ in BEYOND])
def test_a_model_that_nobody_has(quick, tiny, tmp_path, said, says):
    """config.json is asked whether it makes sense before anything is built from it."""
    model = Path(shutil.copytree(tiny, tmp_path/'model'))
    config = json.loads((model/'config.json').read_text())
    (model/'config.json').write_text(json.dumps(config | said))
    before, began = psutil.Process().memory_info().rss, time.process_time()
    start = lambda m: run(quick.replace(ptrain_ver=str(m)), tmp_path/'runs', progress=False)
    for way in (load_encoder, start):
        with pytest.raises(ValueError, match=says) as e: way(model)
        if 'from 1 up' not in says: assert 'which take' in str(e.value) and 'bytes' in str(e.value)
    assert psutil.Process().memory_info().rss < before + 2**26 and time.process_time() < began + 3
    assert not (tmp_path/'runs').exists()


def test_the_bytes_that_are_named_are_those_of_the_student(tiny, quick):
    encoder = load_encoder(tiny)
    for sizes in (dict(), dict(d_model=24, d_ff=50, type_vocab_size=3)):
        with pytest.warns(UserWarning) if sizes else pytest.MonkeyPatch.context():
            student = make_student(encoder, 2, 'toy', d_model=sizes.get('d_model'), d_ff=sizes.get('d_ff'),
                                   type_vocab_size=sizes.get('type_vocab_size'))
        parameters = sum(p.numel() for n, p in student.named_parameters() if not n.startswith('classifier'))
        assert training_bytes(quick.replace(**sizes), encoder.config) == 16*parameters


def test_pairs_of_layers(quick, tmp_path):
    """What our own messages recommend trains, is written down, read back as numbers, run again, resumed."""
    recipe = quick.replace(experiment='pairs', student_init={1: 1, 2: 3})
    folder = run(recipe, tmp_path, progress=False)
    assert json.loads((folder/'recipe.json').read_text())['recipe']['student_init'] == {'1': 1, '2': 3}
    assert open_run(folder)[2].student_init == {1: 1, 2: 3}
    again = rerun(folder, progress=False)
    assert (again/'model.safetensors').read_bytes() == (folder/'model.safetensors').read_bytes()
    assert run(recipe, tmp_path, resume=True, progress=False) == folder
    other = run(quick.replace(experiment='even', student_init='even'), tmp_path, progress=False)
    assert (other/'model.safetensors').read_bytes() != (folder/'model.safetensors').read_bytes()
    with pytest.raises(ValueError, match='cannot go on with another recipe: student_init'):
        run(recipe.replace(student_init={1: 1, 2: 4}), tmp_path, resume=True, progress=False)
    typed = recipe_of(parse('run_lad_distil --experiment x --task toy --student_init 1:1,2:3'.split()))
    assert typed.student_init == {1: 1, 2: 3}


def test_a_step_that_is_text(quick, tmp_path):
    folder = run(quick, tmp_path, progress=False)
    for find in (find_checkpoint, open_run):
        with pytest.raises(ValueError, match="step of a checkpoint is '2'; a whole number"): find(folder, '2')
    assert find_checkpoint(folder, np.int64(2)).name == 'checkpoint-2'


ENORMOUS = '9'*20
WITHOUT_SENSE = ['d_ff', 'type_vocab_size', 'max_seq_len', 'total_step', 'd_model', 'num_attention_heads',
                 'num_hidden_layers', 'train_size', 'tckpt', 'keep_ckpt', 'ckpt_step', 'seed', 'device_id',
                 'epoch']
OF_A_RUN = ['run_fine_tune_eval --batch_size', 'run_fine_tune_eval --device_id', 'eval_dev_loss --tckpt',
            'eval_dev_loss --softmax_temp', 'eval_dev_loss --log_step', 'generate_test_prediction --ckpt']


@pytest.mark.parametrize('flag', [*(f'run_lad_distil --{name}' for name in WITHOUT_SENSE), *OF_A_RUN])
def test_twenty_nines(tmp_path, capsys, flag):
    command, name = flag.split()
    code = main([command, '--experiment', 'x', '--task', 'toy', '--root', str(tmp_path), name, ENORMOUS])
    err = capsys.readouterr().err
    assert code == 2 and len(err.strip().splitlines()) == 1 and 'expected' in err, err
    assert f'{name[2:]} is {ENORMOUS}' in err or f'{name[2:]} is 1e+20' in err, err
    assert not names_in(tmp_path)


NO_PLACE = [123, ['a'], b'a', 1.5, True, {}, '', ' ', 'a\0b']
PLACED = dict(data_dir=lambda v: load_task('rte', data_dir=v), model=load_encoder, tokenizer=load_tokenizer,
              root=lambda v: run(Recipe(), v), folder=open_run, again=rerun, task=open_task,
              checkpoint=find_checkpoint)


@pytest.mark.parametrize('what', PLACED)
def test_what_is_no_place(what):
    """A folder that is a number, or a list: our words."""
    for value in NO_PLACE:
        with pytest.raises(ValueError, match='expected') as e: PLACED[what](value)
        assert 'PathLike' not in str(e.value) and shown(repr(value))[:60] in str(e.value)


def test_home(quick, tiny, tmp_path, monkeypatch, capsys):
    """~ is one's own folder wherever a place is named: no folder of that name is made."""
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    monkeypatch.chdir(tmp_path)
    for name in ('model', 'data'): shutil.copytree(tiny, tmp_path/'home'/name)
    recipe = quick.replace(teacher='~/model', ptrain_ver='~/model')
    assert recipe.teacher == str(tmp_path/'home'/'model')
    folder = run(recipe, '~/runs', progress=False)
    assert folder == tmp_path/'home'/'runs'/'quick_bert_toy' and open_run('~/runs/quick_bert_toy')
    assert main(['rerun', '~/runs/quick_bert_toy']) == 0
    assert main('run_fine_tune_eval --experiment quick --task toy --root=~/runs --device_id -1'.split()) == 0
    capsys.readouterr()
    code = main('run_fine_tune_eval --experiment quick --task toy --root=~/runs --data_dir=~/data'.split())
    assert code == 2 and f"no file {tmp_path/'home'/'data'/'dev.tsv'}" in capsys.readouterr().err
    assert names_in(tmp_path/'home'/'runs')[0].startswith('quick_bert_toy')
    assert [p.name for p in tmp_path.iterdir()] == ['home']


def test_names_that_mean_something_here(quick, tmp_path):
    """teacher_cache is a name like others; checkpoint-1 would be taken for a checkpoint."""
    recipe = quick.replace(experiment='teacher_cache', norm='token', teacher_cache=True)
    folder = run(recipe, tmp_path, progress=False)
    assert open_run(folder) and open_run(folder, 4) and run(recipe, tmp_path, resume=True, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['teacher_cache', 'teacher_cache_bert_toy']
    for name in ('checkpoint-1', 'checkpoint-x'):
        with pytest.raises(ValueError, match=f"named '{name}', and checkpoint-N is what"):
            run(quick.replace(experiment=name), tmp_path/'none', progress=False)
    assert not (tmp_path/'none').exists()


@pytest.mark.parametrize('name', ['cafe\u0301', 'A\u030angstrom', '\u212bngstrom', '\u1112\u1161\u11ab'])
def test_names_in_another_unicode_form(quick, tmp_path, name):
    """Two folders that look alike would be two runs, or on some systems one: one spelling is taken."""
    typed = unicodedata.normalize('NFC', name)
    assert typed != name and experiment_folder(typed, 'toy').name == f'{typed}_bert_toy'
    with pytest.raises(ValueError, match='which looks like .* and is spelled otherwise') as e:
        run(quick.replace(experiment=name), tmp_path, progress=False)
    assert typed in str(e.value) and name not in str(e.value) and not names_in(tmp_path)


TYPED = [('--lr ٣', "'٣' is not a number"), ('--lr 1_0', "'1_0' is not a number"),
         ('--batch_size ٣', "'٣' is not a whole number"),
         ('--batch_size 1_6', "'1_6' is not a whole number"), ('--seed 1.0', "'1.0' is not a whole number"),
         ('--lr ' + '9'*400, 'lr is inf'), ('--batch_size ' + '9'*400, 'is not a whole number'),
         ('--fast --faithful', '--fast and --faithful contradict'),
         ('--student_init 1:x', "'even', 'first', 'random', 'paired', pairs")]


@pytest.mark.parametrize('flags, says', TYPED, ids=[f[:20] for f, _ in TYPED])
def test_flags_as_they_are_typed(tmp_path, capsys, flags, says):
    code = main(f'run_lad_distil --experiment x --task toy --root {tmp_path} {flags}'.split())
    err = capsys.readouterr().err
    assert code == 2 and says in err and len(err.strip().splitlines()) == 1 and not names_in(tmp_path)


@pytest.mark.parametrize('line', [
    'benchmark --batch_size 0', 'benchmark --rows -3', 'benchmark --max_seq_len -1', 'benchmark --rounds 0',
    'run_fine_tune_eval --experiment x --task toy --batch_size 0'])
def test_sizes_of_other_commands(capsys, line):
    code, err = main(line.split()), capsys.readouterr().err
    assert code == 2 and 'a whole number from' in err and len(err.strip().splitlines()) == 1


def test_the_benchmark_refuses_for_itself():
    with pytest.raises(ValueError, match='batch_size is 0; a whole number from 1'): benchmark(batch_size=0)


EVIL = 'in\x1b[2Jvisible\x9b31m\u202e'


def test_what_is_echoed_is_harmless(tmp_path, capsys, quick):
    """A header, a folder's name, an experiment beside: no control character reaches the terminal."""
    (tmp_path/EVIL).mkdir()
    (tmp_path/EVIL/'train.tsv').write_text(f'sentence1\tsentence2\tlabel\t{EVIL}\na\tb\n')
    with pytest.raises(ValueError) as e: read_tsv(tmp_path/EVIL/'train.tsv', 'rte')
    assert shown(EVIL) in str(e.value)
    (tmp_path/f'x{EVIL}_bert_toy').mkdir()
    (tmp_path/f'x{EVIL}_bert_toy'/'recipe.json').write_text('{}')
    teacher = f'run_fine_tune --experiment x --task rte --ptrain_ver {SMALL} --root {tmp_path}'
    lines = [f'{teacher} --data_dir {tmp_path/EVIL}',
             f'run_fine_tune_eval --experiment y --task toy --root {tmp_path}', f'rerun {tmp_path/EVIL}']
    for line in lines:
        code, (out, err) = main(line.split(' ')), capsys.readouterr()
        assert code == 2 and shown(EVIL) in err and len(err.splitlines()) == 1, err
        assert all(c.isprintable() or c == '\n' for c in out + err)
    home = tmp_path/f'home{EVIL}'
    folder = run(quick, home, progress=False)
    assert main(['rerun', str(folder)]) == 0
    out, err = capsys.readouterr()
    assert shown(EVIL) in out and all(c.isprintable() or c == '\n' for c in out)


def test_a_stepper_on_a_finished_run(quick, tmp_path):
    run(quick, tmp_path, progress=False)
    stepper = Stepper(quick, tmp_path, resume=True)
    assert (stepper.state, stepper.done, stepper.total) == ('done', 6, 6) and stepper.record is None
    with pytest.raises(RuntimeError, match='This run is done after 6 of 6 updates'): stepper.step()
    assert Panel(stepper) is not None and stepper.stop() == stepper.folder


def start(words, **env):
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=os.environ | env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


def wait_for(what, process, seconds=120):
    end = time.time() + seconds
    while not what():
        if process.poll() is not None or time.time() > end:
            process.kill() # or to wait for what it says would take forever
            raise AssertionError(process.communicate())
        time.sleep(.005)


@pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='looks into /proc for what is imported')
@pytest.mark.parametrize('library, sent, says', [
    ('libtorch', signal.SIGTERM, 'ended by SIGTERM'), ('pyarrow', signal.SIGINT, 'interrupted'),
    pytest.param('libtorch', signal.SIGHUP, 'ended by SIGHUP', marks=pytest.mark.slow)])
def test_interrupted_while_it_starts(library, sent, says, tmp_path):
    """A signal in the seconds of importing: one line, the shell's exit code, no traceback."""
    line = f'-m lad_nb run_lad_distil --experiment x --task toy --root {tmp_path}'
    process = start(line.split())
    wait_for(lambda: library in Path(f'/proc/{process.pid}/maps').read_text(), process)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (128 + sent, '', f'lad-nb: {says}')


def at_the_door(process):
    """Whether a process has said what it does about SIGHUP, the last of the three."""
    caught = next(x for x in Path(f'/proc/{process.pid}/status').read_text().splitlines() if 'SigCgt' in x)
    return int(caught.split()[1], 16) >> (signal.SIGHUP - 1) & 1


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='looks into /proc for what is caught')
def test_interrupted_at_any_moment_of_its_start(tmp_path):
    """From the hundredths of a second on in which Python itself starts, up to a refusal."""
    seed = int(os.environ.get('LAD_NB_SEED') or random.randrange(10**6))
    rng, door, codes = random.Random(seed), [], []
    print(f'LAD_NB_SEED={seed}')
    for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)*12:
        began = time.time()
        process = start(f'-m lad_nb run_lad_distil --experiment x --task toy --root {tmp_path}'.split())
        wait_for(lambda: at_the_door(process), process)
        door.append(time.time() - began)
        time.sleep(rng.random()**3*4)
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
        assert process.returncode in (128 + sent, 2) and out == '', err
        assert 'Traceback' not in err and len(err.strip().splitlines()) == 1, err
        codes.append(process.returncode)
    print(f'{len(codes) - codes.count(2)} of {len(codes)} ended by a signal; the door was open after '
          f'{min(door):.3f} to {max(door):.3f} s')
    assert codes.count(2) < 12 and not names_in(tmp_path)


def test_the_console_command_starts_lightly():
    """What pip installs is the door that is open before the imports."""
    lines = (ROOT/'settings.ini').read_text().splitlines()
    said = dict(line.split(' = ', 1) for line in lines if ' = ' in line)
    assert said['console_scripts'] == 'lad-nb=lad_nb.__main__:main'
    done = program('starts_lightly.py', cwd=ROOT)
    assert (done.stdout.strip(), done.stderr) == ('[]', '')


@pytest.mark.slow
def test_a_benchmark_that_is_interrupted_twice(tmp_path):
    """It leaves no folder behind, and does not advise what it cannot do."""
    process = start([str(ROOT/'tests'/'small_benchmark.py')], TMPDIR=str(tmp_path))
    wait_for(lambda: [p for p in tmp_path.rglob('*.safetensors')], process)
    process.send_signal(signal.SIGINT)
    time.sleep(.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and err.strip() == 'lad-nb: interrupted', err
    assert not [p for p in tmp_path.rglob('*') if p.is_file()], names_in(tmp_path)
