"""Starts a study in processes of its own, kills each at a random moment, starts the next one, and says what
came of it. The whole way: a teacher, its cache, a run, its scores and snapshots, a line of results, a card.

python killed.py FOLDER MODEL UPDATES KILLS SEED: works in FOLDER, with the tiny model in MODEL; prints JSON.
After LAD_NB_MINUTES it begins no other study, and says how far it came.
Processes are forked, so that a start costs no imports.
"""
import json
import os
import random
import signal
import sys
import time
import traceback
from itertools import zip_longest
from pathlib import Path

import lad_nb.cache
import lad_nb.durable
import lad_nb.jobs
from lad_nb.card import PICTURE, card
from lad_nb.recipes import FAST, Recipe
from lad_nb.results import read_results
from lad_nb.study import Study, run_study

FILES = ('model.safetensors', 'gates.safetensors', 'log.jsonl', PICTURE, 'README.md')
SNAPSHOTS = ('agreement', 'gates_content')
EVENTS = ('open', 'os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'os.truncate', 'shutil.rmtree')
PLACES = {'teacher_cache': 'cache', 'teacher_bert': 'teacher', 'README.md': 'card', PICTURE: 'card',
          'snapshot': 'snapshot', 'runs.jsonl': 'results', '.results': 'results', 'log.jsonl': 'log',
          'checkpoint-': 'checkpoint', '.writing': 'checkpoint', '.removing': 'pruning',
          'tensorboard': 'tensorboard', '.final': 'final'}


def study(name, model, updates):
    few = dict(task='toy', train_size=160, max_seq_len=32, batch_size=16, ckpt_step=5, log_step=3,
               device_id=-1)
    fast = few | FAST | dict(precision='fp32')
    recipe = Recipe(name, num_hidden_layers=2, ptrain_ver=model, total_step=updates, warmup_step=6,
                    lr=1e-3, gate_lr=1e-3, **fast)
    teacher = Recipe('teacher', method='fine_tune', ptrain_ver=model, total_step=10, warmup_step=1, **few)
    return Study(name, recipe, snapshots=SNAPSHOTS, seeds=(42,), teachers=dict(toy=teacher),
                 tasks=dict(toy={}), methods=dict(LAD=dict(method='lad')))


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
    take = lad_nb.jobs.snapshot
    def snapshot(*what):
        for moment in (lambda: None, lambda: take(*what)): # before it is taken, and after
            found = moment()
            if end('snapshot', 'taken'): kill_myself()
        return found
    lad_nb.jobs.snapshot = snapshot


def run_folder(folder, name): return folder/name/f'{name}_LAD_42_bert_toy'


def child(folder, name, model, updates, pipe, kind, where, number):
    """One process: works until it is done or dead."""
    log = os.open(folder/'said.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if kind != 'time': watch(folder, End(pipe, kind, where, number))
    random.seed(number)
    try:
        run_study(study(name, model, updates), folder/name, folder/'.results')
        card(run_folder(folder, name), device_id=-1)
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


def files(folder, name):
    """The bytes of what a study leaves: of the card, all but the run's own name."""
    found = {f: p.read_bytes() if (p := run_folder(folder, name)/f).is_file() else b'' for f in FILES}
    return found | {'README.md': found['README.md'].replace(name.encode() + b'_LAD', b'_LAD')}


class Trials:
    """Rounds of attempts, each killed at another moment, until so many have been."""
    def __init__(self, folder, model, updates, kills, seed):
        self.folder, self.work, self.kills, self.rng = folder, (model, updates), kills, random.Random(seed)
        self.done, self.problems, self.rounds, self.lost = [], [], 0, 0
        status, self.trace, self.lasted = attempt(folder, 'whole', *self.work)
        assert status == 0, self.said()
        self.whole = files(folder, 'whole')
        card(run_folder(folder, 'whole'), device_id=-1) # what that imports, no process need import again
        if files(folder, 'whole') != self.whole:
            self.problems.append('a card that is written anew is another')

    def said(self): return (self.folder/'said.txt').read_text()

    def moments(self, kind):
        """Where an attempt of this kind can die, once for each time that it could."""
        return [t.split(' ', 1)[1] for t in self.trace if t.startswith('torn ') == (kind == 'torn')]

    def ahead(self, moments, reached):
        """Places of some moments that are not all over where the last process died: the nearer half."""
        places = [t.split(' ', 1)[1] for t in self.trace]
        left = places[places.index(reached) if reached in places else 0:]
        found = [place for place in dict.fromkeys(left) if place in moments]
        return found[:len(found)//2 + 1]

    def next_attempt(self, name, reached):
        """The exit status of one more process, and what it told; it dies where the last one did, or later."""
        rng = self.rng
        kind = rng.choice(['time', 'file', 'torn'] * 2 + [None]) if len(self.done) < self.kills else None
        if kind is None: return attempt(self.folder, name, *self.work)[:2]
        if kind == 'time':
            return attempt(self.folder, name, *self.work, 'time', after=rng.uniform(0, .5*self.lasted))[:2]
        moments = self.moments(kind)
        where = rng.choice(self.ahead(moments, reached) or sorted(set(moments)))
        number = rng.randint(1, max(1, moments.count(where)//2))
        return attempt(self.folder, name, *self.work, kind, where, number)[:2]

    def round(self):
        """One study, started until it is done, compared with the one that nothing happened to."""
        name, self.rounds = f'r{self.rounds}', self.rounds + 1
        reached = None
        while (result := self.next_attempt(name, reached))[0] != 0:
            status, told = result
            if status != -signal.SIGKILL:
                self.problems.append(f'{name}: exit {status}: {self.said()[-2000:]}')
                break
            self.done.append(told[-1] if told else 'time')
            if told: reached = told[-1].split(' ', 1)[1]
        found = files(self.folder, name)
        for f, whole in self.whole.items():
            self.lost += (differ := sum(a != b for a, b in zip_longest(found[f], whole)))
            if differ: self.problems.append(f'{name}: {differ} bytes of {f} differ after {self.done}')

    def check_results(self):
        """One line for each study, with the same scores and snapshots."""
        runs = [r for r in read_results(self.folder/'.results') if r['stage'] == 'run'] # not the teacher's
        lines = {r['study']: (r['scores'], r['snapshots']) for r in runs}
        names = {'whole', *(f'r{i}' for i in range(self.rounds))}
        self.lines_lost = len(names - lines.keys())
        if len(runs) != self.rounds + 1 or set(lines) != names or len({str(s) for s in lines.values()}) > 1:
            self.problems.append(f'the table of results: {lines}')
        if not all(set(snapshots) == set(SNAPSHOTS) for _, snapshots in lines.values()):
            self.problems.append(f'snapshots are missing: {lines}')


def main(folder, model, updates, kills, seed):
    trials, stopped = Trials(Path(folder), model, updates, kills, seed), False
    end = time.monotonic() + 60*float(os.environ.get('LAD_NB_MINUTES') or 'inf')
    while len(trials.done) < kills and not trials.problems and not stopped:
        trials.round()
        print(f'{len(trials.done)} kills in {trials.rounds} studies', flush=True)
        stopped = time.monotonic() > end
    trials.check_results()
    moments = {m: trials.done.count(m) for m in sorted(set(trials.done))}
    print(json.dumps(dict(seed=seed, stopped=stopped, kills=len(trials.done), rounds=trials.rounds,
                          moments=moments, lost=dict(bytes=trials.lost, results=trials.lines_lost),
                          problems=trials.problems, seconds=round(trials.lasted, 1))))


if __name__ == '__main__': main(*sys.argv[1:3], *map(int, sys.argv[3:6]))
