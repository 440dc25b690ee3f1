"""Distil SST-2 with all of its labels, with half of them, and with none.

    OMP_NUM_THREADS=1 python tools/half_labels.py ROOT [--lr 9e-4]

A teacher of 6 layers (all-minilm-l6-v2, fine-tuned here) teaches students of 3 by LAD, in the settings of
nbs/analyses (8,000 rows, 500 updates, the learning rate that LAD was tuned to). Half of the labels are
deleted by a seeded draw. Two more students say what that is worth: one without any label (hard_weight 0),
and one that never saw the rows whose labels are gone. One seed, dev accuracy of the end. ROOT keeps the
runs: the same command goes on where it stopped. A run that is done is a line of
ROOT/half_of_the_labels.jsonl, which nbs/analyses/half_of_the_labels.ipynb reads from nbs/analyses/results.
"""

import argparse
import json
import random
import time
from pathlib import Path

import pandas as pd
from lad_nb.data import load_task
from lad_nb.durable import append_line
from lad_nb.evaluation import evaluate
from lad_nb.experiment import run
from lad_nb.runs import code_version
from lad_nb.section5 import section5

SEED = 0  # of the draw of labels that are deleted


def without(labels, n):
    """Labels, n of which are None: drawn with SEED."""
    gone = set(random.Random(SEED).sample(range(len(labels)), n))
    return [None if i in gone else y for i, y in enumerate(labels)]


def variants(size):
    """{name: (training rows, changes to the recipe)}: the same sentences, with so many of their labels."""
    rows = load_task('sst2', 'train', size=size)
    texts, labels = list(rows['sentence1']), list(rows['label'])
    table = pd.DataFrame(dict(sentence=texts, label=pd.Series(labels, dtype=object)))
    half = table.assign(label=pd.Series(without(labels, size//2), dtype=object))
    return {'all labels': (table, {}),
            'half of the labels': (half, {}),
            'no labels': (table.drop(columns='label'), dict(hard_weight=0.)),
            'half of the rows': (half[half.label.notna()].reset_index(drop=True), {})}


def lines_of(path):
    """{name: line} of the runs that are done."""
    if not path.is_file(): return {}
    return {line['name']: line for line in map(json.loads, path.read_text().splitlines())}


def finish(name, recipe, root, path, rows=None):
    """Train a recipe, score it, keep a line; a run that is done is not trained again."""
    if name in (done := lines_of(path)): return done[name]
    start = time.time()
    folder = run(recipe, root, resume=True, progress=False, rows=rows)
    scores = evaluate(folder, 'sst2', max_seq_len=recipe.max_seq_len, device_id=recipe.device_id)
    said = json.loads((folder/'recipe.json').read_text())
    line = dict(name=name, scores=scores, rows=said['rows'], seconds=round(time.time() - start, 1),
                recipe=said['recipe'], code=code_version())
    append_line(path, line, sync=True)
    return line


def settings(size, updates):
    """The teacher's recipe and LAD's."""
    few = dict(total_step=updates, warmup_step=max(1, updates//10), ckpt_step=updates)
    student = section5.recipe('sst2', 'LAD', 42, None).replace(train_size=None, **few)
    return section5.teachers['sst2'].replace(train_size=size, **few), student


def table(path):
    """What the runs gave."""
    lines = lines_of(path).values()
    frame = pd.DataFrame({line['name']: dict(
        rows=line['rows']['count'],
        labelled=line['rows']['count'] - line['rows'].get('unlabelled', 0),
        updates=line['recipe']['total_step'], lr=line['recipe']['lr'], accuracy=line['scores']['accuracy'],
        seconds=line['seconds']) for line in lines}).T
    return frame.astype(dict(rows=int, labelled=int, updates=int))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('root', type=Path, help='where runs and results are kept')
    parser.add_argument('--lr', type=float, default=9e-4, help='of the students; LAD was tuned to it')
    parser.add_argument('--size', type=int, default=8000, help='training rows')
    parser.add_argument('--updates', type=int, default=500)
    args = parser.parse_args()
    teacher, student = settings(args.size, args.updates)
    args.root.mkdir(parents=True, exist_ok=True)
    path = args.root/'half_of_the_labels.jsonl'
    finish('teacher', teacher, args.root, path)
    for name, (rows, changes) in variants(args.size).items():
        recipe = student.replace(experiment=name.replace(' ', '_'), lr=args.lr, **changes)
        finish(name, recipe, args.root, path, rows)
        print(table(path).to_string(), flush=True)


if __name__ == '__main__': main()
