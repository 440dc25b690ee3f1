"""The arguments of a training: what can't work is refused, and Trainer computes on the named device."""
from types import SimpleNamespace

import pytest
import torch

from lad_nb.experiment import resolve
from lad_nb.recipes import Recipe
from lad_nb.training import DistilArguments
from lad_nb.updates import TwoHalves


def arguments(folder, device='cpu', **settings):
    plan = SimpleNamespace(recipe=Recipe(**settings), folder=folder, device=device, precision='fp32')
    return DistilArguments.from_plan(plan)


@pytest.mark.parametrize('wrong, says', [
    (dict(batch_size=32, accum_step=5), 'batch_size 32 is not divisible by accum_step 5'),
    (dict(total_step=0), 'total_step is 0; a whole number from 1 up'),
    (dict(warmup_step=11), 'warmup_step 11 is more than total_step 10'),
    (dict(lr=-1.), 'lr is -1.0; a number above 0')])
def test_what_cannot_work(quick, tmp_path, wrong, says):
    with pytest.raises(ValueError, match=says):
        resolve(quick.replace(**dict(total_step=10) | wrong), tmp_path)


def test_micro_batches(tmp_path):
    args = arguments(tmp_path, total_step=10, warmup_step=0, accum_step=4)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (8, 4)


def test_every_setting_that_a_recipe_names_arrives(tmp_path):
    """Fields that name a setting of the trainer, each with a value of its own."""
    changed = dict(total_step=77, warmup_step=7, lr=.5, beta1=.1, beta2=.2, eps=.3, weight_decay=.4,
                   max_norm=5., gate_lr=.6, gate_beta1=.7, gate_beta2=.8, gate_eps=.9,
                   gate_weight_decay=1., gate_max_norm=2., gate_total_step=88,
                   gate_warmup_step=8, ckpt_step=9, keep_ckpt=3, log_step=11, seed=12,
                   padding='max_length', max_seq_len=24, length_groups=True)
    args = arguments(tmp_path, **changed)
    names = dict(total_step='max_steps', warmup_step='warmup_steps', lr='learning_rate', beta1='adam_beta1',
                 beta2='adam_beta2', eps='adam_epsilon', ckpt_step='save_steps', keep_ckpt='save_total_limit',
                 log_step='logging_steps')
    assert {name: getattr(args, names.get(name, name)) for name in changed} == changed
    assert args.data_seed == 12 and not args.keep_last_batch
    assert arguments(tmp_path, keep_last_batch=True).keep_last_batch


def test_a_device_is_where_model_and_batches_go(monkeypatch):
    """Three CUDA devices that answer, and no more than that."""
    seen = []
    for name, answer in dict(is_available=lambda: True, device_count=lambda: 3, set_device=seen.append,
                             get_device_capability=lambda _: (9, 0), get_device_name=lambda _: 'one').items():
        monkeypatch.setattr(torch.cuda, name, answer)
    args = arguments('nowhere', device='cuda:2')
    assert (str(args.device), str(args.distributed_state.device)) == ('cuda:2', 'cuda:2')
    assert args.n_gpu == 1 and seen[-1] == 2


@pytest.mark.parametrize('warmup, gates, rates', [
    (.1, None, [(0., 0.), (.25, .25), (.5, .5)]), (4, None, [(0., 0.), (.25, .25), (.5, .5)]),
    (.1, 2, [(0., 0.), (.25, .5), (.5, 1.)]), (0, None, [(1., 1.), (39/40, 39/40), (38/40, 38/40)])])
def test_a_warmup_below_one_is_a_share_of_the_updates(tmp_path, warmup, gates, rates):
    """As in Trainer: 0.1 of forty updates are four. The gates warm up with the student unless told."""
    halves = TwoHalves()
    halves.args = DistilArguments(str(tmp_path), warmup_steps=warmup, gate_warmup_step=gates, use_cpu=True)
    weight = lambda: torch.zeros(1, requires_grad=True)
    groups = [dict(params=[weight()], half=half) for half in ('student', 'objective')]
    halves.optimizer, halves.lr_scheduler = torch.optim.AdamW(groups, lr=1.), None
    schedule, seen = halves.create_scheduler(40), []
    for _ in rates:
        seen.append(tuple(schedule.get_last_lr()))
        halves.optimizer.step()
        schedule.step()
    assert seen == rates


@pytest.mark.parametrize('given, says', [
    (dict(lr_scheduler_type='cosine'), "lr_scheduler_type is 'cosine'; 'linear' was expected"),
    (dict(optim='adafactor'), "optim is 'adafactor'; 'adamw_torch' or 'adamw_torch_fused' was expected"),
    (dict(label_smoothing_factor=.1), 'label_smoothing_factor is 0.1; 0.0 was expected.*soft_weight'),
    (dict(train_sampling_strategy='sequential'), "'random' was expected.*length_groups=True"),
    (dict(fp16=True), "mixed_precision is 'fp16'.*take bf16=True")])
def test_settings_of_trainer_that_are_not_followed(tmp_path, given, says):
    with pytest.raises(ValueError, match=says): DistilArguments(str(tmp_path), use_cpu=True, **given)
