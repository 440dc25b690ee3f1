"""What is asked of a family of encoders: runs that are made once, and `CHECKS` that look at them. The tests
ask every family everything; tools/make_families.py writes down what came of it."""
import logging
import warnings
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from families import Family, make_folder, write_rows
from lad_nb.analysis import gate_shares, layer_map, shares_by_token
from lad_nb.data import encode, load_task
from lad_nb.distiller import FrozenTeacher
from lad_nb.durable import file_hash
from lad_nb.encoders import find_layers, load_encoder, parts_of
from lad_nb.evaluation import evaluate, predict, write_predictions
from lad_nb.experiment import open_run, run
from lad_nb.models import load_tokenizer
from lad_nb.recipes import Recipe
from lad_nb.runs import read_log
from lad_nb.similarity import layer_cka, teacher_agreement
from lad_nb.stepper import Stepper
from lad_nb.students import make_student

S = 48  # tokens: none of the toy task's pairs is cut, even into small pieces
FEW = dict(task='toy', max_seq_len=S, batch_size=8, total_step=4, warmup_step=1, ckpt_step=2, log_step=1,
           device_id=-1)
TABLE = Path(__file__).parents[1]/'nbs'/'tutorials'/'families.csv'  # made by tools/make_families.py
METHODS = {'LAD': 'lad', 'BERT-PKD': 'bert_pkd', 'ALP-KD, hidden': 'alp_kd_hidden', 'ALP-KD, [CLS]': 'alp_kd'}


class Runs:
    """A family's encoder and its runs, each made when it is first asked for."""
    def __init__(self, family: Family, root: Path):
        self.family, self.root, self.made = family, root, {}

    @cached_property
    def data(self): return write_rows(self.root/'rows')

    @cached_property
    def encoder(self): return make_folder(self.family, self.root/'encoder')

    def recipe(self, method, **changes):
        """A student of two layers."""
        same = dict(data_dir=str(self.data), num_hidden_layers=2, teacher=str(self.teacher),
                    ptrain_ver=str(self.encoder), lr=3e-3, gate_lr=3e-3)
        return Recipe(method, method=method, **FEW | same | changes)

    @cached_property
    def teacher(self):
        """Fine-tuned for four updates."""
        recipe = Recipe('teacher', method='fine_tune', ptrain_ver=str(self.encoder), data_dir=str(self.data),
                        lr=3e-3, **FEW)
        return run(recipe, self.root, progress=False)

    def student(self, method, **changes):
        """The run folder of a method."""
        key = (method, *changes)
        if key not in self.made:
            where = self.root/'_'.join(key)
            self.made[key] = run(self.recipe(method, **changes), where, progress=False)
        return self.made[key]

    @cached_property
    def held(self):
        """What the second update of a run did that was left there, with a checkpoint."""
        with Stepper(self.recipe('lad'), self.root/'held') as stepper: return stepper.step(2)

    @cached_property
    def model(self): return AutoModelForSequenceClassification.from_pretrained(self.student('lad')).eval()

    @cached_property
    def tokenizer(self): return AutoTokenizer.from_pretrained(self.student('lad'))

    @cached_property
    def dev(self): return load_task('toy', 'dev', self.data)


# ---------------------------------------------------------------- what is known of a family

def facts(family, folder):
    """What the library finds in an encoder's folder."""
    encoder, tokenizer = load_encoder(folder), load_tokenizer(folder)
    path, _ = find_layers(encoder)
    layers = [f'layer {k}' for k in range(1, 5)]
    names = [name for name in parts_of(encoder) if name not in layers]
    return dict(family=family.name, model_type=encoder.config.model_type, encoder=type(encoder).__name__,
                layers=path, beside=', '.join(names), tokenizer=type(tokenizer).__name__, pieces=family.kind,
                token_types='yes' if 'token_type_ids' in tokenizer.model_input_names else 'no')


