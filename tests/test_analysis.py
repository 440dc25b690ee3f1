"""What the analyses promise for any input.

CKA's invariances, shares that sum to one, intervals that cover what they say, refusals that say why.
"""
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from conftest import FEW
from lad_nb import cli
from lad_nb.analysis import (FUNCTION_WORDS, forward_batches, gate_openness, gate_shares, layer_map,
                             open_with_teacher, shares_by_example, shares_by_step, shares_by_token,
                             token_classes)
from lad_nb.data import load_task
from lad_nb.evaluation import evaluate
from lad_nb.experiment import assemble_distiller, open_run, resolve, run
from lad_nb.models import SMALL, load_tokenizer
from lad_nb.records import batch_texts
from lad_nb.run_books import run_books
from lad_nb.runs import read_log
from lad_nb.similarity import CKA, dev_losses, layer_cka, linear_probes, loss_parts, teacher_agreement
from lad_nb.statistics import calibrated, interval, paired_differences, seed_differences, summarise


def cka(*states, batch=None):
    found = CKA()
    n = len(states[0])
    for rows in torch.arange(n).split(batch or n): found.add([x[rows] for x in states])
    return found.value()


def slow_cka(x, y):
    """The estimator as it is written down, one trace at a time."""
    def hsic(a, b):
        k, l = a @ a.T, b @ b.T
        n, one = len(k), torch.ones(len(k), dtype=k.dtype)
        k, l = k - k.diag().diag(), l - l.diag().diag()
        sums = (one @ k @ one)*(one @ l @ one)/((n - 1)*(n - 2))
        return ((k @ l).trace() + sums - 2/(n - 2)*(one @ k @ l @ one))/(n*(n - 3))
    return hsic(x, y)/(hsic(x, x)*hsic(y, y)).sqrt()


@pytest.mark.parametrize('n, d, seed', [(4, 3, 0), (5, 40, 1), (17, 6, 2), (64, 384, 3)])
def test_cka_does_not_mind_rotation_scale_and_place(n, d, seed):
    torch.manual_seed(seed)
    x, y = torch.randn(n, d).double(), torch.randn(n, d).double()
    turn = torch.linalg.qr(torch.randn(d, d).double())[0]
    value = cka(x, x @ turn, -.01*x, x + 100, y, 1e3*y @ turn)
    torch.testing.assert_close(value[:4, :4], torch.ones(4, 4).double())
    torch.testing.assert_close(value[0, 4], value[1, 5])
    torch.testing.assert_close(value[0, 4], slow_cka(x, y))
    torch.testing.assert_close(value, value.T)
    assert value.abs().max() <= 1


def test_cka_minds_what_is_not_a_rotation():
    torch.manual_seed(0)
    x = torch.randn(200, 10)
    assert cka(x, x*torch.tensor([10.] + [1.]*9))[0, 1] < .7


