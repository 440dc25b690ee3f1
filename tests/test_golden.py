"""Every method against reference numbers: targets, losses and gradients, through the classes that train."""
import os
from pathlib import Path

import pytest
from safetensors import safe_open

from lad_nb.distiller import Objective
from lad_nb.gates import content_shares, mixing_weights
from lad_nb.mappings import make_mapping

FOLDER = Path(os.environ.get('LAD_NB_GOLDEN') or Path(__file__).parents[2]/'shared'/'golden')
FILES = sorted(set(FOLDER.glob('*.safetensors')) - set(FOLDER.glob('traj_*'))) # for test_trajectories.py
RELATIVE = 1e-9

# how each method of the reference is said here; T, M: teacher and student layers
METHODS = dict(
    lad=lambda T, M: make_mapping('lad', T, M),
    lad_cls=lambda T, M: make_mapping('lad_cls', T, M),
    lad_no=lambda T, M: make_mapping('lad_no', T, M),
    lad_no_bucket=lambda T, M: make_mapping('lad_no_bucket', T, M),
    lad_reversed=lambda T, M: make_mapping('lad_reversed', T, M),
    lad_user_defined=lambda T, M: make_mapping('lad_user_defined', T, M, gate_indices=[T, 2],
                                               student_indices=[M, 1]),
    partial_lad_1=lambda T, M: make_mapping('partial_lad', T, M, gate_indices=[T//M]),
    bert_pkd=lambda T, M: make_mapping('bert_pkd', T, M),
    kd=lambda T, M: make_mapping('kd', T, M),
    alp_kd=lambda T, M: make_mapping('alp_kd', T, M),
    alp_kd_hidden=lambda T, M: make_mapping('alp_kd_hidden', T, M),
    alp_kd_hidden_v2=lambda T, M: make_mapping('alp_kd_hidden_v2', T, M),
)

if not FILES:
    pytest.skip(f'no reference numbers: {FOLDER} holds no .safetensors files; '
                'LAD_NB_GOLDEN names another folder', allow_module_level=True)


def close(ours, reference, what):
    """Relative to the largest entry of the tensor: single entries may be zero."""
    shapes = tuple(ours.shape), tuple(reference.shape)
    assert shapes[0] == shapes[1], f'{what}: shape {shapes[0]}, reference {shapes[1]}'
    error = (ours - reference).abs().max()/reference.abs().max().clamp(min=1e-30)
    assert error <= RELATIVE, f'{what}: relative error {error:.1e}'


@pytest.fixture(params=FILES, ids=lambda f: f.stem)
def golden(request):
    with safe_open(request.param, 'pt') as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()


def number(method, layer, place):
    """How the reference counts gates."""
    return place if method == 'lad_reversed' else layer


def run(golden, method):
    """One forward and backward pass on the reference's states: what got gradients, and the output."""
    ref, meta = golden
    T, M, H, S = (int(meta[k]) for k in 'TMHS')
    student = [ref[f'student_hidden.{m}'].clone().requires_grad_() for m in range(1, M + 1)]
    logits = ref['student_logits'].clone().requires_grad_()
    weights = {k: float(meta[k]) for k in ('soft_weight', 'hard_weight', 'softmax_temp', 'mu')}
    objective = Objective(METHODS[method](T, M), H, norm='sequence', seq_len=S, **weights).double()
    place, learned = {} if objective.gates is None else objective.gates.place, objective.blocks()
    blocks = {number(method, k, p): learned[f'gate {k}'] for k, p in place.items() if f'gate {k}' in learned}
    for k, gate in blocks.items(): gate.load_state_dict({n: ref[f'gate.{k}.{n}'] for n in gate.state_dict()})
    teacher = [ref[f'teacher_hidden.{k}'] for k in range(1, T + 1)]
    out = objective(student, logits, teacher, ref['teacher_logits'], ref['labels'], output_states=True)
    out.loss.backward()
    return objective, out, student, logits, blocks


@pytest.mark.parametrize('method', METHODS)
def test_golden(golden, method):
    ref, meta = golden
    mine = {k.removeprefix(f'{method}.'): v for k, v in ref.items() if k.startswith(f'{method}.')}
    assert mine, f'the reference has no {method}'
    objective, out, student, logits, blocks = run(golden, method)
    M, mu = int(meta['M']), float(meta['mu'])

    close(out.loss.detach(), mine['loss'], 'loss')
    logit_loss = objective.hard_weight*out.hard + objective.soft_weight*out.soft
    close(logit_loss.detach(), mine['logit_loss'], 'logit loss')
    pairs = {p.student: i for i, p in enumerate(objective.mapping.pairs)}
    assert {int(k.split('.')[1]) for k in mine if k.startswith('target.')} == set(pairs)
    for m, i in pairs.items():
        target = out.targets[i][:, 0] if objective.mapping.on == 'cls' else out.targets[i]
        close(target.detach(), mine[f'target.{m}'], f'target {m}')
        close((mu/M*out.hidden[i]).detach(), mine[f'hidden_loss.{m}'], f'hidden loss {m}')
        if f'attention.{m}' in mine:
            close(out.attention[m].detach(), mine[f'attention.{m}'], f'attention {m}')

    ours = {f'student_hidden.{m}': h.grad for m, h in enumerate(student, start=1)}
    for p, gate in blocks.items(): ours |= {f'gate.{p}.{n}': w.grad for n, w in gate.named_parameters()}
    ours = {k: g for k, g in ours.items() if g is not None} | {'student_logits': logits.grad}
    theirs = {k.removeprefix('grad.'): v for k, v in mine.items() if k.startswith('grad.')}
    for k in ours.keys() | theirs.keys():   # one that is absent is zero
        if k not in theirs: assert ours[k].abs().max() == 0, f'gradient of {k} should be zero'
        else: close(ours[k], theirs[k], f'gradient of {k}')


def test_reference_has_no_other_method(golden):
    given = {'teacher_hidden', 'student_hidden', 'teacher_logits', 'student_logits', 'labels', 'gate'}
    assert {k.split('.')[0] for k in golden[0]} - given == set(METHODS)


def test_what_gates_take(golden):
    """Mixing weights, content shares, and the share of the norms' biases."""
    ref, meta = golden
    objective, out, *_ = run(golden, 'lad')
    close(mixing_weights(objective.gates, out.teacher_hidden), ref['lad.contribution'], 'mixing weight')
    shares = content_shares(objective.gates, out.teacher_hidden)
    close(shares[:, :-1], ref['lad.content_share'], 'content share')
    close(shares[:, -1], ref['lad.content_share_bias'], 'content share of the bias')
