"""Eight families of encoders, and those that are refused: tiny models, tokenizers of their own kinds."""
import importlib.util
import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import program
from families import BERT, FAMILIES, SIZES, WORDS, Family, make_folder, make_tokenizer
from family_checks import CHECKS, Runs, check_head, facts, read_table

from lad_nb.encoders import find_layers, load_classifier, load_encoder
from lad_nb.experiment import resolve
from lad_nb.recipes import Recipe
from lad_nb.runs import find_experiment, read_log
from lad_nb.students import make_student


@pytest.fixture(scope='module')
def all_runs(tmp_path_factory):
    """Every family's runs; each is made when it is first asked for."""
    folders = {name: tmp_path_factory.mktemp(family.model_type) for name, family in FAMILIES.items()}
    return {name: Runs(family, folders[name]) for name, family in FAMILIES.items()}


ALIKE = ('XLM-R', 'ELECTRA')  # much as RoBERTa and BERT
EACH = [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in FAMILIES]


@pytest.fixture(scope='module', params=EACH)
def runs(request, all_runs):
    return all_runs[request.param]


@pytest.fixture
def all_of_it(request):
    """Whether the long tests run as well."""
    return request.config.getoption('--slow')


@pytest.mark.parametrize('check', CHECKS)
def test_family(runs, check, all_of_it):
    """Everything that is asked of a family; `family_checks` says what that is."""
    if check == 'ONNX' and runs.family.model_type != 'bert' and not all_of_it:
        pytest.skip('takes a minute for all families: pytest --slow runs it')
    if check == 'ONNX' and not all(map(importlib.util.find_spec, ('onnx', 'onnxscript', 'onnxruntime'))):
        pytest.skip("ONNX is not installed: pip install 'lad_nb[onnx]'")
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Not every layer of the modernbert')  # `test_first_layer` has it
        CHECKS[check](runs)


def test_head(runs):
    """What trains gates by the task: the head of every family reads states that are not its own."""
    check_head(runs)


def test_head_beside_a_convolution(tmp_path):
    """The large DeBERTas have a convolution beside their first layer: in a pass of one layer it is no part of
    what the head reads."""
    known = FAMILIES['DeBERTa-v2']
    family = replace(known, settings=known.settings | dict(conv_kernel_size=3))
    check_head(Runs(family, tmp_path))


def test_in_a_fresh_process(all_runs):
    """Another process opens all of them by their folders, and its models answer the same."""
    folders = [runs.student('lad') for runs in all_runs.values()]
    done = program('opens_runs.py', *folders)
    assert done.returncode == 0, done.stderr
    for runs, line in zip(all_runs.values(), done.stdout.splitlines(), strict=True):
        said, *answers = json.loads(line)
        assert said == runs.family.model_type
        batch = runs.tokenizer('anna sang again.', 'anna sang.', return_tensors='pt')
        for model, answer in zip((load_classifier(runs.teacher), runs.model), answers):
            with torch.inference_mode(): expected = model.eval()(**batch).logits[0]
            np.testing.assert_allclose(answer, expected, atol=1e-6)


def test_found_by_name(all_runs):
    """A run is found by its experiment and task, whatever the family."""
    runs = all_runs['MPNet']
    folder = runs.student('lad')
    assert find_experiment('lad', 'toy', 'bert', folder.parent) == folder


# ---------------------------------------------------------------- what differs in ModernBERT

def test_layer_types(all_runs):
    """A layer's type travels with it: a student of layers 3 and 4 looks near by with its first alone."""
    encoder = load_encoder(all_runs['ModernBERT'].encoder)
    full, near = 'full_attention', 'sliding_attention'
    assert encoder.config.layer_types == [full, near, near, full]
    for init, types in (('even', [near, full]), ('first', [full, near]), ({1: 1, 2: 4}, [full, full])):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            student = make_student(encoder, 2, 'toy', init)
        assert student.config.layer_types == types
        assert [layer.attention_type for layer in find_layers(student)[1]] == types


def test_first_layer(all_runs):
    """ModernBERT's first layer has no norm before its attention: a later one in its place loses its own, and
    the library says so. The first in first place loses nothing."""
    encoder = load_encoder(all_runs['ModernBERT'].encoder)
    with pytest.warns(UserWarning, match='layer 2 loses attn_norm.weight as student layer 1'):
        make_student(encoder, 2, 'toy')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        make_student(encoder, 2, 'toy', {1: 1, 2: 4})