def test_cka_of_independent_data_is_about_0():
    """With more dimensions than rows, where the plain form is near 1."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 640, 100)
    gram = [(z - z.mean(0)) @ (z - z.mean(0)).T for z in (x[:32], y[:32])]
    assert (gram[0]*gram[1]).sum()/(gram[0].norm()*gram[1].norm()) > .6
    assert abs(cka(x, y, batch=32)[0, 1]) < .05


def test_cka_of_batches_nears_that_of_all_rows():
    torch.manual_seed(0)
    x = torch.randn(4096, 8)
    y = x @ torch.randn(8, 12) + torch.randn(4096, 12)
    x_, y_ = x - x.mean(0), y - y.mean(0)
    plain = (x_.T @ y_).norm()**2/((x_.T @ x_).norm()*(y_.T @ y_).norm())
    assert abs(cka(x, y, batch=64)[0, 1] - plain) < .01
    assert abs(cka(x, y)[0, 1] - plain) < .005


def test_cka_has_a_number_for_every_batch():
    for n in range(4, 8):
        for seed in range(50):
            torch.manual_seed(seed)
            value = cka(torch.randn(n, 2), torch.randn(n, 300), torch.zeros(n, 5))
            assert value.isfinite().all() and value.abs().max() <= 1 and not value[2].any()
    with pytest.raises(ValueError, match='at least 4 rows'): cka(torch.randn(3, 2), torch.randn(3, 2))


def results(**methods):
    """A table of results, the same for two tasks; each method is {seed: value}."""
    found = [dict(method=m, seed=s, metric='accuracy', value=v)
             for m, values in methods.items() for s, v in values.items()]
    columns = ['task', 'method', 'seed', 'metric', 'value']
    return pd.DataFrame([dict(task=task) | row for task in ('rte', 'toy') for row in found], columns=columns)


def test_paired_differences_see_through_the_luck_of_seeds():
    """Seeds differ by 0.1 and more, the method always wins by 0.01: pairs show it, means don't."""
    luck = np.random.default_rng(0).normal(.7, .1, 5)
    better = luck + [.009, .010, .011, .010, .010]
    table = results(undistilled=dict(enumerate(luck)), lad=dict(enumerate(better)))
    for row in paired_differences(table).to_dict('records'):
        assert row['n'] == 5 and row['mean'] == pytest.approx(.01)
        assert .009 <= row['low'] <= row['mean'] <= row['high'] <= .011 and row['t_low'] > .009
    apart = summarise(table).query('task == "rte"').set_index('method')
    assert apart.low['lad'] < apart.high['undistilled']


def test_only_seeds_that_both_have_are_paired():
    table = results(undistilled={1: .5, 2: .6, 3: .7}, lad={2: .65, 3: .8, 4: 0.}, kd={9: .9}, pkd={3: .75})
    found = paired_differences(table).query('task == "toy"').set_index('method')
    assert found.n.to_dict() == dict(lad=2, kd=0, pkd=1)
    assert found['mean'].to_dict() == pytest.approx(dict(lad=.075, kd=np.nan, pkd=.05), nan_ok=True)
    assert found.loc[['kd', 'pkd'], ['sd', 'low', 'high', 't_low', 't_high']].isna().to_numpy().all()
    assert seed_differences(table).query('method == "kd"').difference.isna().all()
    swapped = paired_differences(table, 'lad').query('task == "toy"').set_index('method')
    assert swapped.loc['undistilled', 'mean'] == pytest.approx(-.075)


def test_intervals_cover_what_the_notebook_says():
    """Of normal numbers: Student's t 95 %; the bootstrap of three smallest to largest, of five some 83 %."""
    rng = np.random.default_rng(0)
    for n in (3, 5):
        found = pd.DataFrame([interval(rng.normal(size=n), resamples=999) for _ in range(500)])
        ends = (('t_low', 't_high'), ('low', 'high'))
        t, boot = ((found[low] <= 0) & (found[high] >= 0) for low, high in ends)
        assert .92 < t.mean() < .98
        assert (.68 if n == 3 else .78) < boot.mean() < (.82 if n == 3 else .88)
    values = [.1, .5, .4]
    assert [interval(values)[k] for k in ('low', 'high')] == pytest.approx([.1, .5])
    same = interval([.5]*3)
    assert same['low'] == same['high'] == same['t_low'] == .5
    wider = interval(rng.normal(size=5), level=.99)
    assert wider['t_high'] - wider['t_low'] > wider['high'] - wider['low']


def test_calibration():
    table = results(teacher={1: .9, 2: .8}, undistilled={1: .5, 2: .6}, lad={1: .7, 3: 1.})
    found = calibrated(table).query('task == "rte"')
    means = found.groupby('method').value.mean().to_dict()
    assert means == pytest.approx(dict(teacher=1, undistilled=0, lad=1))
    assert list(found.columns) == ['task', 'method', 'seed', 'metric', 'value']
    worse = table.assign(value=np.where((table.task == 'toy') & (table.method == 'teacher'), .1, table.value))
    with pytest.raises(ValueError, match=r'No scale for toy \(accuracy\)'): calibrated(worse)
    with pytest.warns(UserWarning, match='No scale for toy'):
        assert set(calibrated(worse, unscaled='drop').task) == {'rte'}


