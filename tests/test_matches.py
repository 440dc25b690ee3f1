"""Sources and matches beside the paper's: each against a slow form in float64, written with plain loops, and
each in a run, from its recipe to its pictures."""
import copy
import json
import math
from functools import cache

import pytest
import torch
from conftest import program, ready, same_bytes
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from lad_nb import cli, mappings
from lad_nb.analysis import layer_map
from lad_nb.data import load_task
from lad_nb.distiller import Distiller, Objective
from lad_nb.experiment import open_run, run
from lad_nb.gates import GateChain
from lad_nb.losses import hidden_loss, matches
from lad_nb.mapping_plots import plot_layer_map, plot_mapping
from lad_nb.mappings import Mapping, Pair, make_mapping, mapping_edges, mapping_from_dict
from lad_nb.pages import mapping_html
from lad_nb.plots import plot_losses
from lad_nb.runs import read_log
from lad_nb.similarity import loss_parts
from lad_nb.stepper import Stepper
from lad_nb.targets import Attention, Drawn, Gate, Layer, Mix, draw_layers
from lad_nb.tasks import NO_LABEL

T, M, B, S, H, C = 6, 3, 4, 5, 12, 2
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
ALL = torch.ones(B, S, dtype=torch.long)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(ours, slow, what=''):
    """Relative to the largest entry."""
    ours, slow = torch.as_tensor(ours).detach(), torch.as_tensor(slow, dtype=torch.float64)
    assert ours.shape == slow.shape and ours.dtype == torch.float64
    error = (ours - slow).abs().max()/slow.abs().max().clamp(min=1e-30)
    assert error <= 1e-9, f'{what}: relative error {error:.1e}'


# ---------------------------------------------------------------- slow forms: lists in, a number out

def normed(v):
    """A vector with mean 0 and variance 1, as a LayerNorm without affine leaves it."""
    mean = sum(v)/len(v)
    variance = sum((x - mean)**2 for x in v)/len(v)
    return [(x - mean)/math.sqrt(variance + 1e-5) for x in v]


def dot(v, w): return sum(x*y for x, y in zip(v, w, strict=True))


def softmax(v):
    e = [math.exp(x) for x in v]
    return [x/sum(e) for x in e]


def mean_over_tokens(of_token, mask):
    """The mean of a function of row and token over the tokens that count."""
    values = [of_token(b, i) for b, row in enumerate(mask) for i, counts in enumerate(row) if counts]
    return sum(values)/len(values)


def slow_mse(s, t, mask):
    def of_token(b, i): return sum((x - y)**2 for x, y in zip(s[b][i], t[b][i]))/len(s[b][i])
    return mean_over_tokens(of_token, mask)


def slow_cosine(s, t, mask):
    def of_token(b, i):
        v, w = s[b][i], t[b][i]
        return 1 - dot(v, w)/math.sqrt(dot(v, v)*dot(w, w))
    return mean_over_tokens(of_token, mask)


def tokens_of(h, mask):
    """The tokens that count of all rows, in one list."""
    return [h[b][i] for b, row in enumerate(mask) for i, counts in enumerate(row) if counts]


def centred(x):
    means = [sum(column)/len(x) for column in zip(*x)]
    return [[value - mean for value, mean in zip(row, means)] for row in x]


def slow_cka(s, t, mask):
    """By the two matrices of products among tokens."""
    x, y = (centred(tokens_of(h, mask)) for h in (s, t))
    pairs = [(i, j) for i in range(len(x)) for j in range(len(x))]
    k, g = ([dot(z[i], z[j]) for i, j in pairs] for z in (x, y))
    return 1 - dot(k, g)/math.sqrt(dot(k, k)*dot(g, g))


def hsic(k, g):
    """tr(k C g C)/(n - 1)^2 with the centring matrix C written out (Gretton et al. 2005)."""
    n = len(k)
    c = [[(i == j) - 1/n for j in range(n)] for i in range(n)]
    def times(a, b): return [[sum(a[i][l]*b[l][j] for l in range(n)) for j in range(n)] for i in range(n)]
    whole = times(times(k, c), times(g, c))
    return sum(whole[i][i] for i in range(n))/(n - 1)**2


