"""Studies on executors of other makers: a cluster of Dask, one worker of which is killed; jobs of submitit;
job arrays."""
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from two_processes import study

from lad_nb import cli
from lad_nb.durable import lock_folder
from lad_nb.results import lines_by_run, read_results, run_key
from lad_nb.study import jobs, missing, run_study

HERE = Path(__file__).parent
RUNS = 4  # of the study


def silent(line):
    """What a study says, unread."""


def scores(results):
    """{(stage, method, seed): scores}; no run has two lines."""
    lines = read_results(results)
    found = {(line['stage'], line['method'], line['seed']): line['scores'] for line in lines}
    assert len(found) == len(lines)
    return found


def students(root):
    return {p.parent.name: p.read_bytes() for p in root.glob('two_*/model.safetensors')}


@pytest.fixture(scope='module')
def whole(tiny, tmp_path_factory):
    """The study, done in this process, and its folder."""
    folder = tmp_path_factory.mktemp('whole')
    run_study(study(tiny, 60), folder/'experiments', folder/'results', threads=1, say=silent)
    return folder


@pytest.fixture
def cluster(monkeypatch):
    """Two worker processes of Dask, of one thread each, on loopback; they can import what tests import."""
    distributed = pytest.importorskip('distributed')
    import dask
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([os.environ.get('PYTHONPATH', ''), str(HERE)]))
    patient = {'distributed.comm.timeouts.connect': '120s', 'distributed.worker.daemon': True}
    with (dask.config.set(patient),
          distributed.LocalCluster(n_workers=2, threads_per_worker=1, host='127.0.0.1',
                                   dashboard_address=':0', memory_limit=0) as cluster,
          distributed.Client(cluster) as client):
        client.wait_for_workers(2, timeout=120)
        yield cluster, client


def run_of(pid):
    """The folder of the run that a process has locked, once that has a checkpoint and is not done."""
    locks = [Path(f.path) for f in psutil.Process(pid).open_files() if f.path.endswith('.lock')]
    for folder in (lock.parent for lock in locks if lock.parent.name.startswith('two_')):
        if list(folder.glob('checkpoint-*')) and not (folder/'model.safetensors').exists(): return folder


