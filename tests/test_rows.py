"""Rows that are given in Python, with labels, with some, or with none."""
import json
import re

import pandas as pd
import pytest
import torch
from conftest import names_in, program, ready, same_bytes
from datasets import Dataset
from lad_nb.analysis import shares_by_example
from lad_nb.data import load_task
from lad_nb.distiller import Distiller
from lad_nb.evaluation import evaluate, score_checkpoints, write_predictions
from lad_nb.experiment import open_run, rerun, resolve, run
from lad_nb.losses import hard_loss
from lad_nb.recipes import FAST
from lad_nb.rows import rows_of
from lad_nb.runs import read_log
from lad_nb.stepper import Stepper
from lad_nb.tasks import NO_LABEL, own_task, tasks, write_task


def toy_table(n=160, unlabelled=0):
    """Rows of the toy task as a data frame, label names and all; of the first few labels are deleted."""
    toy = load_task('toy', size=n)
    labels = [toy.features['label'].int2str(y) for y in toy['label']]
    labels[:unlabelled] = [None]*unlabelled
    return pd.DataFrame(dict(text=list(toy['sentence1']), text_pair=list(toy['sentence2']), label=labels))


@pytest.fixture(scope='module')
def given(quick):
    """The quick recipe without a draw of its own: all rows that are given."""
    return quick.replace(train_size=None, log_step=1)


@pytest.fixture(scope='module')
def half_run(given, tmp_path_factory):
    """A run on 160 rows, half of them without labels."""
    root = tmp_path_factory.mktemp('half')
    return run(given.replace(experiment='half'), root, progress=False, rows=toy_table(unlabelled=80))


def test_given_rows_are_the_same_rows(quick, tmp_path):
    """A frame, dicts and a Dataset, with ids or names: the bytes of the task's own rows."""
    one = run(quick.replace(experiment='files'), tmp_path, progress=False)
    toy = load_task('toy')
    named = pd.DataFrame(dict(text=toy['sentence1'], text_pair=toy['sentence2'],
                              label=[toy.features['label'].int2str(y) for y in toy['label']]))
    for name, rows in dict(frame=named, dicts=toy.to_list(), dataset=toy.remove_columns('idx')).items():
        two = run(quick.replace(experiment=name), tmp_path, progress=False, rows=rows)
        assert same_bytes(one, two)
        said, was = (json.loads((f/'recipe.json').read_text())['rows'] for f in (two, one))
        assert said == was | dict(given=True)


def test_a_hard_loss_of_some_rows_by_hand():
    """Rows without a label add nothing and count in the mean; so micro-batches add up to their batch."""
    torch.manual_seed(0)
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([2, NO_LABEL, 0, NO_LABEL, NO_LABEL, NO_LABEL])
    whole = hard_loss(logits, labels)
    by_hand = -(logits.log_softmax(-1)[0, 2] + logits.log_softmax(-1)[2, 0])/6
    torch.testing.assert_close(whole, by_hand, rtol=1e-12, atol=0)
    parts = sum(hard_loss(logits[i:i + 2], labels[i:i + 2]) for i in (0, 2, 4))/3
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    (grad,), (again,) = (torch.autograd.grad(x, logits) for x in (whole, parts))
    torch.testing.assert_close(grad, again, rtol=1e-12, atol=1e-15)
    assert not grad[labels == NO_LABEL].any() and grad[labels != NO_LABEL].all()


def test_a_hard_loss_of_all_rows_has_todays_bits():
    torch.manual_seed(0)
    for B in (1, 3, 31, 32):
        logits, labels = torch.randn(B, 3, requires_grad=True), torch.randint(3, (B,))
        losses = hard_loss(logits, labels), torch.nn.functional.cross_entropy(logits, labels)
        grads = [torch.autograd.grad(x, logits)[0] for x in losses]
        assert torch.equal(*losses) and torch.equal(*grads)


def test_micro_batches_of_some_labels_are_one_batch(given, tmp_path):
    """The same updates, and the same counts in the log."""
    rows, logs = toy_table(unlabelled=50), []
    for n in (1, 4):
        recipe = given.replace(experiment=f'micro{n}', accum_step=n, dropout=0.)
        logs.append(read_log(run(recipe, tmp_path, progress=False, rows=rows)))
    for a, b in zip(*logs):
        assert a['unlabelled'] == b['unlabelled']
        for part in ('loss', 'hard', 'soft', 'hidden_1', 'grad_norm'):
            assert b[part] == pytest.approx(a[part], rel=1e-4, abs=1e-7)