def test_distilbert_of_the_hub(all_runs, tmp_path):
    """The hub's DistilBERT names no tokenizer class, so its tokenizer is BERT's and makes token types. Its
    model takes none: they are left out."""
    runs = all_runs['DistilBERT']
    folder = shutil.copytree(runs.encoder, tmp_path/'encoder')
    (folder/'tokenizer_config.json').write_text('{"do_lower_case": true, "model_max_length": 64}')
    again = Runs(runs.family, tmp_path)
    again.encoder = folder
    losses, known = (pd.DataFrame(read_log(r.teacher)).loss for r in (again, runs))
    assert 'token_type_ids' in transformers.AutoTokenizer.from_pretrained(folder).model_input_names
    assert losses.tolist() == known.tolist()


# ---------------------------------------------------------------- families that nobody named

OTHERS = [
    Family('MobileBERT', 'mobilebert', WORDS, BERT, 'BertTokenizer', 'encoder.layer', True,
           ('embeddings', 'pooler'), dict(embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16)),
    Family('ConvBERT', 'convbert', WORDS, BERT, 'BertTokenizer', 'encoder.layer', True,
           ('embeddings', 'embeddings_project'), dict(embedding_size=16))]


@pytest.mark.parametrize('family', OTHERS, ids=lambda family: family.name)
def test_not_on_the_list(family, tmp_path):
    """A family that the library was not written for: a teacher and a LAD student."""
    runs = Runs(family, tmp_path)
    CHECKS['teacher'](runs)
    CHECKS['LAD'](runs)


SMALL = dict(vocab_size=240)
REFUSED = {
    'ALBERT': (lambda: transformers.AlbertForMaskedLM(transformers.AlbertConfig(
                   embedding_size=16, **SMALL, **SIZES)),
               r'albert.* 4 layers .*one list of 4 blocks .*ALBERT'),
    'Funnel': (lambda: transformers.FunnelForMaskedLM(transformers.FunnelConfig(
                   block_sizes=[2, 2], d_model=32, n_head=4, d_head=8, d_inner=64, **SMALL)),
               r'funnel.* number of layers cannot be set .*one list of 4 blocks'),
    'GPT-2': (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
                  n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0, **SMALL)),
              'type gpt2, a decoder: lad_nb distils encoders'),
    'T5': (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(
               d_model=32, d_ff=64, num_layers=4, num_heads=4, d_kv=8, **SMALL)),
           'type t5, an encoder-decoder: lad_nb distils encoders'),
    'ViT': (lambda: transformers.ViTModel(transformers.ViTConfig(image_size=32, **SIZES)),
            'type vit, and transformers has no classifier of text for it')}


def refusal(folder, root):
    """What `resolve` says of an encoder: one line, and nothing is written."""
    recipe = Recipe('x', method='fine_tune', ptrain_ver=str(folder), task='toy', device_id=-1)
    with pytest.raises(ValueError) as e: resolve(recipe, root)
    assert '\n' not in str(e.value) and not root.exists()
    return str(e.value)


@pytest.mark.parametrize('name', REFUSED)
def test_refused(name, tmp_path):
    """What cannot be cut layer by layer is refused before anything is trained; what to take is said."""
    build, expected = REFUSED[name]
    build().save_pretrained(tmp_path/'model')
    make_tokenizer(FAMILIES['BERT']).save_pretrained(tmp_path/'model')
    said = refusal(tmp_path/'model', tmp_path/'experiments')
    assert pd.Series([said]).str.contains(expected).all(), said
    assert 'Take one such as BERT' in said and str(tmp_path/'model') in said


def test_unknown_type(tmp_path):
    """A model_type that transformers does not know."""
    folder = make_folder(FAMILIES['BERT'], tmp_path/'model')
    config = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text(json.dumps(config | dict(model_type='frobnicator')))
    said = refusal(folder, tmp_path/'experiments')
    assert 'does not describe a model' in said and 'frobnicator' in said


# ---------------------------------------------------------------- the table

def test_table(all_runs):
    """The committed table is of these families and these checks, all were passed, and its facts are those
    that are found now."""
    table = read_table()
    assert table.family.tolist() == [*FAMILIES]
    known = pd.DataFrame([facts(runs.family, runs.encoder) for runs in all_runs.values()])
    pd.testing.assert_frame_equal(table[known.columns], known)
    asked = [name for name in CHECKS if name not in ('facts', 'tokenizer')]
    assert [column for column in table if column not in (*known.columns, 'transformers')] == asked
    assert (table[asked] == 'yes').all(axis=None)
