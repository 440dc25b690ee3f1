"""A study that is killed, or started twice, ends with one line for each run; its processes end with it."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from datasets import Dataset
from transformers import TrainerCallback
from two_processes import study

from lad_nb import jobs as doing
from lad_nb import leases
from lad_nb.durable import append_line, lock_folder
from lad_nb.evaluation import score
from lad_nb.gates_study import decide_twice
from lad_nb.results import (answers_of, append_result, check_comparable, kept_answers, labels_of,
                            lines_by_run, read_results, run_key, scores_again)
from lad_nb.section5 import Claim, section5, verdicts
from lad_nb.study import (at_the_edge, chosen_lrs, chosen_tries, collect, collect_answers, collect_teachers,
                          cost, jobs, missing, run_job, run_study, tuning_table)
from lad_nb.unseen import unseen_rows

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


@pytest.mark.slow
@pytest.mark.parametrize('moments, updates', [(1, 60), (20, 120)])
def test_a_study_of_two_processes_killed_at_its_parent(tiny, tmp_path, seed, counted, moments, updates):
    """SIGKILL and SIGTERM at random moments, half of them while runs go on; started again until whole."""
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
    counted(kills=len(gone), studies=rounds, lines_lost=0)


@pytest.mark.slow
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


def test_a_study_goes_on_with_an_encoder_that_is_named_from_here(tiny, tmp_path, monkeypatch):
    """Its runs are elsewhere. The second time, the teacher is there and has to be known as the same."""
    shutil.copytree(tiny, tmp_path / 'here' / 'encoders' / 'tiny')
    monkeypatch.chdir(tmp_path / 'here')
    small, where = study('encoders/tiny', 6), ('../there/runs', '../there/results')
    assert len(run_study(replace(small, seeds=(42,)), *where, say=silent)) == 2
    assert len(run_study(small, *where, say=silent)) == 4
    other = replace(small.teachers['toy'], lr=1e-4)
    with pytest.raises(ValueError, match='cannot go on with another recipe: lr is 0.0001'):
        run_study(replace(small, teachers=dict(toy=other), seeds=(42, 43, 44)), *where, say=silent)


class StopsAfter10(TrainerCallback):
    """Stops a run once it has the checkpoint of update 10."""
    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 10:
            raise KeyboardInterrupt


def test_a_run_that_was_stopped_took_as_long_as_its_parts(tiny, tmp_path, monkeypatch):
    alone = replace(study(tiny, 20), methods=dict(alone=dict(method='undistilled')), seeds=(42,))
    job, real = jobs(alone, tmp_path)[0], doing.run

    def stopped(*args, callbacks, **more):
        return real(*args, callbacks=[*callbacks, StopsAfter10()], **more)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(doing, 'run', stopped)
        doing.do_job(job, tmp_path, tmp_path)
    notes = doing.job_folder(job, tmp_path) / 'seconds.json'
    before = json.loads(notes.read_text())['10']
    notes.write_text(json.dumps({'10': before + 1000, '20': 9999}))  # the second part was lost
    began = time.time()
    line = doing.do_job(job, tmp_path, tmp_path)
    assert line['resumed'] and not notes.exists()
    assert before + 1000 < line['train_seconds'] <= line['seconds'] < before + 1000.1 + time.time() - began


def test_a_study_that_makes_checkpoints_more_often_goes_on(tiny, tmp_path):
    small = replace(study(tiny, 6), seeds=(42,))
    run_study(small, tmp_path, tmp_path, say=silent)
    often = replace(small, base=small.base.replace(ckpt_step=2), seeds=(42, 43))
    done = lines_by_run(tmp_path)
    assert [job['seed'] for job in jobs(often, tmp_path) if run_key(job) not in done] == [43, 43]
    assert len(run_study(often, tmp_path, tmp_path, say=silent)) == 4


@pytest.fixture
def others(finished, tiny, tmp_path):
    """Another thread has locked the LAD run of seed 42: the study, its folder, what unlocks it, its line."""
    hands, held = ThreadPoolExecutor(1), lock_folder(tmp_path / 'two_LAD_42_bert_toy')
    hands.submit(held.__enter__).result()
    line = next(l for l in read_results(finished) if (l['method'], l['seed']) == ('LAD', 42))
    yield study(tiny, 10), tmp_path, lambda: hands.submit(held.__exit__, None, None, None).result(), line


@pytest.mark.parametrize('ended', [True, pytest.param(False, marks=pytest.mark.slow)])
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


def test_a_job_by_number_says_whom_it_waits_for(others):
    """Of a job array, which does one run: that of another process."""
    small, folder, let_go, line = others
    said, number = [], 1 + [(j['method'], j['seed']) for j in jobs(small, folder)].index(('LAD', 42))

    def say(text):
        said.append(text)
        if 'waiting' in text:
            append_result(folder, line)
            let_go()

    assert run_job(small, number, folder, folder, say=say) == line
    assert said[1].startswith(f'[{number}] another process has') and 'two_LAD_42_bert_toy' in said[1]


@pytest.fixture
def hold():
    """Lock a folder in another thread, as another process does; what it gives back unlocks it."""
    hands = ThreadPoolExecutor(1)

    def hold(folder):
        held = lock_folder(folder)
        hands.submit(held.__enter__).result()
        return lambda: hands.submit(held.__exit__, None, None, None).result()

    yield hold
    hands.shutdown()


def two_teachers(model, **change):
    """Two runs of KD, each with its own teacher."""
    small = study(model, 6)
    first = small.teachers['toy']
    return replace(small, methods=dict(KD=dict(method='kd')), **dict(teachers=dict(toy=[
        first.replace(experiment=f'teacher{n}', seed=n) for n in (1, 2)])) | change)


@pytest.mark.parametrize('elsewhere', [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_teacher_that_another_trains_holds_up_no_other(tiny, tmp_path, hold, elsewhere):
    """The second is trained while the first is held; then that is waited for, and this is said."""
    let_go, said = hold(tmp_path / 'teacher1_bert_toy'), []

    def say(text):
        said.append(text)
        if 'waiting' not in text:
            return
        try:
            assert (tmp_path / 'teacher2_bert_toy' / 'model.safetensors').exists()
        finally:
            let_go()

    with ThreadPoolExecutor(1) as pool:
        executor = pool if elsewhere else None
        assert len(run_study(two_teachers(tiny), tmp_path, tmp_path, say=say, executor=executor)) == 2
    waited = [text for text in said if 'waiting' in text]
    assert len(waited) == 1 and waited[0].startswith('teacher on toy: another process has')
    assert 'teacher1_bert_toy' in waited[0]


@pytest.mark.parametrize('elsewhere', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_of_the_runs_that_are_waited_for_the_first_that_is_free_is_done(tiny, tmp_path, hold, elsewhere):
    """Two are held: the later one is let go first, and is done while the other is still held."""
    small, said, done = replace(study(tiny, 6), seeds=(42,)), [], threading.Event()
    first, later = (hold(tmp_path / f'two_{method}_42_bert_toy') for method in ('LAD', 'KD'))
    late = threading.Timer(60, first)

    def say(text):
        said.append(text)
        if 'waiting' in text:
            late.start()
            later()
        if 'toy KD seed 42' in text and not done.is_set() and late.is_alive():
            late.cancel()
            done.set()
            first()

    with ThreadPoolExecutor(1) as pool:
        executor = pool if elsewhere else None
        assert len(run_study(small, tmp_path, tmp_path, say=say, executor=executor)) == 2
    assert done.is_set(), f'the free one waited for the held one: {said}'


def test_what_another_process_did_is_said_to_be_its(finished, tiny, tmp_path):
    """A run that another study finishes while this one goes on: its line counts, and is told apart."""
    theirs = next(l for l in read_results(finished) if (l['method'], l['seed']) == ('KD', 42))
    said = []

    def say(text):
        said.append(text)
        if text.startswith('[1/2]'):
            append_result(tmp_path, theirs)

    run_study(replace(study(tiny, 10), seeds=(42,)), tmp_path, tmp_path, say=say)
    last = [text for text in said if text.startswith('[2/2]')]
    assert last[0].endswith('by another process; 0 left') and theirs['method'] in last[0]
    assert sum('by another process' in text for text in said) == 1
    assert theirs in read_results(tmp_path)


def another_machine(folder, *does):
    """A process that sees no lock of ours, nor we its; by name it is another machine."""
    program = Path(__file__).with_name('another_machine.py')
    return subprocess.Popen([sys.executable, program, folder, *map(str, does)], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.parametrize('ends', [pytest.param('well', marks=pytest.mark.slow), 'killed'])
def test_a_run_that_another_machine_has_on_a_file_system_without_locks(tiny, tmp_path, monkeypatch, ends):
    """Left, then waited for; a machine that dies is given up after a while."""
    monkeypatch.setattr(leases, 'LEASE', 2.)
    small, said = replace(study(tiny, 6), seeds=(42,)), []
    folder = tmp_path / 'two_LAD_42_bert_toy'
    other = another_machine(folder)
    assert other.stdout.readline() == 'has it\n'

    def say(text):
        said.append(text)
        if 'waiting' not in text:
            return
        assert not (folder / 'model.safetensors').exists() and other.poll() is None
        if ends == 'killed':
            other.kill()
        other.communicate('\n')

    assert len(run_study(small, tmp_path, tmp_path, say=say)) == 2
    assert any('another process has 1 of the runs' in text for text in said)
    assert (folder / 'model.safetensors').exists() and not list(tmp_path.glob('.*.held'))


@pytest.mark.slow
def test_two_machines_do_one_study_on_a_file_system_without_locks(tiny, tmp_path):
    """Both end well, every run has one line, and each did some."""
    whole = run_study(study(tiny, 60), tmp_path / 'whole', tmp_path / 'whole', say=silent)
    both = [another_machine(tmp_path, tiny, name, 60) for name in ('node1', 'node2')]
    said = [machine.communicate()[0] for machine in both]
    assert [machine.returncode for machine in both] == [0, 0], said
    assert table(tmp_path) == scores(tmp_path / 'whole') and len(whole) == 4
    mine = [[line for line in text.splitlines() if line[0] == '[' and 'by another' not in line]
            for text in said]
    assert all(mine) and sum(map(len, mine)) == 4, said


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


COMMITTED = Path(__file__).parent.parent/'nbs'/'analyses'/'results'


def test_committed_results_are_those_of_their_study():
    """Lines of before teachers, tries and answers: each is still a run that its study asks for."""
    lines = [l for l in read_results(COMMITTED) if l.get('study') == 'section5' and 'answers' not in l]
    assert len(lines) > 100 and not any('precision' in l or 'trained_on' in l for l in lines)
    tuned, ran = ([l for l in lines if l['stage'] == stage] for stage in ('tune', 'run'))
    assert {run_key(l) for l in tuned} <= {run_key(job) for job in jobs(section5, COMMITTED, 'tune')}
    table = collect(section5, COMMITTED)
    found = set(table[['task', 'method', 'seed']].itertuples(index=False, name=None))
    assert {(l['task'], l['method'], l['seed']) for l in ran} <= found
    assert list(table) == ['task', 'method', 'seed', 'lr', 'metric', 'value', 'seconds']
    assert list(tuning_table(section5, COMMITTED)) == ['task', 'method', 'lr', 'metric', 'value']


def line_of(task, logits, labels):
    """A line that keeps answers, after it was written and read."""
    rows = Dataset.from_dict(dict(sentence1=[str(i) for i in range(len(labels))], label=list(labels)))
    line = dict(study='s', stage='run', task=task, method='m', seed=1)
    return json.loads(json.dumps(line | dict(answers=dict(dev=kept_answers(rows, logits)))))


@pytest.mark.parametrize('scale', [1e-38, 1e-12, 1e-3, 1, 30, 1e6])
@pytest.mark.parametrize('task, C', [('sst2', 2), ('mrpc', 2), ('cola', 2), ('mnli', 3)])
def test_kept_answers_are_the_reported_ones(task, C, scale):
    """The class of every row and all scores are exactly the same, near zero, in ties and with outliers."""
    rng = np.random.default_rng(3)
    logits = (rng.normal(size=(4000, C))*scale).astype(np.float32)
    logits[:1000] = logits[:1000, :1]                                    # ties: the first class wins
    near = logits[1000:2000]
    near[:] = near[:, :1]
    near[np.arange(1000), rng.integers(C, size=1000)] *= np.float32(1 + 2e-7)  # one step of float32 apart
    logits[2000] = 0
    logits[2001, 0] *= 1000
    labels = rng.integers(C, size=len(logits))
    line = line_of(task, logits, labels)
    assert (answers_of(line).argmax(-1) == logits.argmax(-1)).all()
    assert scores_again(line) == score(task, logits, labels)
    assert (labels_of(line) == labels).all()
    odds = (logits - logits[:, :1]).astype(float)
    assert np.abs(answers_of(line) - odds).max() <= 2*line['answers']['dev']['unit']
    assert line['answers']['dev']['unit'] <= np.abs(odds).max()/500


def test_kept_answers_of_a_regression():
    """Values are kept as they are, so correlations are, too."""
    rng = np.random.default_rng(3)
    values, labels = rng.normal(size=(1500, 1)).astype(np.float32), rng.integers(0, 26, size=1500)/5
    line = line_of('stsb', values, labels)
    assert (answers_of(line) == values).all() and (labels_of(line) == labels).all()
    assert scores_again(line) == score('stsb', values, labels)


def test_kept_answers_are_small():
    """Little more than two kilobytes for 1,000 rows, labels included, in answers as a trained model's."""
    rng = np.random.default_rng(3)
    logits = np.sign(rng.normal(size=(8872, 2)))*2 + rng.normal(size=(8872, 2))
    kept = line_of('sst2', logits.astype(np.float32), logits.argmax(-1))['answers']
    assert len(json.dumps(kept)) < 2200*8.872


