"""Opens a Stepper: python open_stepper.py RECIPE ROOT [resume], where RECIPE is a JSON file.

`%run` in IPython leaves it behind as `stepper`.
"""
import json
import sys
from pathlib import Path

from lad_nb.recipes import recipe_from_dict
from lad_nb.stepper import Stepper

recipe, root, *resume = sys.argv[1:]
stepper = Stepper(recipe_from_dict(json.loads(Path(recipe).read_text())), root, resume=bool(resume))
