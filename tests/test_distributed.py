"""Two processes on loopback compute what one computes with the same global batch."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import same_bytes

from lad_nb.durable import load_weights
from lad_nb.experiment import run
from lad_nb.recipes import FAST
from lad_nb.runs import checkpoints, read_log

PARTS = ('loss', 'hard', 'soft', 'hidden_1', 'hidden_2', 'hidden_3')


def flags(recipe):
    """A recipe as the command's flags."""
    for name, value in recipe.to_dict().items():
        if value is None or name in ('method', 'model', 'tmodel'): continue
        if isinstance(value, bool): yield f"--{'' if value else 'no-'}{name}"
        else: yield from (f'--{name}', str(value))


def start(n, recipe, root, *more):
    beside = Path(sys.executable).with_name
    torchrun = [beside('torchrun'), '--standalone', '--nproc_per_node', str(n), '--no-python']
    command = [beside('lad-nb'), 'run_lad_distil', *flags(recipe), '--root', str(root), *more]
    env = os.environ | dict(OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo')
    return subprocess.Popen([*torchrun, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=env)


def in_processes(n, recipe, root, *more):
    process = start(n, recipe, root, *more)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def same_numbers(a, b):
    """Whether two logs say the same of every update, as far as sums in another order do."""
    assert [line['step'] for line in a] == [line['step'] for line in b] and len(a) > 1
    for one, other in zip(a, b):
        assert other['loss'] == pytest.approx(one['loss'], rel=1e-5)
        for part in PARTS: # early soft losses are 1e-4: a difference of almost equal numbers
            assert other[part] == pytest.approx(one[part], rel=1e-5, abs=1e-6), (one['step'], part)
        assert other['grad_norm'] == pytest.approx(one['grad_norm'], rel=1e-4)


@pytest.mark.parametrize('cached', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_processes_are_one(experiments, lad, cached):
    """The loss of every update, to 1e-5; batches whose halves have different lengths, without dropout."""
    recipe = lad.replace(**FAST).replace(precision='fp32', dropout=0., log_step=1, total_step=4, ckpt_step=2,
                                         teacher_cache=cached, length_groups=cached)
    one = run(recipe.replace(experiment='one'), experiments, progress=False)
    done = in_processes(2, recipe.replace(experiment='two'), experiments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('Score it') == 1
    two = experiments/'two_bert_toy'
    assert [line['step'] for line in read_log(two)] == [1, 2, 3, 4]
    same_numbers(read_log(one), read_log(two))
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    cut(two) # two processes began it, one goes on
    assert read_log(run(recipe.replace(experiment='two'), experiments, resume=True, progress=False))[1:]
    same_numbers(read_log(one), read_log(two))


def cut(folder):
    """A run as it was at its last checkpoint but one."""
    shutil.rmtree(folder/f'checkpoint-{max(checkpoints(folder))}')
    for name in ('model.safetensors', 'gates.safetensors', 'checksums.json'): (folder/name).unlink()
    log = (folder/'log.jsonl').read_text().splitlines(keepends=True)
    (folder/'log.jsonl').write_text(''.join(log[:max(checkpoints(folder))]))


def named(folder, old, new):
    """A copy of a run, under another name."""
    copy = Path(shutil.copytree(folder, folder.with_name(folder.name.replace(old, new))))
    (copy/'recipe.json').write_text((folder/'recipe.json').read_text().replace(f'"{old}"', f'"{new}"'))
    return copy


def killed(recipe, root, rank, sent, seconds):
    """Two processes, one of which is sent a signal so long after the first checkpoint; how long the other
    lived on."""
    launcher, folder = start(2, recipe, root), root/f'{recipe.experiment}_bert_toy'
    try:
        end = time.time() + 200
        while not list(folder.glob('checkpoint-2')): assert time.time() < end and launcher.poll() is None
        ranks = psutil.Process(launcher.pid).children()
        assert len(ranks) == 2
        time.sleep(seconds)
        began = time.time()
        ranks[rank].send_signal(sent)
        gone, left = psutil.wait_procs(ranks, timeout=60)
        took = time.time() - began
        out, err = launcher.communicate(timeout=60)
        assert not left and launcher.returncode != 0
        return took
    finally: launcher.kill()


@pytest.mark.slow
def test_a_process_of_two_is_killed(experiments, lad):
    """Whichever it is, and by whatever: the other is gone with it, and the run goes on in two processes to
    the same bytes, in one to the same numbers."""
    seed = int(os.environ.get('LAD_NB_SEED') or random.randrange(10**6))
    rng, times = random.Random(seed), {}
    print(f'LAD_NB_SEED={seed}')
    recipe = lad.replace(**FAST).replace(precision='fp32', dropout=0., log_step=1, total_step=40,
                                         ckpt_step=2, keep_ckpt=5)
    assert in_processes(2, recipe.replace(experiment='calm'), experiments).returncode == 0
    calm = experiments/'calm_bert_toy'
    for rank, sent in ((0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGTERM)):
        name = f'hit{rank}{sent.name}'
        hit = recipe.replace(experiment=name)
        times[name] = round(killed(hit, experiments, rank, sent, rng.uniform(0, .5)), 2)
        folder = experiments/f'{name}_bert_toy'
        assert 0 < max(checkpoints(folder)) < 40 and not (folder/'model.safetensors').exists()
        alone = named(folder, name, f'{name}_alone')
        done = in_processes(2, hit, experiments, '--resume')
        assert done.returncode == 0 and same_bytes(folder, calm), done.stderr[-2000:]
        run(hit.replace(experiment=f'{name}_alone'), experiments, resume=True, progress=False)
        same_numbers(read_log(calm), read_log(alone))
        weights = [load_weights(f/'model.safetensors') for f in (alone, calm)]
        assert all(weights[0][k].allclose(w, atol=1e-5) for k, w in weights[1].items())
    print(json.dumps(dict(seconds_until_the_other_was_gone=times)))
    assert max(times.values()) < 5


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared(experiments, lad):
    done = in_processes(2, lad.replace(experiment='odd', batch_size=15), experiments)
    assert done.returncode
    assert 'batch_size 15 is not divisible by accum_step 1 times 2 processes' in done.stderr
    assert not (experiments/'odd_bert_toy').exists()


def test_micro_batches_are_one_batch_of_their_tokens(experiments, lad):
    """With padding masked, micro-batches of different lengths weigh by their tokens."""
    recipe = lad.replace(**FAST).replace(precision='fp32', dropout=0., log_step=1, total_step=3,
                                         teacher_cache=False, length_groups=False)
    recipes = [recipe.replace(experiment=f'micro{n}', accum_step=n) for n in (1, 4)]
    logs = [read_log(run(r, experiments, progress=False)) for r in recipes]
    for a, b in zip(*logs):
        for part in PARTS: assert b[part] == pytest.approx(a[part], rel=1e-5, abs=1e-6), part