@pytest.fixture(scope='module')
def crossed(tiny):
    """Three seeds, two teachers, three tries of different settings, scored on unseen rows as well."""
    small = study(tiny, 6)
    teacher = small.teachers['toy']
    tries = {'LAD': tuple(dict(lr=lr, mu=mu) for lr, mu in ((1e-4, 10.), (1e-3, 10.), (1e-3, 100.))),
             'KD': tuple(dict(lr=lr) for lr in (1e-4, 3e-4, 1e-3))}
    return replace(small, name='crossed', seeds=(5, 6, 7), tries=dict(toy=tries), unseen=dict(toy=(70, 90)),
                   teachers=dict(toy=[teacher.replace(experiment=f'teacher{n}', seed=n) for n in (1, 2)]))


@pytest.fixture(scope='module')
def crossed_done(crossed, tmp_path_factory):
    """That study, done: stopped in tuning and after it, and started again by two processes."""
    folder, said = tmp_path_factory.mktemp('crossed'), []
    def stop(text):
        said.append(text)
        if text.startswith(('[4/6]', '[2/2]')): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run_study(crossed, folder, folder, say=stop)
    assert len([l for l in read_results(folder) if l['stage'] == 'tune']) == 4
    with pytest.raises(KeyboardInterrupt):
        run_study(crossed, folder, folder, say=stop)
    run_study(crossed, folder, folder, processes=2, threads=1, say=said.append)
    done = [text.split(': ')[0].split('] ')[1] for text in said if text.startswith('[')]
    assert len(done) == len(set(done)) == 12, 'a run was done twice'
    assert [text.partition(':')[0] for text in said].count('teacher on toy') == 2
    return folder


