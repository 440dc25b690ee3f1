"""What a gate takes from each layer, for every chain and norm: parts sum to the aggregate, shares to 1."""
import os
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from lad_nb.data import load_task
from lad_nb.distiller import Distiller
from lad_nb.encoders import load_encoder
from lad_nb.gates import (GateChain, aggregate_parts, content_shares, gate_amounts, mixing_weights, to_shares)
from lad_nb.mappings import make_mapping
from lad_nb.models import SMALL, load_tokenizer

T, B, S, H = 6, 3, 5, 8
CHAINS = dict(one=((1, 2, 3, 4, 5, 6),), reversed=((6, 5, 4, 3, 2, 1),), no_overlap=((1, 2), (3, 4), (5, 6)),
              partial=((1, 2, 3),), gaps=((2, 3), (5, 6)), single=((1,), (2, 3), (4,)))


def chain_of(segments, norm, dtype=torch.float64):
    """As if trained: weights and biases of the norms are not 1 and 0."""
    torch.manual_seed(0)
    chain = GateChain(segments, H, norm, S).to(dtype)
    with torch.no_grad():
        for gate in chain.gate.values():
            gate.norm.weight.normal_(1, .3)
            gate.norm.bias.normal_(0, .3)
    return chain


def layers(scale=1., dtype=torch.float64):
    torch.manual_seed(1)
    return [scale*k*torch.randn(B, S, H, dtype=dtype) + k for k in range(1, T + 1)]


@pytest.mark.parametrize('norm', ['token', 'sequence'])
@pytest.mark.parametrize('segments', CHAINS.values(), ids=CHAINS)
def test_parts_sum_to_the_aggregate(segments, norm):
    chain, hidden = chain_of(segments, norm), layers()
    aggregates, seen = chain(hidden), []
    for k, parts in aggregate_parts(chain, hidden):
        seen.append(k)
        assert (sum(parts.values()) - aggregates.state[k]).abs().max() < 1e-12
        segment = next(s for s in segments if k in s)
        assert set(parts) == {*segment[:segment.index(k) + 1], 'bias'}
    assert seen == [k for s in segments for k in s]


