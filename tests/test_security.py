"""Opening what somebody sent runs none of their code, reads and writes nothing outside the folder, and tells
nobody."""
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, Counts, program
from make_security import ROWS, Row, counts, security, told
from transformers.trainer_pt_utils import safe_globals

from lad_nb.cli import main
from lad_nb.data import load_task
from lad_nb.durable import write_checksums
from lad_nb.encoders import load_classifier, load_encoder
from lad_nb.evaluation import evaluate
from lad_nb.experiment import open_run, rerun, run
from lad_nb.interchange import load_script_model
from lad_nb.models import load_tokenizer, model_folder
from lad_nb.tasks import open_task
from lad_nb.runs import checkpoints, experiment_folder, find_checkpoint

pytestmark = pytest.mark.faults


class Poison:
    """What a pickle can do when it is loaded."""
    def __init__(self, marker): self.marker = str(marker)
    def __reduce__(self): return open, (self.marker, 'w')


def poison(path, marker, as_zip=True):
    if as_zip: torch.save(Poison(marker), path)
    else: path.write_bytes(pickle.dumps(Poison(marker)))


PICKLES = ['pytorch_model.bin', 'optimizer.pt', 'scheduler.pt', 'rng_state.pth', 'training_args.bin',
           'model-2.pt', 'scaler.pt', 'tf_model.h5', 'gates.bin']


@pytest.fixture(scope='session')
def finished(quick, tmp_path_factory): return run(quick, tmp_path_factory.mktemp('finished'), progress=False)


@pytest.fixture
def done(finished, tmp_path):
    """A run of six updates, with checkpoints at 2, 4 and 6: a copy to do harm to."""
    return Path(shutil.copytree(finished, tmp_path/'experiments'/finished.name))


def cut(folder):
    """As it was at update 4 of 6."""
    shutil.rmtree(folder/'checkpoint-6')
    for name in ('model.safetensors', 'gates.safetensors'): (folder/name).unlink()


def contents(place):
    """The bytes of a file, or of every file in a folder."""
    return {p: p.read_bytes() for p in (place, *place.rglob('*')) if p.is_file()}


@pytest.mark.parametrize('as_zip', [False, True])
def test_the_poison_works(tmp_path, as_zip):
    """Otherwise the tests below would show nothing: a plain load runs it."""
    poison(tmp_path/'x', tmp_path/'marker', as_zip)
    if as_zip: torch.load(tmp_path/'x', weights_only=False).close()
    else: pickle.loads((tmp_path/'x').read_bytes()).close()
    assert (tmp_path/'marker').exists()


@pytest.mark.parametrize('as_zip', [False, True])
def test_a_poisoned_run_folder(quick, done, tmp_path, counted, as_zip):
    """Pickles of every name beside, and in, a run and its checkpoints, with checksums made to fit: opened,
    scored, resumed, run again."""
    marker, places = tmp_path/'marker', [done, *checkpoints(done).values()]
    for place in places:
        for name in PICKLES: poison(place/name, marker, as_zip)
        if place != done: write_checksums(place)
    for load in (open_run, load_encoder, load_tokenizer): load(done)
    open_run(done, 4)
    load_classifier(done, 'toy')
    evaluate(done, 'toy', max_seq_len=32, device_id=-1)
    cut(done)
    says = 'checkpoint-4 holds something else than tensors and numbers: .*nothing in it was run'
    with pytest.raises(ValueError, match=says): run(quick, done.parent, resume=True, progress=False)
    assert not marker.exists()
    rerun(done, 'again', progress=False)
    assert not marker.exists()
    counted(pickles=len(places)*len(PICKLES), run=0)


@pytest.mark.parametrize('name', ['optimizer.pt', 'scheduler.pt', 'rng_state.pth'])
def test_each_file_that_a_resumed_run_reads(quick, done, tmp_path, name):
    poison(done/'checkpoint-4'/name, tmp_path/'marker')
    write_checksums(done/'checkpoint-4')
    cut(done)
    with pytest.raises(ValueError, match='checkpoint-4 holds something else'):
        run(quick, done.parent, resume=True, progress=False)
    assert not (tmp_path/'marker').exists()


def test_weights_as_a_pickle_only(done, tmp_path):
    """A folder without safetensors is refused, not converted."""
    (done/'model.safetensors').unlink()
    poison(done/'pytorch_model.bin', tmp_path/'marker')
    for load in (load_classifier, load_encoder, load_tokenizer, model_folder):
        with pytest.raises(FileNotFoundError, match='no model.safetensors'): load(done)
    assert not (tmp_path/'marker').exists()