@pytest.mark.parametrize('fault, message', [
    (lambda t: t.drop(columns=['seed', 'metric']), 'no column seed, metric'),
    (lambda t: pd.concat([t, t.iloc[[0]]]), 'two values for'),
    (lambda t: t.assign(value=[np.nan, *t.value[1:]]), 'not a finite number'),
])
def test_results_that_cannot_be_summarised(fault, message):
    table = fault(results(undistilled={1: .5}, lad={1: .6}))
    for f in (summarise, paired_differences, calibrated):
        with pytest.raises(ValueError, match=message): f(table)


def test_no_results():
    assert len(summarise(results(lad={1: .6}).iloc[:0])) == 0
    with pytest.raises(ValueError, match='no method .undistilled. to compare with. There are: lad'):
        paired_differences(results(lad={1: .6}))


def test_every_real_token_has_one_class():
    tokenizer = load_tokenizer(SMALL)
    texts = ["She didn't see the (unbelievable) 42 dogs.", '', '... !', 'into thesauruses', 'Überraschung 漢字']
    batch = tokenizer(texts, [''] + ['not a word']*4, padding=True, return_tensors='pt')
    classes = token_classes(batch['input_ids'], batch['attention_mask'], tokenizer)
    assert torch.equal(sum(m.long() for m in classes.values()), batch['attention_mask'])
    def words(row, c): return tokenizer.convert_ids_to_tokens(batch['input_ids'][row, classes[c][row]])
    assert words(0, 'function') == ['she', 'didn', 't', 'the'] and '42' in words(0, 'content')
    assert words(0, 'punctuation') == ["'", '(', ')', '.'] and words(2, 'punctuation') == ['.', '.', '.', '!']
    assert words(1, 'content') == ['word'] and words(3, 'function') == ['into', 'not', 'a']


TEXTS = ["the dog didn't see the cats into the garden, 42 dogs", 'she laughed at them. a garden of cats',
         'Überraschung für 漢字']


def small_tokenizer(kind):
    """A tokenizer of a few hundred pieces, made from a few sentences: WordPiece (BERT's kind), byte-level BPE
    (RoBERTa's) or Unigram with a Metaspace (XLM-R's)."""
    special = ['<s>', '<pad>', '</s>', '<unk>']
    if kind == 'wordpiece':
        made = Tokenizer(models.WordPiece(unk_token='<unk>'))
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    elif kind == 'bytes':
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token='<unk>',
                                          show_progress=False)
    made.train_from_iterator(TEXTS[:2]*20, trainer)
    made.post_processor = processors.TemplateProcessing(
        '<s> $A </s>', '<s> $A </s> </s> $B </s>', [('<s>', 0), ('</s>', 2)])
    return PreTrainedTokenizerFast(tokenizer_object=made, cls_token='<s>', pad_token='<pad>',
                                   sep_token='</s>', unk_token='<unk>')


@pytest.mark.parametrize('kind', ['wordpiece', 'bytes', 'unigram'])
def test_classes_of_any_tokenizer(kind):
    """Characters tell: a token is a function word if the word that it lies in is one and it is all of it."""
    tokenizer = small_tokenizer(kind)
    batch = tokenizer(TEXTS, [TEXTS[1]]*3, padding=True, return_tensors='pt', return_offsets_mapping=True)
    classes = token_classes(batch['input_ids'], batch['attention_mask'], tokenizer)
    assert list(classes) == ['<s>', '</s>', 'content', 'function', 'punctuation']
    assert torch.equal(sum(m.long() for m in classes.values()), batch['attention_mask'])
    assert classes['<s>'][:, 0].all() and classes['</s>'].sum() == 3*3
    for row, text in enumerate(TEXTS):
        expected = None
        for i, sequence in reversed([*enumerate(batch.sequence_ids(row))]):
            if sequence is None: continue
            start, end = batch['offset_mapping'][row, i].tolist()
            read = text if sequence == 0 else TEXTS[1]
            if read[start:end].strip(): expected = class_by_offsets(read, start, end)
            # a lone space goes with what comes after it
            assert next(c for c in classes if classes[c][row, i]) == expected, (row, i)


