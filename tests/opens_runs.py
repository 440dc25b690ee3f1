"""python opens_runs.py FOLDER...: opens run folders, and prints of each what its teacher and its student
answer to one pair, as JSON."""
import json
import sys

import torch

from lad_nb.experiment import open_run

if __name__ == '__main__':
    for folder in sys.argv[1:]:
        distiller, tokenizer, recipe = open_run(folder)
        batch = tokenizer('anna sang again.', 'anna sang.', return_tensors='pt')
        with torch.inference_mode():
            answers = [model(**batch).logits[0].tolist() for model in (distiller.teacher, distiller.student)]
        print(json.dumps([recipe.model, *answers]))
