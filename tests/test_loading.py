"""What is loaded is whole, of one model and what was written; anything else is refused by name."""
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from lad_nb import cli
from lad_nb.cache import TeacherCache
from lad_nb.data import encode, load_task
from lad_nb.encoders import load_classifier, load_encoder, make_classifier
from lad_nb.evaluation import best_checkpoint, evaluate, predict, score_checkpoints, write_predictions
from lad_nb.experiment import open_run, resolve, run
from lad_nb.interchange import load_script_model
from lad_nb.models import SMALL, load_tokenizer
from lad_nb.runs import checkpoints, find_checkpoint
from lad_nb.students import make_student
from lad_nb.tasks import write_task
from lad_nb.toy import toy_examples
from lad_nb.checkpoints import load_gates

pytestmark = pytest.mark.faults
CHECKSUMS = 'checksums.json'
ON = dict(max_seq_len=32, device_id=-1)
TUNE = dict(method='fine_tune', teacher=None)
SCORE = 'run_fine_tune_eval --experiment quick --task toy --device_id -1'
PREDICT = 'generate_test_prediction --experiment quick --task toy --ckpt 4 --dataset dev --device_id -1'
SPECIAL = dict(tokenizer_class='PreTrainedTokenizerFast', pad_token='[PAD]', unk_token='[UNK]',
               cls_token='[CLS]', sep_token='[SEP]', mask_token='[MASK]')
