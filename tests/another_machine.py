"""What another machine does on a file system that passes no locks on: it sees none of ours, nor we its.

python another_machine.py FOLDER: has the folder until a line comes in.
python another_machine.py FOLDER MODEL NAME UPDATES: works on the study of two_processes.py, in FOLDER.
"""
import fcntl
import socket
import sys
from pathlib import Path

from lad_nb import leases


def main(folder, model=None, name='node17', updates=0):
    fcntl.flock = lambda *_: None  # the lock is had, and nobody else knows
    socket.gethostname, leases.LEASE = lambda: name, 2.
    if model:
        import two_processes
        return two_processes.main(folder, model, 1, updates)
    with leases.hold_folder(Path(folder)):
        print('has it', flush=True)
        sys.stdin.readline()


if __name__ == '__main__':
    main(*sys.argv[1:])
