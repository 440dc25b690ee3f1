"""Commands that are sent signals at random moments, and started again with --resume until they are done.

python signalled.py FOLDER MODEL UPDATES SIGNALS SEED: works in FOLDER, with the tiny model in MODEL; prints
JSON. Processes are forked, so that a start costs no imports.
"""
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
        if moment: strike(moment, signals)
        sys.argv[1:] = words
        sys.exit(lad_nb_main())
    if after is not None:
        gone = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while time.monotonic() < started + after and os.waitid(os.P_PID, pid, gone) is None: time.sleep(.002)
        for s in signals: os.kill(pid, s)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, said.read_text(), time.monotonic() - started


MOMENTS = ['time', 'time', 'recipe.json', 'checkpoint-', '.writing', '.final', 'README.md']


def wrong(status, said, signals):
    """What is wrong with how a command ended; None if nothing is."""
    if 'Traceback' in said or 'Exception ignored' in said: return 'a traceback'
    lines = [line for line in said.splitlines() if line.startswith('lad-nb: ')]
    if status == 0: return 'a line, and exit 0' if lines else None
    if status not in [128 + s for s in signals]: return f'exit {status}'
    if len(lines) != 1 or '--resume' not in lines[0]: return f'lines: {lines}'


def main(folder, model, updates, wanted, seed):
    folder, rng = Path(folder), random.Random(seed)
    status, said, lasted = attempt(folder, argv(folder, 'whole', model, updates, False))
    assert status == 0, said
    lasted = attempt(folder, argv(folder, "warm", model, updates, False))[2]
    sent, problems, rounds, told = 0, [], 0, {}
    while sent < wanted:
        name, rounds, status, words = f'r{rounds}', rounds + 1, None, ()
        while status != 0:
            moment = rng.choice(MOMENTS) if sent < wanted else None
            signals = [rng.choice(ENDS)] if rng.random() < .7 else [rng.choice(ENDS) for _ in range(3)]
            words = argv(folder, name, model, updates, True)
            if moment is None: status, said, took = attempt(folder, words)
            elif moment == 'time':
                status, said, took = attempt(folder, words, rng.uniform(0, 1.1*lasted), signals)
            else: status, said, took = attempt(folder, words, None, signals, moment)
            if moment: sent += 1
            what = wrong(status, said, signals)
            key = f"{moment} {'+'.join(signal.Signals(s).name for s in signals)} -> {status}"
            told[key] = told.get(key, 0) + 1
            if what: problems.append(f'{name}: {key}: {what}: {said[-1500:]}')
            if len(problems) > 30: break
        if len(problems) > 30: break
        for f in FILES:
            a, b = (folder/f'{n}_bert_toy'/f for n in (name, 'whole'))
            if not a.is_file() or a.read_bytes() != b.read_bytes(): problems.append(f'{name}: {f} differs')
    print(json.dumps(dict(signals=sent, rounds=rounds, told=told, problems=problems, seconds=round(lasted, 1))))


if __name__ == '__main__': main(*sys.argv[1:3], *map(int, sys.argv[3:6]))
