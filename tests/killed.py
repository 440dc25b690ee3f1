"""Starts a study in processes of its own, kills each at a random moment, starts the next one, and says what came of it.

python killed.py FOLDER MODEL UPDATES KILLS SEED: works in FOLDER, with the tiny model in MODEL; prints JSON. Processes are forked, so that a start costs no imports.
"""
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import lad_nb.cache
import lad_nb.durable
from lad_nb.recipes import FAST, Recipe
from lad_nb.study import Study, run_study
from lad_nb.results import read_results

FILES = ('model.safetensors', 'gates.safetensors', 'log.jsonl')
EVENTS = ('open', 'os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'os.truncate', 'shutil.rmtree')


def study(name, model, updates):
    few = dict(task='toy', train_size=160, max_seq_len=32, batch_size=16, ckpt_step=5, log_step=3, device_id=-1)
    return Study(name, Recipe(name, num_hidden_layers=2, ptrain_ver=model, total_step=updates, warmup_step=6, lr=1e-3, gate_lr=1e-3, **few | FAST | dict(precision='fp32')), snapshots=(), seeds=(42,),
                 teachers=dict(toy=Recipe('teacher', method='fine_tune', ptrain_ver=model, total_step=10, warmup_step=1, **few)), tasks=dict(toy={}), methods=dict(LAD=dict(method='lad')))


def place(path):
    return next((name for part, name in (('teacher_cache', 'cache'), ('runs.jsonl', 'results'), ('.results', 'results'), ('log.jsonl', 'log'), ('checkpoint-', 'checkpoint'), ('.writing', 'checkpoint'),
                                         ('.removing', 'pruning'), ('tensorboard', 'tensorboard'), ('.final', 'final')) if part in path), 'run folder')


class Torn:
    """A file that writes half of what it is given, and is then no more."""
    def __init__(self, file, end): self.file, self.end = file, end
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()
    def write(self, text):
        if self.end(self.file.name): self.file.write(text[:random.randrange(len(text))]); self.file.flush(); os.kill(os.getpid(), signal.SIGKILL)
        return self.file.write(text)


def child(folder, name, model, updates, pipe, kind, where, number):
    """One process: works until it is done or dead; tells which files it touches, and at which it dies."""
    log = os.open(folder/'said.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1); os.dup2(log, 2)
    count = [0]
    def end(path, event='torn'):
        here = place(str(path))
        if kind is None: os.write(pipe, f'{event} {here}\n'.encode())
        if (kind == 'torn') != (event == 'torn') or here != where: return False
        count[0] += 1
        if count[0] < number: return False
        os.write(pipe, f'{event} {here}\n'.encode())
        return True
    def look(event, args):
        if event not in EVENTS or not args or not str(args[0]).startswith(str(folder)) or event == 'open' and not (isinstance(args[1], str) and set(args[1]) & set('wax+') or args[2] & os.O_CREAT): return
        if end(args[0], event): os.kill(os.getpid(), signal.SIGKILL)
    if kind != 'time':
        sys.addaudithook(look)
        for module in (lad_nb.durable, lad_nb.cache): module.open = lambda path, mode='r', **k: Torn(open(path, mode, **k), end) if set(mode) & set('wax') else open(path, mode, **k)
    random.seed(number)
    try: run_study(study(name, model, updates), folder/name, folder/'.results')
    except BaseException:
        import traceback
        traceback.print_exc(); os._exit(1)
    os._exit(0)


def attempt(folder, name, model, updates, kind=None, where=None, number=0, after=None):
    """Its exit status, what it told, and how long it took."""
    read, write = os.pipe()
    started, pid = time.monotonic(), os.fork()
    if pid == 0: os.close(read); child(folder, name, model, updates, write, kind, where, number)
    os.close(write)
    if after is not None:
        while time.monotonic() < started + after and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None: time.sleep(.002)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(read) as f: told = f.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), told, time.monotonic() - started


def main(folder, model, updates, kills, seed):
    folder, rng = Path(folder), random.Random(seed)
    status, trace, lasted = attempt(folder, 'whole', model, updates)
    assert status == 0, (folder/'said.txt').read_text()
    whole = folder/'whole'/'whole_LAD_42_bert_toy'
    moments = {kind: sorted({t.split(' ', 1)[1] for t in trace if t.startswith('torn ') == (kind == 'torn')}) for kind in ('file', 'torn')}
    done, problems, rounds = [], [], 0
    while len(done) < kills:
        name, rounds = f'r{rounds}', rounds + 1
        while True:
            kind = rng.choice(['time', 'file', 'torn']) if len(done) < kills else None
            if kind == 'time': status, told, _ = attempt(folder, name, model, updates, 'time', after=rng.uniform(0, .7*lasted))
            elif kind:
                where = rng.choice(moments[kind])
                there = sum(t.split(' ', 1)[1] == where and t.startswith('torn ') == (kind == 'torn') for t in trace)
                status, told, _ = attempt(folder, name, model, updates, kind, where, rng.randint(1, max(1, there//2)))
            else: status, told, _ = attempt(folder, name, model, updates)
            if status == 0: break
            if status != -signal.SIGKILL: problems.append(f"{name}: exit {status}: {(folder/'said.txt').read_text()[-2000:]}"); break
            done.append(told[-1] if told else 'time')
        found = folder/name/f'{name}_LAD_42_bert_toy'
        problems += [f'{name}: {f} differs after {done}' for f in FILES if not (found/f).is_file() or (found/f).read_bytes() != (whole/f).read_bytes()]
        if problems: break
    runs = [l for l in read_results(folder/'.results') if l['stage'] == 'run']  # the teacher's scores are a line as well
    lines = {l['study']: l['scores'] for l in runs}
    if len(runs) != rounds + 1 or set(lines) != {'whole', *(f'r{i}' for i in range(rounds))} or len({str(s) for s in lines.values()}) > 1: problems.append(f'the table of results: {lines}')
    print(json.dumps(dict(kills=len(done), rounds=rounds, moments={m: done.count(m) for m in sorted(set(done))}, problems=problems, seconds=round(lasted, 1))))


if __name__ == '__main__': main(*sys.argv[1:3], *map(int, sys.argv[3:6]))
