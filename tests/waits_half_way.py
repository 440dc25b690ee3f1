"""A run that waits before its fourth update until its standard input is closed.

python waits_half_way.py ROOT RECIPE: trains the recipe (JSON) in ROOT, and says 'half way' when it waits.
"""
import json
import sys

from transformers import TrainerCallback

from lad_nb.experiment import run
from lad_nb.recipes import recipe_from_dict


class Wait(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            print('half way', flush=True)
            sys.stdin.read()


run(recipe_from_dict(json.loads(sys.argv[2])), sys.argv[1], progress=False, callbacks=[Wait()])