def test_a_crossed_study_does_nothing_twice(crossed, crossed_done):
    before = (crossed_done / 'runs.jsonl').read_bytes()
    assert missing(crossed, crossed_done, 'tune') == missing(crossed, crossed_done) == []
    table = run_study(crossed, crossed_done, crossed_done, say=silent)
    assert (crossed_done / 'runs.jsonl').read_bytes() == before
    took = cost(crossed, crossed_done)[['stage', 'runs', 'of']]
    assert took.values.tolist() == [['tune', 6, 6], ['run', 6, 6]]
    assert len(table) == 2*6


def test_teachers_are_crossed_with_seeds(crossed, crossed_done):
    """Seed 5 and 7 learn from the first, 6 from the second, whatever the method; by recipe and by bytes."""
    table = collect(crossed, crossed_done)
    by_seed = table.groupby('seed').teacher.unique().map(list).to_dict()
    assert by_seed == {5: [1], 6: [2], 7: [1]}
    lines = read_results(crossed_done)
    taught = {l['seed']: l['teacher_sha256'] for l in lines if l['stage'] == 'teacher'}
    assert len(set(taught.values())) == 2
    for line in lines:
        if line['stage'] != 'teacher':
            assert line['teacher_sha256'] == taught[by_seed.get(line['seed'], [1])[0]]
    found = collect_teachers(crossed, crossed_done)
    assert found.groupby('metric').seed.apply(list).to_dict() == dict(accuracy=[1, 2], accuracy_unseen=[1, 2])


