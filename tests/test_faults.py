"""Whatever dies, finished work stays: checkpoints are whole or not there, damage is found, and a full disk
costs nothing that was written."""
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import program, ready, same_bytes
from transformers import Trainer, TrainerCallback

from lad_nb.durable import CHECKSUMS, find_damage
from lad_nb.experiment import run
from lad_nb.recipes import Recipe
from lad_nb.results import append_result, read_results
from lad_nb.runs import checkpoints, experiment_folder, read_log, sound_checkpoint
from lad_nb.training import train

pytestmark = pytest.mark.faults
SETTINGS = dict(total_step=5, ckpt_step=2, log_step=2)


@pytest.fixture
def whole(experiments, lad):
    """The run that nothing happened to."""
    folder = experiments/'whole_faults_bert_toy'
    if folder.exists(): return folder
    return run(lad.replace(experiment='whole_faults', **SETTINGS), experiments, progress=False)


@pytest.fixture
def cut(experiments, lad, whole):
    """The same run as it was at update 4 of 5: two checkpoints, no final student."""
    recipe = lad.replace(experiment='cut', **SETTINGS)
    folder = experiments/'cut_bert_toy'
    shutil.copytree(whole, folder)
    (folder/'recipe.json').write_text((whole/'recipe.json').read_text().replace('whole_faults', 'cut'))
    shutil.rmtree(folder/'checkpoint-5')
    for name in ('model.safetensors', 'gates.safetensors'): (folder/name).unlink()
    return recipe, folder


def contents(folder): return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def all_sound(folder): return all(find_damage(c) is None for c in checkpoints(folder).values())


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw)//2] ^= 1
    path.write_bytes(raw)


HARM = dict(truncated=lambda p: p.write_bytes(p.read_bytes()[:-7]), emptied=lambda p: p.write_bytes(b''),
            flipped=flip, missing=lambda p: p.unlink())


@pytest.mark.parametrize('harm', HARM)
@pytest.mark.parametrize('file', ['model.safetensors', 'optimizer.pt', 'trainer_state.json', CHECKSUMS])
def test_a_damaged_checkpoint_is_named_and_set_aside(cut, file, harm, capsys):
    _, folder = cut
    HARM[harm](folder/'checkpoint-4'/file)
    assert sound_checkpoint(folder) == folder/'checkpoint-2'
    said = capsys.readouterr().err
    assert 'checkpoint-4 is damaged' in said and (file in said or file == CHECKSUMS)
    assert (folder/'checkpoint-4.damaged').is_dir()
    assert list(checkpoints(folder)) == [2]


def test_resumed_past_a_damaged_checkpoint(experiments, cut, whole):
    recipe, folder = cut
    flip(folder/'checkpoint-4'/'model.safetensors')
    run(recipe, experiments, resume=True, progress=False)
    assert same_bytes(folder, whole)
    assert list(checkpoints(folder)) == [2, 4, 5] and find_damage(folder/'checkpoint-4') is None


def test_a_log_with_a_torn_last_line(experiments, cut, whole):
    recipe, folder = cut
    log = (folder/'log.jsonl').read_text().splitlines()
    (folder/'log.jsonl').write_text('\n'.join(log[:2]) + '\n' + log[0][:20])
    run(recipe, experiments, resume=True, progress=False)
    assert same_bytes(folder, whole)


SLOW = ['Trainer._save_optimizer_and_scheduler', 'Trainer._save_rng_state']
MOMENTS = ['os.replace', *(pytest.param(moment, marks=pytest.mark.slow) for moment in SLOW)]


@pytest.mark.parametrize('moment', MOMENTS)
def test_killed_while_a_checkpoint_is_written(experiments, lad, whole, moment):
    """The process is gone in the middle of the second checkpoint: after the weights, after the optimiser,
    before the rename."""
    name = f"killed_{moment.rpartition('.')[2]}"
    recipe = lad.replace(experiment=name, **SETTINGS)
    done = program('dies_while_saving.py', experiments, json.dumps(recipe.to_dict()), moment)
    assert done.returncode == -9, done.stderr
    folder = experiments/f'{name}_bert_toy'
    assert list(checkpoints(folder)) == [2] and (folder/'.writing').is_dir()
    run(recipe, experiments, resume=True, progress=False)
    assert same_bytes(folder, whole) and not (folder/'.writing').exists()


def test_a_full_disk(experiments, lad, whole, monkeypatch):
    recipe = lad.replace(experiment='full', **SETTINGS)
    save = Trainer._save_rng_state
    def full(self, folder):
        if self.state.global_step == 4: raise OSError(errno.ENOSPC, 'No space left on device')
        return save(self, folder)
    says = r'checkpoint-4 could not be written: .*No space left.* bytes were needed, [\d,]+ are free'
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, '_save_rng_state', full)
        with pytest.raises(OSError, match=says) as e: run(recipe, experiments, progress=False)
    folder = experiments/'full_bert_toy'
    assert e.value.errno == errno.ENOSPC and not (folder/'.writing').exists()
    assert list(checkpoints(folder)) == [2] and find_damage(folder/'checkpoint-2') is None
    run(recipe, experiments, resume=True, progress=False)
    assert same_bytes(folder, whole)