EMPTY = 'has no tokenizer, or an empty one: every word would be unknown'


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the tiny model, to harm."""
    return shutil.copytree(tiny, tmp_path/'model')


@pytest.fixture(scope='module')
def finished(quick, tmp_path_factory):
    """A finished run, to copy."""
    return run(quick, tmp_path_factory.mktemp('finished'), progress=False)


@pytest.fixture
def done(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path/'experiments'/finished.name)


def change(folder, how, meant=True):
    """Write other weights; when that is meant, nothing is compared any more."""
    path = folder/'model.safetensors'
    save_file({k: v.contiguous() for k, v in how(load_file(path)).items()}, path, metadata={'format': 'pt'})
    if meant: (folder/CHECKSUMS).unlink(missing_ok=True)
    return folder


def settings(folder, **changes):
    path = folder/'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw)//2] ^= 1
    path.write_bytes(raw)


def without(part): return lambda state: {k: v for k, v in state.items() if part not in k}


def renamed(old, new): return lambda state: {k.replace(old, new): v for k, v in state.items()}


def changed(end, how):
    """What is done to the weights whose names end so."""
    return lambda state: {k: how(v) if k.endswith(end) else v for k, v in state.items()}


def frame_of(rows, labels):
    texts = {c: [e[c] for e in rows] for c in ('sentence1', 'sentence2')}
    return pd.DataFrame(texts | dict(label=labels))


# ways to use a model folder

def fresh_head(folder): return make_classifier(folder, 'toy')


def score(folder): return evaluate(folder, 'toy', **ON)


def run_with(recipe, root, **changes): return run(recipe.replace(**changes), root, progress=False)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def command(line, root, capsys):
    """Exit code, stdout, stderr; a refusal is one line and no traceback."""
    code = cli.main([*line.split(), '--root', str(root)])
    out, err = capsys.readouterr()
    if code:
        assert code == 2 and 'Traceback' not in err and err.count('error: ') == 1
        assert err.strip().count('\n') == err.count('warning: '), err
    return code, out, err


MISFITS = dict(
    middle_layer=(without('layer.1.'), 'no encoder.layer.1, though encoder.layer.3 is there'),
    last_layer=(without('layer.3.'), 'num_hidden_layers is 4, the weights have 3'),
    one_tensor=(without('layer.2.attention.self.query.weight'),
                'encoder.layer.2.attention.self.query.weight is missing'),
    renamed_norms=(renamed('LayerNorm', 'layer_norm'), 'embeddings.LayerNorm.bias is missing'),
    no_tensors=(lambda state: {}, 'there are no tensors'),
    foreign=(renamed('bert.', 'other.'), 'is missing'),
    narrow=(changed('0.output.dense.weight', lambda v: v[:, :8]), r'is \(16, 8\), \(16, 32\) was expected'),
    stranger=(lambda state: state | {'bert.encoder.layer.0.gate.weight': torch.zeros(2)},
              'encoder.layer.0.gate.weight is not of this model'))


@pytest.mark.parametrize('harm', MISFITS)
def test_weights_that_do_not_fit(model, quick, tmp_path, harm):
    """Every way in: loaded, scored, asked for predictions, as a teacher, cut from, fine-tuned."""
    how, says = MISFITS[harm]
    change(model, how)
    ways = [load_classifier, load_encoder, fresh_head, score,
            lambda f: write_predictions(f, 'toy', tmp_path/'out', **ON),
            lambda f: run_with(quick, tmp_path, teacher=str(f)),
            lambda f: run_with(quick, tmp_path, ptrain_ver=str(f)),
            lambda f: run_with(quick, tmp_path, ptrain_ver=str(f), **TUNE)]
    for way in ways:
        with pytest.raises(ValueError, match=says) as e: way(model)
        assert str(model) in str(e.value) and '\n' not in str(e.value)
    assert not (tmp_path/'out').exists() and not (tmp_path/'quick_bert_toy').exists()


def test_a_head_that_is_missing(model, quick, tmp_path):
    change(model, without('classifier'))
    says = 'classifier.bias is missing; classifier.weight is missing.*without a head: make_classifier'
    for way in (load_classifier, score, lambda f: run_with(quick, tmp_path, teacher=str(f))):
        with pytest.raises(ValueError, match=says): way(model)
    assert make_classifier(model, 'toy').classifier.weight.shape == (2, 16)


@pytest.mark.parametrize('layers', [2, 3, 5, 40])
def test_other_layer_counts_in_the_config(model, layers):
    settings(model, num_hidden_layers=layers)
    says = f'num_hidden_layers {layers}|num_hidden_layers is {layers}, the weights have 4'
    for way in (load_classifier, load_encoder, fresh_head):
        with pytest.raises(ValueError, match=says): way(model)


def test_a_checkpoint_without_a_layer(done, capsys):
    """Scores, predictions and the run that is opened; as a person asks for them."""
    change(done/'checkpoint-4', without('layer.1.'))
    for line in (SCORE, PREDICT):
        code, _, err = command(line, done.parent, capsys)
        assert code == 2 and 'checkpoint-4' in err and 'num_hidden_layers is 2, the weights have 1' in err
    assert not (done/'predictions').exists() and not (done/'eval-dev.csv').exists()
    with pytest.raises(ValueError, match='the weights have 1'): open_run(done, 4)


def test_resumed_from_a_checkpoint_that_does_not_fit(quick, done):
    """Its checksums are right, its weights are not the student's."""
    for name in ('model.safetensors', 'gates.safetensors'):
        folder = shutil.copytree(done, done.parent/f'{name[:5]}_bert_toy')
        recipe = folder/'recipe.json'
        recipe.write_text(recipe.read_text().replace('"quick"', f'"{name[:5]}"'))
        shutil.rmtree(folder/'checkpoint-6')
        path = folder/'checkpoint-4'/name
        state = load_file(path)
        gone = sorted(state)[0]
        save_file({k: v for k, v in state.items() if k != gone}, path, metadata={'format': 'pt'})
        sums = json.loads((folder/'checkpoint-4'/CHECKSUMS).read_text())
        sums |= {name: hashlib.sha256(path.read_bytes()).hexdigest()}
        (folder/'checkpoint-4'/CHECKSUMS).write_text(json.dumps(sums))
        with pytest.raises(ValueError, match=f'checkpoint-4/{name} does not fit: {gone} is missing'):
            run(quick.replace(experiment=name[:5]), done.parent, resume=True, progress=False)


# what must load, and answer as before

