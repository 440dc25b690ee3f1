"""A run's card, and the way of a run to a hub: here a server of its own, on this machine."""
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file

from lad_nb import __version__
from lad_nb.card import PICTURE, card
from lad_nb.cli import main
from lad_nb.durable import CHECKSUMS, find_damage
from lad_nb.experiment import open_run, rerun, run
from lad_nb.model_card import MARK, make_card
from lad_nb.push import files_to_push
from lad_nb.checkpoints import load_gates

from conftest import same_bytes

TOKEN = 'hf_this_is_a_secret_of_the_tests'
SENT = {'model.safetensors', 'gates.safetensors', 'config.json', 'tokenizer.json', 'tokenizer_config.json',
        CHECKSUMS, 'recipe.json', 'README.md'}

NONE = ''  # instead of a token


@pytest.fixture(scope='module')
def done(quick, tmp_path_factory):
    """A finished LAD run."""
    return run(quick, tmp_path_factory.mktemp('shared'), progress=False)


def hashes(folder):
    """{name: sha256} of the files of a run folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


# the card

def test_a_run_that_ends_leaves_a_card(done):
    found = ModelCard.load(done/'README.md')
    assert found.data.library_name == 'transformers' and found.data.pipeline_tag == 'text-classification'
    assert {'knowledge-distillation', 'lad'} <= set(found.data.tags) and found.data.metrics == ['accuracy']
    assert not found.data.eval_results, 'nobody has scored it'
    assert 'layer 1 from gate 2' in found.text and 'has not been scored' in found.text
    assert f') {__version__},' in found.text, 'the code that made it'
    assert find_damage(done) is None and 'README.md' not in json.loads((done/CHECKSUMS).read_text())


@pytest.mark.filterwarnings('ignore:The student differs from the encoder')
def test_a_student_of_another_size_names_no_base_model(quick, tmp_path):
    """Nothing was copied from its encoder; a student of the same size says which layers were."""
    said = []
    for name, sizes in dict(same={}, small=dict(d_model=8)).items():
        recipe = quick.replace(experiment=name, total_step=1, warmup_step=1, **sizes)
        folder = run(recipe, tmp_path, progress=False)
        path = folder/'recipe.json'
        told = json.loads(path.read_text())
        told['encoder']['folder'] = 'bert-base-uncased'
        path.write_text(json.dumps(told))
        said.append(make_card(folder))
    assert said[0].data.base_model == 'google-bert/bert-base-uncased'
    assert 'Its layers 1, 2 were layers' in said[0].text
    assert said[1].data.base_model is said[1].data.license is None
    assert 'started from random weights, with the tokenizer of [google-bert' in said[1].text


def test_no_path_of_the_machine(quick, tiny, tmp_path):
    """Not even where teacher and encoder lie outside of the folder of experiments."""
    folder = run(quick, tmp_path, progress=False)
    text = (folder/'README.md').read_text() + str(card(folder) and (folder/'README.md').read_text())
    for place in (tmp_path, tiny, tiny.parent, Path.home(), Path.cwd()): assert str(place) not in text
    assert '..' not in re.sub(r'\.\.\.', '', text) and tiny.name in text


def test_the_whole_card(done):
    """Scores, sizes, the picture; nothing else in the folder changes, and the card can be written again."""
    before = hashes(done)
    text = card(done, speed=True).read_text()
    after = hashes(done)
    assert {n for n in after if after[n] != before.get(n)} == {'README.md', PICTURE}
    found = ModelCard.load(done/'README.md')
    score, = found.data.eval_results
    assert (score.metric_type, score.dataset_type, score.dataset_split) == ('accuracy', 'toy', 'dev')
    assert f'| accuracy on dev | {score.metric_value:.3f} |' in text and 'ms a sentence' in text
    parameters = sum(t.numel() for t in load_file(done/'model.safetensors').values())
    assert f'| parameters | {parameters:,} |' in text and f'({PICTURE})' in text
    card(done)
    assert 'ms a sentence' not in (done/'README.md').read_text()
    open_run(done)


def test_scores_that_are_there_already(done):
    """A table of scores beside the run, or a log line of its last update."""
    log = [dict(step=6, eval_accuracy=.25)]
    assert make_card(done, log).data.eval_results[0].metric_value == .25
    assert not make_card(done, [dict(step=4, eval_accuracy=.25)]).data.eval_results
    (done/'eval-dev.csv').write_text('step,accuracy\n4,.5\n6,.75\n')
    try: assert make_card(done).data.eval_results[0].metric_value == .75
    finally: (done/'eval-dev.csv').unlink()


def test_a_readme_of_ones_own_stays(quick, done, tmp_path):
    """`card` refuses, a resumed run leaves it, and bytes of the run do not depend on it."""
    folder = run(quick, tmp_path, progress=False)
    assert same_bytes(folder, done)
    (folder/'README.md').write_text('mine')
    with pytest.raises(FileExistsError, match='was not written by lad_nb'): card(folder)
    run(quick, tmp_path, resume=True, progress=False)
    assert (folder/'README.md').read_text() == 'mine'
    assert MARK in (rerun(folder, progress=False)/'README.md').read_text()


def test_a_card_takes_no_time(done):
    """A study of thousands of runs: 5 ms each, so that twenty times as much is still no matter."""
    start = time.process_time()
    for _ in range(10): make_card(done)
    assert (time.process_time() - start)/10 < .1


# the way to the hub

class Hub(BaseHTTPRequestHandler):
    """As much of a hub as one commit needs: it keeps what it gets in `server.files`."""
    def log_message(self, *_): pass

    def answer(self, found=None, status=200):
        body = json.dumps(found or {}).encode()
        self.send_response(status)
        self.send_header('Content-Length', len(body))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def body(self): return self.rfile.read(int(self.headers.get('Content-Length') or 0))

    def do_HEAD(self): self.answer()

    def do_GET(self):
        if self.server.refuses: return self.answer(dict(error='no such model'), 404)
        self.answer(dict(id='me/student', modelId='me/student', siblings=[], sha='0'*40))

    def do_PUT(self):
        raw = self.body()
        self.server.large[hashlib.sha256(raw).hexdigest()] = raw
        self.answer()

    def do_POST(self):
        said, hub = self.body(), self.server
        hub.tokens.add(self.headers.get('Authorization'))
        if hub.refuses: return self.answer(dict(error=f'not for {TOKEN}'), 403)
        if self.path.endswith('/commit/main'): return self.answer(self.commit(said))
        said = json.loads(said or '{}')
        if self.path == '/api/repos/create':
            hub.made = said
            return self.answer(dict(url=f'{hub.url}/me/student', id='me/student'))
        if '/preupload/' in self.path:
            def mode(f): return 'lfs' if f['path'].endswith('.safetensors') else 'regular'
            files = [dict(path=f['path'], uploadMode=mode(f), shouldIgnore=False) for f in said['files']]
            return self.answer(dict(files=files))
        if self.path.endswith('/objects/batch'):
            def to(o): return dict(upload=dict(href=f"{hub.url}/large/{o['oid']}"))
            objects = [o | dict(authenticated=True, actions=to(o)) for o in said['objects']]
            return self.answer(dict(transfer='basic', objects=objects))
        self.answer()

    def commit(self, said):
        for line in map(json.loads, said.splitlines()):
            value = line['value']
            if line['key'] == 'file': self.server.files[value['path']] = b64decode(value['content'])
            if line['key'] == 'lfsFile': self.server.files[value['path']] = self.server.large[value['oid']]
        return dict(commitUrl=f'{self.server.url}/me/student/commit/1', commitOid='1', success=True)


@pytest.fixture
def hub():
    """A hub on this machine."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.files, server.large, server.tokens, server.made, server.refuses = {}, {}, set(), None, False
    server.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def pushed(monkeypatch, capsys, tmp_path):
    """`lad-nb push`: its exit status, what it printed. In this process, with the settings that the hub's
    library reads from the environment when it is imported; or in a process of its own."""
    def push(folder, url, *flags, token=TOKEN, offline=False, alone=False):
        words = ['push', str(folder), 'me/student', *flags]
        if alone: found = in_a_process(words, tmp_path, url, token)
        else:
            told = dict(ENDPOINT=url, HF_HUB_OFFLINE=offline, HF_HUB_DISABLE_XET=True,
                        HF_TOKEN_PATH=str(tmp_path/'token'))
            for name, value in told.items(): monkeypatch.setattr(constants, name, value)
            monkeypatch.setenv('HF_TOKEN', token)
            found = main(words), *capsys.readouterr()
        assert TOKEN not in found[1] + found[2]
        return found
    return push


