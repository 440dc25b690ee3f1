"""What came with version 0.2, asked in bad faith: encoders from folders, rows, pages, cards, the way to a
hub, executors. Each test says how many cases it tried: record_property('tried', n)."""
import json
import logging
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from functools import partial
from html.parser import HTMLParser
from multiprocessing import get_context

import numpy as np
import pandas as pd
import pytest
import test_card
import transformers
from datasets import ClassLabel, Dataset, Features, Value
from families import FAMILIES, SIZES, make_folder
from test_card import TOKEN, Hub
from two_processes import study

from lad_nb.encoders import load_classifier, load_encoder, make_classifier
from lad_nb.executors import run_on
from lad_nb.experiment import run
from lad_nb.model_card import MARK, make_card, size_of
from lad_nb.models import load_tokenizer
from lad_nb.panel import Panel
from lad_nb.push import files_to_push, push
from lad_nb.recipes import Recipe
from lad_nb.results import append_result, read_results
from lad_nb.rows import count_unlabelled, rows_of
from lad_nb.stepper import Stepper
from lad_nb.study import run_study
from lad_nb.tasks import own_task, tasks

pytestmark = pytest.mark.faults
hub, pushed = test_card.hub, test_card.pushed  # fixtures
WAYS = load_encoder, load_classifier, lambda folder: make_classifier(folder, 'toy')
EVIL = ('<img src=x onerror=alert(1)>', '</script><script>alert(1)</script>', '<!--<script>',
        '\x1b[2J\x1b]0;x\a', 'a\u2028b\u202ec', '`|](javascript:alert(1))')


def refused(way, place, says):
    """Its message: a `ValueError` in one line of what prints, and not a long one."""
    with pytest.raises(ValueError, match=says) as e: way(place)
    said = str(e.value)
    assert said.isprintable() and len(said) < 2_000, said
    return said


# ---------------------------------------------------------------- encoders from folders

@pytest.fixture(scope='module')
def model(tiny, tmp_path_factory):
    """A copy of the tiny model, mended after each test."""
    return shutil.copytree(tiny, tmp_path_factory.mktemp('hostile')/'model')


@pytest.fixture
def harmed(model):
    """A function that writes files of the model anew, and gives the path of the last; all others are as they
    were, and so are these in the end."""
    before = {p: p.read_bytes() for p in model.iterdir()}
    def write(**files):
        for path in set(model.iterdir()) - before.keys(): path.unlink()
        for path, raw in before.items(): path.write_bytes(raw)
        for name, content in files.items():
            path = model/name.replace('__', '.')
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path if files else None
    yield write
    write()


def header(length, said=b'{}'):
    """A safetensors file whose header says so many bytes."""
    return struct.pack('<Q', length) + said


def tensor(shape, end, start=0, name='x', dtype='F32'):
    """A safetensors file of one tensor, without its bytes."""
    said = json.dumps({name: dict(dtype=dtype, shape=shape, data_offsets=[start, end])}).encode()
    return header(len(said), said)


HEADERS = {f'header of {n}': header(n) for n in (0, 1, 10**8, 10**8 + 1, 2**60, 2**63, 2**64 - 1)} | {
    'tensor of 2**60 bytes': tensor([2**58], 2**60), 'shape that overflows': tensor([2**40, 2**40], 4),
    'shape that wraps to 0': tensor([2**32, 2**32], 0), 'negative shape': tensor([-1], 4),
    'end before start': tensor([1], 0, 4), 'offsets of 2**64': tensor([1], 2**64, 2**64 - 4),
    'dtype of nobody': tensor([1], 4, dtype='PICKLE') + bytes(4),
    'nested': header(10**5, b'['*10**5), 'nested objects': header(6*10**4, b'{"a": '*10**4),
    'nothing': b'', 'half a number': b'\xff'*7}


@pytest.mark.parametrize('hole', [0, 2**40], ids=['short', 'a hole of 1 TB'])
def test_headers_that_lie(model, harmed, record_property, hole):
    """Refused by the file's name, whatever they promise; with a file behind them that could hold it, too."""
    for raw in HEADERS.values():
        path = harmed(model__safetensors=raw)
        if hole: os.truncate(path, hole)
        for way in (*WAYS, size_of): refused(way, model, f'{path} is no whole safetensors file')
    record_property('tried', len(HEADERS)*(len(WAYS) + 1))