def test_other_bytes_of_one_teacher_are_noticed(crossed, crossed_done, tmp_path):
    """A study of another name, on the same results, with a teacher of the same recipe and other weights."""
    lines = read_results(crossed_done)
    for line in lines:
        append_line(tmp_path / 'runs.jsonl',
                    line | (dict(teacher_sha256='0'*16) if line['stage'] == 'teacher' else {}))
    other = replace(crossed, name='other', tries={}, seeds=(5,))
    with pytest.raises(ValueError, match='students of two teachers would be compared'):
        run_study(other, crossed_done, tmp_path, stage='run', say=silent)


def test_tries_choose_by_unseen_rows(crossed, crossed_done):
    """The best on rows that no run trains on, of equals the earlier; at full length; runs take it."""
    tried, lines = tuning_table(crossed, crossed_done), read_results(crossed_done)
    assert list(tried) == ['task', 'method', 'lr', 'mu', 'metric', 'value'] and len(tried) == 6
    for (task, method), changes in chosen_tries(crossed, crossed_done).items():
        mine = tried[tried.method == method].reset_index()
        best = mine.loc[mine.value.idxmax()]
        assert changes['lr'] == best.lr and changes.get('mu', best.mu) == best.mu
        runs = [l for l in lines if (l['stage'], l['method']) == ('run', method)]
        assert [{k: l['recipe'][k] for k in changes} for l in runs] == [changes]*3
        assert chosen_lrs(crossed, crossed_done)[task, method] == best.lr
    order = [l['method'] for l in lines if l['stage'] == 'tune']
    assert order == ['LAD', 'KD']*3, 'try by try'
    for line in lines:
        assert line['recipe']['train_size'] == 160
        if line['stage'] == 'tune':
            assert list(line['answers']) == ['held_out'] and line['answers']['held_out']['count'] == 70
            assert line['recipe']['total_step'] == 6