def in_a_process(words, home, url, token):
    env = os.environ | dict(HF_ENDPOINT=url, HF_HUB_OFFLINE='0', HF_HUB_DISABLE_XET='1', HF_TOKEN=token,
                            HF_HOME=str(home/'home'))
    found = subprocess.run([sys.executable, '-m', 'lad_nb', *words], env=env, capture_output=True, text=True)
    return found.returncode, found.stdout, found.stderr


@pytest.mark.parametrize('alone', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_on_a_hub(done, hub, pushed, tmp_path, alone):
    """What travels is a run folder: it is whole, it loads, and its card is read."""
    code, out, err = pushed(done, hub.url, alone=alone)
    assert code == 0 and f'{hub.url}/me/student' in out, err
    assert SENT <= hub.files.keys() <= SENT | {PICTURE}
    assert hub.made['visibility'] == 'private' and hub.tokens == {f'Bearer {TOKEN}'}
    there = tmp_path/done.name
    there.mkdir()
    for name, raw in hub.files.items(): (there/name).write_bytes(raw)
    assert find_damage(there) is None
    assert ModelCard.load(there/'README.md').data.library_name == 'transformers'
    load_gates(open_run(done)[0].objective, there)


def test_all_of_a_run(done, hub, pushed):
    code, _, err = pushed(done, hub.url, '--all', '--public')
    assert code == 0, err
    assert SENT | {'log.jsonl', 'checkpoint-4/optimizer.pt'} <= hub.files.keys()
    assert not any(name.startswith('.') for name in hub.files) and hub.made['visibility'] == 'public'


@pytest.mark.parametrize('how, says', [
    (dict(offline=True), 'HF_HUB_OFFLINE is set'),
    (dict(token=NONE), 'There is no token for the hub'),
    (dict(url='http://127.0.0.1:9'), 'The hub at http://127.0.0.1:9 does not answer'),
    (dict(refuses=True), r'The hub refused me/student \(status 403\)')], ids=lambda x: str(x)[:12])
def test_what_can_go_wrong(done, hub, pushed, how, says):
    hub.refuses = how.pop('refuses', False)
    code, out, err = pushed(done, how.pop('url', hub.url), **how)
    assert code == 2 and re.search(says, err) and not hub.files and not out


def test_a_dry_run_asks_nobody(done, hub, pushed):
    code, out, err = pushed(done, hub.url, '--dry_run', token=NONE)
    assert code == 0 and not hub.tokens and hub.made is None, err
    assert {line.split()[-1] for line in out.splitlines()[:-1]} == {*files_to_push(done).file}


def test_a_damaged_run_is_not_sent(quick, hub, pushed, tmp_path):
    folder = run(quick, tmp_path, progress=False)
    (folder/'gates.safetensors').write_bytes(b'')
    code, _, err = pushed(folder, hub.url)
    assert code == 2 and 'gates.safetensors is not what was written' in err and not hub.tokens
