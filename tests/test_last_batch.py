"""The scripts' epochs: every row, a last, smaller batch, and accumulation that runs over an epoch's end."""

import shutil

import pytest
from conftest import ready, same_bytes
from test_distributed import PARTS, in_processes
from transformers import TrainerCallback

from lad_nb.experiment import run
from lad_nb.runs import checkpoints, read_log
from lad_nb.training import train


class Rows(TrainerCallback):
    "Keeps the rows of every update"
    def __init__(self): self.updates = []
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.updates.append([sorted(rows.tolist()) for rows, _ in self.trainer.update])


def every(micro_batches): return sorted(row for rows in micro_batches for row in rows)


@pytest.fixture
def kept(quick):
    """Forty rows in batches of sixteen: an epoch has two full ones and one of eight."""
    return quick.replace(train_size=40, keep_last_batch=True, total_step=7, ckpt_step=1, log_step=1)


def updates_of(recipe, root):
    seen = Rows()
    seen.trainer = ready(recipe, root, [seen])
    return seen.updates, train(seen.trainer)


def test_an_epoch_has_all_rows(kept, tmp_path):
    updates, folder = updates_of(kept, tmp_path)
    sizes = [[len(rows) for rows in update] for update in updates]
    assert sizes == [[16], [16], [8]]*2 + [[16]]
    for epoch in (updates[:3], updates[3:6]): assert every(sum(epoch, [])) == list(range(40))
    assert updates[:3] != updates[3:6]
    assert [line['epoch'] for line in read_log(folder)] == pytest.approx([1/3, 2/3, 1, 4/3, 5/3, 2, 7/3])


def test_accumulation_runs_over_the_end_of_an_epoch(kept, tmp_path):
    """Five micro-batches an epoch, two an update: the third update takes the last of one epoch and the first
    of the next."""
    updates, folder = updates_of(kept.replace(accum_step=2), tmp_path)
    assert [[len(rows) for rows in update] for update in updates] == [[8, 8]]*7
    taken = sum(updates, [])
    assert every(taken[:5]) == every(taken[5:10]) == list(range(40))
    assert [line['epoch'] for line in read_log(folder)] == pytest.approx([.4*n for n in range(1, 8)])


@pytest.mark.parametrize('accum_step', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_resumed_at_every_update(kept, tmp_path, accum_step):
    """From each checkpoint, within an epoch, at its smaller batch and at its end: the same bytes."""
    recipe = kept.replace(accum_step=accum_step)
    whole = run(recipe, tmp_path/'whole', progress=False)
    for step in range(1, 7):
        root = tmp_path/f'from{step}'
        shutil.copytree(tmp_path/'whole', root)
        stopped = root/whole.name
        for later, folder in checkpoints(stopped).items():
            if later > step: shutil.rmtree(folder)
        for name in ('model.safetensors', 'gates.safetensors'): (stopped/name).unlink()
        run(recipe, root, resume=True, progress=False)
        assert same_bytes(stopped, whole), step


def test_left_out_without_it(quick, tmp_path):
    updates, _ = updates_of(quick.replace(train_size=40, total_step=4), tmp_path)
    assert [[len(rows) for rows in update] for update in updates] == [[16]]*4


def test_not_with_length_groups(kept, tmp_path):
    with pytest.raises(ValueError, match='take one of the two'):
        run(kept.replace(length_groups=True), tmp_path, progress=False)
    assert not (tmp_path/'quick_bert_toy').exists()


@pytest.mark.slow
def test_shared_by_two_processes(experiments, lad):
    """Loss for loss what one process computes, over the end of an epoch."""
    recipe = lad.replace(dropout=0., log_step=1, total_step=4, train_size=40, ckpt_step=4)
    one = run(recipe.replace(experiment='one'), experiments, progress=False)
    done = in_processes(2, recipe.replace(experiment='two'), experiments)
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(read_log(one), read_log(experiments/'two_bert_toy')):
        for part in PARTS:
            assert b[part] == pytest.approx(a[part], rel=1e-5, abs=1e-6), (a['step'], part)