def test_the_log_counts_rows_without_labels(half_run):
    """96 of 160 rows are seen in six updates; how many of them have no label is between 16 and 80."""
    seen = [line['unlabelled'] for line in read_log(half_run)]
    assert len(seen) == 6 and all(0 <= n <= 16 for n in seen) and 16 <= sum(seen) <= 80
    said = json.loads((half_run/'recipe.json').read_text())
    assert said['rows'] | dict(sha256=0) == dict(count=160, sha256=0, given=True, unlabelled=80)
    assert 'task' not in said


@pytest.mark.parametrize('changes', [dict(hard_weight=0.), dict(method='kd', hard_weight=0.),
                                     dict(hard_weight=0., **FAST)], ids=['lad', 'kd', 'cached'])
def test_no_labels_at_all(given, tmp_path, changes):
    """Trains, stops and goes on to the same bytes; what labels would have said does not matter."""
    rows, recipe = toy_table().drop(columns='label'), given.replace(experiment='none', log_step=4, **changes)
    recipe = recipe.replace(precision='fp32')
    whole = run(recipe, tmp_path/'a', progress=False, rows=rows)
    with Stepper(recipe, tmp_path/'b', rows=rows) as stepper:
        record = stepper.step(2)
        assert set(record.examples.label) <= {'entailment?', 'not_entailment?'} and record.parts['hard'] == 0
        assert '?' in str(record) and 'entailment?' in record._repr_html_()
    with pytest.raises(ValueError, match='Give the same rows again: rows=...'):
        run(recipe, tmp_path/'b', resume=True, progress=False)
    assert same_bytes(whole, run(recipe, tmp_path/'b', resume=True, progress=False, rows=rows))
    assert [line['unlabelled'] for line in read_log(whole)] == [64]
    with_labels = run(recipe.replace(experiment='some'), tmp_path/'a', progress=False, rows=toy_table())
    assert (with_labels/'model.safetensors').read_bytes() == (whole/'model.safetensors').read_bytes()


def test_a_repeated_run_wants_its_rows(half_run):
    rows = toy_table(unlabelled=80)
    with pytest.raises(ValueError, match=r'given in Python: 160 rows, sha256 \w{12}\.\. Give the same'):
        rerun(half_run)
    both = r'160 rows, sha256 \w{12}\.\.; 160 rows, sha256 .* rows \(rows=...\)'
    with pytest.raises(ValueError, match=both):
        rerun(half_run, rows=toy_table(unlabelled=79))
    assert same_bytes(half_run, rerun(half_run, progress=False, rows=rows))


def test_scores_are_of_rows_with_labels(half_run, tmp_path):
    rows = toy_table(40)
    whole, some = (evaluate(half_run, 'toy', max_seq_len=32, rows=r, device_id=-1)
                   for r in (rows[10:], toy_table(40, 10)))
    assert some == whole | dict(unlabelled=10) and 'unlabelled' not in whole
    table = score_checkpoints(half_run, 'toy', rows=rows, device_id=-1)
    assert list(table.columns) == ['step', 'accuracy'] and (half_run/'eval-rows.csv').is_file()
    with pytest.raises(ValueError, match='None of the 40 rows has a label'):
        evaluate(half_run, 'toy', rows=rows.drop(columns='label'), device_id=-1)
    with pytest.raises(ValueError, match='data_dir is .* and rows were given as well'):
        evaluate(half_run, 'toy', data_dir='x', rows=rows)
    blank = rows.drop(columns='label')
    file, = write_predictions(half_run, 'toy', tmp_path, max_seq_len=32, rows=blank, device_id=-1)
    assert file.name == 'toy-rows.tsv' and len(pd.read_csv(file, sep='\t')) == 40
    shares = shares_by_example(half_run, rows=toy_table(8, 4), device_id=-1)
    labels = shares.drop_duplicates('example').label.tolist()
    assert [y in (0, 1) for y in labels] == [False]*4 + [True]*4


REFUSED = {
    "The rows have the columns 'a', 'label'; the task toy needs 'sentence1' and 'sentence2', or 'text' and":
        lambda t: t[['text', 'label']].rename(columns=dict(text='a')),
    'rows is a str; a datasets.Dataset, a data frame or a list of dicts was expected': lambda t: 'rows',
    'rows is a list of something else': lambda t: [1, 2],
    "row 3: the label is 'maybe'; 0 (entailment), 1 (not_entailment) is allowed":
        lambda t: t.assign(label=[*t.label[:3], 'maybe', *t.label[4:]]),
    'row 0: the label is 7;': lambda t: t.assign(label=7),
    'row 0: the label is True;': lambda t: t.assign(label=True),
    'There are no rows': lambda t: t[:0],
    "row 5: 'text' is 3; a text was expected": lambda t: t.assign(text=[*t.text[:5], 3, *t.text[6:]]),
    'None of the 160 training rows has a label, and hard_weight is 0.3. Take hard_weight=0 (--hard_weight 0)':
        lambda t: t.drop(columns='label'),
    "The rows' labels are named":
        lambda t: Dataset.from_pandas(t.assign(label='x')).class_encode_column('label'),
}


