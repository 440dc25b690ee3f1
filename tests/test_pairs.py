"""Teacher and student of different families: with one tokenizer between them, and with a tokenizer each."""
import json
import shutil

import pytest
import torch
from transformers import pipeline
from conftest import FEW
from families import FAMILIES, make_folder, write_rows

from lad_nb.analysis import forward_batches
from lad_nb.data import encode, load_task
from lad_nb.evaluation import predict
from lad_nb.experiment import open_run, rerun, resolve, run
from lad_nb.encoders import load_classifier
from lad_nb.models import load_tokenizer, weights_hash
from lad_nb.recipes import FAST, Recipe
from lad_nb.similarity import dev_losses, layer_cka, teacher_agreement
from lad_nb.stepper import Stepper
from lad_nb.study import Study, run_study
from lad_nb.tasks import get_task

SHORT = FEW | dict(batch_size=8, max_seq_len=48)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """Encoders of four families, and a BERT teacher with segments."""
    root = tmp_path_factory.mktemp('pairs')
    for name in ('BERT', 'ELECTRA', 'DistilBERT', 'MPNet'): make_folder(FAMILIES[name], root/name)
    make_folder(FAMILIES['DistilBERT'], root/'narrow', hidden_size=16)
    write_rows(root/'rows')
    recipe = Recipe('teacher', method='fine_tune', ptrain_ver=str(root/'BERT'), data_dir=str(root/'rows'))
    run(recipe.replace(**SHORT), root, progress=False)
    return root


def student(root, name, encoder, method='lad', **changes):
    """The recipe of a student with two layers, cut from an encoder of another family than its teacher's."""
    recipe = Recipe(name, teacher_exp='teacher', method=method, num_hidden_layers=2,
                    data_dir=str(root/'rows'), ptrain_ver=str(root/encoder))
    return recipe.replace(**SHORT | changes)


def log(folder): return [json.loads(line) for line in (folder/'log.jsonl').read_text().splitlines()]


@pytest.mark.parametrize('encoder', ['ELECTRA', 'DistilBERT', 'narrow'])
def test_one_tokenizer_between_them(root, encoder):
    """Hidden states are compared token by token; a narrower student is projected."""
    folder = run(student(root, f'LAD-{encoder}', encoder), root, progress=False)
    assert folder.name == f"LAD-{encoder}_{'electra' if encoder == 'ELECTRA' else 'distilbert'}_toy"
    distiller, tokenizer, recipe = open_run(folder)
    assert recipe.tmodel == 'bert' and (distiller.objective.project is None) == (encoder != 'narrow')
    hidden = [line['hidden_1'] for line in log(folder)]
    assert len(hidden) == 2 and min(hidden) > 0


def test_the_teacher_keeps_its_segments(root):
    """A student without segments must not take them from its teacher, whose answers they change."""
    folder = run(student(root, 'segments', 'DistilBERT', 'kd'), root, progress=False)
    distiller, reader, _ = open_run(folder)
    rows = encode(load_task('toy', 'train', root/'rows'), reader, 48).select(range(8))
    assert 'token_type_ids' in rows.column_names
    assert 'token_type_ids' not in load_tokenizer(folder).model_input_names  # the student's own has none
    batch = reader.pad({k: rows[k] for k in rows.column_names if k != 'labels'}, return_tensors='pt')
    with torch.no_grad():
        alone = distiller.teacher(**batch).logits
        out = distiller(**batch, labels=torch.tensor(rows['labels']))
        without = distiller.teacher(**{k: v for k, v in batch.items() if k != 'token_type_ids'}).logits
    assert torch.equal(out.teacher_logits, alone) and not torch.equal(alone, without)


def test_a_student_is_saved_with_the_segments_that_it_learned_from(root):
    """Its encoder's tokenizer marks none, its teacher's does: the folder answers as what was trained."""
    shutil.copytree(root/'BERT', root/'unmarked')
    path = root/'unmarked'/'tokenizer_config.json'
    unmarked = dict(model_input_names=['input_ids', 'attention_mask'])
    path.write_text(json.dumps(json.loads(path.read_text()) | unmarked))
    folder = run(student(root, 'marked', 'unmarked'), root, progress=False)
    assert 'token_type_ids' not in load_tokenizer(root/'unmarked').model_input_names
    distiller, reader, _ = open_run(folder)
    rows = encode(load_task('toy', 'dev', root/'rows'), reader, 48)
    assert 'token_type_ids' in rows.column_names
    trained = torch.from_numpy(predict(distiller.student, rows, reader, device_id=-1)).double()
    assert torch.equal(answers(root, folder), trained)


def test_a_student_of_one_segment_type_answers_on_pairs(root):
    """Its encoder's tokenizer marks two segments, it has one: a plain pipeline would give both, and raise."""
    recipe = student(root, 'one-type', 'BERT', type_vocab_size=1)
    with pytest.warns(UserWarning, match='type_vocab_size 1'): folder = run(recipe, root, progress=False)
    assert 'token_type_ids' in load_tokenizer(root/'BERT').model_input_names
    assert load_tokenizer(folder).model_input_names == ['input_ids', 'attention_mask']
    dev = load_task('toy', 'dev', root/'rows')
    classify = pipeline('text-classification', model=str(folder), device='cpu', top_k=None)
    found = classify([dict(text=row['sentence1'], text_pair=row['sentence2']) for row in dev])
    odds = answers(root, folder).softmax(-1)
    for row, told in zip(odds, found):
        score_of = {each['label']: each['score'] for each in told}
        assert [score_of[label] for label in get_task('toy').labels] == pytest.approx(row.tolist(), abs=1e-5)