def test_names_of_older_files(model):
    """gamma and beta, position_ids: transformers knows them."""
    whole = load_classifier(model)
    kept = {k: v.clone() for k, v in whole.state_dict().items()}
    whole.load_state_dict(kept, assign=True) # its file will change
    change(model, renamed('LayerNorm.weight', 'LayerNorm.gamma'))
    change(model, renamed('LayerNorm.bias', 'LayerNorm.beta'))
    change(model, lambda state: state | {'bert.embeddings.position_ids': torch.arange(64)[None]})
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert same_weights(load_classifier(model), whole)
        load_encoder(model)


def test_encoders_that_are_whole(tiny, tmp_path):
    """Alone, in a classifier, in a language model, and the package's own: no warning."""
    encoder = load_encoder(tiny)
    encoder.save_pretrained(tmp_path/'alone')
    lm = BertForMaskedLM(encoder.config)
    lm.bert.load_state_dict(encoder.state_dict(), strict=False)
    lm.save_pretrained(tmp_path/'lm')
    pooler = {f'bert.pooler.{k}': v for k, v in encoder.pooler.state_dict().items()}
    change(tmp_path/'lm', lambda state: state | pooler | {'cls.seq_relationship.bias': torch.zeros(2)})
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_encoder(SMALL)
        heads = [make_classifier(f, 'toy', seed=3) for f in (tiny, tmp_path/'alone', tmp_path/'lm')]
        assert all(same_weights(load_encoder(f), encoder) for f in (tmp_path/'alone', tmp_path/'lm'))
    assert all(same_weights(h, heads[0]) for h in heads)


def test_an_encoder_without_a_pooler(tiny, tmp_path):
    """A language model has none: said, and the student's comes from the student's seed."""
    BertForMaskedLM(BertConfig.from_pretrained(tiny)).save_pretrained(tmp_path/'lm')
    with pytest.warns(UserWarning, match='lm has no pooler: what is made from it begins with a fresh one'):
        encoder = load_encoder(tmp_path/'lm')
    torch.manual_seed(8)
    with pytest.warns(UserWarning, match='no pooler'): again = load_encoder(tmp_path/'lm')
    a, b = (make_student(e, 2, 'toy').bert.pooler.dense.weight for e in (encoder, again))
    assert torch.equal(a, b)
    with pytest.warns(UserWarning, match='no pooler'):
        a, b = (fresh_head(tmp_path/'lm').bert.pooler.dense.weight for _ in range(2))
    assert torch.equal(a, b)
    change(tmp_path/'lm', lambda state: state | {'bert.pooler.dense.bias': torch.zeros(16)})
    with pytest.raises(ValueError, match='pooler.dense.weight is missing'): load_encoder(tmp_path/'lm')


# tokenizers

@pytest.mark.parametrize('files', ['absent', 'special tokens alone'])
def test_an_empty_tokenizer(model, quick, tmp_path, files):
    tokenizer = AutoTokenizer.from_pretrained(model)
    for path in model.glob('tokenizer*'): path.unlink()
    if files != 'absent':
        said = json.loads(tokenizer.backend_tokenizer.to_str())
        vocab = said['model']['vocab']
        said['model']['vocab'] = {w: i for w, i in vocab.items() if w in tokenizer.all_special_tokens}
        (model/'tokenizer.json').write_text(json.dumps(said))
        origin = Path(tokenizer.name_or_path)
        if origin != model: shutil.copy(origin/'config.json', model/'config.json')
        (model/'tokenizer_config.json').write_text(json.dumps(SPECIAL))
    for way in (load_tokenizer, score,
                lambda f: write_predictions(f, 'toy', tmp_path/'out', split='dev', **ON),
                lambda f: run_with(quick, tmp_path, ptrain_ver=str(f), **TUNE)):
        with pytest.raises(ValueError, match=f'{EMPTY}.*Copy tokenizer.json'): way(model)
    assert not (tmp_path/'quick_bert_toy').exists()