class Killer(threading.Thread):
    """Kills a process in the middle of its first run, and remembers which that was."""
    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.folder, self.over = pid, None, threading.Event()

    def run(self):
        while self.folder is None and not self.over.wait(.002): self.folder = run_of(self.pid)
        if self.folder: os.kill(self.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_of_a_cluster_is_killed(cluster, tiny, whole, tmp_path):
    """The study ends; no result is lost or doubled, and all are those of a study on one machine."""
    cluster, client = cluster
    pids = set(client.run(os.getpid).values())
    killer = Killer(min(pids))
    killer.start()
    said, executor = [], client.get_executor(pure=False)
    asked = study(tiny, 60)
    try: run_study(asked, tmp_path/'experiments', tmp_path/'results', say=said.append, executor=executor)
    finally: killer.over.set()
    assert killer.folder is not None, 'no worker was seen in the middle of a run'
    assert not psutil.pid_exists(killer.pid)
    assert scores(tmp_path/'results') == scores(whole/'results') and len(scores(whole/'results')) == RUNS + 1
    assert students(tmp_path/'experiments') == students(whole/'experiments')
    lines = read_results(tmp_path/'results')
    resumed = {line['recipe']['experiment'] for line in lines if line.get('resumed')}
    assert resumed == {killer.folder.name.removesuffix('_bert_toy')}
    assert sum(line.startswith('[') for line in said) == RUNS and missing(asked, tmp_path/'results') == []
    assert not list((tmp_path/'experiments').glob('two_*/checkpoint-*')), 'checkpoints are left'


class Watched(ThreadPoolExecutor):
    """Notes which jobs are in the results when their worker is through with them."""
    def __init__(self, results):
        super().__init__(2)
        self.results, self.early, self.jobs = results, [], 0

    def submit(self, in_turn, one, job):
        def watched():
            line, self.jobs = in_turn(one, job), self.jobs + 1
            if run_key(job) in lines_by_run(self.results): self.early.append(job)
            return line
        return super().submit(watched)


def test_results_are_written_by_the_process_that_asks(tiny, tmp_path):
    few, here = replace(study(tiny, 6), seeds=(42,)), tmp_path/'here'
    run_study(few, here/'experiments', here/'results', threads=1, say=silent)
    with Watched(tmp_path/'results') as executor:
        run_study(few, tmp_path/'experiments', tmp_path/'results', say=silent, executor=executor)
    assert (executor.jobs, executor.early) == (3, [])
    assert scores(tmp_path/'results') == scores(here/'results') and len(scores(here/'results')) == 3
    assert students(tmp_path/'experiments') == students(here/'experiments')


def test_a_run_that_another_study_has_is_waited_for(tiny, tmp_path):
    """It is held while the executor works, and given back without a result."""
    few, said = replace(study(tiny, 6), seeds=(42,)), []
    elsewhere, lock = ThreadPoolExecutor(1), lock_folder(tmp_path/'two_KD_42_bert_toy')
    def say(text):
        said.append(text)
        if 'waiting' in text: elsewhere.submit(lock.__exit__, None, None, None).result()
    elsewhere.submit(lock.__enter__).result()
    with ThreadPoolExecutor(2) as executor:
        run_study(few, tmp_path, tmp_path/'results', say=say, executor=executor)
    done = [text.partition(':')[0] for text in said if text.startswith('[')]
    assert [text.split('] ')[1] for text in done] == ['toy LAD seed 42', 'toy KD seed 42']
    assert len(scores(tmp_path/'results')) == 3


def test_a_job_that_fails_on_a_worker(tiny, tmp_path):
    few = replace(study(tiny, 6), seeds=(42,))
    bad = replace(few, methods=few.methods | dict(bad=dict(method='lad', lr=1e-3, num_hidden_layers=3)))
    with ThreadPoolExecutor(1) as executor:
        with pytest.raises(RuntimeError, match='(?s)1 run failed, the others are done.*toy bad seed 42'):
            run_study(bad, tmp_path, tmp_path/'results', say=silent, executor=executor)
    assert {method for _, method, _ in scores(tmp_path/'results')} == {'teacher', 'LAD', 'KD'}


@pytest.mark.slow
def test_jobs_of_submitit(tiny, tmp_path):
    """Each in a process of its own, by files: what it does on Slurm, without Slurm."""
    submitit = pytest.importorskip('submitit')
    few = replace(study(tiny, 6), seeds=(42,), methods=dict(KD=dict(method='kd')))
    executor = submitit.LocalExecutor(tmp_path/'jobs')
    executor.update_parameters(timeout_min=3) # a job that hangs is ended, and the test fails
    table = run_study(few, tmp_path/'experiments', tmp_path/'results', say=silent, executor=executor)
    assert len(table) == 1 and len(scores(tmp_path/'results')) == 2
    assert len(list((tmp_path/'jobs').glob('*_result.pkl'))) == 2


MINE = """
from dataclasses import replace
from two_processes import study
mine = replace(study({model!r}, 6), seeds=(42,))
"""


@pytest.fixture
def lad_nb(tiny, tmp_path, monkeypatch, capsys):
    """The command, in a folder with a study in a file."""
    (tmp_path/'my_studies.py').write_text(MINE.format(model=str(tiny)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    monkeypatch.delitem(sys.modules, 'my_studies', raising=False)
    def say(line):
        code, (out, err) = cli.main(line.split()), capsys.readouterr()
        return code, out.splitlines(), err
    return say


def test_a_scheduler_that_counts(lad_nb, tmp_path):
    """Numbers stay while runs are done; each does its own run, and the teacher before it."""
    code, out, err = lad_nb('study my_studies:mine --list')
    assert code == 0, err
    assert [line.split()[:3] for line in out] == [[str(n), 'to', 'do'] for n in (1, 2)]
    code, out, err = lad_nb('study my_studies:mine --job 2')
    assert code == 0 and out[-1].startswith('[2] toy KD seed 42'), err
    assert set(scores('results')) == {('teacher', 'teacher', 42), ('run', 'KD', 42)}
    code, out, err = lad_nb('study my_studies:mine --list')
    assert [line.split()[1] for line in out] == ['to', 'done']
    before = (tmp_path/'results'/'runs.jsonl').read_bytes()
    assert lad_nb('study my_studies:mine --job 2')[0] == 0
    assert (tmp_path/'results'/'runs.jsonl').read_bytes() == before
    code, out, err = lad_nb('study my_studies:mine')
    assert code == 0 and 'two, run: 1 of 2 runs to do, 1 at a time' in out, err
    from my_studies import mine
    assert {run_key(job) for job in jobs(mine, 'results')} < set(lines_by_run('results'))


@pytest.mark.parametrize('line, says', [
    ('study my_studies:mine --job 5', 'There is no job 5: two has 2'),
    ('study my_studies:mine --job 0', 'counted from 1'),
    ('study my_studies:min', 'Did you mean mine?'),
    ('study my_studie:mine', "There is no module 'my_studie'"),
    ('study section6', 'Did you mean section5?'),
    ('study section5 --list', 'Run them first'),
    ('study my_studies:mine --stage last', 'invalid choice')])
def test_a_study_that_cannot_be_named(lad_nb, tmp_path, line, says):
    code, out, err = lad_nb(line)
    assert (code, out) == (2, []) and says in err and 'Traceback' not in err, err
    assert not (tmp_path/'results').exists() and not (tmp_path/'experiments').exists()