def check_facts(runs):
    """What is found is what is known."""
    family, found = runs.family, facts(runs.family, runs.encoder)
    assert found['model_type'] == family.model_type and found['tokenizer'] == family.tokenizer
    assert found['layers'] == family.layers and found['beside'] == ', '.join(family.beside)
    assert (found['token_types'] == 'yes') == family.token_types


def check_tokenizer(runs):
    """Padding is the model's, a pair has its separators, and what the toy task says is known."""
    tokenizer, config = load_tokenizer(runs.encoder), load_encoder(runs.encoder).config
    assert tokenizer.pad_token_id == config.pad_token_id == runs.family.special.index(runs.family.pad)
    data = encode(runs.dev, tokenizer, S)
    inputs = {name for name in data.column_names if name != 'labels'}
    assert inputs == set(tokenizer.model_input_names)
    for ids, row in zip(data['input_ids'], runs.dev):
        assert ids[0] == tokenizer.cls_token_id and ids.count(tokenizer.sep_token_id) in (2, 3)
        assert tokenizer.unk_token_id not in ids
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text.replace(' ', '') == (row['sentence1'] + row['sentence2']).replace(' ', '')


# ---------------------------------------------------------------- training

def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def moved(before, after):
    """{part: by how much its weights moved} of two models of one shape."""
    parts = zip(parts_of(before).items(), parts_of(after).values())
    return {name: sum((p - q).abs().sum().item() for p, q in zip(a.parameters(), b.parameters()))
            for (name, a), b in parts}


def check_log(folder, names, steps=4):
    """Every update has its losses, and each is a number."""
    log = pd.DataFrame(read_log(folder)).dropna(subset=['loss'])
    assert log.step.tolist() == [*range(1, steps + 1)]
    assert np.isfinite(log[names].to_numpy(dtype=float)).all()
    return log


def check_teacher(runs):
    """Every part of the encoder was trained, and the folder holds the family's own classifier."""
    check_log(runs.teacher, ['loss'])
    teacher = AutoModelForSequenceClassification.from_pretrained(runs.teacher)
    assert type(teacher).__name__ == type(load_encoder(runs.encoder)).__name__.removesuffix(
        'Model') + 'ForSequenceClassification'
    assert all(moved(load_encoder(runs.encoder), teacher.base_model).values())


def check_method(runs, method):
    """The student has two layers, each with a hidden loss, and every part of it was trained."""
    short = {} if method == 'lad' else dict(total_step=2)
    folder = runs.student(method, **short)
    assert folder.name == f'{method}_{runs.family.model_type}_toy'
    log = check_log(folder, ['loss', 'hard', 'soft', 'hidden_1', 'hidden_2'], short.get('total_step', 4))
    assert (log[['hidden_1', 'hidden_2']] > 0).all(axis=None)
    student = AutoModelForSequenceClassification.from_pretrained(folder)
    assert len(find_layers(student)[1]) == student.config.num_hidden_layers == 2
    began = make_student(load_encoder(runs.encoder), 2, 'toy')
    assert {name: shift for name, shift in moved(began, student).items() if not shift} == {}


def check_cache(runs):
    """A teacher that is read from disk teaches the same."""
    both = runs.student('lad'), runs.student('lad', teacher_cache=True)
    here, cached = (pd.DataFrame(read_log(folder)) for folder in both)
    parts = ['loss', 'hard', 'soft', 'hidden_1', 'hidden_2']
    np.testing.assert_allclose(here[parts], cached[parts], rtol=1e-4)


def squeezed(text): return text.replace(' ', '')