def test_of_equal_tries_the_earlier_is_taken(crossed, tmp_path):
    for job in jobs(crossed, tmp_path, 'tune'):
        append_result(tmp_path, job | dict(scores=dict(accuracy=0.5)))
    assert list(chosen_tries(crossed, tmp_path).values()) == [dict(lr=1e-4, mu=10.), dict(lr=1e-4)]
    assert at_the_edge(crossed, tmp_path)[['method', 'lr', 'edge']].values.tolist() == [
        ['LAD', 1e-4, 'smallest'], ['KD', 1e-4, 'smallest']]


def test_a_rate_inside_is_not_at_the_edge(crossed, tmp_path):
    for job in jobs(crossed, tmp_path, 'tune'):
        append_result(tmp_path, job | dict(scores=dict(accuracy=float(job['recipe']['lr'] == 3e-4))))
    assert at_the_edge(crossed, tmp_path).method.tolist() == ['LAD']
    with pytest.raises(ValueError, match='KD on toy has 2 of 3 tuning runs'):
        chosen_tries(crossed, first_lines(tmp_path, 5))


def first_lines(results, n):
    """Other results, with the first lines of these."""
    few = results / 'few'
    for line in read_results(results)[:n]:
        append_result(few, line)
    return few


def test_unseen_rows_are_the_same_for_all(crossed, crossed_done):
    """One set of rows to score, another to choose by, none of them trained on; scores follow from answers."""
    rows = unseen_rows('toy', ((160, 0),))
    lines = read_results(crossed_done)
    kept = {name: {l['answers'][name]['rows'] for l in lines if name in l['answers']}
            for name in ('dev', 'unseen', 'held_out')}
    assert [len(hashes) for hashes in kept.values()] == [1, 1, 1] and len(set.union(*kept.values())) == 3
    assert len({l['trained_on'] for l in lines}) == 1 and {l['precision'] for l in lines} == {'fp32'}
    for line in lines:
        if line['stage'] == 'tune':
            assert scores_again(line, 'held_out') == line['scores']
            assert labels_of(line, 'held_out').tolist() == rows['label'][90:160]
            continue
        assert list(line['answers']) == ['dev', 'unseen'] and line['answers']['unseen']['count'] == 90
        assert labels_of(line, 'unseen').tolist() == rows['label'][:90]
        unseen = scores_again(line, 'unseen')['accuracy']
        assert scores_again(line) | dict(accuracy_unseen=unseen) == line['scores']