@pytest.mark.parametrize('said', REFUSED)
def test_rows_that_do_not_fit(given, tmp_path, said):
    """One line each, and nothing is written."""
    with pytest.raises(ValueError, match=re.escape(said)) as e:
        run(given, tmp_path, progress=False, rows=REFUSED[said](toy_table()))
    assert '\n' not in str(e.value) and names_in(tmp_path) == []


def test_what_learns_from_labels_alone(given, tiny):
    """It wants them all. A folder beside rows is refused as well."""
    alone = given.replace(method='undistilled', teacher=None)
    resolve(alone, rows=toy_table())
    with pytest.raises(ValueError, match='3 of 160 training rows have no label, and there is no teacher'):
        resolve(alone, rows=toy_table(unlabelled=3))
    with pytest.raises(ValueError, match="data_dir is 'x', and rows were given as well"):
        resolve(given.replace(data_dir='x'), rows=toy_table())


def test_a_dataset_on_disk_stays_there(tmp_path):
    Dataset.from_pandas(toy_table(300)).save_to_disk(str(tmp_path/'rows'))
    stored = Dataset.load_from_disk(str(tmp_path/'rows'))
    rows = rows_of('toy', stored.with_format('numpy'))
    assert rows.cache_files and rows['label'][:] == rows_of('toy', toy_table(300))['label'][:]


def test_a_regression_by_rows():
    scored = own_task('scored', labels=(), columns=('text',))
    rows = rows_of(scored, [dict(text='a', label=1), dict(text='b'), dict(text='c', label=float('nan'))])
    assert rows['label'][:] == [1., None, None]
    with pytest.raises(ValueError, match='row 0: the label is 7; a number from 0 to 5 is allowed'):
        rows_of(scored, [dict(text='a', label=7)])
    del tasks['scored']


def test_write_task_takes_other_rows(tmp_path):
    """And leads those without labels elsewhere."""
    frame = pd.DataFrame(dict(text=['a', 'b'], label=['bad', 'good']))
    dataset = Dataset.from_pandas(frame).class_encode_column('label')
    write_task('kind', tmp_path/'a', ('bad', 'good'), ('text',), train=frame, dev=frame)
    write_task('kind', tmp_path/'b', ('bad', 'good'), ('text',), train=dataset, dev=frame.to_dict('records'))
    for name in ('train.tsv', 'dev.tsv'):
        assert (tmp_path/'a'/name).read_bytes() == (tmp_path/'b'/name).read_bytes()
    with pytest.raises(ValueError, match=r'row 1: the label is missing, .* run\(recipe, rows=...\)'):
        write_task('kind', tmp_path/'c', ('bad', 'good'), ('text',), train=frame.assign(label=['bad', None]),
                   dev=frame)
    del tasks['kind']


@pytest.fixture
def reviews():
    yield own_task('reviews', labels=('entailment', 'not_entailment'), columns=('text', 'text_pair'))
    del tasks['reviews']


def test_a_run_brings_its_own_task(given, reviews, tmp_path):
    """Another process opens the run; a task of the same name with other labels is not written over."""
    folder = run(given.replace(task='reviews'), tmp_path, progress=False, rows=toy_table())
    done = program('knows_no_task.py', folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['reviews', 'entailment', 'not_entailment']
    own_task('reviews', labels=('not_entailment', 'entailment'), columns=('text', 'text_pair'))
    with pytest.raises(ValueError, match="here that name has labels .'not_entailment', 'entailment'."):
        open_run(folder)
    said = json.loads((folder/'recipe.json').read_text())
    (folder/'recipe.json').write_text(json.dumps(said | dict(task=said['task'] | dict(name='rte'))))
    with pytest.raises(ValueError, match='describes no task of your own: The task is named'): open_run(folder)


def test_a_direct_trainer_checks_labels_too(given, tmp_path):
    """The distiller of a trainer learns without labels only where something else teaches."""
    trainer = ready(given, tmp_path)
    alone = trainer.train_dataset.remove_columns(['row', 'labels'])
    alone = alone.add_column('labels', [NO_LABEL]*len(alone))
    with pytest.raises(ValueError, match='3000 of 3000 training rows have no label'):
        type(trainer)(Distiller(trainer.model.student), trainer.args, alone, trainer.processing_class)
