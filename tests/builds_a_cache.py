"""Builds a teacher cache of 120 rows of the toy task, slowly, or dies while it does.

python builds_a_cache.py TEACHER ROOT DIE NAP: the cache lies in ROOT; the process is killed when it is about
to write its shard number DIE (0: never), and sleeps NAP seconds before each. Prints how many shards it wrote,
how many there are, and a sum of some logits.
"""
import os
import signal
import sys
import time
from unittest.mock import patch

import safetensors.torch

from lad_nb.cache import teacher_cache
from lad_nb.data import encode, load_task
from lad_nb.encoders import load_classifier
from lad_nb.models import SMALL, load_tokenizer


def main(teacher, root, die, nap):
    tokenizer, written, save = load_tokenizer(SMALL), [], safetensors.torch.save

    def slowly(tensors):
        written.append(tensors)
        if len(written) == die: os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(nap)
        return save(tensors)

    data = encode(load_task('toy', size=120), tokenizer, 32)
    with patch('safetensors.torch.save', slowly):
        cache = teacher_cache(load_classifier(teacher, 'toy').eval(), data, tokenizer, root, progress=False,
                              shard_bytes=2**18)
    print(len(written), len(cache.shards), float(cache.batch([0, 60, 119], 32)[1].double().sum()))


if __name__ == '__main__': main(*sys.argv[1:3], int(sys.argv[3]), float(sys.argv[4]))