def test_tokens_beyond_the_embeddings(model, tiny, tmp_path):
    words = BertConfig.from_pretrained(model).vocab_size
    tokenizer = load_tokenizer(tiny)
    data = encode(load_task('toy', 'dev', size=20), tokenizer, 32)
    tokenizer.add_tokens(['zyzzyva'])
    tokenizer.save_pretrained(model)
    says = f'ids up to {words}, .*embeddings for 0 to {words - 1}'
    for way in (load_tokenizer, score,
                lambda f: evaluate(load_classifier(f), 'toy', tokenizer=tokenizer, **ON),
                lambda f: predict(load_classifier(f), data, tokenizer, device_id=-1)):
        with pytest.raises(ValueError, match=says): way(model)


def test_a_tokenizer_that_is_none(model):
    (model/'tokenizer.json').write_text('{"model": 5}')
    with pytest.raises(ValueError, match='model.*does not load'): load_tokenizer(model)


# answers that are no numbers

def nan_in_bias(state): return state | {'classifier.bias': torch.tensor([float('nan'), 0.])}


def test_answers_that_are_no_numbers(model, tmp_path):
    change(model, nan_in_bias)
    says = (r'answers of .*model are not finite on 20 of 20 rows \(the first is row 0, from 0\), '
            'so nothing was scored or written. Weights that are not finite: classifier.bias. Take another')
    data = encode(load_task('toy', 'dev', size=20), load_tokenizer(model), 32)
    with pytest.raises(FloatingPointError, match=says):
        predict(load_classifier(model), data, load_tokenizer(model), device_id=-1)
    for way in (score, lambda f: write_predictions(f, 'toy', tmp_path/'out', split='dev', **ON)):
        with pytest.raises(FloatingPointError, match='not finite on .* rows.*classifier.bias'): way(model)
    assert not (tmp_path/'out').exists()


def test_answers_that_are_no_numbers_on_the_command_line(done, capsys):
    change(done/'checkpoint-4', nan_in_bias)
    for line in (SCORE, PREDICT):
        code, _, err = command(line, done.parent, capsys)
        assert code == 2 and 'checkpoint-4 are not finite' in err and 'classifier.bias' in err
    assert not (done/'eval-dev.csv').exists()


def test_a_weight_that_is_too_large(model):
    large = {'classifier.weight': torch.full((2, 16), 3e38), 'bert.pooler.dense.bias': torch.full((16,), 50.)}
    change(model, lambda state: state | large)
    with pytest.raises(FloatingPointError, match='Its weights are finite: they are too large'): score(model)


# fresh heads, and one precision

def test_a_fresh_head_is_fresh(tiny, tmp_path):
    """Of a classifier as of an encoder alone: one seed, one head, nothing of the old one, any labels."""
    old = load_classifier(tiny)
    load_encoder(tiny).save_pretrained(tmp_path/'encoder')
    for task, rows in (('toy', 2), ('rte', 2), ('mnli', 3), ('stsb', 1)):
        heads = [make_classifier(f, task, seed=5).classifier for f in (tiny, tmp_path/'encoder', tiny)]
        assert all(torch.equal(h.weight, heads[0].weight) and not h.bias.any() for h in heads)
        assert heads[0].weight.shape == (rows, 16)
        assert not torch.equal(heads[0].weight[0], old.classifier.weight[0])
    five, six = (make_classifier(tiny, 'toy', seed=seed).classifier.weight for seed in (5, 6))
    assert not torch.equal(five, six)


def test_other_numbers_of_labels_start_a_run(tiny, quick, tmp_path):
    rows = toy_examples(400)
    frame = frame_of(rows, ['a', 'b', 'c', 'a']*100)
    task = write_task('three', tmp_path/'three', ('a', 'b', 'c'), train=frame[:320], dev=frame[320:])
    data = str(tmp_path/'three')
    folder = run_with(quick, tmp_path, task='three', data_dir=data, ptrain_ver=str(tiny), **TUNE)
    assert load_classifier(folder, task).classifier.weight.shape == (3, 16)