def check_stepper(runs):
    """Held after two updates: the loss is the sum of its terms, the batch is readable, and every layer and
    gate has a gradient."""
    record = runs.held
    assert record.step == 2 and record.full
    assert {'layer 1', 'layer 2', 'gate 2', 'gate 4'} <= {*record.groups.index}
    assert (record.groups.gradient > 0).all()
    np.testing.assert_allclose(sum(record.terms.values()), record.parts['loss'], rtol=1e-4)
    train = load_task('toy', 'train', runs.data)
    known = {squeezed(text) for column in ('sentence1', 'sentence2') for text in train[column]}
    read = [squeezed(part) for text in record.examples.text for part in text.split('|')]
    assert len(read) == 16 and known.issuperset(read)


def check_resume(runs):
    """The run that was held and left goes on to the same bytes."""
    assert runs.held.step == 2
    again = run(runs.recipe('lad'), runs.root/'held', resume=True, progress=False)
    for name in ('model.safetensors', 'gates.safetensors'):
        assert file_hash(again/name) == file_hash(runs.student('lad')/name)


def check_head(runs):
    """The teacher's head on the teacher's own last states says what the teacher says, on any other states
    something else; states get gradients, weights get none, and the teacher is afterwards what it was."""
    teacher = FrozenTeacher(AutoModelForSequenceClassification.from_pretrained(runs.teacher))
    rows = runs.dev[:4]
    tokenizer = load_tokenizer(runs.encoder)
    batch = dict(tokenizer(rows['sentence1'], rows['sentence2'], padding=True, return_tensors='pt'))
    hidden, logits = teacher.ask_teacher(**batch, output_states=True)
    assert (teacher.ask_head(batch, hidden[-1]) - logits).abs().max() < 1e-6
    lower = hidden[1].clone().requires_grad_()
    said = teacher.ask_head(batch, lower)
    assert (said - logits).abs().max() > 1e-3
    said.sum().backward()
    assert lower.grad.norm() > 0 and all(p.grad is None for p in teacher.teacher.parameters())
    assert teacher.ask_teacher(**batch)[1].equal(logits)


# ---------------------------------------------------------------- looking at it

def check_analyses(runs):
    """Shares sum to 1, tokens fall into classes of both sentences, and layers are compared."""
    folder, which = runs.student('lad'), dict(rows=16, device_id=-1)
    shares = gate_shares(folder, **which)
    sums = shares.groupby('gate').share.sum() + shares.groupby('gate').bias.first()
    np.testing.assert_allclose(sums, 1, atol=1e-4)
    tokens = set(shares_by_token(folder, **which).token)
    own = {runs.tokenizer.cls_token, runs.tokenizer.sep_token}
    assert tokens == own | {'content', 'function', 'punctuation'}
    assert len(layer_map(folder, **which)) == 8
    alike = layer_cka(folder, chunk=32, **which)
    assert alike.cka.between(-.1, 1.001).all() and {'teacher', 'student', 'gate'} <= set(alike.kind_a)
    assert teacher_agreement(folder, [4], **which).same.between(0, 1).all()


def check_evaluation(runs):
    """The score is the share of right answers, and the file of answers says the same."""
    folder, where = runs.student('lad'), dict(data_dir=runs.data, max_seq_len=S, device_id=-1)
    score = evaluate(folder, 'toy', **where)['accuracy']
    file, = write_predictions(folder, 'toy', runs.root/'answers', split='dev', **where)
    answers = pd.read_csv(file, sep='\t').prediction
    labels = [runs.dev.features['label'].int2str(label) for label in runs.dev['label']]
    assert len(answers) == len(labels) and abs((answers == labels).mean() - score) < 1e-9


def answers_of(runs):
    return predict(runs.model, encode(runs.dev, runs.tokenizer, S), runs.tokenizer, device_id=-1)


def check_pipeline(runs):
    """transformers alone reads the run folder, and answers as `predict` does."""
    classify = pipeline('text-classification', model=str(runs.student('lad')), device='cpu')
    pairs = [dict(text=row['sentence1'], text_pair=row['sentence2']) for row in runs.dev]
    said = classify(pairs, batch_size=8, top_k=None)
    ours = torch.from_numpy(answers_of(runs)).softmax(-1)
    ids = runs.model.config.label2id
    for row, scores in zip(ours, said):
        for answer in scores: assert abs(answer['score'] - row[ids[answer['label']]].item()) < 1e-5


