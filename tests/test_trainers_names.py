"""A `DistilTrainer` in transformers' own names: its method `train`, its best checkpoint, its epochs."""
import warnings

import pytest
import torch
from conftest import ready, same_bytes
from transformers import TrainerCallback

from lad_nb.data import encode
from lad_nb.durable import load_weights
from lad_nb.experiment import assemble_distiller, resolve, run
from lad_nb.health import check_teacher
from lad_nb.runs import checkpoints
from lad_nb.stepper import Stepper
from lad_nb.training import DistilArguments, DistilTrainer, train


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


class Dies(TrainerCallback):
    "Ends a training after some updates, as a kill would"
    def __init__(self, after): self.after = after
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.after: raise InterruptedError


def in_epochs(recipe, folder, callbacks=(), num_train_epochs=1.2):
    """A trainer that counts in epochs: of 160 rows in batches of sixteen, ten updates each."""
    plan = resolve(recipe, folder.parent)
    distiller, tokenizer = assemble_distiller(plan)
    args = DistilArguments(str(folder), num_train_epochs=num_train_epochs, save_steps=4,
                           per_device_train_batch_size=16, logging_steps=1, max_seq_len=32, use_cpu=True,
                           disable_tqdm=True)
    return DistilTrainer(distiller, args, encode(plan.rows, tokenizer, 32), tokenizer, callbacks)


def test_epochs_are_resumed(quick, tmp_path):
    whole = in_epochs(quick, tmp_path/'whole')
    assert whole.args.max_steps == 12
    train(whole)
    assert whole.state.max_steps == whole.state.global_step == 12
    with pytest.raises(InterruptedError): train(in_epochs(quick, tmp_path/'killed', [Dies(6)]))
    again = in_epochs(quick, tmp_path/'killed')
    train(again, resume=True)
    assert list(checkpoints(tmp_path/'killed')) == [4, 8, 12]
    assert same_bytes(tmp_path/'whole', tmp_path/'killed')


def test_a_stepper_knows_how_many_updates_epochs_have(quick, tmp_path):
    with Stepper(in_epochs(quick, tmp_path/'held')) as stepper:
        assert (stepper.done, stepper.total) == (0, 12)
        stepper.step(11)
        assert stepper.state == 'held'
        stepper.step()
        assert stepper.state == 'done'


def test_a_teacher_that_knows_nothing_is_told_of(quick, tmp_path):
    """Fifteen epochs see 2,400 rows, a twentieth of which is enough to say so; 1.2 epochs see too few."""
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        check_teacher(in_epochs(quick, tmp_path/'short'))
    with pytest.warns(UserWarning, match='On 120 training rows .* no better than chance'):
        check_teacher(in_epochs(quick, tmp_path/'long', num_train_epochs=15))