@pytest.mark.parametrize('precision', ['bfloat16', 'float16'])
def test_half_precision_is_loaded_in_fp32(model, quick, tmp_path, precision):
    change(model, lambda state: {k: v.to(getattr(torch, precision)) for k, v in state.items()})
    settings(model, dtype=precision)
    with pytest.warns(UserWarning, match='model is stored in B?F16; it is loaded in fp32'):
        models = load_classifier(model), load_encoder(model), fresh_head(model)
    assert {p.dtype for m in models for p in m.parameters()} == {torch.float32}
    with pytest.warns(UserWarning):
        folder = run_with(quick, tmp_path, teacher=str(model), ptrain_ver=str(model))
    assert {t.dtype for t in load_file(folder/'model.safetensors').values()} == {torch.float32}


# what was written is what is read

def test_one_bit_in_a_checkpoint(done, quick, capsys):
    """Scores, predictions, the run opened, a student of such a teacher, a student cut from it, a plan."""
    flip(done/'checkpoint-4'/'model.safetensors')
    root, says = done.parent, 'checkpoint-4 is damaged: model.safetensors is not what was written'
    distil = 'run_lad_distil --experiment new --task toy --num_hidden_layers 2 --teacher_exp quick --tckpt 4'
    for line in (SCORE, PREDICT,
                 f'{distil} --ptrain_ver {quick.ptrain_ver} --device_id -1 --total_step 2 --warmup_step 0',
                 f'{distil} --device_id -1 --dry_run'):
        code, _, err = command(line, root, capsys)
        assert code == 2 and says in err and f"delete {done/'checkpoint-4'/CHECKSUMS}" in err
    for way in (load_classifier, load_encoder, load_tokenizer, fresh_head,
                lambda f: write_predictions(f, 'toy', done/'out', split='dev', **ON),
                lambda f: open_run(done, 4),
                lambda f: run_with(quick, root, experiment='new', teacher=str(f)),
                lambda f: run_with(quick, root, experiment='new', ptrain_ver=str(f))):
        with pytest.raises(ValueError, match=says): way(done/'checkpoint-4')
    assert sorted(p.name for p in root.iterdir()) == [done.name] and not (done/'out').exists()
    open_run(done, 6), evaluate(done, 'toy', **ON) # the others are as they were


@pytest.mark.parametrize('name', ['model.safetensors', 'gates.safetensors', 'config.json', 'tokenizer.json'])
def test_one_bit_in_the_final_model(done, name):
    flip(done/name)
    with pytest.raises(ValueError, match=f'quick_bert_toy is damaged: {name} is not what was written'):
        open_run(done)
    open_run(done, 6)


def test_gates_of_an_analysis(done):
    """Read without the model beside them."""
    distiller = open_run(done)[0]
    flip(done/'checkpoint-2'/'gates.safetensors')
    with pytest.raises(ValueError, match='checkpoint-2 is damaged: gates.safetensors'):
        load_gates(distiller.objective, done/'checkpoint-2')


def test_what_only_a_resumed_run_reads(done):
    """Half of a checkpoint is the optimiser's: who is short of room may delete it."""
    (done/'checkpoint-4'/'optimizer.pt').unlink()
    evaluate(find_checkpoint(done, 4), 'toy', **ON), open_run(done, 4)


def test_changes_that_were_meant(done):
    """More files, an edited one, and a folder of version 0.1."""
    (done/'README.md').write_text('mine')
    open_run(done)
    settings(done, note='mine')
    says = f'config.json is not what was written.*If the change was meant, delete {done/CHECKSUMS}'
    with pytest.raises(ValueError, match=says): open_run(done)
    (done/CHECKSUMS).unlink()
    open_run(done)
    for checkpoint in checkpoints(done).values(): (checkpoint/CHECKSUMS).unlink()
    open_run(done, 4)


@pytest.mark.parametrize('text', ['', '[]', '{"../../other": ""}', '{"model.safetensors": 5}'])
def test_checksums_that_are_none(done, text):
    (done/CHECKSUMS).write_text(text)
    with pytest.raises(ValueError, match=f'is damaged: .*delete {done/CHECKSUMS}'): open_run(done)


