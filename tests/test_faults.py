"""Whatever dies, finished work stays: checkpoints are whole or not there, damage is found, a full disk costs nothing that was written."""
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from test_training import in_a_process, same_bytes

from lad_nb.durable import SEAL, damage
from lad_nb.recipes import run
from lad_nb.training import DistilTrainer, checkpoints, sound_checkpoint

pytestmark = pytest.mark.faults
SETTINGS = dict(total_step=5, ckpt_step=2, log_step=2)


@pytest.fixture
def whole(experiments, lad):
    """The run that nothing happened to."""
    folder = experiments/'whole_faults_bert_toy'
    return folder if folder.exists() else run(lad.replace(experiment='whole_faults', **SETTINGS), experiments, progress=False)


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


def flip(path): raw = bytearray(path.read_bytes()); raw[len(raw)//2] ^= 1; path.write_bytes(raw)


HARM = dict(truncated=lambda p: p.write_bytes(p.read_bytes()[:-7]), emptied=lambda p: p.write_bytes(b''), flipped=flip, missing=lambda p: p.unlink())


@pytest.mark.parametrize('harm', HARM)
@pytest.mark.parametrize('file', ['model.safetensors', 'optimizer.pt', 'trainer_state.json', SEAL])
def test_a_damaged_checkpoint_is_named_and_set_aside(cut, file, harm, capsys):
    _, folder = cut
    HARM[harm](folder/'checkpoint-4'/file)
    assert sound_checkpoint(folder) == folder/'checkpoint-2'
    said = capsys.readouterr().err
    assert 'checkpoint-4 is damaged' in said and (file in said or file == SEAL) and (folder/'checkpoint-4.damaged').is_dir()
    assert list(checkpoints(folder)) == [2]


def test_resumed_past_a_damaged_checkpoint(experiments, cut, whole):
    recipe, folder = cut
    flip(folder/'checkpoint-4'/'model.safetensors')
    run(recipe, experiments, resume=True, progress=False)
    assert same_bytes(folder, whole) and list(checkpoints(folder)) == [2, 4, 5] and damage(folder/'checkpoint-4') is None


def test_a_log_with_a_torn_last_line(experiments, cut, whole):
    recipe, folder = cut
    log = (folder/'log.jsonl').read_text().splitlines()
    (folder/'log.jsonl').write_text('\n'.join(log[:2]) + '\n' + log[0][:20])
    run(recipe, experiments, resume=True, progress=False)
    assert same_bytes(folder, whole)


@pytest.mark.parametrize('moment', ['Trainer._save_optimizer_and_scheduler', 'Trainer._save_rng_state', 'os.replace'])
def test_killed_while_a_checkpoint_is_written(experiments, lad, whole, moment):
    """The process is gone in the middle of the second checkpoint: after the weights, after the optimiser, before the rename."""
    name = f"killed_{moment.rpartition('.')[2]}"
    recipe = lad.replace(experiment=name, **SETTINGS)
    at = "'checkpoint-4' in str(args)" if moment == 'os.replace' else "self.state.global_step == 4"
    code = ("import os, signal\nfrom transformers import Trainer\nfrom lad_nb.recipes import recipe_from_dict, run\n"
            f"before = {moment}\ndef die(*args, **kwargs):\n    self = args[0]\n    if {at}: os.kill(os.getpid(), signal.SIGKILL)\n    return before(*args, **kwargs)\n"
            f"{moment} = die\nrun(recipe_from_dict({recipe.to_dict()!r}), {str(experiments)!r}, progress=False)")
    assert in_a_process(code, experiments).returncode == -9
    folder = experiments/f'{name}_bert_toy'
    assert list(checkpoints(folder)) == [2] and (folder/'.writing').is_dir()
    run(recipe, experiments, resume=True, progress=False)
    assert same_bytes(folder, whole) and not (folder/'.writing').exists()


def test_a_full_disk(experiments, lad, whole):
    recipe = lad.replace(experiment='full', **SETTINGS)
    save = DistilTrainer._save_rng_state
    def full(self, folder):
        if self.state.global_step == 4: raise OSError(errno.ENOSPC, 'No space left on device')
        return save(self, folder)
    with patch('lad_nb.training.DistilTrainer._save_rng_state', full), pytest.raises(OSError, match=r'checkpoint-4 could not be written: .*No space left.* bytes were needed, [\d,]+ are free') as e:
        run(recipe, experiments, progress=False)
    folder = experiments/'full_bert_toy'
    assert e.value.errno == errno.ENOSPC and list(checkpoints(folder)) == [2] and damage(folder/'checkpoint-2') is None and not (folder/'.writing').exists()
    run(recipe, experiments, resume=True, progress=False)
    assert same_bytes(folder, whole)


@pytest.mark.parametrize('kills', [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tiny, tmp_path, kills):
    """A study of one run of 60 updates, checkpoints every 5, with its teacher, cache, log and table of results: killed, started again, and in the end the same bytes."""
    done = subprocess.run([sys.executable, Path(__file__).with_name('killed.py'), tmp_path, tiny, str(kills), '7'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    print(said)
    assert not said['problems'], said['problems']
    assert said['kills'] == kills