def class_by_offsets(text, start, end):
    """The class of text[start:end], by the word of letters and digits that it lies in."""
    piece = text[start:end].strip()
    if not any(c.isalnum() for c in piece): return 'punctuation'
    words = [m.span() for m in re.finditer(r'\w+', text)]
    inside = next(w for w in words if w[0] < end and start < w[1])
    whole = start <= inside[0] and end >= inside[1]
    return 'function' if whole and text[slice(*inside)].lower() in FUNCTION_WORDS else 'content'


@pytest.mark.parametrize('kind', ['wordpiece', 'bytes', 'unigram'])
def test_sentences_without_token_types(kind):
    """By separators, of which RoBERTa has two in a row; whatever a teacher with other ids read."""
    tokenizer = small_tokenizer(kind)
    batch = tokenizer([TEXTS[1]], ['a garden of cats'], return_tensors='pt')
    ids, mask = batch['input_ids'], batch['attention_mask']
    told = batch_texts([dict(input_ids=ids, attention_mask=mask, teacher_input_ids=ids[:, :3])], tokenizer)
    assert [t.replace(' .', '.') for t in told] == [f'{TEXTS[1]} | a garden of cats']
    alone = tokenizer(['a garden'], return_tensors='pt')
    assert batch_texts([alone], tokenizer) == ['a garden']


METHODS = [
    ('lad', {}), ('partial_lad', {}), ('alp_kd_hidden', {}),
    *(pytest.param(m, {}, marks=pytest.mark.slow)
      for m in ('lad_no', 'bert_pkd', 'lad_cls', 'lad_reversed', 'alp_kd')),
    *(pytest.param(m, options, marks=pytest.mark.slow)
      for m, options in (('lad', dict(norm='sequence', padding='max_length')),
                         ('lad_user_defined', dict(gate_indices=(6, 4), student_indices=(3, 1)))))]


def sums(frame, by): return frame.groupby(by).share.sum() + frame.groupby(by).bias.first()


@pytest.mark.parametrize('method, options', METHODS)
def test_shares_sum_to_one(experiments, lad, method, options):
    """For every method, as it was made and as it was trained; batches don't matter."""
    once = dict(total_step=1, ckpt_step=1, log_step=1)
    recipe = lad.replace(experiment=f'sums_{method}', method=method, **once, **options)
    folder = run(recipe, experiments, progress=False)
    students = [1, 3] if 'gate_indices' in options else [1, 2, 3]
    on = 'cls' if method in ('lad_cls', 'alp_kd') else 'hidden'
    weights = layer_map(folder, what='mixing', rows=10)
    table, again = (layer_map(folder, rows=10, batch_size=size) for size in (4, 10))
    assert (sums(weights, 'student') - 1).abs().max() < 1e-5
    assert weights.share.between(-1e-6, 1 + 1e-6).all()
    assert set(weights.bias) == {0.} and set(weights.measure) == {'mixing weight'}
    assert (sums(table, 'student') - 1).abs().max() < 1e-5 and set(table.measure) == {'content share'}
    one = ~weights.share.between(1e-6, 1 - 1e-6)
    # a layer that has all or nothing has it either way
    assert np.allclose(table.share[one], weights.share[one], atol=1e-5)
    assert np.allclose(table.share, again.share, atol=1e-5) and np.allclose(table.sd, again.sd, atol=1e-5)
    assert sorted(table.student.unique()) == students
    assert (set(table.layer), set(table.examples)) == (set(range(1, 7)), {10})
    assert table.attrs == dict(method=method, T=6, M=3, on=on)
    mapping = open_run(folder)[0].mapping
    if mapping.segments: shares_of_gates_sum_to_one(folder, mapping.gates)
    else:
        with pytest.raises(ValueError, match='which has no gates'): gate_openness(folder)