@pytest.mark.parametrize('first', [True, False], ids=['first end', 'ended again'])
def test_killed_between_the_final_files(done, quick, finished, first):
    """At every file: a folder without weights is refused, any other opens; resumed, the same bytes."""
    root, replace, moved = done.parent, os.replace, []
    whole = (finished/'model.safetensors').read_bytes()
    class Killed(BaseException): pass
    def count(a, b):
        if '.final' in str(a): moved.append(Path(b).name)
        replace(a, b)
    with patch('os.replace', count): run(quick, root, resume=True, progress=False)
    assert moved[-2:] == ['model.safetensors', CHECKSUMS]
    for n in range(len(moved)):
        if first:
            for name in moved: (done/name).unlink(missing_ok=True)
        left = [n]
        def die(a, b):
            if '.final' in str(a) and not left[0]: raise Killed
            left[0] -= '.final' in str(a)
            replace(a, b)
        with patch('os.replace', die), pytest.raises(Killed): run(quick, root, resume=True, progress=False)
        if (done/'model.safetensors').exists(): open_run(done)
        else:
            with pytest.warns(match='did not finish; its last checkpoint'): open_run(done)
        run(quick, root, resume=True, progress=False)
        assert (done/'model.safetensors').read_bytes() == whole
        assert (done/CHECKSUMS).exists() and not (done/'.final').exists()
        open_run(done)


def test_a_file_is_hashed_once(done):
    """Opening a run reads each sealed file once, whatever looks at it; a changed one again."""
    for path in done.rglob('*'):
        if path.is_file(): os.utime(path, (1e9, 1e9)) # not written a moment ago
    with patch('hashlib.file_digest', wraps=hashlib.file_digest) as reads:
        open_run(done)
        names = [Path(call.args[0].name) for call in reads.call_args_list]
        assert len(names) == len(set(names)) and done/'model.safetensors' in names
        open_run(done)
        assert len(names) == reads.call_count
    flip(done/'model.safetensors')
    os.utime(done/'model.safetensors', (1e9, 1e9)) # even with its old time
    with pytest.raises(ValueError, match='is damaged'): open_run(done)


# files that were cut

@pytest.mark.parametrize('cut', [0, 5, 300, -7])
def test_truncated_safetensors(done, quick, capsys, cut):
    """The file is named, on the command line in one line."""
    for folder in (done, done/'checkpoint-6'): (folder/CHECKSUMS).unlink()
    for name, ways in {'model.safetensors': (load_classifier, load_encoder, fresh_head, score),
                       'gates.safetensors': (lambda f: open_run(done, None if f == done else 6),)}.items():
        for folder in (done, done/'checkpoint-6'):
            whole = (folder/name).read_bytes()
            (folder/name).write_bytes(whole[:cut])
            for way in ways:
                with pytest.raises(ValueError, match=f'{folder/name} is no whole safetensors file .* bytes'):
                    way(folder)
            if folder != done and name == 'model.safetensors':
                code, _, err = command(SCORE, done.parent, capsys)
                assert code == 2 and f'{folder/name} is no whole safetensors file' in err
            (folder/name).write_bytes(whole)


def test_a_truncated_shard(quick, tmp_path, counted):
    """The cache finds it by its hash; opened past that, the file is named."""
    path = tmp_path/'00000-x.safetensors'
    save_file(dict(layer_1=torch.zeros(4, 2), logits=torch.zeros(2, 2)), path)
    TeacherCache(tmp_path, [path], [0, 2], np.array([2, 2]))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match='00000-x.safetensors is no whole safetensors file'):
        TeacherCache(tmp_path, [path], [0, 2], np.array([2, 2]))
    counted(shards=1)


# settings that no model has