@pytest.mark.parametrize('scored, metric', [('dev', 'accuracy'), ('unseen', 'accuracy_unseen')])
def test_collected_answers(crossed, crossed_done, scored, metric):
    answers, labels = collect_answers(crossed, crossed_done, 'toy', scored)
    table = collect(crossed, crossed_done)
    table = table[table.metric == metric].set_index(['method', 'seed']).value
    assert answers.shape == (6, len(labels)) and answers.index.names == ['method', 'seed']
    assert ((answers == labels).mean(axis=1) == table[answers.index]).all()
    with pytest.raises(ValueError, match="answers on 'test'. Kept were: dev, unseen"):
        collect_answers(crossed, crossed_done, 'toy', 'test')


def test_some_of_the_claims_are_decided_as_all_are(crossed, crossed_done):
    """`only` leaves rows out, and corrects for all claims; a claim that is not among them is refused."""
    claims = tuple(Claim('', f'{a} beats {b}', a, b) for a, b in (('LAD', 'KD'), ('KD', 'LAD')))
    whole = decide_twice(crossed, crossed_done, claims)
    some = decide_twice(crossed, crossed_done, claims, only=claims[1:])
    pd.testing.assert_frame_equal(some, whole[1:].reset_index(drop=True))
    pd.testing.assert_frame_equal(decide_twice(crossed, crossed_done, claims, only=claims[::-1]), whole)
    with pytest.raises(ValueError, match="'LAD beats KD' is not among the 1 claims"):
        decide_twice(crossed, crossed_done, claims[1:], only=claims[:1])


def changed(lines, which, **change):
    """The lines, with a change in some of the grid's."""
    places = {(l['seed'], l['method']): i for i, l in enumerate(lines) if l['stage'] == 'run'}
    runs = [places[place] for place in sorted(places)][which]
    return [l | change if i in runs else l for i, l in enumerate(lines)]