class Logits(torch.nn.Module):
    """A classifier with plain tensors going in and coming out."""
    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors): return self.model(**dict(zip(self.names, tensors))).logits


def check_onnx(runs):
    """The exported student answers as the student does, for batches of other sizes and lengths."""
    import onnxruntime
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    def ask(rows):
        return runs.tokenizer(rows['sentence1'], rows['sentence2'], padding=True, return_tensors='pt')
    batch, file = ask(runs.dev[:2]), runs.root/'student.onnx'
    names = [*batch]
    axes = tuple(dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC) for _ in names)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(Logits(runs.model, names).eval(), tuple(batch.values()), file, input_names=names,
                          output_names=['logits'], dynamic_shapes=(axes,), dynamo=True, external_data=False,
                          optimize=False, verbose=False)
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    for rows in (runs.dev[:1], runs.dev[3:10]):
        batch = ask(rows)
        found, = session.run(None, {name: batch[name].numpy() for name in names})
        with torch.inference_mode(): expected = runs.model(**batch).logits
        np.testing.assert_allclose(found, expected, atol=1e-4)


def check_open(runs):
    """`open_run` and transformers open the same student."""
    distiller, tokenizer, _ = open_run(runs.student('lad'))
    ours, theirs = weights_of(distiller.student), weights_of(runs.model)
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    assert tokenizer.get_vocab() == runs.tokenizer.get_vocab() and type(tokenizer) is type(runs.tokenizer)


# ---------------------------------------------------------------- cutting

def states_of(model, batch):
    with torch.inference_mode(): return model.eval()(**batch, output_hidden_states=True).hidden_states


def check_copy(runs):
    """A student of all layers has the encoder's states, to the last bit."""
    encoder = load_encoder(runs.encoder)
    student = make_student(encoder, 4, 'toy')
    rows = runs.dev[:4]
    tokenizer = load_tokenizer(runs.encoder)
    batch = tokenizer(rows['sentence1'], rows['sentence2'], padding=True, return_tensors='pt')
    pairs = [*zip(states_of(encoder, batch), states_of(student.base_model, batch))]
    assert len(pairs) == 5 and all(a.equal(b) for a, b in pairs)


def check_start(runs):
    """Layers begin as those that were named, and what lies beside them is copied."""
    encoder = load_encoder(runs.encoder)
    _, theirs = find_layers(encoder)
    beside = {name: part for name, part in parts_of(encoder).items() if not name.startswith('layer ')}
    for init, layers in (('even', (2, 4)), ('first', (1, 2)), ({1: 1, 2: 3}, (1, 3))):
        student = make_student(encoder, 2, 'toy', init)
        for ours, k in zip(find_layers(student)[1], layers):
            told = theirs[k - 1].state_dict()
            both = ours.state_dict().keys() & told.keys()
            assert both and all(told[name].equal(ours.state_dict()[name]) for name in both)
        for name, part in beside.items():
            copied = student.base_model.get_submodule(name).state_dict()
            assert all(weight.equal(copied[n]) for n, weight in part.state_dict().items())


CHECKS = {
    'facts': check_facts, 'tokenizer': check_tokenizer, 'copy of all layers': check_copy,
    'student_init': check_start, 'teacher': check_teacher,
    **{name: (lambda runs, method=method: check_method(runs, method)) for name, method in METHODS.items()},
    'teacher cache': check_cache, 'Stepper': check_stepper, 'resume': check_resume,
    'analyses': check_analyses, 'evaluation': check_evaluation, 'pipeline': check_pipeline,
    'open again': check_open, 'ONNX': check_onnx}


def read_table():
    """The committed table: a row a family, what is known of it, and what came of every check."""
    return pd.read_csv(TABLE)
