"""A study of four short runs, to be killed, or to be started twice at once.

python two_processes.py FOLDER MODEL PROCESSES UPDATES: works in FOLDER, with the tiny model in MODEL.

A worker imports this script before anything else, so what takes time is imported in functions.
"""

import sys
from pathlib import Path


def study(model, updates):
    from lad_nb.recipes import FAST, Recipe
    from lad_nb.study import Study
    few = dict(task='toy', train_size=160, max_seq_len=32, batch_size=16, ckpt_step=10, log_step=5,
               device_id=-1, ptrain_ver=str(model))
    fast = FAST | dict(precision='fp32')
    student = Recipe('two', num_hidden_layers=2, total_step=updates, warmup_step=6, lr=1e-3, gate_lr=1e-3,
                     **few | fast)
    teacher = Recipe('teacher', method='fine_tune', total_step=10, warmup_step=1, **few)
    return Study('two', student, teachers=dict(toy=teacher), tasks=dict(toy={}),
                 methods=dict(LAD=dict(method='lad'), KD=dict(method='kd')), seeds=(42, 43), snapshots=())


def main(folder, model, processes, updates):
    from lad_nb.study import run_study
    folder, say = Path(folder), lambda line: print(line, flush=True)
    run_study(study(model, int(updates)), folder/'experiments', folder/'results', processes=int(processes),
              threads=1, say=say)


if __name__ == '__main__':
    main(*sys.argv[1:])
