"""Numbers that go wrong: the update stops; the term, the layer and the rows are named; what was good stays;
and what could be known before is said before."""
import json
import shutil
import traceback
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import ready
from torch.nn.functional import one_hot
from transformers import TrainerCallback

import lad_nb

from lad_nb.cache import teacher_cache
from lad_nb.durable import find_damage
from lad_nb.experiment import run
from lad_nb.encoders import load_classifier
from lad_nb.health import check_teacher
from lad_nb.runs import checkpoints, read_log
from lad_nb.training import DistilTrainer, train

pytestmark = pytest.mark.faults


class Spoil(TrainerCallback):
    """Does something to the trainer's models before one update."""
    def __init__(self, step, how): self.step, self.how = step, how
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step: self.how(self.trainer)


def spoiled(recipe, root, how, step=4):
    """What is said when update 4 of 6 goes wrong; checkpoint 2 is there and whole, the log ends before."""
    spoil = Spoil(step, how)
    spoil.trainer = ready(recipe, root, [spoil])
    with pytest.raises(FloatingPointError) as e:
        train(spoil.trainer, spoil.trainer.description)
    folder = root/f'{recipe.experiment}_bert_toy'
    assert list(checkpoints(folder)) == [2] and find_damage(folder/'checkpoint-2') is None
    assert not (folder/'model.safetensors').exists()
    log = read_log(folder)
    assert [line['step'] for line in log] == [2] and all(np.isfinite(x) for x in log[0].values())
    said = str(e.value)
    for part in (f'Update {step} of 6', 'checkpoint-2 is the last checkpoint', 'a lower lr'):
        assert part in said
    return said, spoil.trainer


def rows_said(said, trainer):
    """The rows that the message names are those of the update."""
    rows = [int(r) for r in said.partition('The batch was rows ')[2].partition(' of the')[0].split(', ')]
    if len(trainer.update) == 1: assert rows == sorted(trainer.update[0][0].tolist())
    return rows


def set_nan(parameter): parameter.data.view(-1)[0] = float('nan')


def test_a_student_layer(quick, tmp_path):
    def spoil(trainer): set_nan(trainer.model.student.bert.encoder.layer[1].output.dense.weight)
    said, trainer = spoiled(quick, tmp_path, spoil)
    assert 'nor is its hard term, its soft term, its hidden term of student layer 2 (from gate 4)' in said
    assert 'student layer 1' not in said
    assert 'weights that are not finite: student layer 2;' in said and 'first in student layer 2' in said
    assert len(rows_said(said, trainer)) == 16


def test_a_gate(quick, tmp_path):
    said, _ = spoiled(quick, tmp_path, lambda t: set_nan(t.model.objective.blocks()['gate 3'].linear.weight))
    assert 'nor is its hidden term of student layer 2 (from gate 4)' in said and 'hard' not in said
    assert 'weights that are not finite: gate 3;' in said and 'first in gate 3' in said


def test_a_teacher_layer(quick, tmp_path):
    def spoil(trainer): set_nan(trainer.model.teacher.bert.encoder.layer[2].output.dense.bias)
    said, _ = spoiled(quick.replace(method='bert_pkd'), tmp_path, spoil)
    assert 'nor is its soft term, its hidden term of student layer 2 (from layer 4)' in said
    assert 'first in teacher layer 3' in said


def test_one_row_of_one_micro_batch(quick, tmp_path):
    """One word's embedding is infinite: of four micro-batches, one that has it is named, and in it the rows
    that have it."""
    def spoil(trainer):
        trainer.word = trainer.processing_class.convert_tokens_to_ids('alice')
        trainer.model.student.bert.embeddings.word_embeddings.weight.data[trainer.word] = float('inf')
    said, trainer = spoiled(quick.replace(accum_step=4, copy_embeddings=True, batch_size=32), tmp_path, spoil)
    named = sorted(int(r) for r in said.partition('in row')[2].lstrip('s ').partition('.')[0].split(', '))
    batch = rows_said(said, trainer)
    data = trainer.train_dataset
    assert len(batch) == 8 and named == [r for r in batch if trainer.word in data[r]['input_ids']] != []


def test_a_gradient_without_a_loss(quick, tmp_path):
    """The loss is finite, the gradient of one gate is not."""
    def spoil(trainer):
        weight = trainer.model.objective.blocks()['gate 2'].linear.weight
        weight.register_hook(lambda g: g*float('inf'))
    said, _ = spoiled(quick, tmp_path, spoil)
    assert 'the loss is finite, the gradient is not, from the loss back: gate 2. ' in said
    assert 'weights' not in said


def test_a_student_gradient_without_a_loss(quick, tmp_path):
    def nan(module, into, out): return tuple(g*float('nan') for g in into)
    def spoil(trainer): trainer.model.student.bert.encoder.layer[0].output.register_full_backward_hook(nan)
    said, _ = spoiled(quick, tmp_path, spoil)
    assert 'from the loss back: student layer 1, ' in said
    assert 'student layer 2' not in said.partition('. The batch')[0]