def hsic_cka(s, t, mask):
    """The definition (Kornblith et al. 2019), from states that nobody centred."""
    k, g = ([[dot(v, w) for w in x] for v in x] for x in (tokens_of(s, mask), tokens_of(t, mask)))
    return 1 - hsic(k, g)/math.sqrt(hsic(k, k)*hsic(g, g))


def distribution(row, i, head, size, seen):
    """What a token's part in a head says of the tokens of its row that count."""
    def part(j): return row[j][head*size:(head + 1)*size]
    return softmax([dot(part(i), part(j))/math.sqrt(size) for j in seen])


def slow_relation(s, t, mask):
    """In as many heads as 12 and both widths allow."""
    heads = max(n for n in range(1, 13) if 12 % n == len(s[0][0]) % n == len(t[0][0]) % n == 0)
    def of_token(b, i):
        seen, total = [j for j, counts in enumerate(mask[b]) if counts], 0.
        for head in range(heads):
            p, q = (distribution(h[b], i, head, len(h[b][i])//heads, seen) for h in (t, s))
            total += sum(x*math.log(x/y) for x, y in zip(p, q))
        return total/heads
    return mean_over_tokens(of_token, mask)


SLOW = dict(mse=slow_mse, cosine=slow_cosine, cka=slow_cka, relation=slow_relation)


# ---------------------------------------------------------------- matches

def test_every_match_has_a_slow_form():
    assert set(SLOW) == set(matches)


@pytest.mark.parametrize('masked', [False, True], ids=['all tokens', 'masked'])
@pytest.mark.parametrize('target_norm', ['none', 'layer'])
@pytest.mark.parametrize('match', matches)
def test_match(match, target_norm, masked):
    s, t = randn(B, S, H, seed=1), 3*randn(B, S, H, seed=2) + 1
    mask = MASK if masked else ALL
    ours = hidden_loss(s, t, 'hidden', mask if masked else None, match=match, target_norm=target_norm)
    norm = normed if target_norm == 'layer' else list
    lists = [[[norm(v) for v in row] for row in h.tolist()] for h in (s, t)]
    near(ours, SLOW[match](*lists, mask.tolist()), match)


@pytest.mark.parametrize('target_norm', ['none', 'layer'])
@pytest.mark.parametrize('match', [m for m in matches if not matches[m].among_tokens])
def test_match_on_cls(match, target_norm):
    """A batch of [CLS] states is like a batch of rows with a token each, whatever the mask."""
    s, t = randn(B, S, H, seed=1), 3*randn(B, S, H, seed=2) + 1
    ours = hidden_loss(s, t, 'cls', MASK, match=match, target_norm=target_norm)
    norm = normed if target_norm == 'layer' else list
    lists = [[[norm(v) for v in row[:1]] for row in h.tolist()] for h in (s, t)]
    near(ours, SLOW[match](*lists, [[1]]*B), match)


def test_cka_is_that_of_its_definition():
    s, t = randn(B, S, H, seed=1) + 2, randn(B, S, 8, seed=2)
    for mask in (ALL, MASK):
        near(hidden_loss(s, t, 'hidden', mask, match='cka'), hsic_cka(s.tolist(), t.tolist(), mask.tolist()))


@pytest.mark.parametrize('match', [m for m in matches if matches[m].any_width])
def test_match_of_two_widths(match):
    s, t = randn(B, S, 16, seed=1), randn(B, S, 24, seed=2)
    ours = hidden_loss(s, t, 'hidden', MASK, match=match)
    near(ours, SLOW[match](s.tolist(), t.tolist(), MASK.tolist()), match)


@pytest.mark.parametrize('target_norm', ['none', 'layer'])
@pytest.mark.parametrize('match', matches)
def test_gradient_of_a_match(match, target_norm):
    """By differences, for the student and for what it learns from."""
    def loss(s, t): return hidden_loss(s, t, 'hidden', MASK, match=match, target_norm=target_norm)
    assert torch.autograd.gradcheck(loss, (randn(B, S, H, seed=1).requires_grad_(),
                                           randn(B, S, H, seed=2).requires_grad_()))


@pytest.mark.parametrize('target_norm', ['none', 'layer'])
@pytest.mark.parametrize('match', matches)
def test_match_in_bf16(match, target_norm):
    """States in bf16, as autocast hands them on: the loss is that of the same numbers in fp32, to the bit,
    and never below zero; not even that of a state with itself."""
    h = randn(B, S, 384, seed=1)
    s, t = (h + .3*randn(B, S, 384, seed=2)).bfloat16(), h.bfloat16()
    how = dict(attention_mask=MASK, match=match, target_norm=target_norm)
    exact = hidden_loss(s.float(), t.float(), **how)
    with torch.autocast('cpu', torch.bfloat16):
        half, none = hidden_loss(s, t, **how), hidden_loss(t, t, **how)
    assert half.dtype == torch.float32 and half.equal(exact) and half > 1e-3
    assert 0 <= none < 1e-5


# ---------------------------------------------------------------- sources, through an objective

def batch_of_states(seed=0, width=H):
    """Students, their logits, teachers, their logits, labels, mask."""
    student = [randn(B, S, width, seed=seed + m).requires_grad_() for m in range(1, M + 1)]
    teacher = [(k*randn(B, S, H, seed=seed + 10 + k) + k) for k in range(1, T + 1)]
    logits = randn(B, C, seed=seed + 30).requires_grad_()
    return student, logits, teacher, randn(B, C, seed=seed + 31), torch.tensor([0, 1, 1, 0]), MASK


def objective_of(mapping, width=H, **options):
    """An objective in float64 whose sources and gates have learned something."""
    torch.manual_seed(0)
    objective = Objective(mapping, H, width, norm='token', mask_padding=True, **options).double()
    for i, p in enumerate(objective.parameters()): p.data.add_(.5*randn(*p.shape, seed=i))
    return objective


def check_terms(objective, targets, match='mse'):
    """Every hidden loss is that of its target, and the loss is the weighted sum."""
    batch = batch_of_states()
    out = objective(*batch, output_states=True)
    slow = []
    for pair, target in zip(objective.mapping.pairs, targets, strict=True):
        slow.append(SLOW[match](batch[0][pair.student - 1].tolist(), target, MASK.tolist()))
    near(out.hidden, slow, 'hidden')
    near(out.loss, .3*out.hard.item() + .7*out.soft.item() + 500/M*sum(slow), 'loss')
    return out


def test_last_layer():
    objective = objective_of(make_mapping('last_layer', T, M))
    out = check_terms(objective, [batch_of_states()[2][T - 1].tolist()])
    assert [p.student for p in objective.mapping.pairs] == [M] and len(out.hidden) == 1


def test_random_layers():
    """Student m learns from the m-th of the layers that are drawn; the draw is one of seed and epoch."""
    objective, teacher = objective_of(make_mapping('random_layers', T, M)), batch_of_states()[2]
    drawn = {}
    for seed in (0, 7):
        for epoch in range(40):
            objective.redraw(seed, epoch)
            drawn[seed, epoch] = layers = objective.drawn
            assert layers == draw_layers(T, M, seed, epoch)
            assert len(set(layers)) == M and list(layers) == sorted(layers)
            assert 1 <= layers[0] and layers[-1] <= T
            assert all(k in Drawn(m, M).layers(T) for m, k in enumerate(layers, start=1))
    assert len(set(drawn.values())) > 12  # of 20 that there are
    assert drawn[0, 1] != drawn[0, 0] != drawn[7, 0]
    assert {k for layers in drawn.values() for k in layers} == {*range(1, T + 1)}
    losses = []
    for epoch in (0, 1):
        objective.redraw(0, epoch)
        out = check_terms(objective, [teacher[k - 1].tolist() for k in drawn[0, epoch]])
        for m, k in enumerate(drawn[0, epoch], start=1):
            assert out.attention[m].tolist() == [[float(j == k) for j in range(1, T + 1)]]*B
        losses.append(out.loss.item())
    assert losses[0] != losses[1]


def slow_mix(weight, scale, layers):
    """scale times the sum of softmaxed weights times normed layers, entry by entry."""
    w, mixed = softmax(weight), []
    for b in range(B):
        tokens = []
        for i in range(S):
            parts = [normed(h[b][i]) for h in layers]
            tokens.append([scale*sum(x*p[d] for x, p in zip(w, parts)) for d in range(H)])
        mixed.append(tokens)
    return mixed


def test_scalar_mix():
    """Softmax over weights, normed layers, a scale; one mix a student, of layers 1 to m·skip."""
    objective, teacher = objective_of(make_mapping('scalar_mix', T, M)), batch_of_states()[2]
    learned, layers = objective.learned, [h.tolist() for h in teacher]
    mixes = [slow_mix(learned[m].weight.tolist(), learned[m].scale.item(), layers[:2*m]) for m in (1, 2, 3)]
    out = check_terms(objective, mixes)
    for m in (1, 2, 3):
        told = softmax(learned[m].weight.tolist()) + [0.]*(T - 2*m)
        near(out.attention[m], [told]*B, 'weights')
    out.loss.backward()
    assert all(p.grad.abs().max() > 0 for p in objective.parameters())


def test_relation_learns_no_projection():
    """A narrower student needs none; with mse it does."""
    mapping = make_mapping('bert_pkd', T, M)
    objective = objective_of(mapping, width=8, match='relation')
    assert objective.project is None and not [*objective.parameters()]
    assert len(objective_of(mapping, width=8).project) == M
    student, *rest = batch_of_states(width=8)
    out = objective(student, *rest)
    slow = [slow_relation(h.tolist(), rest[1][2*m - 1].tolist(), MASK.tolist())
            for m, h in enumerate(student, start=1)]
    near(out.hidden, slow)
    out.loss.backward()
    assert all(h.grad.abs().max() > 0 for h in student)


def two_sources(T, M, name='two_sources'):
    """The last student layer learns from a layer, a gate and a mix at once, the first from a layer alone."""
    pairs = (Pair(1, Layer(1)), Pair(M, Layer(T)), Pair(M, Gate(T)), Pair(M, Mix(2)))
    return Mapping(name, T, M, pairs, (tuple(range(1, T + 1)),))


def test_several_sources():
    """A term each, each with mu/M."""
    mapping = two_sources(T, M)
    assert mapping.parts == ['hidden_1', 'hidden_3.1', 'hidden_3.2', 'hidden_3.3']
    assert mapping_from_dict(json.loads(json.dumps(mappings.mapping_to_dict(mapping)))) == mapping
    objective, teacher = objective_of(mapping), batch_of_states()[2]
    mix, layers = objective.learned['3.3'], [h.tolist() for h in teacher]
    gate = objective.gates(teacher).state[T].tolist()
    mixed = slow_mix(mix.weight.tolist(), mix.scale.item(), layers[:2])
    out = check_terms(objective, [layers[0], layers[T - 1], gate, mixed])
    out.loss.backward()
    assert batch_of_states()[0][1].grad is None and all(p.grad is not None for p in mix.parameters())
    assert set(objective.blocks()) == {f'gate {k}' for k in range(2, T + 1)} | {'source 3.3'}


# ---------------------------------------------------------------- sources that the task trains

@cache
def models():
    """A student and a teacher of random weights, in float64, without dropout."""
    sizes = dict(vocab_size=50, hidden_size=H, num_attention_heads=2, intermediate_size=24,
                 max_position_embeddings=16, hidden_dropout_prob=0., attention_probs_dropout_prob=0.,
                 initializer_range=.4)
    torch.manual_seed(1)
    return [BertForSequenceClassification(BertConfig(num_hidden_layers=n, **sizes)).double() for n in (M, T)]


def text():
    ids = torch.randint(5, 50, (B, S), generator=torch.Generator().manual_seed(0))
    return dict(input_ids=ids, attention_mask=MASK, labels=torch.tensor([0, 1, 1, 0]))


def distiller_of(method):
    student, teacher = models()
    torch.manual_seed(0)
    distiller = Distiller(student, teacher, make_mapping(method, T, M), norm='token', mask_padding=True)
    distiller.objective.double()
    for i, p in enumerate(distiller.objective.parameters()): p.data.add_(.5*randn(*p.shape, seed=i))
    student.zero_grad(set_to_none=True)
    return distiller


def head_by_hand(target, labels, share):
    """Cross-entropy of the teacher's head on [CLS] states, and its gradient to each of their entries."""
    _, teacher = models()
    W, b = (x.tolist() for x in teacher.bert.pooler.dense.parameters())
    V, c = (x.tolist() for x in teacher.classifier.parameters())
    loss, gradient = 0., torch.zeros(B, S, H, dtype=torch.float64)
    for row in range(B):
        x, y = target[row][0], labels[row]
        pooled = [math.tanh(dot(w, x) + bias) for w, bias in zip(W, b)]
        p = softmax([dot(v, pooled) + bias for v, bias in zip(V, c)])
        loss -= share*math.log(p[y])/B
        d_logits = [share*(p[k] - (k == y))/B for k in range(C)]
        d_inner = [(1 - z*z)*sum(g*V[k][n] for k, g in enumerate(d_logits)) for n, z in enumerate(pooled)]
        gradient[row, 0] = torch.tensor([sum(g*W[n][d] for n, g in enumerate(d_inner)) for d in range(H)],
                                        dtype=torch.float64)
    return loss, gradient


def none_of(loss, weights):
    """Whether a loss has no gradient at all to some weights."""
    if not loss.requires_grad: return True
    return all(g is None for g in torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True))


def check_task(distiller):
    """The task's loss is that of the teacher's head by hand; which loss reaches which weights."""
    out, batch = distiller(**text(), output_states=True), text()
    found = [head_by_hand(target.tolist(), batch['labels'].tolist(), 1/M) for target in out.targets]
    near(out.task, sum(loss for loss, _ in found), 'task')
    near(out.loss, .3*out.hard.item() + .7*out.soft.item() + 500/M*out.hidden.sum().item() + out.task.item())
    learned, student = [*distiller.objective.parameters()], [*distiller.student.parameters()]
    for loss in (out.hard, out.soft, out.hidden.sum()): assert none_of(loss, learned)
    assert none_of(out.task, student) and not none_of(out.hidden.sum(), student)
    out.loss.backward()
    assert all(p.grad is None for p in distiller.teacher.parameters())
    return out, [gradient for _, gradient in found]


def test_lad_by_task():
    """Gates learn from the teacher's head alone; the student learns exactly what LAD would teach it."""
    distiller = distiller_of('lad_by_task')
    out, gradients = check_task(distiller)
    gates = distiller.objective.gates
    chain = GateChain(gates.segments, H, 'token').double()
    chain.load_state_dict(gates.state_dict())
    state = chain(out.teacher_hidden).state
    torch.autograd.backward([state[2*m] for m in (1, 2, 3)], gradients)
    both = zip(gates.named_parameters(), chain.parameters())
    for (name, ours), slow in both: near(ours.grad, slow.grad, name)
    mine = {name: p.grad for name, p in distiller.student.named_parameters()}
    plain = distiller_of('lad')
    assert all(p.equal(q) for p, q in zip(plain.objective.parameters(), gates.parameters()))
    plain(**text()).loss.backward()
    theirs = {name: p.grad for name, p in plain.student.named_parameters()}
    assert mine.keys() == theirs.keys() and any(g is not None for g in mine.values())
    for name, g in mine.items(): assert g is theirs[name] is None or g.equal(theirs[name]), name


def test_scalar_mix_by_task():
    """The gradient of weights and scale, by hand from the head down."""
    distiller = distiller_of('scalar_mix_by_task')
    out, gradients = check_task(distiller)
    for m, gradient in zip((1, 2, 3), gradients):
        mix, g = distiller.objective.learned[m], gradient[:, 0].flatten().tolist()
        w, scale = softmax(mix.weight.tolist()), mix.scale.item()
        parts = [[x for row in h.tolist() for x in normed(row[0])] for h in out.teacher_hidden[:2*m]]
        along = [dot(g, part) for part in parts]
        mean = dot(w, along)
        near(mix.scale.grad, mean, f'scale {m}')
        near(mix.weight.grad, [x*scale*(a - mean) for x, a in zip(w, along)], f'weights {m}')


# ---------------------------------------------------------------- runs

NEW = ['lad_by_task', 'scalar_mix', 'scalar_mix_by_task', 'last_layer', 'random_layers', 'two_sources',
       'two_mixes']


def two_mixes(T, M, name='two_mixes'):
    """Several sources of one student layer that weigh layers, and no gates."""
    return Mapping(name, T, M, (Pair(1, Mix(2)), Pair(M, Attention('cls')), Pair(M, Mix(T))))


@pytest.fixture
def several(monkeypatch):
    monkeypatch.setitem(mappings.methods, 'two_sources', two_sources)
    monkeypatch.setitem(mappings.methods, 'two_mixes', two_mixes)


class Draws(TrainerCallback):
    """What is drawn when an update begins."""
    def __init__(self): self.seen = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append(model.objective.drawn)


@pytest.mark.parametrize('method', NEW)
def test_every_new_method_runs(quick, several, tmp_path, method):
    """From recipe to layer map; stopped in its middle, it goes on to the same bytes."""
    recipe = quick.replace(experiment='whole', method=method, log_step=1, total_step=4, gate_lr=3e-3)
    folder = run(recipe, tmp_path, progress=False)
    distiller, _, again = open_run(folder)
    mapping = distiller.mapping
    assert again == recipe and mapping == make_mapping(method, 4, 2)
    assert (folder/'gates.safetensors').exists() == any(mapping.learns)
    for line in read_log(folder):
        hidden = sum(line[part] for part in mapping.parts if part != 'task')
        expected = .3*line['hard'] + .7*line['soft'] + 500/2*hidden + line.get('task', 0.)
        assert line['loss'] == pytest.approx(expected, rel=1e-4)
        assert ('task' in line) == (mapping.trained_by == 'task')
    table = layer_map(folder, rows=16, device_id=-1)
    sums = table.groupby('student').share.sum() + table.groupby('student').bias.first()
    assert [*map(str, sums.index)] == sorted(map(str, mapping.names)) and sums.tolist() == pytest.approx(
        [1]*len(sums), abs=1e-4)
    parts = loss_parts(folder)
    last = parts[parts.step == 4].set_index('part')
    assert last.drop('loss').weighted.sum() == pytest.approx(last.value['loss'], rel=1e-4)
    with Stepper(recipe.replace(experiment='held'), tmp_path) as stepper: record = stepper.step(3)
    for what in ('content', 'mixing'): assert record.draw(what) is not None
    assert f'{record.parts["loss"]:.4g}' in str(record) and 'Loss' in record._repr_html_()
    resumed = run(recipe.replace(experiment='held'), tmp_path, resume=True, progress=False)
    assert same_bytes(folder, resumed)


@pytest.mark.parametrize('method', ['lad_by_task', 'scalar_mix', 'scalar_mix_by_task'])
def test_sources_learn_in_a_run(quick, tmp_path, method):
    recipe = quick.replace(experiment='learns', method=method, gate_lr=3e-3)
    trainer = ready(recipe, tmp_path)
    before = {name: p.clone() for name, p in trainer.model.objective.named_parameters()}
    trainer.train()
    for name, p in trainer.model.objective.named_parameters(): assert not p.equal(before[name]), name


def test_several_sources_are_shown(quick, several, tmp_path):
    """The record of an update, its page, arrows, layer map and losses know a student layer's sources."""
    recipe = quick.replace(experiment='seen', method='two_sources', log_step=1)
    with Stepper(recipe, tmp_path) as stepper:
        record = stepper.step(1)
        assert stepper.draw() is not None
        stepper.step(5)
    names = ['1', '2.1', '2.2', '2.3']
    assert [*record.parts] == ['loss', 'hard', 'soft', *(f'hidden_{name}' for name in names)]
    assert sum(record.terms.values()) == pytest.approx(record.parts['loss'], rel=1e-4)
    assert record.hardest in names and record.mapping.student_of(record.hardest) in (1, 2)
    page = mapping_html(record.mapping, record.parts, record.hardest)
    for name in names: assert f"{record.parts[f'hidden_{name}']:.3g}" in page
    assert page.count('worst') == 1 and {'gate 4', 'source 2.3'} <= {*record.groups.index}
    for name in names: assert f'(hidden_{name})' in str(record) and f'hidden {name}' in record._repr_html_()
    folder = tmp_path/'seen_bert_toy'
    said = json.loads((folder/'recipe.json').read_text())
    assert mapping_from_dict(said['mapping']) == two_sources(4, 2) == open_run(folder)[0].mapping
    axes = {ax.get_title(): ax for ax in plot_losses(loss_parts(folder))}
    assert [line.get_label() for line in axes['hidden, by layer'].lines] == names
    assert plot_mapping(mapping_edges(record.mapping)) is not None


def test_layer_map_of_several_sources(quick, several, tmp_path):
    folder = run(quick.replace(method='two_sources', total_step=2), tmp_path, progress=False)
    assert plot_layer_map(layer_map(folder, rows=16, device_id=-1)) is not None


FORMS = [{}, dict(accum_step=2), dict(keep_last_batch=True), dict(keep_last_batch=True, accum_step=2)]


@pytest.mark.parametrize('form', FORMS, ids=str)
def test_what_was_drawn(quick, tmp_path, form):
    """A draw an epoch, by seed and epoch; an opened run or checkpoint has that of its last update."""
    draws = Draws()
    recipe = quick.replace(experiment='drawn', method='random_layers', train_size=72, total_step=14, seed=3,
                           ckpt_step=4, **form)
    folder = run(recipe, tmp_path, progress=False, callbacks=[draws])
    assert len(draws.seen) == 14 and len({*draws.seen}) > 1
    for step in (4, 8, 12): assert open_run(folder, step)[0].objective.drawn == draws.seen[step - 1]
    assert open_run(folder)[0].objective.drawn == draws.seen[-1]


def test_draws_after_a_stop(quick, tmp_path):
    """A process that dies in the second epoch; another goes on with that epoch's draw and ends in the same
    bytes."""
    recipe = quick.replace(experiment='through', method='random_layers', train_size=64, total_step=10,
                           ckpt_step=3, log_step=1)
    draws = Draws()
    through = run(recipe, tmp_path, progress=False, callbacks=[draws])
    assert draws.seen == [draw_layers(4, 2, recipe.seed, e) for e in (0, 0, 0, 0, 1, 1, 1, 1, 2, 2)]
    assert len({*draws.seen}) > 1
    stopped = recipe.replace(experiment='stopped')
    died = program('dies.py', tmp_path, json.dumps(stopped.to_dict()), 7, cwd=tmp_path)
    assert died.returncode == 9, died.stderr
    draws = Draws()
    resumed = run(stopped, tmp_path, resume=True, progress=False, callbacks=[draws])
    assert draws.seen == [draw_layers(4, 2, recipe.seed, e) for e in (1, 1, 2, 2)]
    assert same_bytes(through, resumed)


@pytest.mark.parametrize('match', ['mse', 'cosine', 'relation'])
def test_micro_batches_sum_to_the_batch(quick, tmp_path, match):
    """Without dropout, two micro-batches of eight rows give the gradient of one batch of sixteen."""
    recipe = quick.replace(dropout=0., total_step=3, log_step=1, match=match, target_norm='layer')
    logs = [read_log(run(recipe.replace(experiment=f'accum{n}', accum_step=n), tmp_path, progress=False))
            for n in (1, 2)]
    for one, two in zip(*logs):
        assert one['hidden_2'] > 0
        for part in ('loss', 'hard', 'soft', 'hidden_1', 'hidden_2'):
            assert two[part] == pytest.approx(one[part], rel=2e-4, abs=1e-6)
        assert two['grad_norm'] == pytest.approx(one['grad_norm'], rel=2e-3)


@pytest.mark.parametrize('match', matches)
def test_every_match_trains(quick, tmp_path, match):
    """In bf16, with a narrower student: losses are finite and not below zero, and the folder opens."""
    recipe = quick.replace(experiment=match, match=match, target_norm='layer', precision='bf16', log_step=1)
    folder = run(recipe, tmp_path, progress=False)
    for line in read_log(folder):
        assert all(0 <= line[part] < math.inf for part in ('loss', 'hard', 'soft', 'hidden_1', 'hidden_2'))
    objective = open_run(folder)[0].objective
    assert (objective.match, objective.target_norm) == (match, 'layer')


@pytest.mark.parametrize('match', matches)
def test_forward_in_bf16(match):
    """The whole batch under autocast: hidden losses stay in fp32 and at or above zero."""
    student, teacher = (copy.deepcopy(m).float() for m in models())
    mapping = make_mapping('lad_by_task', T, M)
    distiller = Distiller(student, teacher, mapping, norm='token', match=match).eval()
    with torch.autocast('cpu', torch.bfloat16): out = distiller(**text())
    for loss in (out.loss, out.hard, out.soft, out.hidden, out.task):
        assert loss.dtype == torch.float32 and (loss >= 0).all()
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in distiller.parameters() if p.grad is not None)


