"""A study that is killed, or started twice, ends with one line for each run; its processes end with it."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from two_processes import study

from lad_nb.durable import append_line, lock_folder
from lad_nb.results import append_result, read_results
from lad_nb.section5 import verdicts
from lad_nb.study import chosen_lrs, collect, jobs, missing, run_study, tuning_table

pytestmark = pytest.mark.faults
PROGRAM = Path(__file__).with_name('two_processes.py')


def silent(line):
    """What a study says, unread."""


def scores(folder):
    return {(l['method'], l['seed']): l['scores'] for l in read_results(folder)}


def start(folder, model, processes, updates):
    """The program, in a session of its own, by which its processes are known."""
    command = [sys.executable, PROGRAM, folder, model, str(processes), str(updates)]
    with open(folder / 'said.txt', 'a') as said:
        return subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)


def alive(session):
    """The processes of a session that still run: zombies have ended."""
    found = []
    for p in psutil.process_iter(['status']):
        try:
            mine = os.getsid(p.pid) == session
        except (ProcessLookupError, PermissionError):
            continue
        if mine and p.info['status'] != psutil.STATUS_ZOMBIE:
            found.append(p.pid)
    return found


def seconds_until(true, most):
    """How long it took; None if it did not happen in time."""
    began = time.monotonic()
    while time.monotonic() < began + most:
        if true():
            return time.monotonic() - began
        time.sleep(0.05)


def table(folder):
    """{(method, seed): scores} of the whole lines of a table; no run has two."""
    path = folder / 'results' / 'runs.jsonl'
    whole = path.read_text().rpartition('\n')[0].splitlines() if path.is_file() else []
    found = [((line['method'], line['seed']), line['scores']) for line in map(json.loads, whole)]
    assert len(dict(found)) == len(found), f'doubled lines: {[key for key, _ in found]}'
    return dict(found)


def students(folder):
    return {p.parent.name: p.read_bytes() for p in (folder / 'experiments').glob('two_*/model.safetensors')}


def kill(folder, model, updates, sent, after, working):
    """Start a study of two processes, send its parent a signal, and say how long its processes lived on.

    `after` is counted from the start or, if `working`, from when the first run has its folder.
    None: the study had ended before."""
    parent = start(folder, model, 2, updates)
    try:
        if working:
            def begun(): return parent.poll() is not None or list((folder / 'experiments').glob('two_*'))
            seconds_until(begun, 120)
        if seconds_until(lambda: parent.poll() is not None, after) is not None:
            return None
        parent.send_signal(sent)
        assert parent.wait() == -sent, (folder / 'said.txt').read_text()
        took = seconds_until(lambda: not alive(parent.pid), 10)
        assert took is not None, f'{alive(parent.pid)} are left ten seconds after {sent.name}'
        return took
    finally:
        if alive(parent.pid):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()


@pytest.mark.parametrize('moments, updates', [(1, 60), pytest.param(20, 120, marks=pytest.mark.slow)])
def test_a_study_of_two_processes_killed_at_its_parent(tiny, tmp_path, moments, updates):
    """SIGKILL and SIGTERM at random moments, half of them while runs go on; started again until whole."""
    seed = int(os.environ.get('LAD_NB_SEED') or random.randrange(10**6))
    print(f'LAD_NB_SEED={seed}')
    rng, whole = random.Random(seed), tmp_path / 'whole'
    began = time.monotonic()
    run_study(study(tiny, updates), whole / 'experiments', whole / 'results', threads=1, say=silent)
    lasted = time.monotonic() - began
    left = [s for s in (signal.SIGKILL, signal.SIGTERM) for _ in range(moments)]
    rng.shuffle(left)
    rounds, gone, resumed = 0, [], 0
    while left:
        folder = tmp_path / f'round{rounds}'
        folder.mkdir()
        rounds += 1
        before = {}
        while left:
            working = moments == 1 or rng.random() < 0.5
            after = rng.uniform(0, lasted if working else 10 + lasted)
            took = kill(folder, tiny, updates, left[-1], after, working)
            now = table(folder)
            assert before.items() <= now.items(), 'a line was lost'
            before = now
            if took is None:
                break
            gone.append((left.pop().name, round(took, 2)))
        assert start(folder, tiny, 2, updates).wait() == 0, (folder / 'said.txt').read_text()
        assert table(folder) == table(whole) and len(table(whole)) == 5
        assert students(folder) == students(whole)
        lines = read_results(folder / 'results')
        resumed += sum(line['resumed'] for line in lines if line['stage'] == 'run')
    print(f'{len(gone)} kills in {rounds} studies, {resumed} of their runs resumed; the last process '
          f'was gone after at most {max(t for _, t in gone)} s; {gone}')


def test_two_studies_at_once(tiny, tmp_path):
    """One root, one table: both end well, every run has one line, and nothing is trained twice."""
    whole = run_study(study(tiny, 60), tmp_path / 'whole', tmp_path / 'whole', say=silent)
    both = [start(tmp_path, tiny, 1, 60) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0], (tmp_path / 'said.txt').read_text()
    assert len(table(tmp_path)) == 5
    assert table(tmp_path) == scores(tmp_path / 'whole') and len(whole) == 4


@pytest.fixture(scope='module')
def finished(tiny, tmp_path_factory):
    """A study of four runs of two updates, done."""
    folder = tmp_path_factory.mktemp('finished')
    run_study(study(tiny, 10), folder, folder, say=silent)
    return folder


@pytest.fixture
def others(finished, tiny, tmp_path):
    """Another thread has locked the LAD run of seed 42: the study, its folder, what unlocks it, its line."""
    hands, held = ThreadPoolExecutor(1), lock_folder(tmp_path / 'two_LAD_42_bert_toy')
    hands.submit(held.__enter__).result()
    line = next(l for l in read_results(finished) if (l['method'], l['seed']) == ('LAD', 42))
    yield study(tiny, 10), tmp_path, lambda: hands.submit(held.__exit__, None, None, None).result(), line


@pytest.mark.parametrize('ended', [True, False])
def test_a_run_that_another_holds(others, ended):
    """The others go on, then it is waited for: its line is taken, or, when there is none, it is run here."""
    small, folder, let_go, line = others
    said = []

    def say(text):
        said.append(text)
        if 'waiting' not in text:
            return
        assert len([l for l in read_results(folder) if l['stage'] == 'run']) == 3
        if ended:
            append_result(folder, line | dict(finished='there'))
        let_go()

    assert len(run_study(small, folder, folder, say=say)) == 4
    assert any('another process has 1 of the runs' in text for text in said)
    found = next(l for l in read_results(folder) if (l['method'], l['seed']) == ('LAD', 42))
    assert (found['finished'] == 'there') == ended and found['scores'] == line['scores']
    trained = (folder / 'two_LAD_42_bert_toy' / 'model.safetensors').exists()
    assert trained != ended, 'trained twice, or not at all'


def test_a_teacher_that_another_trains(finished, tiny, tmp_path):
    """It is waited for; the study does not fail."""
    hands, held, said = ThreadPoolExecutor(1), lock_folder(tmp_path / 'teacher_bert_toy'), []
    hands.submit(held.__enter__).result()

    def say(text):
        said.append(text)
        if 'waiting' in text:
            hands.submit(held.__exit__, None, None, None).result()

    run_study(study(tiny, 10), tmp_path, tmp_path, say=say)
    assert 'teacher on toy: another process has' in said[0]
    assert scores(tmp_path) == scores(finished)


def test_a_line_is_written_once(finished, tmp_path):
    """A second line of a run is not written: the first is returned."""
    line = read_results(finished)[-1]
    assert append_result(tmp_path, line) == line
    assert append_result(tmp_path, line | dict(scores=dict(accuracy=0.0))) == line
    assert read_results(tmp_path) == [line]


@pytest.mark.parametrize(
    'change, says',
    [
        ({}, r"both say \{'accuracy'"),
        (dict(scores=dict(accuracy=0.25)), r"they say .* and \{'accuracy': 0.25\}"),
        (dict(code={}, seconds=1.0), 'both say'),
    ],
)
def test_two_lines_of_one_run(finished, tiny, tmp_path, change, says):
    """In a table put together by hand, say: neither is taken, and the message has their numbers."""
    lines = read_results(finished)
    for line in (*lines, lines[2] | change):
        append_line(tmp_path / 'runs.jsonl', line)
    run = rf"toy, {lines[2]['method']}, seed {lines[2]['seed']}, lr 0.001"
    message = (r'runs.jsonl, lines 3 and 6: two results of one run '
               rf'\(two, run: {run}\); {says}.*delete the line')
    small = study(tiny, 10)
    for read in (
        lambda: read_results(tmp_path),
        lambda: collect(small, tmp_path),
        lambda: missing(small, tmp_path),
        lambda: run_study(small, tmp_path, tmp_path, say=silent),
        lambda: append_result(tmp_path, lines[0]),
        lambda: verdicts(collect(small, tmp_path)),
    ):
        with pytest.raises(ValueError, match=message):
            read()


@pytest.fixture
def tuned(tiny):
    """A study with two rates to choose from, and a result of each, made up."""
    small = replace(study(tiny, 10), methods=dict(KD=dict(method='kd')), lrs=dict(toy=(1e-4, 3e-4)),
                    held_out=dict(toy=64))
    todo = jobs(small, 'nowhere', 'tune')
    return small, [job | dict(scores=dict(accuracy=0.5 + i / 10)) for i, job in enumerate(todo)]


def test_a_doubled_tuning_line_is_no_rate_that_was_tried(tuned, tmp_path):
    """A second line of one rate does not count as a second rate."""
    small, lines = tuned
    for _ in range(2):
        append_result(tmp_path, lines[0])
    assert len(tuning_table(small, tmp_path)) == 1
    with pytest.raises(ValueError, match='KD on toy has 1 of 2 tuning runs'):
        chosen_lrs(small, tmp_path)
    append_result(tmp_path, lines[1])
    assert chosen_lrs(small, tmp_path) == {('toy', 'KD'): 3e-4}
    append_line(tmp_path / 'runs.jsonl', lines[0])
    with pytest.raises(ValueError, match='lines 1 and 3: two results of one run .*lr 0.0001'):
        chosen_lrs(small, tmp_path)


@pytest.mark.parametrize('change', [dict(seeds=(42, 43, 42)), dict(lrs=dict(toy=(1e-4, 1e-4)))])
def test_a_seed_or_rate_that_is_named_twice(tuned, change):
    with pytest.raises(ValueError, match=r'(seeds|lrs\[.toy.\]) names one twice'):
        replace(tuned[0], **change)
