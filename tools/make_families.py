"""Ask every family of encoders everything that the tests ask, and write down what came of it.

    python tools/make_families.py            # writes nbs/tutorials/families.csv: a minute or two

A row a family: its classes, where its layers are, what lies beside them, and `yes` or what went wrong for
each of `CHECKS` in tests/family_checks.py. tests/test_families.py holds the table to the families and checks.
"""
import sys
import tempfile
import warnings
from pathlib import Path

import pandas as pd
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]/'tests'))
from families import FAMILIES  # noqa: E402
from family_checks import CHECKS, TABLE, Runs, facts  # noqa: E402


def outcome(check, runs):
    "`yes`, or the error in a line."
    try:
        check(runs)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
    return 'yes'


def row(family, root):
    "A line of the table."
    runs = Runs(family, Path(root))
    asked = {name: check for name, check in CHECKS.items() if name not in ('facts', 'tokenizer')}
    answers = {name: outcome(check, runs) for name, check in asked.items()}
    return facts(family, runs.encoder) | answers | dict(transformers=transformers.__version__)


def main():
    "Write the table, and say what is not a yes."
    warnings.simplefilter('ignore')
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = []
    for family in FAMILIES.values():
        with tempfile.TemporaryDirectory() as root:
            rows.append(row(family, root))
        wrong = {name: said for name, said in rows[-1].items() if 'Error' in str(said)}
        print(family.name, wrong or 'fine', flush=True)
    pd.DataFrame(rows).to_csv(TABLE, index=False)


if __name__ == '__main__':
    main()