@pytest.mark.parametrize('change, says', [
    (dict(precision='bf16'), 'the precision differs .*fp32 in 5; bf16 in 1 .these: KD seed 5'),
    (dict(trained_on='0'*16), 'the rows trained on differ between'),
    (dict(teacher_sha256='0'*16), 'the teacher differs'),
    (dict(answers={}), 'the rows scored differ between'),
])
def test_runs_that_are_not_alike_are_not_compared(crossed, crossed_done, tmp_path, change, says):
    """One line of six got another thing than the others: no table, no answers, and its name is said."""
    for line in changed(read_results(crossed_done), slice(0, 1), **change):
        append_line(tmp_path / 'runs.jsonl', line)
    for read in (lambda: collect(crossed, tmp_path), lambda: collect_answers(crossed, tmp_path, 'toy')):
        with pytest.raises(ValueError, match=says):
            read()
    assert len(tuning_table(crossed, tmp_path)) == 6


def test_old_lines_agree_with_whoever_agrees(crossed, crossed_done, tmp_path):
    """What a line doesn't say counts as what the others say; if those differ it is a group of its own."""
    lines = changed(read_results(crossed_done), slice(0, 2), precision=None, answers=None, trained_on=None)
    runs = [l for l in lines if l['stage'] == 'run']
    check_comparable(runs)
    with pytest.raises(ValueError, match='fp32 in 3; not said in 2; bf16 in 1 .these: '):
        check_comparable(changed(runs, slice(5, 6), precision='bf16'))
    for line in lines:
        append_line(tmp_path / 'runs.jsonl', line)
    assert len(collect(crossed, tmp_path)) == 12
    with pytest.warns(UserWarning, match='2 of 6 runs of crossed on toy have kept no answers'):
        assert len(collect_answers(crossed, tmp_path, 'toy')[0]) == 4


@pytest.mark.parametrize('change, says', [
    (dict(tries=dict(toy=dict(LAD=(dict(lr=1.),), KD=(dict(lr=1.), dict(lr=2.))))), '1 for LAD, 2 for KD'),
    (dict(tries=dict(toy=dict(LAD=(dict(lr=1.),)))), 'has none for KD'),
    (dict(tries=dict(toy=dict(LAD=(dict(lr=1.),)*2, KD=(dict(lr=1.),)*2))), 'names one twice'),
    (dict(tries=dict(toy=dict(LAD=(dict(seed=1),), KD=(dict(lr=1.),)))), 'changes seed; settings of'),
    (dict(lrs=dict(toy=(1e-4,))), 'lrs and tries both'),
    (dict(held_out=dict(toy=10)), 'held_out and unseen both'),
    (dict(unseen=dict(toy=(0, 0))), 'two numbers of rows'),
    (dict(unseen=dict(toy=7)), 'two numbers of rows'),
])
def test_a_study_that_cannot_be(crossed, change, says):
    with pytest.raises(ValueError, match=says):
        replace(crossed, **change)


def test_teachers_that_cannot_be(crossed):
    first, second = crossed.teachers['toy']
    for twins, what in (((first, second.replace(experiment='teacher1')), 'experiment teacher1, teacher1'),
                        ((first, second.replace(seed=1)), 'seed 1, 1')):
        with pytest.raises(ValueError, match=what):
            replace(crossed, teachers=dict(toy=twins))


def test_what_is_unseen_is_unseen_by_teachers_too(crossed, tmp_path):
    """The teacher's draw counts, and one that sees all rows leaves nothing."""
    first, second = crossed.teachers['toy']
    larger = replace(crossed, teachers=dict(toy=(first, second.replace(train_size=300))))
    assert all(job['unseen']['draws'] == [[300, 0]] for job in jobs(larger, tmp_path, 'tune'))
    greedy = replace(crossed, teachers=dict(toy=(first, second.replace(train_size=None))))
    with pytest.raises(ValueError, match='unseen for toy: fine_tune trains on the whole train split'):
        jobs(greedy, tmp_path, 'tune')
