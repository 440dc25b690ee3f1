"""Every method against reference numbers: targets, losses and gradients, through the classes that train."""
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lad_nb.distiller import Objective
from lad_nb.gates import content_shares, mixing_weights
from lad_nb.mappings import make_mapping

FOLDER = Path(os.environ.get('LAD_NB_GOLDEN') or Path(__file__).parents[2]/'shared'/'golden')
FILES = sorted(f for f in FOLDER.glob('*.safetensors') if not f.name.startswith('traj_')) # those are test_trajectories.py's
RELATIVE = 1e-9

# how each method of the reference is said here; T, M: teacher and student layers
METHODS = dict(
    lad=lambda T, M: make_mapping('lad', T, M),
    lad_cls=lambda T, M: make_mapping('lad_cls', T, M),
    lad_no=lambda T, M: make_mapping('lad_no', T, M),
    lad_no_bucket=lambda T, M: make_mapping('lad_no_bucket', T, M),
    lad_reversed=lambda T, M: make_mapping('lad_reversed', T, M),
    lad_user_defined=lambda T, M: make_mapping('lad_user_defined', T, M, gate_indices=[T, 2], student_indices=[M, 1]),
    partial_lad_1=lambda T, M: make_mapping('partial_lad', T, M, gate_indices=[T//M]),
    bert_pkd=lambda T, M: make_mapping('bert_pkd', T, M),
    kd=lambda T, M: make_mapping('kd', T, M),
    alp_kd=lambda T, M: make_mapping('alp_kd', T, M),
    alp_kd_hidden=lambda T, M: make_mapping('alp_kd_hidden', T, M),
    alp_kd_hidden_v2=lambda T, M: make_mapping('alp_kd_hidden_v2', T, M),
)

if not FILES:
    pytest.skip(f'no reference numbers: {FOLDER} holds no .safetensors files; LAD_NB_GOLDEN names another folder', allow_module_level=True)


def close(ours, reference, what):
    """Relative to the largest entry of the tensor: single entries may be zero."""
    assert ours.shape == reference.shape, f'{what}: shape {tuple(ours.shape)}, reference {tuple(reference.shape)}'
    error = (ours - reference).abs().max()/reference.abs().max().clamp(min=1e-30)
    assert error <= RELATIVE, f'{what}: relative error {error:.1e}'


@pytest.fixture(params=FILES, ids=lambda f: f.stem)
def golden(request):
    with safe_open(request.param, 'pt') as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()


def number(method, layer, place): return place if method == 'lad_reversed' else layer # how the reference counts gates


def run(golden, method):
    """One forward and backward pass on the reference's states; the tensors that got gradients, and the output."""
    ref, meta = golden
    T, M, H, S = (int(meta[k]) for k in 'TMHS')
    student = [ref[f'student_hidden.{m}'].clone().requires_grad_() for m in range(1, M + 1)]
    logits = ref['student_logits'].clone().requires_grad_()
    objective = Objective(METHODS[method](T, M), H, norm='sequence', seq_len=S, soft_weight=float(meta['soft_weight']),
                          hard_weight=float(meta['hard_weight']), softmax_temp=float(meta['softmax_temp']), mu=float(meta['mu'])).double()
    blocks = {} if objective.gates is None else {number(method, k, p): objective.gates.gate[str(p)]
                                                 for k, p in objective.gates.place.items() if str(p) in objective.gates.gate}
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
    close((objective.hard_weight*out.hard + objective.soft_weight*out.soft).detach(), mine['logit_loss'], 'logit loss')
    pairs = {p.student: i for i, p in enumerate(objective.mapping.pairs)}
    assert {int(k.split('.')[1]) for k in mine if k.startswith('target.')} == set(pairs)
    for m, i in pairs.items():
        target = out.targets[i][:, 0] if objective.mapping.on == 'cls' else out.targets[i]
        close(target.detach(), mine[f'target.{m}'], f'target {m}')
        close((mu/M*out.hidden[i]).detach(), mine[f'hidden_loss.{m}'], f'hidden loss {m}')
        if f'attention.{m}' in mine: close(out.attention[m].detach(), mine[f'attention.{m}'], f'attention {m}')

    ours = {'student_logits': logits.grad, **{f'student_hidden.{m}': h.grad for m, h in enumerate(student, start=1)},
            **{f'gate.{p}.{n}': w.grad for p, g in blocks.items() for n, w in g.named_parameters()}}
    ours = {k: g for k, g in ours.items() if g is not None}
    theirs = {k.removeprefix('grad.'): v for k, v in mine.items() if k.startswith('grad.')}
    for k in ours.keys() | theirs.keys():   # one that is absent is zero
        if k not in theirs: assert ours[k].abs().max() == 0, f'gradient of {k} should be zero'
        else: close(ours[k], theirs[k], f'gradient of {k}')


def test_reference_has_no_other_method(golden):
    methods = {k.split('.')[0] for k in golden[0]} - {'teacher_hidden', 'student_hidden', 'teacher_logits', 'student_logits', 'labels', 'gate'}
    assert methods == set(METHODS)


def test_what_gates_take(golden):
    """Mixing weights, content shares, and the share of the norms' biases."""
    ref, meta = golden
    objective, out, *_ = run(golden, 'lad')
    close(mixing_weights(objective.gates, out.teacher_hidden), ref['lad.contribution'], 'mixing weight')
    shares = content_shares(objective.gates, out.teacher_hidden)
    close(shares[:, :-1], ref['lad.content_share'], 'content share')
    close(shares[:, -1], ref['lad.content_share_bias'], 'content share of the bias')