@pytest.mark.parametrize('updates, kills', [(15, 1), pytest.param(30, 300, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tiny, tmp_path, seed, counted, updates, kills):
    """A study of one run of so many updates, checkpoints every 5, with its teacher, cache, log, snapshots,
    table of results and card: killed, started again, and in the end the same bytes."""
    done = program('killed.py', tmp_path, tiny, updates, kills, seed)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    print(said)
    assert not said['problems'], said['problems']
    assert said['kills'] == kills or said['stopped']
    counted(kills=said['kills'], studies=said['rounds'], **{f'{k}_lost': n for k, n in said['lost'].items()})


@pytest.mark.slow  # in short, while it starts: test_values
@pytest.mark.parametrize('updates, signals', [(10, 3), (30, 60)])
def test_signals_at_random_moments(tiny, tmp_path, seed, counted, updates, signals):
    """Ctrl-C, SIGTERM and SIGHUP to the command: before the first update, within one, as a checkpoint, the
    final student or the card is written, some three in a row. One line, 128 and the signal's number, no
    traceback; --resume goes on to the same bytes."""
    done = program('signalled.py', tmp_path, tiny, updates, signals, seed)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    print(said)
    assert not said['problems'], said['problems']
    assert said['ended'] >= signals
    counted(signals=said['ended'], runs=said['rounds'], three_in_a_row=said['three_in_a_row'], bytes_lost=0)


@pytest.mark.parametrize('left', range(1, 30, 4))
def test_a_torn_result_is_not_glued_to_the_next(tmp_path, left):
    """A process died in the middle of its line: what was finished is kept, and so is all that comes later."""
    lines = [dict(study='s', run=i) for i in range(4)]
    for line in lines[:2]: append_result(tmp_path, line)
    torn = json.dumps(dict(study='s', run='the torn one'))[:left]
    with open(tmp_path/'runs.jsonl', 'a') as f: f.write(torn)
    assert read_results(tmp_path) == lines[:2]
    for line in lines[2:]: append_result(tmp_path, line)
    assert read_results(tmp_path) == lines


def test_two_threads_of_results(tmp_path):
    """Forty lines by four writers at once: all there, none torn."""
    def write(writer):
        for i in range(10): append_result(tmp_path, dict(writer=writer, line=i))
    writers = [threading.Thread(target=write, args=(w,)) for w in range(4)]
    for w in writers: w.start()
    for w in writers: w.join()
    found = sorted((line['writer'], line['line']) for line in read_results(tmp_path))
    assert found == [(w, i) for w in range(4) for i in range(10)]


@pytest.mark.slow
def test_two_processes_start_the_same_experiment(quick, tmp_path):
    """One works, the other is told and leaves no trace. When the first is killed, its folder is free, and the
    run goes on from its checkpoint."""
    whole = run(quick.replace(experiment='whole'), tmp_path, progress=False)
    recipe = quick.replace(experiment='shared')
    waits = Path(__file__).with_name('waits_half_way.py')
    command = [sys.executable, waits, tmp_path, json.dumps(recipe.to_dict())]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == 'half way\n'
    folder = tmp_path/'shared_bert_toy'
    before = contents(folder)
    for resume, says in {True: 'another process trains there now', False: 'Resume it'}.items():
        with pytest.raises(FileExistsError, match=says): run(recipe, tmp_path, resume=resume, progress=False)
    assert contents(folder) == before
    first.kill()
    first.communicate()
    run(recipe, tmp_path, resume=True, progress=False)
    assert same_bytes(folder, whole)


def test_two_that_start_at_the_same_moment(quick, tmp_path):
    """Neither sees the other's folder before it has one: still only one trains."""
    said, trainers = [], [ready(quick, tmp_path) for _ in range(2)]
    gate = threading.Barrier(2)
    def start(trainer):
        gate.wait()
        try: said.append(train(trainer, trainer.description))
        except FileExistsError as e: said.append(str(e))
    both = [threading.Thread(target=start, args=(t,)) for t in trainers]
    for t in both: t.start()
    for t in both: t.join()
    folder = tmp_path/'quick_bert_toy'
    assert folder in said
    assert any('another process trains' in str(s) or 'Resume it' in str(s) for s in said)
    assert [line['step'] for line in read_log(folder)] == [2, 4, 6] and all_sound(folder)


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, of a given number of bytes."""
    mounted = []
    def mount(size):
        place = tmp_path/f'disk{len(mounted)}'
        place.mkdir()
        command = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', place]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode: pytest.skip(f'no disk may be mounted here: {done.stderr.strip()}')
        mounted.append(place)
        return place
    yield mount
    for place in mounted: subprocess.run(['umount', '-l', place])


def fill(root, left):
    """Leave so many bytes of a disk free."""
    free = shutil.disk_usage(root).free
    (root/'ballast').write_bytes(bytes(max(0, free - left)))


@pytest.mark.slow
def test_a_disk_that_is_really_full(quick, tmp_path, disk, counted):
    """It fills up at every few kilobytes of a run: a clear error, earlier checkpoints whole; with room again,
    the same bytes."""
    recipe = quick.replace(experiment='whole')
    whole = run(recipe, tmp_path, progress=False)
    used = sum(p.stat().st_size for p in whole.rglob('*') if p.is_file())
    root, stops, places = disk('16m'), 0, set()
    folder = root/'whole_bert_toy'
    for left in range(4096, used + 200_000, used//9):
        if folder.exists(): shutil.rmtree(folder)
        fill(root, left)
        try: run(recipe, root, progress=False)
        except OSError as e:
            said = str(e)
            assert e.errno == errno.ENOSPC and str(root) in said and 'bytes' in said, said
            assert all_sound(folder), said
            stops += 1
            places.add(said.partition(' could not')[0].rpartition('/')[2])
        (root/'ballast').unlink()
        assert same_bytes(run(recipe, root, resume=True, progress=False), whole)
    print(stops, places)
    counted(stops=stops, bytes_lost=0)
    assert stops >= 5 and any('checkpoint-' in p for p in places)


def test_a_full_disk_and_the_cache(quick, tmp_path, disk):
    root = disk('4m')
    fill(root, 100_000)
    recipe = quick.replace(teacher_cache=True)
    says = r'The teacher cache needs [\d,]+ more bytes in .*teacher_cache.* has [\d,]+ free'
    with pytest.raises(OSError, match=says) as e: run(recipe, root, progress=False)
    assert e.value.errno == errno.ENOSPC and not (root/'quick_bert_toy').exists()
    (root/'ballast').unlink()
    run(recipe, root, progress=False)


def test_a_full_disk_and_the_results(tmp_path, disk):
    """The line that did not fit left nothing of itself."""
    root = disk('64k')
    append_result(root, dict(run=0))
    fill(root, 0)
    long = dict(run=1, looks='x'*8000)
    says = r'runs.jsonl could not get its next line \(8,[\d]+ bytes\): No space left'
    with pytest.raises(OSError, match=says): append_result(root, long)
    assert (root/'runs.jsonl').read_text() == '{"run": 0}\n'
    (root/'ballast').unlink()
    append_result(root, long)
    assert read_results(root) == [dict(run=0), long]


def make_read_only(root):
    """What is open stays open; what is opened from now on may only be read."""
    subprocess.run(['mount', '--bind', root, root], check=True)
    subprocess.run(['mount', '-o', 'remount,bind,ro', root], check=True)


def test_a_read_only_folder(quick, tmp_path, disk):
    """A disk that is made read-only between two updates, and one that always was."""
    recipe = quick.replace(experiment='whole')
    whole = run(recipe, tmp_path, progress=False)
    root = disk('16m')
    class Close(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3: make_read_only(root)
    says = r'whole_bert_toy/(checkpoint-4|log.jsonl|tensorboard) could not .*Read-only file system.*'
    with pytest.raises(OSError, match=says): run(recipe, root, progress=False, callbacks=[Close()])
    folder = root/'whole_bert_toy'
    assert list(checkpoints(folder)) == [2] and find_damage(folder/'checkpoint-2') is None
    with pytest.raises(OSError, match='Read-only file system.*whole_bert_toy'):
        run(recipe, root, resume=True, progress=False)
    with pytest.raises(OSError, match='Read-only file system.*other_bert_toy'):
        run(quick.replace(experiment='other'), root, progress=False)
    subprocess.run(['umount', root], check=True)
    assert same_bytes(run(recipe, root, resume=True, progress=False), whole)


def test_no_permission(quick, tmp_path):
    """What another user owns: as that user's neighbour, who may read and not write."""
    if os.geteuid(): pytest.skip('becoming another user takes root')
    whole = run(quick.replace(experiment='whole'), tmp_path/'experiments', progress=False)
    before = contents(whole)
    for p in [*tmp_path.rglob('*'), tmp_path]: p.chmod(0o755 if p.is_dir() else 0o644)
    said = program('writes_as_another.py', 'experiments/whole_bert_toy', cwd=tmp_path).stdout.splitlines()
    assert len(said) == 4 and all('experiments/whole_bert_toy' in line for line in said)
    assert 'bytes' in said[0] and 'bytes' in said[1]
    assert contents(whole) == before


def test_only_the_newest_checkpoints_are_kept(quick, tmp_path):
    folder = run(quick.replace(keep_ckpt=2), tmp_path, progress=False)
    assert list(checkpoints(folder)) == [4, 6] and not list(folder.glob('.removing'))
    with pytest.raises(ValueError, match='keep_ckpt is 0; a whole number from 1 up'):
        run(quick.replace(experiment='none', keep_ckpt=0), tmp_path, progress=False)
    assert not experiment_folder('none', 'toy', root=tmp_path).exists() and Recipe().keep_ckpt is None