ABSURD = dict(
    num_hidden_layers=(10**9, 10**18, -1, 0, '4', 4.0, True, [4]), hidden_size=(10**8, -16, '16', True),
    vocab_size=(10**12, 0, -5, 'x', 1.5), intermediate_size=(10**10, 0, '32'),
    num_attention_heads=(0, 3, '2', 10**9), max_position_embeddings=(10**12, 0), type_vocab_size=(10**12, 0),
    num_labels=(10**9, -1, 'x'), pad_token_id=(10**9, 'x'), hidden_act=('nope', 5),
    hidden_dropout_prob=(2, 'x'), layer_norm_eps=('x',), id2label=(5, [1], {'a': 'b'}),
    quantization_config=(5,), model_type=('gpt2', 5), is_decoder=('x',))


@pytest.mark.parametrize('name, value', [(name, value) for name in ABSURD for value in ABSURD[name]], ids=str)
def test_absurd_settings(model, quick, tmp_path, capsys, name, value):
    """Refused in a moment, before anything is allocated: what config.json says, and what the file holds."""
    settings(model, **{name: value})
    with pytest.raises(ValueError) as e: load_classifier(model, 'toy')
    assert '\n' not in str(e.value) and (str(model) in str(e.value) or 'dropout' in name)
    if name in ('num_hidden_layers', 'hidden_size', 'vocab_size'):
        assert name in str(e.value) and str(value) in str(e.value).replace(',', '')
    of_a_head = name in ('num_labels', 'id2label', 'hidden_dropout_prob')
    for way in () if of_a_head else (load_encoder, fresh_head):
        with pytest.raises(ValueError): way(model)
    if isinstance(value, int) and name == 'num_hidden_layers':
        with pytest.raises(ValueError, match='num_hidden_layers'):
            resolve(quick.replace(teacher=str(model)), tmp_path, fetch=False)
        line = (f'run_lad_distil --experiment new --task toy --num_hidden_layers 2 --teacher {model} '
                f'--ptrain_ver {model} --device_id -1')
        code, _, err = command(line, tmp_path, capsys)
        assert code == 2 and 'num_hidden_layers' in err


def test_absurd_settings_of_a_checkpoint(done, quick):
    """Nor does a plan count to a thousand million layers."""
    settings(done/'checkpoint-6', num_hidden_layers=10**9)
    (done/'checkpoint-6'/CHECKSUMS).unlink()
    recipe = quick.replace(teacher=None, teacher_exp='quick', tckpt=6)
    says = (r'describes a model of [\d,]+ weights or more, which take [\d,]+ bytes. The file beside it has'
            '.*num_hidden_layers 1000000000')
    for way in (lambda: resolve(recipe, done.parent, fetch=False), lambda: open_run(done, 6)):
        with pytest.raises(ValueError, match=says): way()


# checkpoints of the scripts

def scripts(tiny, folder):
    """The tiny model as the scripts would keep it."""
    folder.mkdir()
    def theirs(name): return name.replace('bert.', 'encoder.', 1).replace('classifier', 'linear_layer')
    state = {theirs(k): v for k, v in load_classifier(tiny).state_dict().items()}
    torch.save(state, folder/'model-1.pt')
    (folder/'config.json').write_text(json.dumps(dict(task='rte', num_attention_heads=2, dropout=.1)))
    return state


FOREIGN = dict(
    empty=lambda p: p.write_bytes(b''),
    junk=lambda p: p.write_bytes(bytes(range(256))*8),
    text=lambda p: p.write_text('accuracy 0.66\n'),
    zip=lambda p: p.write_bytes(b'PK\3\4' + bytes(400)),
    cut=lambda p: p.write_bytes(p.read_bytes()[:-900]),
    half=lambda p: p.write_bytes(p.read_bytes()[:900]),
    safetensors=lambda p: save_file(dict(a=torch.zeros(3)), p),
    a_list=lambda p: torch.save([torch.zeros(2)], p),
    a_number=lambda p: torch.save(5, p),
    nothing=lambda p: torch.save({}, p),
    a_tensor=lambda p: torch.save(torch.zeros(3), p),
    others=lambda p: torch.save(dict(weight=torch.zeros(3, 4)), p),
    wrapped=lambda p: torch.save(dict(model=dict(a=torch.zeros(2)), step=3), p),
    numbered=lambda p: torch.save({1: torch.zeros(2)}, p))