def test_a_tokenizer_each(root):
    """kd compares answers; each side reads its own ids, with and without the cache, to the same loss."""
    with pytest.warns(UserWarning, match='each reads its own ids'):
        plain = run(student(root, 'own', 'MPNet', 'kd'), root, progress=False)
        cached = run(student(root, 'own-cached', 'MPNet', 'kd', teacher_cache=True), root, progress=False)
        again = rerun(plain, progress=False)
    assert weights_hash(again) == weights_hash(plain)
    losses = [[line['loss'] for line in log(f) if 'loss' in line] for f in (plain, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    distiller, tokenizer, _ = open_run(plain)
    theirs = load_tokenizer(root/'teacher_bert_toy')
    text = load_task('toy', 'train', root/'rows').select([0, 1])
    mine, other = (encode(text, t, 48) for t in (tokenizer, theirs))
    assert mine['input_ids'] != other['input_ids']
    batch = {k: torch.tensor(mine[k][:1]) for k in ('input_ids', 'attention_mask')}
    names = [k for k in other.column_names if k != 'labels']
    own = {f'teacher_{k}': torch.tensor(other[k][:1]) for k in names}
    with torch.no_grad():
        out = distiller(**batch, **own, labels=torch.tensor(mine['labels'][:1]))
        alone = distiller.teacher(**{k: torch.tensor(other[k][:1]) for k in names}).logits
    assert torch.equal(out.teacher_logits, alone)
    with pytest.raises(ValueError, match='has no teacher_input_ids'): distiller(**batch)


def test_a_tokenizer_each_stepped_through(root):
    """The stepper shows the student's tokens, and answers of both."""
    recipe = student(root, 'own-stepped', 'MPNet', 'kd', total_step=2, ckpt_step=2)
    with pytest.warns(UserWarning, match='each reads its own ids'), Stepper(recipe, root) as stepper:
        record = stepper.step()
    assert record.parts['soft'] > 0 and len(record.examples) == 8
    read = set(record.examples.text.str.replace(' ', '').str.split('|').explode())
    rows = load_task('toy', 'train', root/'rows')
    assert read <= {text.replace(' ', '') for text in [*rows['sentence1'], *rows['sentence2']]}


@pytest.mark.parametrize('method', ['lad', 'bert_pkd', 'alp_kd'])
def test_hidden_methods_are_refused(root, method):
    """Positions of two tokenizers do not belong together."""
    with pytest.raises(ValueError, match='have different tokenizers, and .* token by token.*or take kd'):
        resolve(student(root, 'refused', 'MPNet', method, **FAST), root)
    assert not list(root.glob('refused*'))


def answers(root, folder):
    """What a model says of the dev rows, read with its own tokenizer."""
    tokenizer = load_tokenizer(folder)
    rows = encode(load_task('toy', 'dev', root/'rows'), tokenizer, 48)
    return torch.from_numpy(predict(load_classifier(folder), rows, tokenizer, device_id=-1)).double()


@pytest.mark.parametrize('encoder', ['MPNet', pytest.param('DistilBERT', marks=pytest.mark.slow)])
def test_analyses_ask_each_with_its_own_ids(root, encoder):
    """The teacher's answers are those to its own ids and segments, in the run and beside another student."""
    teacher = root/'teacher_bert_toy'
    folder = run(student(root, f'asked-{encoder}', encoder, 'kd'), root, progress=False)
    alone = student(root, f'alone-{encoder}', encoder, 'undistilled', teacher_exp=None)
    alone = run(alone, root, progress=False)
    for place, named in (folder, None), (folder, teacher), (alone, teacher):
        said, mine = answers(root, teacher), answers(root, place)
        soft = 25*torch.nn.functional.kl_div((mine/5).log_softmax(-1), (said/5).log_softmax(-1),
                                             reduction='batchmean', log_target=True).item()
        weights = dict(soft_weight=.7, hard_weight=.3, softmax_temp=5.)
        found = dev_losses(place, teacher=named, device_id=-1, **weights)
        assert found.soft.iloc[-1] == pytest.approx(soft, rel=1e-4)
        if place == folder and named is not None: continue
        same = teacher_agreement(place, teacher=named, device_id=-1).same.iloc[-1]
        assert same == (said.argmax(-1) == mine.argmax(-1)).double().mean()


def test_states_of_two_tokenizers_are_not_compared(root):
    """What would hold one token against another is refused."""
    folder = run(student(root, 'states', 'MPNet', 'kd'), root, progress=False)
    for look in (lambda: layer_cka(folder), lambda: next(forward_batches(open_run(folder)))):
        with pytest.raises(ValueError, match='Compare their answers'): look()


def test_a_study_of_another_family(root, tmp_path):
    """Its run folders carry the family that is found, and nothing is trained twice."""
    few = SHORT | dict(ptrain_ver=str(root/'MPNet'), data_dir=str(root/'rows'), total_step=2, ckpt_step=2)
    study = Study('small', base=Recipe('small', num_hidden_layers=2, **few),
                  teachers=dict(toy=Recipe('teacher', method='fine_tune', **few)), tasks=dict(toy={}),
                  methods={'LAD': dict(method='lad')}, seeds=(1,))
    table, said = run_study(study, tmp_path, tmp_path, say=lambda line: None), []
    assert sorted(p.name for p in tmp_path.glob('*_toy')) == ['small_LAD_1_mpnet_toy', 'teacher_mpnet_toy']
    again = run_study(study, tmp_path, tmp_path, say=said.append)
    assert again.value.tolist() == table.value.tolist()
    assert said == ['small, run: 0 of 1 runs to do, 1 at a time']