def shares_of_gates_sum_to_one(folder, gates):
    """In all four frames and all three measures."""
    for what, norm in (('content', 'projection'), ('content', 'norm'), ('mixing', 'projection')):
        for of in (shares_by_example, shares_by_token, shares_by_step, gate_shares):
            frame = of(folder, what=what, by=norm, rows=6)
            by = [c for c in ('example', 'token', 'step', 'gate') if c in frame]
            assert (sums(frame, by) - 1).abs().max() < 1e-5 and set(frame.gate) == set(gates)
            assert frame.measure.nunique() == 1 and ((frame.share >= 0).all() or norm == 'projection')
    assert gate_openness(folder, rows=6).openness.between(0, 1).all()


def test_a_map_at_cls_is_that_of_cls(experiments, lad):
    once = dict(total_step=1, ckpt_step=1, log_step=1)
    folder = run(lad.replace(experiment='at_cls', method='lad_cls', **once), experiments, progress=False)
    cls = shares_by_token(folder, rows=8).query('token == "[CLS]" and gate in (2, 4, 6)')
    assert np.allclose(layer_map(folder, rows=8).share, cls.share, atol=1e-6)
    assert not np.allclose(cls.share, gate_shares(folder, rows=8).query('gate in (2, 4, 6)').share, atol=1e-5)


def test_fresh_gates_are_those_the_run_began_with(experiments, lad):
    still = lad.replace(experiment='still', gate_lr=1e-12, total_step=2, ckpt_step=2)
    folder = run(still, experiments, progress=False)
    distiller, tokenizer, recipe = open_run(folder)
    made, _ = assemble_distiller(resolve(recipe, experiments))
    table = shares_by_step(folder, rows=8)
    first, last = (table[table.step == step].share for step in (0, 2))
    assert np.allclose(first, last, atol=1e-6)  # gates that never moved
    gates = (d.objective.gates.parameters() for d in (made, distiller))
    for a, b in zip(*gates): torch.testing.assert_close(a, b)


def test_gates_alone_need_no_student(experiments, lad):
    folder = run(lad.replace(experiment='short'), experiments, progress=False)
    def outputs(**how): return [out for _, out in forward_batches(open_run(folder), **how)]
    assert all(out.student_logits is None for out in outputs(rows=4, student=False))
    whole, alone = ([out.aggregates.state[6] for out in outputs(rows=5, batch_size=5, student=student)]
                    for student in (True, False))
    torch.testing.assert_close(whole, alone)
    with pytest.raises(FileNotFoundError, match='There are: 2, 4'): gate_openness(folder, [3])
    with pytest.raises(FileNotFoundError, match='no run folder at'): layer_map(experiments)
    hard = loss_parts(folder).query('part == "hard"').value
    assert hard.tolist() == [line['hard'] for line in read_log(folder)]
    (folder/'log.jsonl').write_text('')
    with pytest.raises(ValueError, match='never reached a log line'): loss_parts(folder)


def test_the_training_split_is_that_of_the_run(experiments, lad):
    recipe = lad.replace(experiment='slice', train_size=20, sample_seed=3, total_step=1)
    folder = run(recipe, experiments, progress=False)
    tokenizer = load_tokenizer(folder)
    def text(ids): return tokenizer.decode(ids, skip_special_tokens=True)
    batches = forward_batches(open_run(folder), split='train', rows=None, batch_size=8, student=False)
    seen = [text(ids) for batch, _ in batches for ids in batch['input_ids']]
    drawn = load_task('toy', 'train', size=20, sample_seed=3)
    pairs = zip(drawn['sentence1'], drawn['sentence2'])
    assert seen == [text(tokenizer(a, b)['input_ids']) for a, b in pairs]