def nested(depth):
    return {'[]': '['*depth + ']'*depth, '{}': '{"a": '*depth + '1' + '}'*depth, 'cut': '['*depth,
            'model': '{"model": ' + '['*depth + ']'*depth + '}'}


def test_settings_that_are_nested(model, harmed, record_property):
    """10,000 deep is refused; 300, which Python reads and other readers don't, as well or understood."""
    files = 'tokenizer.json', 'tokenizer_config.json', 'config.json', 'special_tokens_map.json'
    for name in files:
        for text in nested(10_000).values():
            path = harmed(**{name: text})
            refused(load_tokenizer, model, re.escape(str(model)))
            if name == 'config.json': refused(load_encoder, model, f'{path} is not JSON')
        for text in nested(300).values():
            harmed(**{name: text})
            try: load_tokenizer(model)
            except ValueError as e: assert str(model) in str(e) and str(e).isprintable()
    record_property('tried', 2*len(files)*len(nested(1)))


@pytest.mark.parametrize('size', [10**9, 2**40], ids=['1 GB', '1 TB'])
def test_settings_that_are_long(model, harmed, record_property, size):
    """Their size is asked before they are read. On the disk they are holes."""
    files = ('tokenizer.json', 'tokenizer_config.json', 'config.json', 'special_tokens_map.json', 'vocab.txt',
             'added_tokens.json', 'checksums.json', 'spm.model')
    for name in files:
        path = harmed(**{name: (model/name).read_bytes() if (model/name).exists() else b'{}'})
        os.truncate(path, size)
        for way in (*WAYS, load_tokenizer): refused(way, model, f'{path} has {size:,} bytes and is not read')
        harmed()
    record_property('tried', len(files)*(len(WAYS) + 1))


CODE = dict(
    config=('config.json', dict(auto_map=dict(AutoConfig='evil.Config', AutoModel='evil.Model'))),
    elsewhere=('config.json', dict(auto_map=dict(AutoConfig='somebody/repository--evil.Config'))),
    text=('config.json', dict(auto_map='\x1b[2Jevil.Model')),
    a_list=('config.json', dict(auto_map=['evil.Model']*10_000)),
    kernels=('config.json', dict(_attn_implementation='somebody/kernels')),
    pipelines=('config.json', dict(custom_pipelines=dict(x=dict(impl='evil.Pipe')))),
    tokenizer=('tokenizer_config.json', dict(auto_map=dict(AutoTokenizer=['evil.Tokenizer', None]))))


def test_families_that_ask_for_code(tmp_path, record_property):
    """Of every kind that the library loads: none of it is run."""
    evil = f"open({str(tmp_path/'marker')!r}, 'w')\nclass Config: pass\nclass Model: pass"
    for family in FAMILIES.values():
        folder, said, sizes = tmp_path/family.model_type, {}, SIZES | dict(pad_token_id=0) | family.settings
        transformers.AutoConfig.for_model(family.model_type, vocab_size=99, **sizes).save_pretrained(folder)
        (folder/'tokenizer_config.json').write_text('{}')
        (folder/'model.safetensors').write_bytes(tensor([1], 4) + bytes(4))
        (folder/'evil.py').write_text(evil)
        for name, _ in CODE.values(): said[name] = json.loads((folder/name).read_text())
        for name, change in CODE.values():
            (folder/name).write_text(json.dumps(said[name] | change))
            for way in (*WAYS, load_tokenizer): refused(way, folder, 'asks for code from elsewhere')
            (folder/name).write_text(json.dumps(said[name]))
        refused(load_encoder, folder, 'weights')
    assert not (tmp_path/'marker').exists()
    record_property('tried', len(FAMILIES)*len(CODE)*(len(WAYS) + 1))


