# Cells of the notebook that test_browser.py runs; they read steps.json, which has a recipe and a root.
import json
import time
import warnings

import numpy as np
from lad_nb.experiment import run
from lad_nb.panel import LiveView, panel as show_panel
from lad_nb.recipes import recipe_from_dict
from lad_nb.records import Reader
from lad_nb.stepper import Stepper, TellUpdates

warnings.filterwarnings('ignore', message='.*no better than chance') # four updates teach a teacher nothing
with open('steps.json') as f: said = json.load(f)
recipe, root = recipe_from_dict(said['recipe']), said['root']

watched = Stepper(recipe.replace(experiment='watched'), root)
free = Stepper(recipe.replace(experiment='unwatched'), root)
for callback in (Reader, TellUpdates): free.trainer.remove_callback(callback) # nothing but the place to wait
panel = show_panel(watched)
panel
# %%
def timed(stepper, n=20):
    "Seconds of the clock, and of this process' work: other processes disturb the first"
    start = time.perf_counter(), time.process_time()
    stepper.step(n)
    return time.perf_counter() - start[0], time.process_time() - start[1]

watched.step(4), free.step(4)
times = np.array([(timed(watched), timed(free)) for _ in range(8)]) # pairs, watched and free, clock and work
free.stop()
overhead, pairs = times[:, 0].sum(0)/times[:, 1].sum(0) - 1, times[:, 0, 1]/times[:, 1, 1] - 1
print('overhead', *overhead.round(4), pairs.round(3).tolist())
# %%
live, start = LiveView(every=10), time.perf_counter()
longer = recipe.replace(experiment='live', total_step=120, warmup_step=10)
run(longer, root, progress=False, callbacks=[live])
print('live', round(live.spent/(time.perf_counter() - start), 4), len(live.history))
