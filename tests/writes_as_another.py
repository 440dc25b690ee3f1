"""Four ways to write to a run folder of another user, who allows reading only. Prints what each is told.

python writes_as_another.py RUN: as root, which gives its rights away first.
"""
import os
import sys

from lad_nb.durable import append_line, lock_folder, write_text

run = sys.argv[1]
os.setgid(65534)
os.setuid(65534)
for deed in (lambda: append_line(f'{run}/log.jsonl', dict(step=1)),
             lambda: write_text(f'{run}/recipe.json', 'mine'),
             lambda: lock_folder(run).__enter__(),
             lambda: lock_folder(f'{run}/new').__enter__()):
    try: deed()
    except PermissionError as e: print(e)
