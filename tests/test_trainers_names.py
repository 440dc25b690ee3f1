"""A `DistilTrainer` in transformers' own names: its method `train`, its best checkpoint, its epochs."""
import pytest
import torch
from conftest import ready

from lad_nb.durable import load_weights
from lad_nb.experiment import run


def is_checkpoint(trainer, folder):
    """Whether student and gates have the weights of a checkpoint."""
    student, gates = (load_weights(folder/f'{name}.safetensors') for name in ('model', 'gates'))
    now = trainer.model.student.state_dict(), trainer.model.objective.state_dict()
    return all(torch.equal(had[n], has[n]) for had, has in zip((student, gates), now) for n in had)


@pytest.fixture
def best_is_first(quick):
    """A learning rate that ruins the student: it was best before its last update."""
    return quick.replace(eval_step=1, keep_best=True, total_step=4, ckpt_step=1, lr=1.)


def test_trainers_own_train_ends_with_the_best(best_is_first, tmp_path):
    trainer = ready(best_is_first, tmp_path)
    trainer.train()
    best, last = trainer.state.best_global_step, trainer.state.global_step
    folder = tmp_path/'quick_bert_toy'
    assert best < last == 4
    assert is_checkpoint(trainer, folder/f'checkpoint-{best}')
    assert not is_checkpoint(trainer, folder/f'checkpoint-{last}')
    ours = run(best_is_first, tmp_path/'ours', progress=False)
    assert all(torch.equal(w, trainer.model.student.state_dict()[name])
               for name, w in load_weights(ours/'model.safetensors').items())


def test_a_run_that_was_done_ends_with_the_best_again(best_is_first, tmp_path):
    folder = run(best_is_first, tmp_path, progress=False)
    final = {name: (folder/name).read_bytes() for name in ('model.safetensors', 'gates.safetensors')}
    for name in final: (folder/name).unlink()
    run(best_is_first, tmp_path, resume=True, progress=False)
    assert {name: (folder/name).read_bytes() for name in final} == final
