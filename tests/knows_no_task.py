"""Open a run whose task this process has never heard of: python knows_no_task.py FOLDER."""

import sys

from lad_nb.evaluation import evaluate
from lad_nb.experiment import open_run
from lad_nb.tasks import tasks


def main(folder):
    assert 'reviews' not in tasks
    rows = [dict(text='Anna sings.', text_pair='Anna sings.', label='entailment')]
    assert set(evaluate(folder, 'reviews', max_seq_len=32, rows=rows, device_id=-1)) == {'accuracy'}
    recipe = open_run(folder)[2]
    print(recipe.task, *tasks[recipe.task].labels)


if __name__ == '__main__':
    main(*sys.argv[1:])