def test_weights_that_are_not_finite_are_not_written(quick, tmp_path):
    """The optimiser spoils them in the update before a checkpoint: loss and gradient were fine."""
    def spoil(trainer):
        for group in trainer.optimizer.param_groups: group['weight_decay'] = float('nan')
    spoil = Spoil(4, spoil)
    spoil.trainer = ready(quick, tmp_path, [spoil])
    said = ('After update 4 weights are not finite: .*student layer 1.* were not written; '
            'checkpoints before are sound')
    with pytest.raises(FloatingPointError, match=said): train(spoil.trainer)
    assert list(checkpoints(tmp_path/'quick_bert_toy')) == [2]


def test_a_cache_of_states_that_are_not_finite(quick, tiny, tmp_path):
    trainer = ready(quick, tmp_path)
    set_nan(trainer.model.teacher.bert.encoder.layer[2].output.dense.bias)
    with pytest.raises(FloatingPointError, match="The teacher's layer_3, layer_4, logits are not finite"):
        teacher_cache(trainer.model.teacher, trainer.train_dataset, trainer.processing_class,
                      tmp_path/'cache', progress=False)
    assert not list((tmp_path/'cache').rglob('*.safetensors'))


@pytest.mark.parametrize('label', [2, -1, -99])  # -100 says that a row has none
def test_a_label_outside_the_head(quick, tmp_path, label):
    trainer = ready(quick, tmp_path)
    labels = list(trainer.train_dataset['labels'])
    labels[5] = label
    data = trainer.train_dataset.remove_columns(['labels', 'row']).add_column('labels', labels)
    said = (rf"label of training row 5 \(from 0\) is {label}; the student's head allows 0 \(entailment\), "
            r"1 \(not_entailment\). 1 of 160")
    with pytest.raises(ValueError, match=said):
        DistilTrainer(trainer.model, trainer.args, data, trainer.processing_class)


def other_config(tiny, folder, **changed):
    shutil.copytree(tiny, folder)
    config = json.loads((folder/'config.json').read_text()) | changed
    (folder/'config.json').write_text(json.dumps(config))
    return folder


def test_label_orders(tiny, quick, tmp_path):
    """Ids decide, not the order in which a config lists them; a config that contradicts itself is refused."""
    right, wrong = dict(entailment=0, not_entailment=1), dict(entailment=1, not_entailment=0)
    names = {'1': 'not_entailment', '0': 'entailment'}
    listed = other_config(tiny, tmp_path/'listed', id2label=names, label2id=right)
    load_classifier(listed, 'toy')

    names = {'1': 'entailment', '0': 'not_entailment'} # listed in the task's order, and meant the other way
    turned = other_config(tiny, tmp_path/'turned', id2label=names, label2id=wrong)
    both = r"\['not_entailment', 'entailment'\].*\['entailment', 'not_entailment'\]"
    with pytest.raises(ValueError, match=both):
        run(quick.replace(teacher=str(turned)), tmp_path, progress=False)

    torn = other_config(tiny, tmp_path/'torn', label2id=wrong)
    said = (r"its id2label says \['entailment', 'not_entailment'\], "
            r"its label2id \['not_entailment', 'entailment'\]")
    with pytest.raises(ValueError, match=said):
        run(quick.replace(teacher=str(torn)), tmp_path, progress=False)
    assert not (tmp_path/'quick_bert_toy').exists()


def know_the_labels(trainer, cached):
    """Have its teacher answer what the labels say."""
    data = trainer.train_dataset
    answers = one_hot(torch.tensor(list(data['labels'])), 2).float()
    if cached:
        trainer.cache.shards = [shard | dict(logits=answers) for shard in trainer.cache.shards]
        return
    row = {tuple(ids): i for i, ids in enumerate(data['input_ids'])}
    def answer(input_ids, **_):
        return None, answers[[row[tuple(ids[ids != 0].tolist())] for ids in input_ids]]
    trainer.model.ask_teacher = answer


@pytest.mark.parametrize('cached', [False, True])
def test_a_teacher_at_chance(quick, tmp_path, cached):
    """A head of random weights is noticed, one that knows the labels is not; and looking changes no byte."""
    recipe = quick.replace(total_step=128, warmup_step=1, ckpt_step=128, teacher_cache=cached)
    def look(know):
        trainer = ready(recipe, tmp_path)
        if know: know_the_labels(trainer, cached)
        before = torch.get_rng_state()
        check_teacher(trainer)
        assert torch.equal(before, torch.get_rng_state())
    said = (r'On 102 training rows the teacher is right on \d+ \(the most frequent label is on 52\): '
            r'no better than chance \(p = .*Was it fine-tuned')
    with pytest.warns(UserWarning, match=said): look(know=False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        look(know=True)


def test_no_cost_when_all_is_well(quick, tmp_path):
    """One question per update, whatever the number of terms."""
    package = Path(lad_nb.__file__).parent
    trainer = ready(quick.replace(ckpt_step=100, log_step=100), tmp_path)
    asked, ask = [], torch.Tensor.__bool__
    def counted(tensor):
        callers = traceback.extract_stack(limit=3)[:-1]
        if any(Path(f.filename).parent == package for f in callers): asked.append(1)
        return ask(tensor)
    with patch('torch.Tensor.__bool__', counted): trainer.train()
    weights = len(list(trainer.model.named_parameters())) # asked once, when the last checkpoint is written
    assert len(asked) == 6 + weights
