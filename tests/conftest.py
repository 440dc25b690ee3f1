"""What the tests share: real data when it is there, and a small teacher trained once."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
ROOT = Path(__file__).parents[1]
FILES = ('model.safetensors', 'gates.safetensors', 'log.jsonl')


def final_files(folder):
    """{name: bytes} of what a run leaves behind; a method without gates leaves none of them."""
    return {name: (folder/name).read_bytes() for name in FILES if (folder/name).exists()}


def same_bytes(a, b):
    """Whether two runs ended alike: the same files, byte for byte, a model and a log among them."""
    found = final_files(a)
    return found == final_files(b) and {'model.safetensors', 'log.jsonl'} <= found.keys()


def in_python(*words, cwd):
    """A program in a process of its own: in_python(TESTS/'program.py', argument, ..., cwd=folder)."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


TESTS = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the tests marked slow as well')


def pytest_collection_modifyitems(config, items):
    if not config.getoption('--slow'):
        for item in items:
            if 'slow' in item.keywords: item.add_marker(pytest.mark.skip(reason='takes minutes: pytest --slow runs it'))


@pytest.fixture(scope='session')
def glue():
    """The folder of real GLUE folders: LAD_NB_GLUE, or shared/data/glue beside the project."""
    folder = Path(os.environ.get('LAD_NB_GLUE') or ROOT.parent/'shared'/'data'/'glue')
    if not (folder/'RTE').is_dir(): pytest.skip(f'no GLUE data: {folder} has no RTE; LAD_NB_GLUE names the folder that has')
    return folder


FEW = dict(task='toy', max_seq_len=32, batch_size=16, total_step=4, warmup_step=1, ckpt_step=2, log_step=2, device_id=-1)


@pytest.fixture(scope='session')
def experiments(tmp_path_factory):
    """A folder of experiments with one teacher in it: a tiny BERT of random weights, fine-tuned on the toy task for four updates."""
    from lad_nb.experiment import run
    from lad_nb.run_books import run_books
    from lad_nb.encoders import random_bert
    root = tmp_path_factory.mktemp('experiments')
    encoder = random_bert(root/'encoder', num_attention_heads=12)
    teacher = run_books['rte']['fine_tune'].replace(experiment='teacher', ptrain_ver=str(encoder), lr=5e-5, **FEW)
    run(teacher, root, progress=False)
    return root


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    """The folder of a BERT of four layers, 16 wide, with random weights and the toy task's words: what tests of faults can afford to start often."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    from lad_nb.tasks import tasks
    from lad_nb.toy import toy_examples
    folder = tmp_path_factory.mktemp('tiny')
    words = sorted({w for e in toy_examples(3000) for s in (e['sentence1'], e['sentence2']) for w in s.removesuffix('.').split()})
    special = dict(pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]', mask_token='[MASK]')
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate([*special.values(), '.', *words])}, unk_token='[UNK]'))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing('[CLS] $A [SEP]', '[CLS] $A [SEP] $B:1 [SEP]:1', [('[CLS]', 2), ('[SEP]', 3)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, model_input_names=['input_ids', 'token_type_ids', 'attention_mask'], **special).save_pretrained(folder)
    torch.manual_seed(0)
    id2label = tasks['toy'].id2label
    BertForSequenceClassification(BertConfig(vocab_size=len(words) + 6, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64, initializer_range=.3,
                                             id2label=id2label, label2id={v: k for k, v in id2label.items()}, problem_type='single_label_classification')).save_pretrained(folder)
    return folder


@pytest.fixture(scope='session')
def quick(tiny):
    """A LAD recipe of six updates on that model, which is teacher and encoder at once."""
    from lad_nb.recipes import Recipe
    return Recipe('quick', task='toy', num_hidden_layers=2, teacher=str(tiny), ptrain_ver=str(tiny), train_size=160, max_seq_len=32, batch_size=16, total_step=6, warmup_step=1, ckpt_step=2, log_step=2, device_id=-1)


@pytest.fixture(autouse=True)
def no_runs_left_behind(request):
    """After a test only the encoder, the teacher and the run that others are compared with stay."""
    yield
    if 'experiments' in request.fixturenames:
        for folder in request.getfixturevalue('experiments').iterdir():
            if not folder.name.startswith(('encoder', 'teacher_', 'whole_')): shutil.rmtree(folder)


@pytest.fixture
def lad():
    """A LAD recipe of four updates that learns from that teacher."""
    from lad_nb.run_books import run_books
    book = run_books['rte']
    return book['lad'].replace(experiment='lad', num_hidden_layers=3, teacher_exp='teacher', tckpt=4, **FEW)
