"""A run that is killed in the middle of a checkpoint.

python dies_while_saving.py ROOT RECIPE MOMENT: trains the recipe (JSON) in ROOT, and dies at its checkpoint
of update 4 where MOMENT would be called: a method of transformers' Trainer, or os.replace.
"""
import json
import os
import signal
import sys

from transformers import Trainer

from lad_nb.experiment import run
from lad_nb.recipes import recipe_from_dict

root, recipe, moment = sys.argv[1:]
where, name = dict(os=os, Trainer=Trainer)[moment.partition('.')[0]], moment.partition('.')[2]
before = getattr(where, name)


def die(*args, **kwargs):
    here = 'checkpoint-4' in str(args) if where is os else args[0].state.global_step == 4
    if here: os.kill(os.getpid(), signal.SIGKILL)
    return before(*args, **kwargs)


setattr(where, name, die)
run(recipe_from_dict(json.loads(recipe)), root, progress=False)