def test_a_poisoned_checkpoint_of_the_papers_scripts(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(dict(task='toy')))
    for as_zip in (False, True):
        poison(tmp_path/'model-2.pt', tmp_path/'marker', as_zip)
        with pytest.raises(ValueError, match='does not load as plain tensors'):
            load_script_model(tmp_path, 2)
    assert not (tmp_path/'marker').exists()


UNSAFE = re.compile(r'pickle\.loads?\b|\beval\(|\bexec\(|joblib|allow_pickle'
                    r'|trust_remote_code=True|shell=True')


def test_no_pickle_of_ours(done):
    """Run folders hold no pickled objects: what torch writes loads as weights only."""
    for path in done.rglob('*'):
        if path.suffix in ('.pt', '.pth'):
            with safe_globals(): torch.load(path, weights_only=True)
        assert path.suffix not in ('.bin', '.pkl', '.pickle', '.npy')
    source = '\n'.join(p.read_text() for p in (ROOT/'lad_nb').glob('*.py'))
    loads = re.findall(r'torch\.load\(.*', source)
    assert loads and all('weights_only=True' in call for call in loads)
    assert not UNSAFE.search(source.replace('.eval()', ''))


LINKS = ['log.jsonl', 'recipe.json', 'model.safetensors', 'tensorboard', 'checkpoint-4',
         'checkpoint-4/model.safetensors', 'config.json']


@pytest.mark.parametrize('name', LINKS)
def test_a_link_out_of_a_run_folder(quick, done, tmp_path, name):
    """Nothing is read or written through it."""
    outside = tmp_path/'outside'
    shutil.move(done/name, outside)
    before = contents(outside)
    (done/name).symlink_to(outside)
    deeds = [lambda: run(quick, done.parent, resume=True, progress=False), lambda: open_run(done),
             lambda: rerun(done), lambda: find_checkpoint(done, 4), lambda: load_classifier(done)]
    says = f'{name} is a link that leads out of its folder, to .*outside'
    for deed in deeds:
        with pytest.raises(ValueError, match=says): deed()
    if '/' in name:
        with pytest.raises(ValueError, match='leads out of its folder'): load_classifier(done/'checkpoint-4')
    assert contents(outside) == before


def test_links_that_are_fine(done):
    """Inside the folder, and the folder itself."""
    (done/'best').symlink_to('checkpoint-4')
    (done.parent/'linked_bert_toy').symlink_to(done)
    open_run(done.parent/'linked_bert_toy')


SECRET = 'root:x:0:0:a secret'


@pytest.mark.parametrize('task, file', [('rte', 'train.tsv'), ('stsb', 'train.tsv'), ('cola', 'train.tsv'),
                                        ('own', 'task.json')])
def test_a_link_to_a_file_that_is_no_data(tmp_path, task, file):
    """An error about a file that a folder links to elsewhere quotes nothing of it."""
    folder, outside = tmp_path/'folder', tmp_path/'outside'
    folder.mkdir()
    said = json.dumps({SECRET: SECRET}) if task == 'own' else '\t'.join([SECRET]*4) + '\n'
    outside.write_text(said)
    read = (lambda: open_task(folder)) if task == 'own' else lambda: load_task(task, data_dir=folder)
    (folder/file).symlink_to(outside)
    with pytest.raises(ValueError, match='is a link that leads out of its folder') as e: read()
    assert 'secret' not in str(e.value) and str(folder/file) in str(e.value)
    (folder/file).unlink()
    (folder/file).write_text(said) # one's own file is quoted
    with pytest.raises(ValueError, match='secret'): read()


def test_rows_behind_a_link_are_read(tmp_path):
    """Data that lies elsewhere is linked to by many."""
    (tmp_path/'store.tsv').write_text('sentence1\tsentence2\tlabel\na\tb\tentailment\n')
    (tmp_path/'rte').mkdir()
    (tmp_path/'rte'/'train.tsv').symlink_to(tmp_path/'store.tsv')
    assert load_task('rte', data_dir=tmp_path/'rte')['sentence1'] == ['a']


NAMES = ['../x', '..', '.', '', '/etc/x', 'a/b', 'a\\b', 'a\0b', '.hidden', 'a\n', ' ', '~', '$HOME', 'a;b',
         '..\\x', 'a/../../b', '\u202ex', 'x'*300]
PLACES = [lambda name: dict(experiment=name), lambda name: dict(task=name), lambda name: dict(model=name),
          lambda name: dict(teacher=None, teacher_exp=name), lambda name: dict(dataset=name),
          lambda name: dict(teacher=name)]