def test_code_that_nobody_looks_for(model, harmed, tmp_path, record_property):
    """Deeper down, or in files of other libraries: the model loads, and nothing of it is run."""
    said, ask = json.loads((model/'config.json').read_text()), dict(auto_map=dict(AutoConfig='evil.Config'))
    code = f"open({str(tmp_path/'marker')!r}, 'w')\nclass Config: pass"
    changes = dict(text_config=ask), dict(architectures=['evil.Model']), dict(auto_map={})
    tried = [dict(config__json=json.dumps(said | change)) for change in changes]
    tried += [{f'{name}.json': json.dumps(ask)} for name in ('generation_config', 'preprocessor_config')]
    for files in tried:
        harmed(evil__py=code, **files)
        load_classifier(model), load_tokenizer(model)
    assert not (tmp_path/'marker').exists()
    record_property('tried', len(tried))


def test_messages_that_would_repaint_a_terminal(model, harmed, record_property):
    """Names of weights, kinds of model, labels: as the folder has them, and spelled out."""
    from safetensors.torch import load_file, save_file
    said, state = json.loads((model/'config.json').read_text()), load_file(model/'model.safetensors')
    state, evil = {k: v.clone() for k, v in state.items()}, ''.join(EVIL)
    changes = (dict(model_type=evil), dict(hidden_act=evil), dict(num_hidden_layers=evil),
               dict(id2label={str(i): f'{evil} {i}' for i in range(3)}, num_labels=3),
               dict(id2label={'0': evil, '1': evil + evil}))
    for change in changes:
        harmed(config__json=json.dumps(said | change))
        refused(lambda folder: load_classifier(folder, 'toy'), model, str(model))
    harmed()
    for name in (evil, evil*1000, f'bert.{evil}'):
        for others in (state, {}):
            weights = others | {name: state['classifier.bias'].clone()}
            save_file(weights, model/'model.safetensors', dict(format='pt'))
            refused(load_classifier, model, str(model))
    record_property('tried', len(changes) + 6)


# ---------------------------------------------------------------- rows

@pytest.fixture
def own():
    """Two tasks of texts, one of them a regression."""
    yield (own_task('kind', labels=('bad', 'good'), columns=('text',)),
           own_task('scored', labels=(), columns=('text',)))
    del tasks['kind'], tasks['scored']


class Silent:
    """What does not even say what it is."""
    def __repr__(self): raise RuntimeError


NAN = float('nan')
LABELS = [float('inf'), -float('inf'), 10**400, -10**400, 10**5000, 6, -2, 10.5, True, 1 + 0j, b'\x1b', [0],
          {}, {'a': 0}, [[0]], np.array([1, 2]), pd.Series([0, 1]), pd.DataFrame(dict(a=[1])), Silent(),
          object, pd.Timestamp('2020'), '\x1b[2J', 'good ', '9'*10**6]
NONE = [None, NAN, np.float16('nan'), pd.NA, pd.NaT, Decimal('nan'), -1, -1.]
TEXTS = [None, NAN, 3, '', ' \n', [], ['x', 'y'], {'a': 'x'}, b'x', '\ud800', 'x\udcff', np.array(['x']),
         pd.NA, Silent()]


def test_labels_and_texts_that_are_none(own, record_property):
    """The row is named, whatever was given; labels that are not numbers are missing, and count as that."""
    for task in own:
        for label in LABELS:
            refused(partial(rows_of, task), [dict(text='x'), dict(text='x', label=label)], 'row 1: ')
        for text in TEXTS: refused(partial(rows_of, task), [dict(text=text)], "row 0: 'text' is")
        rows = rows_of(task, [dict(text='x', label=y) for y in NONE])
        assert rows['label'][:] == [None]*len(NONE) and count_unlabelled(rows) == len(NONE)
    record_property('tried', len(own)*(len(LABELS) + len(TEXTS) + len(NONE)))


