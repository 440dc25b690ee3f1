"""Two processes on loopback compute what one computes with the same global batch."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lad_nb.recipes import FAST
from lad_nb.experiment import run
from lad_nb.runs import read_log

PARTS = ('loss', 'hard', 'soft', 'hidden_1', 'hidden_2', 'hidden_3')


def flags(recipe):
    """A recipe as the command's flags."""
    for name, value in recipe.to_dict().items():
        if value is None or name in ('method', 'model', 'tmodel'): continue
        if isinstance(value, bool): yield f"--{'' if value else 'no-'}{name}"
        else: yield from (f'--{name}', str(value))


def in_processes(n, recipe, root):
    beside = Path(sys.executable).with_name
    torchrun = [beside('torchrun'), '--standalone', '--nproc_per_node', str(n), '--no-python']
    command = [beside('lad-nb'), 'run_lad_distil', *flags(recipe), '--root', str(root)]
    env = os.environ | dict(OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo')
    return subprocess.run([*torchrun, *command], capture_output=True, text=True, env=env, timeout=300)


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
    logs = read_log(one), read_log(two)
    assert [line['step'] for line in logs[1]] == [1, 2, 3, 4]
    for a, b in zip(*logs):
        assert b['loss'] == pytest.approx(a['loss'], rel=1e-5)
        for part in PARTS: # early soft losses are 1e-4: a difference of almost equal numbers
            assert b[part] == pytest.approx(a[part], rel=1e-5, abs=1e-6), (a['step'], part)
        assert b['grad_norm'] == pytest.approx(a['grad_norm'], rel=1e-4)
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())


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