def slow_but(first, values):
    """The first values as they are; the others marked as slow."""
    return [*values[:first], *(pytest.param(v, marks=pytest.mark.slow) for v in values[first:])]


@pytest.mark.parametrize('name', slow_but(8, NAMES))
def test_names_that_lead_elsewhere(quick, tmp_path, capsys, counted, name):
    """As the experiment, the task, the kind of model, the teacher's experiment, a split; in Python and on the
    command line."""
    root = tmp_path/'deep'/'er'/'experiments'
    root.mkdir(parents=True)
    before = sorted(tmp_path.rglob('*'))
    common = dict(experiment='a', task='toy', teacher_exp='b', device_id=-1, num_hidden_layers=2, root=root)
    for change in (place(name) for place in PLACES):
        if change == dict(model='x'*300): continue
        counted(names=1)
        with pytest.raises((ValueError, OSError)): run(quick.replace(**change), root, progress=False)
        if '\0' in name: continue # no command line can hold it
        given = common | {k: v for k, v in change.items() if v is not None}
        if 'teacher' in given: given.pop('teacher_exp') # one of the two
        assert main(['run_lad_distil', *(f'--{k}={v}' for k, v in given.items())]) == 2
        assert 'Traceback' not in capsys.readouterr().err
    assert sorted(tmp_path.rglob('*')) == before
    if name != 'x'*300:
        with pytest.raises(ValueError, match='letters, digits'): experiment_folder(name, 'toy', root=root)


REMOTE = dict(  # a file of a model, and what it says
    classes=('config.json', dict(auto_map={'AutoConfig': 'evil.Config',
                                           'AutoModelForSequenceClassification': 'evil.Model'})),
    tokenizer=('tokenizer_config.json', dict(auto_map={'AutoTokenizer': ['evil.Tokenizer', None]})),
    kernels=('config.json', dict(attn_implementation='somebody/kernels')),
    kind=('config.json', dict(model_type='evil', auto_map={'AutoConfig': 'evil.Config'})),
    pipelines=('config.json', dict(custom_pipelines={'x': dict(impl='evil.Pipe')})))
EVIL = "open({!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"


@pytest.mark.parametrize('asks', REMOTE)
def test_a_model_that_asks_for_code(quick, tiny, tmp_path, counted, asks):
    folder, (file, said) = tmp_path/'model', REMOTE[asks]
    shutil.copytree(tiny, folder)
    (folder/'evil.py').write_text(EVIL.format(str(tmp_path/'marker')))
    path = folder/file
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    ways = [load_classifier, load_encoder, load_tokenizer,
            lambda f: run(quick.replace(teacher=str(f)), tmp_path, progress=False),
            lambda f: run(quick.replace(ptrain_ver=str(f)), tmp_path, progress=False)]
    says = 'asks for code from elsewhere .*lad_nb runs no code of model folders'
    for way in ways:
        with pytest.raises(ValueError, match=says): way(folder)
    assert not (tmp_path/'marker').exists() and not (tmp_path/'quick_bert_toy').exists()
    counted(ways=len(ways), run=0)


HOSTILE = [dict(experiment='../x'), dict(experiment=5), dict(task='../toy'), dict(lr='3e-4'),
           dict(total_step=True), dict(gate_indices=['2']), dict(gate_indices='2'), dict(__class__='x'),
           dict(seed=1.5), dict(mask_padding=1), dict(num_hidden_layers='__import__("os")'),
           dict(dropout=None), dict(teacher=['a']), dict(softmax_temp={})]


@pytest.mark.parametrize('change', HOSTILE, ids=str)
def test_hostile_recipes(done, change):
    said = json.loads((done/'recipe.json').read_text())
    said['recipe'] |= change
    (done/'recipe.json').write_text(json.dumps(said))
    before = sorted(done.parent.rglob('*'))
    says = 'letters, digits' if change == dict(experiment='../x') else next(iter(change))
    with pytest.raises(ValueError, match=says):
        rerun(done, None if 'experiment' in change else 'x', progress=False)
    assert sorted(done.parent.rglob('*')) == before


@pytest.mark.parametrize('teacher', ['somebody/model', '../x', '', 5, None, dict(a=1)])
def test_a_run_that_names_a_teacher_elsewhere(done, teacher):
    """Opening a run asks no hub for the teacher that it names."""
    said = json.loads((done/'recipe.json').read_text())
    said['teacher'] = dict(folder=teacher)
    (done/'recipe.json').write_text(json.dumps(said))
    with pytest.raises(FileNotFoundError, match='there is no such folder here'): open_run(done)