# ---------------------------------------------------------------- what is refused

def test_refused_values():
    with pytest.raises(ValueError, match='7: .* counted from 1 to 6'):
        Mapping('x', T, M, (Pair(1, Drawn(1, 7)),))
    with pytest.raises(ValueError, match='drawn layer 4: .* from 1 to 3'):
        Mapping('x', T, M, (Pair(1, Drawn(4, 3)),))
    with pytest.raises(ValueError, match='draws 2, 3 teacher layers at once'):
        Mapping('x', T, M, (Pair(1, Drawn(1, 2)), Pair(2, Drawn(1, 3))))
    with pytest.raises(ValueError, match='cannot be drawn from a teacher of 2'):
        make_mapping('random_layers', 2, 3)
    with pytest.raises(ValueError, match='those of bert_pkd learn nothing'):
        Mapping('bert_pkd', T, M, (Pair(1, Layer(2)),), trained_by='task')
    with pytest.raises(ValueError, match='twice'): Mapping('x', T, M, (Pair(1, Layer(2)), Pair(1, Layer(2))))


def test_refused_recipes(quick, tmp_path):
    with pytest.raises(ValueError, match='no match .mes.* mse, cosine, cka, relation'):
        run(quick.replace(match='mes'), tmp_path, progress=False)
    with pytest.raises(ValueError, match='target_norm'): quick.replace(target_norm='batch')
    with pytest.raises(ValueError, match='looks at .CLS. alone'):
        run(quick.replace(method='lad_cls', match='relation'), tmp_path, progress=False)
    assert not any(tmp_path.iterdir())


