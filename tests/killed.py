"""Starts a study in processes of its own, kills each at a random moment, starts the next one, and says what
came of it.

python killed.py FOLDER MODEL UPDATES KILLS SEED: works in FOLDER, with the tiny model in MODEL; prints JSON.
Processes are forked, so that a start costs no imports.
"""
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import lad_nb.cache
import lad_nb.durable
from lad_nb.recipes import FAST, Recipe
from lad_nb.results import read_results
from lad_nb.study import Study, run_study

FILES = ('model.safetensors', 'gates.safetensors', 'log.jsonl')
EVENTS = ('open', 'os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'os.truncate', 'shutil.rmtree')
PLACES = {'teacher_cache': 'cache', 'runs.jsonl': 'results', '.results': 'results', 'log.jsonl': 'log',
          'checkpoint-': 'checkpoint', '.writing': 'checkpoint', '.removing': 'pruning',
          'tensorboard': 'tensorboard', '.final': 'final'}


def study(name, model, updates):
    few = dict(task='toy', train_size=160, max_seq_len=32, batch_size=16, ckpt_step=5, log_step=3,
               device_id=-1)
    fast = few | FAST | dict(precision='fp32')
    recipe = Recipe(name, num_hidden_layers=2, ptrain_ver=model, total_step=updates, warmup_step=6,
                    lr=1e-3, gate_lr=1e-3, **fast)
    teacher = Recipe('teacher', method='fine_tune', ptrain_ver=model, total_step=10, warmup_step=1, **few)
    return Study(name, recipe, snapshots=(), seeds=(42,), teachers=dict(toy=teacher), tasks=dict(toy={}),
                 methods=dict(LAD=dict(method='lad')))


def place(path): return next((name for part, name in PLACES.items() if part in path), 'run folder')


def kill_myself(): os.kill(os.getpid(), signal.SIGKILL)


class Torn:
    """A file that writes half of what it is given, and is then no more."""
    def __init__(self, file, end): self.file, self.end = file, end
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()

    def write(self, text):
        if self.end(self.file.name):
            self.file.write(text[:random.randrange(len(text))])
            self.file.flush()
            kill_myself()
        return self.file.write(text)


class End:
    """Whether this is the moment to die; tells which files are touched, and at which it dies."""
    def __init__(self, pipe, kind, where, number):
        self.pipe, self.kind, self.where, self.number, self.count = pipe, kind, where, number, 0

    def __call__(self, path, event='torn'):
        here = place(str(path))
        if self.kind is None: os.write(self.pipe, f'{event} {here}\n'.encode())
        if (self.kind == 'torn') != (event == 'torn') or here != self.where: return False
        self.count += 1
        if self.count < self.number: return False
        os.write(self.pipe, f'{event} {here}\n'.encode())
        return True


def changes(event, args, folder):
    """Whether an audit event changes a file of the folder."""
    if event not in EVENTS or not args or not str(args[0]).startswith(str(folder)): return False
    if event != 'open': return True
    return isinstance(args[1], str) and bool(set(args[1]) & set('wax+')) or bool(args[2] & os.O_CREAT)


def watch(folder, end):
    """Die at a file operation, or in the middle of a write."""
    def look(event, args):
        if changes(event, args, folder) and end(args[0], event): kill_myself()
    def torn_open(path, mode='r', **how):
        file = open(path, mode, **how)
        return Torn(file, end) if set(mode) & set('wax') else file
    sys.addaudithook(look)
    for module in (lad_nb.durable, lad_nb.cache): module.open = torn_open


def child(folder, name, model, updates, pipe, kind, where, number):
    """One process: works until it is done or dead."""
    log = os.open(folder/'said.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if kind != 'time': watch(folder, End(pipe, kind, where, number))
    random.seed(number)
    try: run_study(study(name, model, updates), folder/name, folder/'.results')
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def attempt(folder, name, model, updates, kind=None, where=None, number=0, after=None):
    """Its exit status, what it told, and how long it took."""
    read, write = os.pipe()
    started, pid = time.monotonic(), os.fork()
    if pid == 0:
        os.close(read)
        child(folder, name, model, updates, write, kind, where, number)
    os.close(write)
    if after is not None:
        gone = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while time.monotonic() < started + after and os.waitid(os.P_PID, pid, gone) is None: time.sleep(.002)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(read) as f: told = f.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), told, time.monotonic() - started


class Trials:
    """Rounds of attempts, each killed at another moment, until so many have been."""
    def __init__(self, folder, model, updates, kills, seed):
        self.folder, self.work, self.kills, self.rng = folder, (model, updates), kills, random.Random(seed)
        self.done, self.problems, self.rounds = [], [], 0
        status, self.trace, self.lasted = attempt(folder, 'whole', *self.work)
        assert status == 0, self.said()
        self.whole = folder/'whole'/'whole_LAD_42_bert_toy'

    def said(self): return (self.folder/'said.txt').read_text()

    def moments(self, kind):
        """Where an attempt of this kind can die, once for each time that it could."""
        return [t.split(' ', 1)[1] for t in self.trace if t.startswith('torn ') == (kind == 'torn')]

    def next_attempt(self, name):
        """The exit status of one more process, and what it told."""
        rng = self.rng
        kind = rng.choice(['time', 'file', 'torn']) if len(self.done) < self.kills else None
        if kind is None: return attempt(self.folder, name, *self.work)[:2]
        if kind == 'time':
            return attempt(self.folder, name, *self.work, 'time', after=rng.uniform(0, .7*self.lasted))[:2]
        where = rng.choice(sorted(set(self.moments(kind))))
        number = rng.randint(1, max(1, self.moments(kind).count(where)//2))
        return attempt(self.folder, name, *self.work, kind, where, number)[:2]

    def round(self):
        """One study, started until it is done, compared with the one that nothing happened to."""
        name, self.rounds = f'r{self.rounds}', self.rounds + 1
        while (result := self.next_attempt(name))[0] != 0:
            status, told = result
            if status != -signal.SIGKILL:
                self.problems.append(f'{name}: exit {status}: {self.said()[-2000:]}')
                break
            self.done.append(told[-1] if told else 'time')
        found = self.folder/name/f'{name}_LAD_42_bert_toy'
        for f in FILES:
            if not (found/f).is_file() or (found/f).read_bytes() != (self.whole/f).read_bytes():
                self.problems.append(f'{name}: {f} differs after {self.done}')

    def check_results(self):
        """One line for each study, with the same scores."""
        runs = [r for r in read_results(self.folder/'.results') if r['stage'] == 'run'] # not the teacher's
        lines = {r['study']: r['scores'] for r in runs}
        names = {'whole', *(f'r{i}' for i in range(self.rounds))}
        if len(runs) != self.rounds + 1 or set(lines) != names or len({str(s) for s in lines.values()}) > 1:
            self.problems.append(f'the table of results: {lines}')


def main(folder, model, updates, kills, seed):
    trials = Trials(Path(folder), model, updates, kills, seed)
    while len(trials.done) < kills and not trials.problems: trials.round()
    trials.check_results()
    moments = {m: trials.done.count(m) for m in sorted(set(trials.done))}
    print(json.dumps(dict(kills=len(trials.done), rounds=trials.rounds, moments=moments,
                          problems=trials.problems, seconds=round(trials.lasted, 1))))


if __name__ == '__main__': main(*sys.argv[1:3], *map(int, sys.argv[3:6]))