def test_runs_without_a_teacher_are_held_against_one(experiments, lad):
    plain = lad.replace(experiment='plain', method='undistilled', teacher_exp=None, ptrain_ver=SMALL)
    folder, teacher = run(plain, experiments, progress=False), experiments/'teacher_bert_toy'
    assert len(layer_map(folder)) == 0 and layer_map(folder).attrs['M'] == 3
    with pytest.raises(ValueError, match='learned from no teacher'): teacher_agreement(folder)
    assert set(layer_cka(folder, teacher=teacher, rows=8, on='cls').kind_a) == {'teacher', 'student'}
    assert set(layer_cka(folder, rows=8, on='mean').kind_a) == {'student'}
    agreement = teacher_agreement(folder, teacher=teacher, rows=40)
    assert agreement.step.tolist() == [2, 4]
    assert agreement.same.between(0, 1).all() and (agreement.kl > 0).all()
    itself = teacher_agreement(teacher, steps=[4], teacher=teacher, rows=40).iloc[0]
    assert itself.same == 1 and itself.kl == pytest.approx(0, abs=1e-9)
    assert set(loss_parts(folder).query('weighted != 0').part) == {'loss', 'hard'}
    own = run(lad.replace(experiment='own', total_step=1), experiments, progress=False)
    with pytest.raises(ValueError, match='has a teacher of its own'): open_with_teacher(own, teacher=teacher)


def test_dev_losses_are_means_over_rows(experiments, lad, tmp_path, capsys):
    """Held against a loop by hand, row by row. The last batch has two short rows, of the other label."""
    long = ['a man saw the small dog\ta man saw a dog\tentailment']*8
    short = ['a cat\ta dog\tnot_entailment']*2
    rows = [f'{i}\t{row}' for i, row in enumerate(long + short)]
    (tmp_path/'dev.tsv').write_text('\n'.join(['index\tsentence1\tsentence2\tlabel', *rows, '']))
    folder = run(lad.replace(experiment='curves'), experiments, progress=False)
    flags = '--experiment curves --task toy --batch_size 8 --device_id -1'
    weights = f'--softmax_temp 3 --soft_weight .25 --hard_weight 2 --data_dir {tmp_path} --root {experiments}'
    assert cli.main(['eval_dev_loss', *flags.split(), *weights.split()]) == 0, capsys.readouterr().err
    table = pd.read_csv(folder/'dev-loss.csv')
    assert list(table.columns) == ['step', 'split', 'rows', 'hard', 'soft', 'loss']
    assert list(table.step) == [2, 4] and set(table.rows) == {10} and set(table.split) == {'dev'}
    for row in table.itertuples():
        distiller, tokenizer, recipe = open_run(folder, row.step)
        examples = load_task('toy', 'dev', str(tmp_path))
        hard, soft = zip(*(losses_of_a_row(distiller, tokenizer, e, tau=3) for e in examples))
        assert row.hard == pytest.approx(np.mean(hard), rel=1e-6)
        assert row.soft == pytest.approx(np.mean(soft), rel=1e-4)
        assert row.hard != pytest.approx((np.mean(hard[:8]) + np.mean(hard[8:]))/2, rel=1e-4)
        assert row.loss == pytest.approx(2*row.hard + .25*row.soft, rel=1e-9)
    assert table.hard[0] != table.hard[1] and (table.soft > 0).all()
    events = event_files(folder/'tensorboard'/'losses')
    drawn = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()['scalars']}
    assert set(drawn) == {'dev/hard', 'dev/soft', 'dev/loss'}
    assert [v for _, v in drawn['dev/soft']] == pytest.approx(list(table.soft), rel=1e-6)
    assert [s for s, _ in drawn['dev/loss']] == [2, 4]