def test_the_task_needs_labels_and_a_head():
    distiller = distiller_of('lad_by_task')
    distiller.objective.hard_weight = 0.
    with pytest.raises(ValueError, match='without labels'): distiller(**text() | dict(labels=None))
    with pytest.raises(ValueError, match="without the teacher's head"):
        objective_of(make_mapping('lad_by_task', T, M))(*batch_of_states())


def test_rows_without_a_label_train_no_gate():
    """They add nothing to the task's loss, and count in its mean."""
    distiller, batch = distiller_of('lad_by_task'), text()
    batch['labels'] = torch.tensor([0, NO_LABEL, 1, NO_LABEL])
    out = distiller(**batch, output_states=True)
    slow = 0.
    for target in out.targets:
        for row in (0, 2):
            lone = [target.tolist()[row]]*B
            slow += head_by_hand(lone, [batch['labels'][row].item()]*B, 1/M)[0]/B
    near(out.task, slow)


def test_a_task_without_any_label(quick, tmp_path):
    """Rows without any label have no task: said before anything is trained."""
    recipe = quick.replace(method='lad_by_task', hard_weight=0., train_size=None)
    rows = load_task('toy', size=64).remove_columns(['label', 'idx'])
    with pytest.raises(ValueError, match='label'): run(recipe, tmp_path, rows=rows, progress=False)
    assert not any(tmp_path.iterdir())


def test_flags(experiments, capsys):
    """--match and --target_norm reach the run; a match that is not there is refused."""
    line = ('distil --method lad --experiment flags --teacher_exp teacher --tckpt 4 --num_hidden_layers 3 '
            '--task toy --max_seq_len 32 --batch_size 16 --total_step 2 --warmup_step 1 --ckpt_step 2 '
            '--device_id -1 '
            f'--ptrain_ver {experiments}/encoder --target_norm layer --root {experiments}')
    assert cli.main([*line.split(), '--match', 'cosin']) == 2
    assert "There is no match 'cosin'. Matches are: mse, cosine" in capsys.readouterr().err
    assert cli.main([*line.split(), '--match', 'cosine']) == 0
    objective = open_run(experiments/'flags_bert_toy')[0].objective
    assert (objective.match, objective.target_norm) == ('cosine', 'layer')
