"""Two thousand updates with scores, pages and a card: memory stays flat, file handles are given back, old
checkpoints go."""
import gc
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import psutil
import pytest
from transformers import TrainerCallback

from lad_nb.card import card
from lad_nb.recipes import FAST
from lad_nb.runs import checkpoints, read_log
from lad_nb.stepper import Stepper

pytestmark = pytest.mark.faults
WARM_UP, BOUND = 400, 2048 # updates; bytes per update: over the 1,155 of the run book, less than 2.4 MB
PROCESS = psutil.Process()


def now(): return PROCESS.memory_info().rss, PROCESS.num_fds(), PROCESS.num_threads()


class Watch(TrainerCallback):
    """Memory, file handles and threads every few updates."""
    def __init__(self, every): self.every, self.seen = every, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0: self.seen.append((state.global_step, *now()))


def held_and_watched(recipe, root, page, every):
    """The run in a Stepper, which every so often writes its page; what was seen."""
    watch = Watch(every//10)
    with Stepper(recipe, root) as stepper:
        stepper.trainer.add_callback(watch)
        while not stepper.over:
            stepper.step(every)
            stepper.save_html(page)
            gc.collect()
    assert stepper.state == 'done'
    return stepper.folder, watch.seen


def cards_written(folder, times):
    """A card written anew so many times; memory and handles after each."""
    seen = []
    for _ in range(times):
        card(folder, device_id=-1)
        gc.collect()
        seen.append(now())
    return np.array(seen).T


def held_and_carded(recipe, root, page, every, times):
    """Both, one after the other."""
    folder, seen = held_and_watched(recipe, root, page, every)
    return folder, seen, cards_written(folder, times)


def alone(function, *args):
    """What comes of a function in a process that has done nothing before: what other tests gave back of their
    memory would be taken there, and look like growth."""
    with ProcessPoolExecutor(1, get_context('spawn')) as pool: return pool.submit(function, *args).result()


@pytest.mark.slow
@pytest.mark.parametrize('updates', [60, 2000])
def test_many_updates(quick, tmp_path, counted, updates):
    """Scored, saved and written as a page ten times in the long form; at the end, cards."""
    every, long = max(updates//10, 20), updates > WARM_UP
    recipe = quick.replace(**FAST).replace(precision='fp32', total_step=updates, warmup_step=5, keep_ckpt=3,
                                           train_size=1600, ckpt_step=every//2, eval_step=every,
                                           log_step=every//4)
    page = tmp_path/'session.html'
    folder, seen, carded = alone(held_and_carded, recipe, tmp_path, page, every, 6 if long else 2)
    ends = [updates - every, updates - every//2, updates]
    scored = [json.loads(line) for line in (folder/'log.jsonl').read_text().splitlines() if 'eval_' in line]
    assert list(checkpoints(folder)) == ends and len(read_log(folder)) >= updates//(every//4)
    assert len(scored) == updates//every and '<svg' in page.read_text()
    step, rss, handles, threads = np.array([s for s in seen if s[0] > updates//5]).T
    slope = np.polyfit(step, rss, 1)[0]
    memory, after, _ = carded
    print(f'{slope:.0f} bytes of memory per update over {len(step)} samples, update {step[0]} to {step[-1]} '
          f'(RSS {rss.min()/1e6:.1f} to {rss.max()/1e6:.1f} MB); {handles.min()} to {handles.max()} file '
          f'handles, {threads.min()} to {threads.max()} threads; cards: {memory/1e6} MB, {after} handles')
    assert handles.max() - handles.min() <= 2 and handles[-1] <= handles[0] + 1
    assert threads.max() == threads.min() and after[-1] <= after[0]
    counted(updates=updates, scores=len(scored), pages=updates//every, cards=len(memory),
            handles_lost=max(int(handles[-1] - handles[0]), 0))
    if not long: return
    assert slope < BOUND and memory[-1] - memory[2] < 8e6
    counted(bytes_an_update=round(slope), rss_from_mb=round(rss.min()/1e6), rss_to_mb=round(rss.max()/1e6))