@pytest.mark.parametrize('norm', ['token', 'sequence'])
@pytest.mark.parametrize('segments', CHAINS.values(), ids=CHAINS)
def test_shares(segments, norm):
    """Rows sum to 1, see their own segment only, and are the sums over tokens before the division."""
    chain, hidden, there = chain_of(segments, norm), layers(), [k for s in segments for k in s]
    mask = torch.tensor([[1., 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    shares, weights = content_shares(chain, hidden, mask), mixing_weights(chain, hidden, mask)
    sizes = content_shares(chain, hidden, mask, by='norm')
    absent = [k - 1 for k in range(1, T + 1) if k not in there]
    for found in (shares, sizes, weights):
        assert found[absent].isnan().all()
        for segment in segments:
            for i, k in enumerate(segment):
                assert found[k - 1].sum() == pytest.approx(1, abs=1e-12)
                assert all(found[k - 1, j - 1] == 0 for j in range(1, T + 1) if j not in segment[:i + 1])
            assert found[segment[0] - 1, segment[0] - 1] == 1
    rows = [k - 1 for k in there]
    assert (sizes[rows] >= 0).all() and not torch.allclose(sizes[rows], shares[rows])
    state, real = chain(hidden).state, mask.bool()
    for k, parts in aggregate_parts(chain, hidden):
        whole = (state[k][real]**2).sum()
        for j, part in parts.items():
            by_hand = (part[real]*state[k][real]).sum()/whole
            assert shares[k - 1, -1 if j == 'bias' else j - 1] == pytest.approx(by_hand.item(), abs=1e-12)


@pytest.mark.parametrize('what', ['content', 'mixing'])
def test_examples_and_classes_of_tokens_add_up(what):
    """Amounts of disjoint masks sum to those of all; an example without a token of the class has no share."""
    chain, hidden = chain_of(CHAINS['one'], 'token'), layers()
    amounts, first = gate_amounts(chain, hidden, what), torch.zeros(B, S)
    first[:2, 0] = 1
    rest = 1 - first
    total = lambda mask: (amounts*mask[..., None, None]).sum((0, 1, 3))
    weighted = sum(to_shares(amounts, mask)*total(mask)[:, None] for mask in (first, rest))
    joint = weighted/total(first + rest)[:, None]
    assert torch.allclose(joint, to_shares(amounts), atol=1e-12)
    per = to_shares(amounts, first, per_example=True)
    assert per[2].isnan().all() and torch.allclose(per[0], to_shares(amounts[:1, :1]), atol=1e-12)


def test_padding():
    """Gates that norm by token do not see it; those that norm over the sequence do, as the scripts' do."""
    short, mask = layers(), torch.cat([torch.ones(B, 3), torch.zeros(B, 2)], 1)
    for norm, same in (('token', True), ('sequence', False)):
        chain = chain_of(CHAINS['one'], norm)
        moved = [torch.cat([h[:, :3], 7*h[:, 3:] + 1], 1) for h in short]
        shares = [content_shares(chain, h, mask) for h in (short, moved)]
        weights = [mixing_weights(chain, h, mask) for h in (short, moved)]
        assert torch.allclose(*shares, atol=1e-12) == same
        assert torch.allclose(weights[0][1], weights[1][1], atol=1e-12)


def test_a_negative_share():
    """A layer that points away from the rest takes from the aggregate what the others put in."""
    chain = chain_of(((1, 2),), 'token')
    with torch.no_grad():
        for p in chain.gate['2'].linear.parameters(): p.zero_()
        chain.gate['2'].norm.weight.fill_(1.), chain.gate['2'].norm.bias.zero_()
    h = layers()[0]
    shares = content_shares(chain, [3*h, -h])
    assert shares[1].tolist() == pytest.approx([1.5, -.5, 0], abs=1e-12)
    assert content_shares(chain, [3*h, -h], by='norm')[1].tolist() == pytest.approx([.75, .25, 0], abs=1e-12)


def test_in_half_precision_shares_are_single_precision():
    """As on a GPU under autocast: the states come in bf16; sums are in fp32, rows sum to 1."""
    chain, hidden = chain_of(CHAINS['one'], 'token', torch.float32), layers(dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        half = [h.bfloat16() for h in hidden]
        shares = content_shares(chain, half)
    assert shares.dtype == torch.float32 and (shares.sum(1) - 1).abs().max() < 1e-5
    assert (shares - content_shares(chain, hidden)).abs().max() < .01


def bert(num_layers):
    torch.manual_seed(num_layers)
    config = BertConfig(vocab_size=50, hidden_size=H, num_hidden_layers=num_layers, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=S)
    return BertForSequenceClassification(config).double()


@pytest.mark.parametrize('method', ['alp_kd', 'alp_kd_hidden', 'alp_kd_hidden_v2', 'layer_mean', 'bert_pkd',
                                    'lad_no', 'partial_lad'])
def test_what_targets_are_made_of(method):
    """For an attention, weight times layer; shares sum to 1, and a target of one layer is that layer."""
    distiller = Distiller(bert(3), bert(T), make_mapping(method, T, 3), norm='token').double()
    ids = torch.randint(50, (B, S), generator=torch.Generator().manual_seed(0))
    out = distiller(ids, torch.ones_like(ids), labels=torch.zeros(B, dtype=torch.long), output_states=True)
    for what in ('content', 'mixing'):
        for m, amounts in distiller.source_amounts(out, what).items():
            share = to_shares(amounts)
            assert share.sum() == pytest.approx(1, abs=1e-12)
            if method == 'bert_pkd': assert share[2*m - 1] == pytest.approx(1, abs=1e-12)
            if method.startswith('alp') and what == 'content':
                target, weights = out.targets[m - 1], out.attention[m]
                weights = weights[:, None] if weights.dim() == 2 else weights
                parts = [w[..., None]*h for w, h in zip(weights.unbind(-1), out.teacher_hidden)]
                by_hand = [((part*target).sum()/(target*target).sum()).item() for part in parts]
                assert share[:T].tolist() == pytest.approx(by_hand, abs=1e-10) and share[T] == 0


@pytest.mark.parametrize('task, content', [('toy', [.10, .10, .11, .20, .24, .25, 0]),
                                           ('sst2', [.10, .11, .13, .21, .27, .18, 0])])
def test_fresh_gates_over_the_pretrained_encoder(task, content):
    """Mixing weights halve with every layer down; what arrives does not, for the last layer is small."""
    folder = Path(os.environ.get('LAD_NB_GLUE', 'nowhere'))/'SST-2'
    if task == 'sst2' and not folder.is_dir(): pytest.skip('LAD_NB_GLUE names no folder with SST-2 in it')
    encoder, tokenizer = load_encoder(SMALL).eval(), load_tokenizer(SMALL)
    rows = load_task(task, 'dev', str(folder) if task == 'sst2' else None).select(range(64))
    columns = ('sentence1', 'sentence2') if task == 'toy' else ('sentence1',)
    texts = [list(rows[c]) for c in columns]
    batch = tokenizer(*texts, padding=True, return_tensors='pt')
    with torch.no_grad(): hidden = encoder(**batch, output_hidden_states=True).hidden_states[1:]
    torch.manual_seed(42)
    chain, real = GateChain((range(1, T + 1),), 384, 'token'), batch['attention_mask']
    weights = mixing_weights(chain, hidden, real)[5].tolist()
    assert weights == pytest.approx([.03, .03, .06, .12, .25, .51], abs=.02)
    assert content_shares(chain, hidden, real)[5].tolist() == pytest.approx(content, abs=.01)
