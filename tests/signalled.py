"""Commands that are sent signals at random moments, and started again with --resume until they are done.

python signalled.py FOLDER MODEL UPDATES SIGNALS SEED: works in FOLDER, with the tiny model in MODEL; prints
JSON. Processes are forked, so that a start costs no imports.
"""
import atexit
import gc
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import lad_nb.cli
import lad_nb.experiment  # noqa: F401
from lad_nb.__main__ import main as lad_nb_main

FILES = ('model.safetensors', 'gates.safetensors', 'log.jsonl')
ENDS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
FLAGS = ('--task toy --num_hidden_layers 2 --train_size 160 --max_seq_len 32 --batch_size 16 --warmup_step 1 '
         '--ckpt_step 5 --log_step 3 --device_id -1 --fast --precision fp32')


def argv(folder, name, model, updates, resume):
    flags = f'run_lad_distil --experiment {name} --teacher {model} --ptrain_ver {model} {FLAGS}'
    flags += f' --total_step {updates} --root {folder}'
    return flags.split() + ['--resume']*resume


def strike(moment, signals):
    """Send signals to this very process when it first does what `moment` names, as an audit event sees it."""
    left = list(signals)
    def look(event, args):
        if left and event in ('open', 'os.rename') and moment in str(args[0]):
            sent = [left.pop(0) for _ in signals]
            for s in sent: os.kill(os.getpid(), s)
    sys.addaudithook(look)


def attempt(folder, words, after=None, signals=(), moment=None):
    """One command: its exit status, what it said on stderr, and how long it took."""
    said, started, pid = folder/'said.txt', time.monotonic(), os.fork()
    if pid == 0:
        for s in ENDS: signal.signal(s, signal.default_int_handler if s == signal.SIGINT else signal.SIG_DFL)
        log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if moment == LAST: atexit.register(lambda: [os.kill(os.getpid(), s) for s in signals])
        elif moment: strike(moment, signals)
        sys.argv[1:] = words
        sys.exit(lad_nb_main())
    if after is not None:
        gone = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while time.monotonic() < started + after and os.waitid(os.P_PID, pid, gone) is None: time.sleep(.002)
        for s in signals: os.kill(pid, s)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, said.read_text(), time.monotonic() - started


MOMENTS = ['recipe.json', 'checkpoint-5', 'time', '.writing', '.final', 'README.md']
LAST = 'as Python ends'


def wrong(status, said, signals, early=False):
    """What is wrong with how a command ended; None if nothing is. For one that is done they come too late.

    `early`: perhaps while it starts, when there is no run yet to go on with.
    """
    if 'Traceback' in said or 'Exception ignored' in said: return 'a traceback'
    lines = [line for line in said.splitlines() if line.startswith('lad-nb: ')]
    if status == 0: return 'a line, and exit 0' if lines else None
    if status not in [128 + s for s in signals]: return f'exit {status}'
    if len(lines) != 1 or not (early or '--resume' in lines[0]): return f'lines: {lines}'


class Trials:
    """Commands, each sent signals, until so many have ended by them."""
    def __init__(self, folder, model, updates, wanted, seed):
        self.folder, self.work, self.wanted, self.rng = folder, (model, updates), wanted, random.Random(seed)
        self.ended, self.problems, self.rounds, self.three = [], [], 0, 0
        status, said, took = self.attempt('whole')
        assert status == 0, said
        self.lasted = took/2 # the first one takes longer than the others will

    def attempt(self, name, *how, resume=False):
        return attempt(self.folder, argv(self.folder, name, *self.work, resume), *how)

    def signals(self):
        """One; of three, three in a row."""
        return [self.rng.choice(ENDS) for _ in range(1 if self.rng.random() < .7 else 3)]

    def round(self):
        """One run, started until it is done, compared with the one that nothing happened to."""
        name, self.rounds, status, moments = f'r{self.rounds}', self.rounds + 1, None, list(MOMENTS)
        while status != 0:
            moment = moments.pop(0) if moments and len(self.ended) < self.wanted else LAST
            signals = self.signals()
            after = self.rng.uniform(0, .8*self.lasted) if moment == 'time' else None
            by_itself = moment if moment != 'time' else None
            status, said, _ = self.attempt(name, after, signals, by_itself, resume=True)
            if status != 0: self.ended.append(f'{moment} {signal.Signals(status - 128).name}'
                                              if 128 < status < 160 else f'{moment} {status}')
            if status != 0: self.three += len(signals) == 3
            if what := wrong(status, said, signals, early=moment == 'time'):
                self.problems.append(f'{name}: {moment}, {signals}: {what}: {said[-1500:]}')
            if len(self.problems) > 9 or status not in (0, 129, 130, 143): break
        found, whole = (self.folder/f'{n}_bert_toy' for n in (name, 'whole'))
        for f in FILES:
            if not (found/f).is_file() or (found/f).read_bytes() != (whole/f).read_bytes():
                self.problems.append(f'{name}: {f} differs after {self.ended}')


def main(folder, model, updates, wanted, seed):
    gc.collect()
    gc.freeze()
    trials = Trials(Path(folder), model, updates, wanted, seed)
    while len(trials.ended) < wanted and not trials.problems: trials.round()
    moments = {m: trials.ended.count(m) for m in sorted(set(trials.ended))}
    print(json.dumps(dict(ended=len(trials.ended), rounds=trials.rounds, three_in_a_row=trials.three,
                          moments=moments, problems=trials.problems, seconds=round(trials.lasted, 1))))


if __name__ == '__main__': main(*sys.argv[1:3], *map(int, sys.argv[3:6]))
