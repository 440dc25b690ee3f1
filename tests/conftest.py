"""What the tests share: real data when it is there, and a small teacher trained once."""
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest

# What a shell starts in its background ignores Ctrl-C (with nohup a hangup, too), and so does all that is
# started there; tests need both
if threading.current_thread() is threading.main_thread():
    for name, before in dict(SIGINT=signal.default_int_handler, SIGHUP=signal.SIG_DFL).items():
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) == signal.SIG_IGN: signal.signal(number, before)

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


def program(name, *args, **how):
    """Run a program of this folder to its end; its exit status and what it printed."""
    command = [sys.executable, Path(__file__).with_name(name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **how)


def ready(recipe, root, callbacks=()):
    """A trainer of a recipe, ready to go."""
    from lad_nb.experiment import assemble, resolve
    return assemble(resolve(recipe, root), progress=False, callbacks=callbacks)


def names_in(root):
    """The names of everything in a folder: what a refusal must not change."""
    return sorted(str(p.relative_to(root)) for p in root.rglob('*'))


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the tests marked slow as well')
    parser.addoption('--counts', metavar='FILE', help='add to FILE, as JSON lines, how often each test of '
                     'faults did what it does; tools/make_security.py makes the table of it')


@pytest.fixture(scope='session')
def seed(request):
    """What random tests begin with: LAD_NB_SEED; without it a new one with --slow, and else always 7."""
    found = int(os.environ['LAD_NB_SEED'])
    print(f'LAD_NB_SEED={found}')
    return found


@pytest.fixture
def counted(record_property):
    """Says how often a test did something, and what was lost: counted(kills=30, bytes_lost=0)."""
    return lambda **numbers: record_property('counted', numbers)


class Counts:
    """The counts of the tests that ran, added up over their parameters, and what they were run with."""
    packages = 'torch', 'transformers', 'datasets', 'safetensors', 'tokenizers', 'hypothesis'

    def __init__(self, file, slow):
        self.file, self.form, self.tests = Path(file), 'long' if slow else 'short', {}

    def pytest_runtest_logreport(self, report):
        if 'faults' not in report.keywords: return
        name = report.nodeid.partition('[')[0].rpartition('/')[2]
        here = self.tests.setdefault(name, Counter())
        here['seconds'] += report.duration
        if report.when == 'call' or report.outcome != 'passed': here[report.outcome] += 1
        if report.when != 'teardown': return # properties come with every one of the three reports
        for what, said in report.user_properties:
            here.update(said if what == 'counted' else {what: said} if what == 'tried' else {})

    def pytest_sessionfinish(self):
        about = dict(form=self.form, date=date.today().isoformat(), seed=int(os.environ['LAD_NB_SEED']),
                     versions={name: version(name) for name in self.packages})
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        found = {(line['test'], line['form']): line for line in map(json.loads, lines)}
        for name, here in self.tests.items():
            said = dict(here) | dict(seconds=round(here['seconds'], 1))
            if here.keys() - {'seconds', 'skipped'}: found[name, self.form] = dict(test=name) | said | about
        self.file.write_text(''.join(json.dumps(found[at]) + '\n' for at in sorted(found)))


LONG = ['runbook', 'families', 'faults', 'browser', 'analysis', 'training', 'studies', 'loading', 'matches',
        'while_training', 'cli', 'tasks', 'rows', 'distributed', 'card', 'moves', 'widgets', 'security',
        'cache', 'values', 'compare', 'unseen_rows', 'what_ran', 'own_gates',
        'benchmark']  # begun first, the longest first


def pytest_configure(config):
    if config.getoption('dist', 'no') == 'no' or hasattr(config, 'workerinput'):  # this process runs tests
        import lad_nb.study  # noqa: F401  nearly all tests need it, and all that it imports
        gc.collect()
        gc.freeze()  # collections are many, and need not look at libraries again and again
    config.option.loadscopereorder = False  # xdist would begin with the file that has the most tests
    slow, counts = config.getoption('--slow'), config.getoption('--counts')
    os.environ.setdefault('LAD_NB_SEED', str(random.SystemRandom().randrange(10**6) if slow else 7))
    if counts and not hasattr(config, 'workerinput'): config.pluginmanager.register(Counts(counts, slow))


def pytest_collection_modifyitems(config, items):
    place = {f'test_{name}': i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
    if config.getoption('--slow'): return
    skip = pytest.mark.skip(reason='takes minutes: pytest --slow runs it')
    for item in items:
        if 'slow' in item.keywords: item.add_marker(skip)


@pytest.fixture(scope='session')
def glue():
    """The folder of real GLUE folders: LAD_NB_GLUE, or shared/data/glue beside the project."""
    folder = Path(os.environ.get('LAD_NB_GLUE') or ROOT.parent/'shared'/'data'/'glue')
    if not (folder/'RTE').is_dir():
        pytest.skip(f'no GLUE data: {folder} has no RTE; LAD_NB_GLUE names the folder that has')
    return folder


FEW = dict(task='toy', max_seq_len=32, batch_size=16, total_step=4, warmup_step=1, ckpt_step=2, log_step=2,
           device_id=-1)


@pytest.fixture(scope='session')
def experiments(tmp_path_factory):
    """A folder of experiments with one teacher in it: a tiny BERT of random weights, fine-tuned on the toy
    task for four updates."""
    from lad_nb.encoders import random_bert
    from lad_nb.experiment import run
    from lad_nb.run_books import run_books
    root = tmp_path_factory.mktemp('experiments')
    encoder = random_bert(root/'encoder', num_attention_heads=12)
    teacher = dict(experiment='teacher', ptrain_ver=str(encoder), lr=5e-5)
    run(run_books['rte']['fine_tune'].replace(**teacher, **FEW), root, progress=False)
    return root


def word_tokenizer(words):
    """A tokenizer of BERT's kind that knows these words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    special = dict(pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]',
                   mask_token='[MASK]')
    vocabulary = {w: i for i, w in enumerate([*special.values(), '.', *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token='[UNK]'))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        '[CLS] $A [SEP]', '[CLS] $A [SEP] $B:1 [SEP]:1', [('[CLS]', 2), ('[SEP]', 3)])
    inputs = ['input_ids', 'token_type_ids', 'attention_mask']
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, model_input_names=inputs,
                                   **special)


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    """The folder of a BERT of four layers, 16 wide, with random weights and the toy task's words: what tests
    of faults can afford to start often."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from lad_nb.tasks import tasks
    from lad_nb.toy import toy_examples
    folder = tmp_path_factory.mktemp('tiny')
    text = ' '.join(e['sentence1'] + ' ' + e['sentence2'] for e in toy_examples(3000))
    words = sorted(set(text.replace('.', '').split()))
    word_tokenizer(words).save_pretrained(folder)
    torch.manual_seed(0)
    labels = tasks['toy'].id2label
    config = BertConfig(vocab_size=len(words) + 6, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=64, initializer_range=.3,
                        id2label=labels, label2id={v: k for k, v in labels.items()},
                        problem_type='single_label_classification')
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope='session')
def quick(tiny):
    """A LAD recipe of six updates on that model, which is teacher and encoder at once."""
    from lad_nb.recipes import Recipe
    return Recipe('quick', teacher=str(tiny), ptrain_ver=str(tiny), num_hidden_layers=2, train_size=160,
                  **FEW | dict(total_step=6))


@pytest.fixture(autouse=True)
def no_runs_left_behind(request):
    """After a test only the encoder, the teacher and the run that others are compared with stay."""
    yield
    if 'experiments' not in request.fixturenames: return
    for folder in request.getfixturevalue('experiments').iterdir():
        if not folder.name.startswith(('encoder', 'teacher_', 'whole_')): shutil.rmtree(folder)


@pytest.fixture
def lad():
    """A LAD recipe of four updates that learns from that teacher."""
    from lad_nb.run_books import run_books
    few = dict(experiment='lad', num_hidden_layers=3, teacher_exp='teacher', tckpt=4)
    return run_books['rte']['lad'].replace(**few, **FEW)