@pytest.mark.parametrize('text', ['[]', '5', 'null', '{', '', '\0', '['*100_000, '"x"'])
def test_a_description_that_is_none(done, text):
    (done/'recipe.json').write_text(text)
    for deed in (open_run, rerun):
        with pytest.raises(ValueError, match='recipe.json'): deed(done)


def test_nobody_is_told(quick, tmp_path):
    """Imports, a run, its scores and a rerun, with the hub allowed: no name is looked up, no connection is
    tried."""
    silent = 'HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_HUB_DISABLE_TELEMETRY'
    env = {k: v for k, v in os.environ.items() if k not in silent}
    done = program('asks_nobody.py', tmp_path, json.dumps(quick.to_dict()), env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    asked = [line for line in done.stdout.splitlines() if line.startswith('asked:')]
    assert len(asked) == 2, asked # the last lines of the program itself: the watch works
    assert all("'127.0.0.1'" in line and ', 9' in line for line in asked), asked


OPEN_JUPYTER = re.compile(
    r'''--ip[= ]['"]?(\*|0\.0\.0\.0|::)|allow_remote_access|allow_origin|disable_check_xsrf'''
    r'''|token=(''|""| |\\|$)|IdentityProvider\.token\W*(''|"")|password=(''|"")''')


def test_jupyter_is_for_this_machine_alone():
    """No page tells to open JupyterLab to the network or to take its token away."""
    pages = [*ROOT.glob('*.md'), *ROOT.glob('nbs/**/*.ipynb'), *ROOT.glob('tests/*.py'), *ROOT.glob('.ci/*')]
    found = {p: OPEN_JUPYTER.search(p.read_text()) for p in pages if p != Path(__file__)}
    assert len(found) > 30 and not {p.name: m[0] for p, m in found.items() if m}


PROMISES = ('pickle', 'safetensors', 'symbolic link', 'loopback', 'telemetry', 'report', 'Not promised',
            'pytest --slow -m faults')


def test_what_is_promised_is_written_down():
    text = (ROOT/'SECURITY.md').read_text()
    for said in PROMISES: assert said in text, said


def test_the_table_is_made_of_the_counts():
    what = 'SECURITY.md is not what its tool makes: run python tools/make_security.py'
    assert (ROOT/'SECURITY.md').read_text() == security(), what


def test_every_test_of_the_table_is_there():
    """And is counted in no other row."""
    named = [name for row in ROWS for name in row.names]
    assert len(named) == len(set(named))
    for file, test in (name.split('::') for name in named):
        assert f'\ndef {test}(' in (ROOT/'tests'/file).read_text(), f'{file} has no {test}'


def report(name, outcome='passed', when='teardown', **numbers):
    return SimpleNamespace(nodeid=f'tests/test_x.py::{name}', keywords=['faults'], outcome=outcome, when=when,
                           duration=.1, user_properties=[('counted', numbers)] if numbers else [])


def counted_in(file, slow, *reports):
    counting = Counts(file, slow)
    for one in reports: counting.pytest_runtest_logreport(one)
    counting.pytest_sessionfinish()


def test_counts_are_added_up(tmp_path):
    """Over parameters and a row's tests; the long form is shown; a failure makes no table."""
    file = tmp_path/'counts.jsonl'
    row = Row('f', 'h', 'test_x.py::a test_x.py::b', '{kills} of {passed}', '{lost}')
    one, two = ([report(f'a[{i}]', when='call', kills=n, lost=0), report(f'a[{i}]', kills=n, lost=0)]
                for i, n in enumerate((3, 1300)))
    b = [report('b', when='call'), report('b')]
    lines = lambda: map(json.loads, file.read_text().splitlines())
    counted_in(file, False, *one, *b)
    assert told(row, counts(lines())) == ('3 of 2', '0', 'short')
    counted_in(file, True, *one, *two, *b)
    times, lost, form = told(row, counts(lines()))
    assert (times, lost) == ('1,303 of 3', '0') and form.startswith('long, seed ')
    counted_in(file, True, *b)
    assert len(file.read_text().splitlines()) == 4 # a form's counts of a test are replaced
    with pytest.raises(ValueError, match='Not counted yet: .*::c'): told(Row('f', 'h', 'test_x.py::c'), {})
    counted_in(file, True, report('b', 'failed', 'call'))
    with pytest.raises(ValueError, match='::b failed in its long form'): counts(lines())
