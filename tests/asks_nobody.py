"""Imports, a run, its scores and a rerun, while every look-up of a name and every connection is printed.

python asks_nobody.py ROOT RECIPE: runs the recipe (JSON) in ROOT. The last connection is the program's own,
which shows that the watch works.
"""
import json
import socket
import sys

CONNECTING = 'socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.sendto'


def watch(event, args):
    if event in CONNECTING:
        print('asked:', event, args[1:] if event == 'socket.connect' else args, flush=True)


sys.addaudithook(watch)

import lad_nb.cli, lad_nb.interchange, lad_nb.panel, lad_nb.study # noqa: E402, E401, F401
from lad_nb.evaluation import evaluate # noqa: E402
from lad_nb.experiment import open_run, rerun, run # noqa: E402
from lad_nb.recipes import recipe_from_dict # noqa: E402

folder = run(recipe_from_dict(json.loads(sys.argv[2])), sys.argv[1], progress=False)
evaluate(folder, 'toy', max_seq_len=32, device_id=-1)
open_run(folder)
rerun(folder, progress=False)
try: socket.create_connection(('127.0.0.1', 9), timeout=1)
except OSError: pass