@pytest.mark.parametrize('kind', FOREIGN)
def test_script_files_that_are_none(tiny, tmp_path, kind):
    scripts(tiny, tmp_path/'theirs')
    load_script_model(tmp_path/'theirs', 1)
    FOREIGN[kind](tmp_path/'theirs'/'model-1.pt')
    with pytest.raises(ValueError, match='model-1.pt') as e: load_script_model(tmp_path/'theirs', 1)
    assert '\n' not in str(e.value)


STATES = dict(
    layers=renamed('layer.3.', 'layer.999999999.'),
    flat=changed('word_embeddings.weight', torch.flatten),
    positions=without('position'),
    no_layers=without('layer.'),
    bias=lambda s: s | {'linear_layer.bias': torch.zeros(())},
    headless=without('linear'),
    labels=lambda s: s | {'linear_layer.weight': torch.zeros(3, 16), 'linear_layer.bias': torch.zeros(3)})


@pytest.mark.parametrize('what', STATES)
def test_script_states_that_do_not_fit(tiny, tmp_path, what):
    state = scripts(tiny, tmp_path/'theirs')
    torch.save(STATES[what](state), tmp_path/'theirs'/'model-1.pt')
    with pytest.raises(ValueError, match='model-1.pt'): load_script_model(tmp_path/'theirs', 1)


@pytest.mark.parametrize('said', [
    '', '{', '[]', '5', '{}', '{"task": 5}', '{"task": "nobody"}',
    '{"task": "rte", "num_attention_heads": "two"}', '{"task": "rte", "num_attention_heads": 3}',
    '{"task": "rte", "dropout": "much"}'])
def test_script_settings_that_are_none(tiny, tmp_path, said):
    scripts(tiny, tmp_path/'theirs')
    (tmp_path/'theirs'/'config.json').write_text(said)
    with pytest.raises(ValueError, match='config.json|no task') as e: load_script_model(tmp_path/'theirs', 1)
    assert '\n' not in str(e.value)


# a student that says one thing

@pytest.fixture
def regression(quick, tiny, tmp_path):
    """A run on scores, of three checkpoints."""
    rows = toy_examples(300)
    frame = frame_of(rows, [i % 6 for i in range(300)])
    write_task('scores', tmp_path/'scores', (), train=frame[:200], dev=frame[200:])
    load_encoder(tiny).save_pretrained(tmp_path/'encoder')
    load_tokenizer(tiny).save_pretrained(tmp_path/'encoder')
    return run_with(quick, tmp_path/'experiments', task='scores', data_dir=str(tmp_path/'scores'),
                    ptrain_ver=str(tmp_path/'encoder'), **TUNE)


def constant(state): return {k: v*0 if k.startswith('classifier') else v for k, v in state.items()}


def test_a_constant_student_of_a_regression(regression, capsys):
    data = regression.parent.parent/'scores'
    line = f'run_fine_tune_eval --experiment quick --task scores --data_dir {data} --device_id -1'
    change(regression/'checkpoint-2', constant)
    code, out, err = command(line, regression.parent, capsys)
    assert code == 0 and 'checkpoint 2: pearson nan' in out and 'best on dev: checkpoint 2' not in out
    assert 'pearson is undefined: the model says the same of all 100 rows' in err
    for step in (4, 6): change(regression/f'checkpoint-{step}', constant)
    code, out, err = command(line, regression.parent, capsys)
    assert code == 2 and 'best on' not in out
    assert 'No checkpoint is the best: pearson is undefined for each of them (2, 4, 6)' in err
    assert (regression/'eval-dev.csv').read_text().count('NaN') == 6
    with pytest.warns(UserWarning, match='spearman is undefined'):
        table = score_checkpoints(regression, 'scores', device_id=-1)
    with pytest.raises(ValueError, match='No checkpoint is the best'): best_checkpoint(table)