def test_datasets_with_nested_features(own, record_property):
    """As texts and labels they are refused by row; beside those they are left."""
    def given(text='x', label=0, **more):
        return Dataset.from_dict({k: [v]*3 for k, v in dict(text=text, label=label, **more).items()})
    lists = given(label=[0]).cast(Features(text=Value('string'), label=[ClassLabel(names=['bad', 'good'])]))
    bad = [given(text={'a': 'x'}), given(text=['x', 'y']), given(text=[{'a': ['x']}]), given(label={'a': 0}),
           given(label=[0]), given(label=[[0]]), given(label=[]), lists, given(label=float('inf'))]
    deep = {'a': [{'b': [[1]], 'c': 'x'}]}
    for task in own:
        for rows in bad: refused(partial(rows_of, task), rows, 'row 0: ')
        rows = rows_of(task, given(meta=deep, more=[deep]))
        assert rows.column_names == ['sentence1', 'label', 'idx'] and rows['label'][:] == [0, 0, 0]
        rows = rows_of(task, Dataset.from_dict(dict(text=['x']*3, label=[0., NAN, None])))
        assert rows['label'][:] == [0, None, None]
    record_property('tried', len(own)*(len(bad) + 2))


MANY = """
import json, sys, time
import pandas as pd
from datasets import Dataset
from lad_nb.data import encode
from lad_nb.models import SMALL, load_tokenizer
from lad_nb.rows import count_unlabelled, rows_of
from lad_nb.tasks import own_task

def said(name): return int(open('/proc/self/status').read().split(name)[1].split()[0])/1024 # MB
kind, n = sys.argv[1], int(sys.argv[2])
own_task('kind', labels=('bad', 'good'), columns=('text',))
columns, tokenizer = dict(text=['word']*n, label=[0, None]*(n//2)), load_tokenizer(SMALL)
rows = dict(dataset=Dataset.from_dict).get(kind, pd.DataFrame)(columns)
if kind == 'dicts': rows = rows.to_dict('records')
before, start = said('VmRSS:'), time.process_time()
found = rows_of('kind', rows)
seconds = time.process_time() - start
assert len(found) == n and count_unlabelled(found) == n//2 and found[-1]['sentence1'] == 'word'
encoded = encode(found, tokenizer, 32)
assert len(encoded) == n and len(encoded[-1]['input_ids']) == 3
print(json.dumps([seconds, time.process_time() - start, said('VmHWM:') - before]))
"""


def test_many_rows_of_one_word_in_short(own, record_property):
    """10,000 of them, in each form."""
    columns = dict(text=['word']*10**4, label=[0, None]*5_000)
    for rows in (pd.DataFrame(columns), pd.DataFrame(columns).to_dict('records'), Dataset.from_dict(columns)):
        start = time.process_time()
        found = rows_of('kind', rows)
        assert len(found) == 10**4 and count_unlabelled(found) == 5_000 and time.process_time() - start < 3
    record_property('tried', 3*10**4)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['dicts', 'frame', 'dataset'])
