"""Two thousand updates: memory stays flat, file handles are given back, old checkpoints go."""
import gc

import numpy as np
import psutil
import pytest
from transformers import TrainerCallback

from lad_nb.evaluation import evaluate
from lad_nb.experiment import run
from lad_nb.recipes import FAST
from lad_nb.runs import checkpoints, read_log

pytestmark = [pytest.mark.faults, pytest.mark.slow]
WARM_UP, BOUND = 400, 2048 # updates; bytes per update: over the 1,155 of the run book, less than 2.4 MB


class Watch(TrainerCallback):
    """Memory and file handles every 20 updates; scores of every second checkpoint."""
    def __init__(self): self.seen, self.scores, self.process = [], {}, psutil.Process()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 20: return
        memory = self.process.memory_info().rss
        self.seen.append((state.global_step, memory, self.process.num_fds(), self.process.num_threads()))

    def on_save(self, args, state, control, **kwargs):
        step = state.global_step
        if step % 200: return
        found = evaluate(f'{args.output_dir}/checkpoint-{step}', 'toy', max_seq_len=32, device_id=-1)
        self.scores[step] = found['accuracy']
        gc.collect()


def test_two_thousand_updates(quick, tmp_path):
    watch = Watch()
    long = dict(precision='fp32', total_step=2000, warmup_step=100, train_size=1600, ckpt_step=100,
                keep_ckpt=3, log_step=50)
    recipe = quick.replace(**FAST).replace(**long)
    folder = run(recipe, tmp_path, progress=False, callbacks=[watch])
    assert list(checkpoints(folder)) == [1800, 1900, 2000]
    assert len(watch.scores) == 10 and len(read_log(folder)) == 40
    step, rss, handles, threads = np.array([s for s in watch.seen if s[0] > WARM_UP]).T
    slope = np.polyfit(step, rss, 1)[0]
    print(f'{slope:.0f} bytes of memory per update over {len(step)} samples, update {step[0]} to {step[-1]} '
          f'(RSS {rss.min()/1e6:.1f} to {rss.max()/1e6:.1f} MB); '
          f'{handles.min()} to {handles.max()} file handles, {threads.min()} to {threads.max()} threads')
    assert slope < BOUND
    assert handles.max() - handles.min() <= 2 and handles[-1] <= handles[0] + 1
