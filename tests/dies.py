"""A run that dies at the start of an update, as if killed.

python dies.py ROOT RECIPE STEP: runs the recipe, which is JSON, in the folder ROOT; dies after STEP updates.
"""
import json
import os
import sys

from transformers import TrainerCallback

from lad_nb.experiment import run
from lad_nb.recipes import recipe_from_dict


class Die(TrainerCallback):
    def __init__(self, step): self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step: os._exit(9)


if __name__ == '__main__':
    root, recipe, step = sys.argv[1:]
    run(recipe_from_dict(json.loads(recipe)), root, progress=False, callbacks=[Die(int(step))])