def test_many_rows_of_one_word(tmp_path, record_property, kind):
    """A million of them are read in seconds and tokenised in a minute; what that takes in memory, beside the
    rows themselves, is less than what they take as dicts."""
    if not sys.platform.startswith('linux'): pytest.skip('memory is read from /proc')
    env = os.environ | dict(HF_DATASETS_DISABLE_PROGRESS_BARS='1', HF_DATASETS_CACHE=str(tmp_path))
    command = [sys.executable, '-c', MANY, kind, str(10**6)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read, both, megabytes = json.loads(done.stdout)
    for name, value in dict(read=read, both=both, megabytes=megabytes).items(): record_property(name, value)
    assert read < 35 and both < 160 and megabytes < 500
    record_property('tried', 10**6)


# ---------------------------------------------------------------- pages and cards

class Seen(HTMLParser):
    """What a browser would find in a page: tags, attributes, comments, scripts."""
    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.comments, self.scripts, self.text = [], [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == 'script': self.scripts.append('')

    def handle_comment(self, data): self.comments.append(data)

    def handle_data(self, data):
        if self.cdata_elem == 'script': self.scripts[-1] += data
        else: self.text.append(data)

    def check(self, scripts=0):
        assert not {'img', 'iframe', 'object', 'embed', 'a', 'form'} & {*self.tags}, self.tags
        assert not self.comments and self.tags.count('script') == len(self.scripts) == scripts
        assert not [k for k, v in self.attributes if k.startswith('on') or 'javascript:' in (v or '')]
        return self


@pytest.fixture(scope='module')
def session(tmp_path_factory):
    """A run of three updates on such sentences and labels, through a tokenizer that keeps every byte."""
    root = tmp_path_factory.mktemp('session')
    family = replace(FAMILIES['RoBERTa'], settings=dict(type_vocab_size=1, max_position_embeddings=300))
    encoder = make_folder(family, root/'encoder')
    config = json.loads((encoder/'tokenizer_config.json').read_text())
    (encoder/'tokenizer_config.json').write_text(json.dumps(config | dict(model_max_length=256)))
    own_task('evil', labels=EVIL[:2], columns=('text', 'text_pair'))
    rows = [dict(text=f'{a} {i}', text_pair=b, label=i % 2) for i, a in enumerate(EVIL) for b in EVIL]
    recipe = Recipe('evil', task='evil', method='fine_tune', ptrain_ver=str(encoder), max_seq_len=256,
                    batch_size=len(rows), total_step=3, warmup_step=1, ckpt_step=3, log_step=1, device_id=-1)
    with Stepper(recipe, root, rows=rows) as stepper:
        stepper.step(2)
        yield stepper
        stepper.run_until()
    del tasks['evil']


def test_the_panel_shows_text(session, record_property):
    """Every page that is shown or stored; what a record prints moves no cursor."""
    board, record = Panel(session), session.record
    for evil in EVIL: assert record.examples.text.str.contains(evil, regex=False).any(), evil
    pages = [place.value for place in board.places.values()] + [record._repr_html_()]
    pages.append(board.saved(picture=False)['text/html'])
    text = ''.join(''.join(Seen(page).check().text) for page in pages)
    for evil in EVIL[:3]: assert evil in text
    for plain in (str(record), str(session), board.saved(picture=False)['text/plain']):
        assert all(line.isprintable() for line in plain.split('\n')), plain
    board.close()
    record_property('tried', len(EVIL)*len(pages))


def test_a_page_of_its_own_shows_text(session, tmp_path, record_property):
    """`save_html`: the page's own two scripts, and not a `<` in its data."""
    page = session.save_html(tmp_path/'session.html').read_text()
    seen = Seen(page).check(scripts=2)
    data, script = seen.scripts
    assert '<' not in data and '\u2028' not in data and '<' not in script.replace('i < ', '')
    frames = json.loads(data)
    assert len(frames) == len(session.session.records)
    for frame in frames:
        shown = ''.join(Seen(frame['pages']['examples']).check().text)
        for evil in EVIL[:3]: assert evil in shown
    assert page.count('</script>') == 2 and not re.search('<script[^>]*src', page)
    record_property('tried', len(EVIL)*len(frames))


@pytest.fixture(scope='module')
def finished(quick, tmp_path_factory): return run(quick, tmp_path_factory.mktemp('finished'), progress=False)


@pytest.fixture
def done(finished, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(finished, tmp_path/'experiments'/finished.name)


def leaves(said, path=()):
    """Where the values in a JSON value are."""
    inside = said.items() if isinstance(said, dict) else enumerate(said) if isinstance(said, list) else ()
    return [place for k, v in inside for place in ((*path, k), *leaves(v, (*path, k)))]


def changed(said, path, value):
    """The same with another value there."""
    first, *rest = path
    new = dict(said) if isinstance(said, dict) else [*said]
    new[first] = changed(said[first], rest, value) if rest else value
    return new


def check_card(card):
    """No tag but Markdown's and the fold around the settings, no comment but the mark, no cursor moves."""
    markdown = pytest.importorskip('markdown_it')
    text = str(card)
    assert not (bad := [line for line in text.split('\n') if not line.isprintable()]), bad
    page = markdown.MarkdownIt('commonmark').enable('table').render(card.text.replace(MARK, '', 1))
    seen = Seen(re.sub('<a href="https://(huggingface.co|github.com)/[^"]*">', '', page)).check()
    own = {'h1', 'h2', 'p', 'em', 'strong', 'code', 'pre', 'table', 'thead', 'tbody', 'tr', 'th', 'td',
           'details', 'summary'}
    assert {*seen.tags} <= own and seen.tags.count('details') == 1, {*seen.tags} - own


@pytest.mark.parametrize('every', [6, pytest.param(1, marks=pytest.mark.slow)])
def test_a_card_of_somebody_elses_run(done, record_property, every):
    """Every value of recipe.json, config.json and ending.json replaced: the card is text, or refused."""
    files = {'recipe.json': json.loads((done/'recipe.json').read_text()),
             'config.json': json.loads((done/'config.json').read_text()),
             'ending.json': dict(checkpoint=6, updates=6, chosen=dict(metric='accuracy', on='dev'))}
    evil, tried, written = '\n\n'.join(EVIL) + '\n```\n' + ''.join(EVIL), 0, 0
    for name, said in files.items():
        before = (done/name).read_text() if (done/name).exists() else None
        for path in leaves(said)[::every]:
            (done/name).write_text(json.dumps(changed(said, path, evil)))
            try: check_card(make_card(done))
            except ValueError as e: refusal = e
            else: written += 1
            tried += 1
        (done/name).write_text(before) if before else (done/name).unlink()
    assert written > tried/3, refusal
    record_property('tried', tried)


@pytest.mark.parametrize('name', ["a'; rm -rf ~; '", '$(touch x)', 'a`b`', 'x\x1b[2J', '<img src=x>'])
def test_a_run_folder_with_a_name_of_somebody_else(done, record_property, name):
    """What the card tells to type is that name, and nothing besides."""
    place = done.rename(done.parent/name)
    card = make_card(place)
    check_card(card)
    typed = re.search('^lad-nb rerun (.*)$', card.text, re.M)[1]
    assert shlex.split(typed) == [name.replace('\x1b', r'\x1b')]
    assert re.search('^model = (.*?) # this', card.text, re.M)[1] == repr(name)
    record_property('tried', 1)


# ---------------------------------------------------------------- the way to a hub

class Meddler(Hub):
    """A hub, and somebody who changes the folder when it is asked for a repository."""
    def do_POST(self):
        if self.path == '/api/repos/create': self.server.meddle()
        super().do_POST()


SECRET = 'a secret of mine'


@pytest.fixture
def secret(tmp_path):
    path = tmp_path/'secret'
    path.write_text(SECRET)
    return path


@pytest.mark.parametrize('flags', [(), ('--all',)], ids=['model', 'all'])
def test_what_is_sent_was_listed(done, hub, pushed, record_property, flags):
    """Names that would be patterns for all others; hidden files; files of one's own."""
    mine = ['*', '?onfig.json', '[a-z]*', '**', '*.json', 'checkpoint-*', 'private/key.txt', 'notes.txt']
    hidden = ['.env', '.cache/x', 'checkpoint-4/.env', '.git/config']
    for name in mine + hidden:
        (done/name).parent.mkdir(exist_ok=True)
        (done/name).write_text(SECRET)
    listed = {*files_to_push(done, bool(flags)).file}
    code, out, err = pushed(done, hub.url, *flags)
    assert code == 0, err
    assert hub.files.keys() == listed
    assert not listed & {*hidden} and listed & {*mine} == {*(mine if flags else ())}
    for name, raw in hub.files.items(): assert raw == (done/name).read_bytes()
    assert not list(done.glob('.sending*'))
    record_property('tried', len(mine + hidden))


@pytest.mark.parametrize('flags', [(), ('--all',)], ids=['model', 'all'])
def test_a_folder_that_changes_while_it_is_sent(done, hub, pushed, secret, record_property, flags):
    """Files appear, others become links to something private: what was listed is sent, as it was."""
    before = {p.relative_to(done).as_posix(): p.read_bytes() for p in done.rglob('*') if p.is_file()}
    hub.RequestHandlerClass, listed = Meddler, {*files_to_push(done, bool(flags)).file}
    def meddle():
        for name in ('new.txt', 'model-2.safetensors', 'checkpoint-4/new.txt'): (done/name).write_text(SECRET)
        for name in ('config.json', 'README.md', 'checkpoint-4/trainer_state.json', 'recipe.json'):
            (done/name).unlink()
            (done/name).symlink_to(secret)
    hub.meddle = meddle
    code, out, err = pushed(done, hub.url, *flags)
    assert code == 0, err
    assert hub.files == {name: before[name] for name in listed}
    record_property('tried', 7)


def test_a_link_among_the_files(done, hub, pushed, secret, record_property):
    """Out of the folder: refused before anybody is asked."""
    for name in ('config.json', 'README.md', 'checkpoint-4/optimizer.pt', 'more.txt'):
        kept = (done/name).read_bytes() if (done/name).exists() else None
        (done/name).unlink(missing_ok=True)
        (done/name).symlink_to(secret)
        code, out, err = pushed(done, hub.url, '--all')
        assert code == 2 and 'is a link that leads out of its folder' in err and SECRET not in err
        (done/name).unlink()
        if kept is not None: (done/name).write_bytes(kept)
    assert not hub.files and not hub.tokens and secret.read_text() == SECRET
    record_property('tried', 4)


class Echo(Hub):
    """A hub that says the token wherever it can."""
    def answer(self, found=None, status=200):
        hub = self.server
        if hub.status and self.command == 'POST': found, status = dict(error=hub.said), hub.status
        elif found and 'url' in found: found = found | dict(url=f'{hub.url}/me/student?{TOKEN}')
        super().answer(found, status)


@pytest.mark.parametrize('status', [0, 400, 401, 403, 404, 409, 500])
def test_the_token_is_not_told(done, hub, pushed, caplog, record_property, status):
    """Not in what is printed or logged, in any error, in the card or in a file that is sent."""
    hub.RequestHandlerClass, hub.status = Echo, status
    hub.said = f'{TOKEN}, {TOKEN!r}, {TOKEN}\x1b[2J Bearer {TOKEN}'
    with caplog.at_level(logging.DEBUG):
        code, out, err = pushed(done, hub.url, '--all')  # it looks for the token in both
    assert (code == 0) == (status == 0), err
    told = [line for line in caplog.text.splitlines() if TOKEN in line]
    assert not told, told
    assert status == 0 or err.strip().isprintable()  # bars move the cursor
    for path in done.rglob('*'): assert path.is_dir() or TOKEN.encode() not in path.read_bytes()
    for raw in hub.files.values(): assert TOKEN.encode() not in raw
    record_property('tried', 1)


@pytest.mark.parametrize('token', [f' {TOKEN}\n', f'{TOKEN}\x00', f'{TOKEN}\r\nX-Evil: 1', f'{TOKEN}\xe9',
                                   f'{TOKEN} {TOKEN}'])
def test_a_token_that_is_none(done, hub, monkeypatch, record_property, token):
    """What a library says of it is not passed on; spaces around it are cut."""
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_DISABLE_XET', True)
    hub.status = 0
    try: push(done, 'me/student', endpoint=hub.url, token=token)
    except (OSError, ValueError) as e: assert TOKEN not in str(e) and str(e).isprintable()
    else: assert hub.tokens == {f'Bearer {token.strip()}'}
    address = f'http://me:{TOKEN}@127.0.0.1:9'
    with pytest.raises(OSError) as e: push(done, 'me/student', endpoint=address, token=TOKEN)
    assert TOKEN not in str(e.value)
    record_property('tried', 2)


# ---------------------------------------------------------------- executors

def die(job):
    """Ends its process, in the way of one that is killed for its memory."""
    if job == 'dies': os.kill(os.getpid(), signal.SIGKILL)
    return job


@pytest.mark.slow  # it forks, and the next one interrupts: not beside the threads of all other tests
def test_a_worker_that_dies(record_property):
    """Its job, and those that went with it, end in an error; none hangs, none is left out."""
    jobs = ['fine', 'dies', 'later', 'latest']
    with ProcessPoolExecutor(1, get_context('fork')) as executor:
        ends = {job: failure(get) for job, get in run_on(executor, jobs, die)}
    assert ends.keys() == {*jobs} and ends['dies'] == 'BrokenProcessPool'
    assert {*ends.values()} <= {'BrokenProcessPool', 'fine'}
    record_property('tried', len(jobs))


def failure(get):
    try: return get()
    except Exception as e: return type(e).__name__


class Hangs(Executor):
    """Its jobs never end."""
    def __init__(self, kind=Future): self.kind, self.futures = kind, []

    def submit(self, *what):
        self.futures.append(self.kind())
        return self.futures[-1]


class Ticket:
    """A job of another maker: it can't tell when it is done, and is asked."""
    cancelled = False
    def done(self): return self.cancelled
    def cancel(self): self.cancelled = True
    def result(self): raise RuntimeError('never')


def interrupted(seconds=.3):
    """Ctrl-C, in a moment."""
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


@pytest.mark.slow
@pytest.mark.parametrize('kind', [Future, Ticket])
def test_a_worker_that_hangs(record_property, kind):
    """Nobody can tell that from a long job: it is waited for. Ctrl-C gets out, nothing is left waiting."""
    executor, start = Hangs(kind), time.perf_counter()
    interrupted()
    with pytest.raises(KeyboardInterrupt): next(run_on(executor, [1, 2], die))
    assert time.perf_counter() - start < 3
    assert all(f.cancelled() if kind is Future else f.cancelled for f in executor.futures)
    record_property('tried', 1)


class Twice(ThreadPoolExecutor):
    """Does each job twice and gives back the second answer, as a cluster that took a worker for dead."""
    def submit(self, in_turn, one, job):
        return super().submit(lambda: (in_turn(one, job), in_turn(one, job))[1])


class Mixed(ThreadPoolExecutor):
    """Gives back the first run's line for every run."""
    first = None
    def submit(self, in_turn, one, job):
        def work():
            line = in_turn(one, job)
            if not (isinstance(line, dict) and 'scores' in line): return line
            self.first = self.first or line
            return dict(self.first)
        return super().submit(work)


def lines(results): return [(line['stage'], line['method'], line['seed']) for line in read_results(results)]


def test_a_line_that_comes_twice_in_short(tmp_path, record_property):
    """From eight workers at once: one is kept, and all are told of that one."""
    job = dict(study='a', stage='run', task='toy', method='KD', seed=42, recipe={}, scores={})
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(lambda i: append_result(tmp_path, job | dict(worker=i)), range(32))]
    assert len({line['worker'] for line in found}) == 1 and len(read_results(tmp_path)) == 1
    record_property('tried', 32)


@pytest.mark.slow
def test_a_line_that_comes_twice(tiny, tmp_path, record_property):
    """A study keeps one of them."""
    few = replace(study(tiny, 6), seeds=(42,), methods=dict(KD=dict(method='kd')))
    with Twice(1) as executor:
        run_study(few, tmp_path, tmp_path/'results', say=lambda line: None, executor=executor)
    assert sorted(lines(tmp_path/'results')) == [('run', 'KD', 42), ('teacher', 'teacher', 42)]
    record_property('tried', 2)


@pytest.mark.slow
def test_a_study_on_workers_that_hang_or_mix_up(tiny, tmp_path, record_property):
    """Interrupted, it begins again; a line of another run is not taken for a run's own."""
    few, said = replace(study(tiny, 6), seeds=(42,)), []
    interrupted(2)
    with pytest.raises(KeyboardInterrupt):
        run_study(few, tmp_path, tmp_path/'results', say=said.append, executor=Hangs())
    assert not (tmp_path/'results'/'runs.jsonl').exists()
    with Mixed(1) as executor, pytest.raises(RuntimeError, match='1 run failed'):
        run_study(few, tmp_path, tmp_path/'results', say=said.append, executor=executor)
    assert len(lines(tmp_path/'results')) == 2
    run_study(few, tmp_path, tmp_path/'results', say=said.append, threads=1)
    assert len({*lines(tmp_path/'results')}) == len(lines(tmp_path/'results')) == 3
    record_property('tried', 3)
