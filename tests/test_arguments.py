"""The arguments of a training: what can't work is refused, and Trainer computes on the named device."""
import pytest
import torch

from lad_nb.training import training_arguments


@pytest.mark.parametrize('wrong, says', [
    (dict(batch_size=32, accum_step=5), 'batch_size 32 is not divisible by accum_step 5'),
    (dict(total_step=0), 'total_step is 0; a whole number from 1 up'),
    (dict(warmup_step=11), 'warmup_step 11 is more than total_step 10'),
    (dict(lr=-1.), 'lr is -1.0; a number above 0')])
def test_what_cannot_work(tmp_path, wrong, says):
    with pytest.raises(ValueError, match=says): training_arguments(tmp_path, **dict(total_step=10) | wrong)


def test_micro_batches(tmp_path):
    assert training_arguments(tmp_path, 10, accum_step=4).per_device_train_batch_size == 8


def test_a_device_is_where_model_and_batches_go(monkeypatch):
    """Three CUDA devices that answer, and no more than that."""
    seen = []
    for name, answer in dict(is_available=lambda: True, device_count=lambda: 3, set_device=seen.append,
                             get_device_capability=lambda _: (9, 0), get_device_name=lambda _: 'one').items():
        monkeypatch.setattr(torch.cuda, name, answer)
    args = training_arguments('nowhere', 5, device_id=2)
    assert (str(args.device), str(args.distributed_state.device)) == ('cuda:2', 'cuda:2')
    assert args.n_gpu == 1 and seen[-1] == 2
