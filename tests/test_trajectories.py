"""Five updates of every training function of the paper's scripts: our trainer makes the same ones.

The files hold what those scripts, run as published, computed in float64 on tiny models: weights before and
after, every batch, every loss, the gradients of the first update. Here the same models and batches go through
`DistilTrainer`, with its optimiser groups, schedules, clipping and accumulation."""
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from safetensors import safe_open
from torch.utils.data import SequentialSampler
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from lad_nb.models import load_tokenizer
from lad_nb.distiller import Distiller
from lad_nb.mappings import make_mapping
from lad_nb.training import DistilArguments, DistilTrainer, train
from lad_nb.recipes import Recipe
from lad_nb.runs import read_log

FOLDER = Path(os.environ.get('LAD_NB_GOLDEN') or Path(__file__).parents[2]/'shared'/'golden')
if not list(FOLDER.glob('traj_*.safetensors')):
    pytest.skip(f'no trajectories: {FOLDER} holds no traj_*.safetensors; LAD_NB_GOLDEN names another folder',
                allow_module_level=True)

FLOAT64 = 1e-8   # gradients and weights, relative to the largest entry of their tensor
LOGGED = 1e-6    # losses, which the log keeps in fp32
ROUNDING = 1e-11 # gradient of attention.self.key.bias: zero in exact arithmetic

METHODS = dict( # file: how the method is said here, beside T and M
    lad_t12_m6=('lad', {}), lad_t12_m4=('lad', {}), lad_accum2_t12_m6=('lad', {}),
    lad_cls_t12_m6=('lad_cls', {}), lad_no_t12_m6=('lad_no', {}), lad_no_t12_m4=('lad_no', {}),
    lad_user_defined_t12_m6=('lad_user_defined', dict(gate_indices=[12, 10, 7], student_indices=[6, 5, 1])),
    partial_lad_1_t12_m6=('partial_lad', dict(gate_indices=[2])),
    partial_lad_2_t12_m6=('partial_lad', dict(gate_indices=[2, 4])),
    alp_kd_t12_m6=('alp_kd', {}), alp_kd_hidden_t12_m6=('alp_kd_hidden', {}),
    alp_kd_hidden_v2_t12_m6=('alp_kd_hidden_v2', {}), alp_kd_hidden_v2_t12_m4=('alp_kd_hidden_v2', {}),
    bert_pkd_t12_m6=('bert_pkd', {}),
    pkd_hidden_user_defined_t12_m6=('pkd_hidden_user_defined',
                                    dict(teacher_indices=[12, 10, 7], student_indices=[6, 5, 1])),
    pkd_cls_user_defined_t12_m6=('pkd_cls_user_defined',
                                 dict(teacher_indices=[12, 10, 7], student_indices=[6, 5, 1])),
)


class InOrder(DistilTrainer):
    "Takes rows as they come: in the order in which the scripts took them"
    def _get_train_sampler(self, train_dataset=None): return SequentialSampler(self.train_dataset)


class FirstUpdate(TrainerCallback):
    "Keeps the first update's gradients, before they are clipped"
    def __init__(self): self.grads = {}
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step: return
        self.grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Trajectory:
    "A file, and what it says of settings"
    def __init__(self, path):
        with safe_open(path, 'pt') as f:
            self.tensors = {k: f.get_tensor(k) for k in f.keys()}
            self.meta = json.loads(f.metadata()['meta'])

    def under(self, prefix):
        start = f'{prefix}.'
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}

    def model(self, which, layers):
        m, state = self.meta, self.under(which)
        config = BertConfig(vocab_size=m['vocab'], hidden_size=m['H'], num_hidden_layers=layers,
                            num_attention_heads=m['heads'], intermediate_size=m['d_ff'], num_labels=m['C'],
                            hidden_dropout_prob=0., attention_probs_dropout_prob=0.,
                            max_position_embeddings=len(state['bert.embeddings.position_embeddings.weight']),
                            type_vocab_size=len(state['bert.embeddings.token_type_embeddings.weight']))
        model = BertForSequenceClassification(config).double()
        model.load_state_dict(state)
        return model

    def distiller(self, mapping):
        m = self.meta
        loss = {n: m[n] for n in ('soft_weight', 'hard_weight', 'softmax_temp', 'mu')}
        made = Distiller(self.model('student_before', m['M']), self.model('teacher', m['T']), mapping,
                         norm=m['gate_norm'] or 'sequence', seq_len=m['S'], **loss)
        made.objective.double()
        gates = self.under('gates_before')
        for k, gate in gates_of(made).items():
            gate.load_state_dict({n: gates[f'{k}.{n}'] for n in gate.state_dict()})
        return made

    def arguments(self, folder):
        m = self.meta
        both = {n: m[n] for n in ('beta1', 'beta2', 'eps')}
        same = {n: m[n] for n in ('lr', 'gate_lr', 'max_norm', 'gate_max_norm', 'weight_decay',
                                  'gate_weight_decay', 'total_step', 'warmup_step', 'batch_size',
                                  'accum_step')}
        recipe = Recipe(log_step=1, ckpt_step=m['total_step'], padding='max_length', max_seq_len=m['S'],
                        **both, **{f'gate_{n}': v for n, v in both.items()}, **same)
        plan = SimpleNamespace(recipe=recipe, folder=folder, device='cpu', precision='fp32')
        return DistilArguments.from_plan(plan, progress=False)

    def rows(self):
        batches = self.under('batches')
        return Dataset.from_dict({k: v.flatten(0, 1).tolist() for k, v in batches.items()})


