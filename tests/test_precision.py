"""Losses are computed in fp32 at least, whatever the forward passes are in; one below zero stops a run."""
import pytest
import torch
from conftest import ready
from torch.nn import functional as F

from lad_nb.losses import hard_loss, soft_loss
from lad_nb.experiment import run
from lad_nb.runs import read_log
from lad_nb.training import train


def in_float64(distiller, batch, out):
    """The parts of a loss from the same logits and states, term by term in float64."""
    student, teacher = out.student_logits.double(), out.teacher_logits.double()
    hidden = []
    for pair, target in zip(distiller.mapping.pairs, out.targets):
        gap = (out.student_hidden[pair.student - 1].double() - target.double())**2
        mask = batch['attention_mask'].unsqueeze(-1).double()
        masked = distiller.objective.mask_padding
        hidden.append((gap*mask).sum()/(mask.sum()*gap.shape[-1]) if masked else gap.mean())
    tau = distiller.objective.softmax_temp
    soft = F.kl_div((student/tau).log_softmax(-1), (teacher/tau).softmax(-1), reduction='batchmean')*tau**2
    return F.cross_entropy(student, batch['labels']), soft, torch.stack(hidden)


@pytest.mark.parametrize('method', ['lad', 'bert_pkd', 'alp_kd_hidden_v2'])
def test_parts_of_a_bf16_pass(quick, tmp_path, method):
    """Rounding of logits and states explains all but a millionth; losses taken in bf16 were a third off."""
    trainer = ready(quick.replace(method=method, softmax_temp=10.), tmp_path)
    distiller, batch = trainer.model.eval(), next(iter(trainer.get_train_dataloader()))
    batch.pop('row')
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        out = distiller(**batch, output_states=True)
    assert out.student_logits.dtype == torch.bfloat16
    for ours, theirs in zip((out.hard, out.soft, out.hidden), in_float64(distiller, batch, out)):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-7)


def test_a_bf16_run_beside_its_fp32_twin(quick, tmp_path):
    """Every logged part of both is possible, and they are one run: rounding of the forward passes is all that
    differs."""
    recipe = quick.replace(dropout=0., log_step=1, total_step=4)
    recipes = [recipe.replace(experiment=p, precision=p) for p in ('fp32', 'bf16')]
    logs = [read_log(run(r, tmp_path, progress=False)) for r in recipes]
    for full, half in zip(*logs):
        for part in ('hard', 'soft', 'hidden_1', 'hidden_2'):
            assert half[part] >= 0 and full[part] >= 0
            assert half[part] == pytest.approx(full[part], rel=.05, abs=1e-3), (full['step'], part)


@pytest.mark.parametrize('tau', [1., 5., 10.])
@pytest.mark.parametrize('near', [1., .05])
def test_soft_loss_and_its_direction(tau, near):
    """Of logits rounded to bf16: the value that float64 has of them, and the gradient's direction."""
    torch.manual_seed(0)
    teacher = 2*torch.randn(32, 2)
    student = (teacher + near*torch.randn(32, 2)).bfloat16().requires_grad_()
    loss = soft_loss(student, teacher.bfloat16(), tau)
    exact = student.detach().double().requires_grad_()
    reference = soft_loss(exact, teacher.bfloat16().double(), tau)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6) and loss >= 0
    for value in (loss, reference): value.backward()
    assert F.cosine_similarity(student.grad.double().flatten(), exact.grad.flatten(), dim=0) > .9999


def test_float64_stays():
    logits = torch.randn(4, 3, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0])
    assert hard_loss(logits, labels).dtype == soft_loss(logits, -logits, 2.).dtype == torch.float64


def test_a_loss_below_zero_stops(quick, tmp_path, monkeypatch):
    """A loss of one's own that is no loss: the term and the update are named, nothing of it is written."""
    monkeypatch.setattr('lad_nb.distiller.soft_loss', lambda *args: soft_loss(*args) - 1.)
    trainer = ready(quick, tmp_path)
    said = 'Update 1 of 6: its soft term is below zero, which no square and no divergence can be'
    with pytest.raises(FloatingPointError, match=said): train(trainer)
    assert not list((tmp_path/'quick_bert_toy').glob('checkpoint-*'))