def event_files(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


@torch.no_grad()
def losses_of_a_row(distiller, tokenizer, example, tau):
    """Cross-entropy and tempered divergence of one row, term by term."""
    row = tokenizer(example['sentence1'], example['sentence2'], return_tensors='pt')
    student, teacher = (model(**row).logits[0].double() for model in (distiller.student, distiller.teacher))
    p, q = ((x/tau).exp()/(x/tau).exp().sum() for x in (teacher, student))
    hard = student.exp().sum().log() - student[example['label']]
    return hard.item(), tau**2*sum(a*(a.log() - b.log()) for a, b in zip(p, q)).item()


def test_dev_losses_without_and_with_a_teacher(experiments, lad, capsys):
    """Nobody taught: the hard loss alone. A teacher that is named is asked."""
    plain = lad.replace(experiment='alone', method='undistilled', teacher_exp=None)
    folder = run(plain.replace(ptrain_ver=str(experiments/'encoder')), experiments, progress=False)
    alone = dev_losses(folder, batch_size=500, device_id=-1)
    assert alone.soft.isna().all() and alone.loss.tolist() == alone.hard.tolist()
    def said(more):
        flags = f'--experiment alone --task toy --batch_size 500 --device_id -1 --root {experiments} {more}'
        return cli.main(['eval_dev_loss', *flags.split()]), capsys.readouterr().err
    code, err = said('--soft_weight .5')
    assert code == 2 and 'Name one' in err
    assert 'name that with --teacher_exp' in said('--tckpt 4')[1]
    assert 'no experiment nobody' in said('--texperiment nobody')[1]
    assert said('--texperiment teacher --tckpt 4')[0] == 0
    taught = pd.read_csv(folder/'dev-loss.csv')
    assert (taught.soft > 0).all() and taught.hard.tolist() == pytest.approx(alone.hard.tolist())
    assert taught.loss.tolist() == pytest.approx((.3*taught.hard + .7*taught.soft).tolist())
    assert len(list((folder/'tensorboard'/'losses').iterdir())) == 1   # what was there before is gone
    with pytest.raises(ValueError, match='no labels to score against'): dev_losses(folder, 'test')


@pytest.mark.slow
def test_a_probe_reads_what_is_there_and_no_more(experiments):
    """The teacher's own head reads its pooled [CLS]; a probe of the last layer must not be far below it."""
    book = run_books['rte']['fine_tune']
    recipe = book.replace(experiment='reads', ptrain_ver=SMALL, lr=5e-5, **FEW)
    teacher = run(recipe, experiments, progress=False)  # random weights have nothing to read
    table = linear_probes(teacher, train_rows=300, rows=200)
    assert set(table.kind) == {'student'} and table.layer.max() == 6 and len(table) == 12
    assert table.value.max() > .6  # the mean of tokens tells some of the toy task's phenomena
    assert table.baseline.iloc[0] == pytest.approx(.5, abs=.02)
    accuracy = evaluate(teacher, 'toy', max_seq_len=32)['accuracy']
    assert table.query('layer == 6').value.max() > accuracy - .1


def scored_pair(i):
    """A pair of sentences and a score: 5 for the same verb twice."""
    a, b = (('saw', 'fed', 'hit')[n % 3] for n in (i, i//3))
    return f'{i}\ta man {a} a dog\ta man {b} a dog\t{5. if a == b else 1. + i % 3/2}\n'


@pytest.mark.slow
def test_probes_and_agreement_of_a_regression(tmp_path, experiments, lad):
    for split, rows in (('train', 48), ('dev', 24)):
        lines = ''.join(map(scored_pair, range(rows)))
        (tmp_path/f'{split}.tsv').write_text('index\tsentence1\tsentence2\tscore\n' + lines)
    few = FEW | dict(task='stsb', data_dir=str(tmp_path), total_step=2)
    teacher = run_books['rte']['fine_tune'].replace(experiment='scores', ptrain_ver=SMALL, **few)
    run(teacher, experiments, progress=False)
    student = lad.replace(experiment='lad_scores', teacher_exp='scores', tckpt=2, **few)
    folder = run(student, experiments, progress=False)
    table = linear_probes(folder, rows=24, train_rows=48)
    assert set(table.metric) == {'pearson'} and set(table.baseline) == {0.} and table.value.max() > .5
    agreement = teacher_agreement(folder)
    assert list(agreement.columns) == ['step', 'mse', 'pearson', 'examples']
    assert (agreement.mse > 0).all() and agreement.examples.tolist() == [24]
    assert json.loads((folder/'recipe.json').read_text())['recipe']['task'] == 'stsb'