def gates_of(distiller):
    "{number: gate block}, counted by the layer that enters it"
    return {int(name.split()[1]): block for name, block in distiller.objective.blocks().items()}


def gap(ours, theirs): return ((ours - theirs).abs().max()/theirs.abs().max().clamp(min=1e-30)).item()


@pytest.fixture
def trained(request, tiny, tmp_path):
    path = FOLDER/f'traj_{request.param}.safetensors'
    if not path.is_file(): pytest.skip(f'there is no {path.name}')
    method, options = METHODS[request.param]
    t = Trajectory(path)
    distiller, first = t.distiller(make_mapping(method, t.meta['T'], t.meta['M'], **options)), FirstUpdate()
    batch = {k: v[0] for k, v in t.under('batches').items()}
    students = [p.student for p in distiller.mapping.pairs]
    targets = dict(zip(students, distiller(**batch, output_states=True).targets))
    trainer = InOrder(distiller, t.arguments(tmp_path), t.rows(), load_tokenizer(tiny), callbacks=[first])
    train(trainer)
    return t, distiller, targets, first.grads, read_log(tmp_path)


@pytest.mark.parametrize('trained', METHODS, indirect=True)
def test_trajectory(trained):
    t, distiller, targets, grads, log = trained
    m, worst = t.meta, dict(targets=0., losses=0., gradients=0., weights=0.)

    assert [m_ for m_, *_ in m['pairs']] == list(targets)
    for k, target in t.under('targets').items():
        ours = targets[int(k)] if target.dim() == 3 else targets[int(k)][:, 0]
        worst['targets'] = max(worst['targets'], gap(ours.detach(), target))

    of_updates = lambda losses: losses.unflatten(0, (-1, m['accum_step'])).mean(1) # not of micro-batches
    logits, hidden = of_updates(t.tensors['losses.logits']), of_updates(t.tensors['losses.hidden'])
    assert len(log) == len(logits) == m['total_step']
    for line, logit, terms in zip(log, logits.tolist(), hidden.tolist()):
        pairs = [(m['hard_weight']*line['hard'] + m['soft_weight']*line['soft'], logit)]
        pairs += [(line[f'hidden_{s}'], h) for (s, *_), h in zip(m['pairs'], terms, strict=True)]
        worst['losses'] = max([worst['losses'], *(abs(a - b)/abs(b) for a, b in pairs)])

    gate = {f'objective.gates.gate.{distiller.objective.gates.place[k]}': k for k in gates_of(distiller)}
    theirs = {f'student.{k}': v for k, v in t.under('grads.student').items()}
    for name, k in gate.items(): theirs |= {f'{name}.{n}': v for n, v in t.under(f'grads.gates.{k}').items()}
    assert not {k for k in grads if k not in theirs and grads[k].abs().max() > 0}
    for k, g in theirs.items():
        if k.endswith('attention.self.key.bias'):
            assert max(g.abs().max(), grads[k].abs().max()) < ROUNDING
        elif g.abs().max(): worst['gradients'] = max(worst['gradients'], gap(grads[k], g))

    after = {f'student.{k}': v for k, v in distiller.student.state_dict().items()}
    for k, block in gates_of(distiller).items():
        after |= {f'gates.{k}.{n}': v for n, v in block.state_dict().items()}
    expected = {f'student.{k}': v for k, v in t.under('student_after').items()}
    expected |= {f'gates.{k}': v for k, v in t.under('gates_after').items() if f'gates.{k}' in after}
    assert after.keys() == expected.keys()
    rounding = [k for k in expected if k.endswith('attention.self.key.bias')] # rounding alone moves these
    worst['weights'] = max(gap(after[k], v) for k, v in expected.items() if k not in rounding)
    assert max((after[k] - expected[k]).abs().max().item() for k in rounding) < FLOAT64

    print('worst relative errors:', worst) # pytest -rP shows them
    assert worst['losses'] < LOGGED, worst
    assert max(worst['targets'], worst['gradients'], worst['weights']) < FLOAT64, worst


def test_every_file_is_held_to():
    """A trajectory without a line in METHODS would be one that nobody looks at."""
    assert {p.stem.removeprefix('traj_') for p in FOLDER.glob('traj_*.safetensors')} <= METHODS.keys()
