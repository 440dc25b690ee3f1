"""The teacher cache changes time and nothing else, for every kind of source; it survives being killed and
being shared."""
import copy
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import safetensors.torch
from conftest import program, ready, same_bytes

from lad_nb.cache import check_cache, teacher_cache
from lad_nb.data import encode, load_task
from lad_nb.distiller import Distiller
from lad_nb.encoders import load_classifier
from lad_nb.experiment import run
from lad_nb.gates import to_shares
from lad_nb.mappings import make_mapping
from lad_nb.models import SMALL, load_tokenizer
from lad_nb.panel import LiveView
from lad_nb.recipes import FAST
from lad_nb.runs import read_log
from lad_nb.stepper import Stepper
from lad_nb.students import make_student
from lad_nb.training import DistilArguments, DistilTrainer

SLOW = ('bert_pkd', 'alp_kd_hidden', 'lad_cls', 'lad_no', 'partial_lad', 'lad_reversed', 'alp_kd',
        'alp_kd_hidden_v2', 'layer_mean', 'kd')
METHODS = ['lad', *(pytest.param(m, marks=pytest.mark.slow) for m in SLOW)]


@pytest.mark.parametrize('method', METHODS)
def test_same_bytes_with_and_without(experiments, lad, method):
    recipe = lad.replace(method=method, **FAST).replace(precision='fp32')
    without, cached = (run(recipe.replace(experiment=f'{method}{cached}', teacher_cache=cached), experiments,
                           progress=False) for cached in (False, True))
    assert same_bytes(without, cached)
    assert (without/'gates.safetensors').exists() == ('lad' in method)


@pytest.mark.parametrize('method', ['lad', 'lad_cls', 'scalar_mix_by_task', 'alp_kd_hidden_v2'])
def test_states_in_bf16_under_gates_in_fp32(quick, tmp_path, method):
    """A cache in half the room under a training in fp32: rounding of the states is all that differs."""
    recipe = quick.replace(method=method, **FAST).replace(precision='fp32', log_step=1, dropout=0.)
    logs = [read_log(run(recipe.replace(experiment=p, cache_precision=p), tmp_path, progress=False))
            for p in ('fp32', 'bf16')]
    assert len(logs[0]) == len(logs[1]) == 6
    for full, half in zip(*logs):
        for part in ('hard', 'soft', 'hidden_1', 'hidden_2'):
            assert half[part] == pytest.approx(full[part], rel=.05, abs=1e-3), (full['step'], part)


@pytest.mark.parametrize('method', ['lad_no', 'bert_pkd'])
def test_layers_that_are_not_read(quick, tmp_path, method):
    """Four layers to one: of them a mapping reads two or one, and what is shown is what is shown without."""
    recipe = quick.replace(method=method, num_hidden_layers=1, dropout=0., **FAST).replace(precision='fp32')
    shown = {}
    for cached in (False, True):
        with Stepper(recipe.replace(experiment=f'{cached}', teacher_cache=cached), tmp_path) as stepper:
            record, reading = stepper.step(2), stepper.read_gates()
            trainer = stepper.trainer
            batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
            batch.pop('row')
            amounts = trainer.model.source_amounts(trainer.model.eval()(**batch, output_states=True))[1]
            shares = to_shares(amounts, batch['attention_mask'])
            shown[cached] = record.taken, reading and reading.taken, shares.tolist()
            stepper.draw()
    assert shown[True] == shown[False]
    assert (shown[True][1] is not None) == (method == 'lad_no')


def test_a_live_view_of_layers_that_are_not_read(quick, tmp_path):
    live = LiveView(every=1)
    recipe = quick.replace(method='lad_no', num_hidden_layers=1, **FAST).replace(precision='fp32')
    run(recipe, tmp_path, progress=False, callbacks=[live])
    assert live.record.step == 6 and list(live.record.taken['content']) == [3, 4]


def test_the_teacher_is_not_asked_again(experiments, lad):
    recipe = lad.replace(**FAST).replace(precision='fp32')
    ready(recipe, experiments) # builds it
    def refuse(*args, **kwargs): raise AssertionError('the teacher was asked')
    with patch('transformers.BertForSequenceClassification.forward', new=refuse):
        trainer = ready(recipe.replace(experiment='second'), experiments)
    with patch.object(trainer.model.teacher, 'forward', new=refuse): trainer.train()


@pytest.mark.slow
def test_resumed_within_an_epoch(experiments, lad):
    """Length groups come in the same order after a stop, in the second epoch as well (48 rows: 3 updates an
    epoch)."""
    settings = dict(total_step=7, ckpt_step=2, log_step=1, train_size=48) | FAST | dict(precision='fp32')
    whole = run(lad.replace(experiment='grouped', **settings), experiments, progress=False)
    recipe = lad.replace(experiment='cut', **settings)
    died = program('dies.py', experiments, json.dumps(recipe.to_dict()), 5, cwd=experiments)
    assert died.returncode == 9, died.stderr
    recipe = recipe.replace(teacher_cache=False) # where states come from may change
    assert same_bytes(whole, run(recipe, experiments, resume=True, progress=False))
    assert (whole/'gates.safetensors').exists()


def test_settings_that_look_at_padding_are_refused(experiments, lad):
    for change in (dict(norm='sequence', padding='max_length'), dict(mask_padding=False)):
        with pytest.raises(ValueError, match='the cache keeps no padding'):
            run(lad.replace(**FAST).replace(**change), experiments, progress=False)
    assert not (experiments/'lad_bert_toy').exists()


@pytest.fixture
def rows(experiments):
    tokenizer = load_tokenizer(SMALL)
    teacher = load_classifier(experiments/'teacher_bert_toy', 'toy').eval()
    return teacher, encode(load_task('toy', size=120), tokenizer, 32), tokenizer


def build(experiments, root, die=0, nap=0):
    """A program and its arguments, which builds the same cache."""
    return 'builds_a_cache.py', experiments/'teacher_bert_toy', root, die, nap


@pytest.mark.faults
@pytest.mark.slow
def test_killed_while_building(experiments, tmp_path, counted):
    """Each process dies at its second shard; the next one goes on with it."""
    deaths = 0
    while (done := program(*build(experiments, tmp_path, die=2))).returncode:
        deaths += 1
        assert done.returncode == -9, done.stderr
    shards = int(done.stdout.split()[1])
    assert shards > 4 and deaths == shards - 1
    counted(kills=deaths)


@pytest.mark.faults
@pytest.mark.slow
def test_two_processes_build_the_same_cache(experiments, tmp_path, counted):
    name, *words = build(experiments, tmp_path, nap=.3)
    command = [sys.executable, Path(__file__).with_name(name), *map(str, words)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    said = [p.communicate() for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    (one, shards, logits), (other, _, same) = (out.split() for out, _ in said)
    assert sorted([int(one), int(other)]) == [0, int(shards)] # one wrote every shard, the other none
    assert logits == same
    assert sum('another process builds' in err for _, err in said) == 1
    counted(builders=len(both))


def full_at(shard):
    """A disk that is full when a shard's bytes are to be kept."""
    def fsync(file):
        if shard in os.readlink(f'/proc/self/fd/{file}'):
            raise OSError(errno.ENOSPC, 'No space left on device')
    return patch('os.fsync', side_effect=fsync)


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='which file is written is read from /proc')
def test_a_full_disk_keeps_what_was_written(rows, tmp_path):
    teacher, data, tokenizer = rows
    build = lambda: teacher_cache(teacher, data, tokenizer, tmp_path, progress=False, shard_bytes=2**18)
    said = r'could not write [\d,]+ bytes to .*00002-.*No space left'
    with full_at('00002-'), pytest.raises(OSError, match=said): build()
    folder, = tmp_path.iterdir()
    written = sorted(p.name[:5] for p in folder.glob('*.safetensors'))
    assert written == ['00000', '00001'] and not list(folder.glob('*.part'))
    with patch('safetensors.torch.save', wraps=safetensors.torch.save) as save: cache = build()
    assert save.call_count == len(cache.shards) - 2
    assert json.loads((folder/'cache.json').read_text())['bytes'] == cache.nbytes


def test_a_teacher_in_training_mode_is_refused(rows, tmp_path):
    teacher, data, tokenizer = rows
    with pytest.raises(ValueError, match='dropout'): teacher_cache(teacher.train(), data, tokenizer, tmp_path)


def test_padding_on_the_left_is_refused(rows, tmp_path):
    """A model with positions says something else of a token that padding moves: no cache can know it."""
    teacher, data, tokenizer = rows
    tokenizer = copy.copy(tokenizer)
    cache = teacher_cache(teacher, data, tokenizer, tmp_path, progress=False)
    tokenizer.padding_side = 'left'
    says = "pads on the left.*padding_side to 'right', or train without the cache"
    with pytest.raises(ValueError, match=says): teacher_cache(teacher, data, tokenizer, tmp_path)
    student = make_student(teacher.bert, 3, 'toy')
    lad = Distiller(student, teacher, make_mapping('lad', 6, 3), norm='token', mask_padding=True)
    args = DistilArguments(str(tmp_path/'run'), use_cpu=True, max_steps=1)
    with pytest.raises(ValueError, match=says): DistilTrainer(lad, args, data, tokenizer, cache=cache)


def test_a_cache_of_other_rows_is_refused(rows, tmp_path):
    teacher, data, tokenizer = rows
    cache = teacher_cache(teacher, data, tokenizer, tmp_path, progress=False)
    student = make_student(teacher.bert, 3, 'toy')
    lad = Distiller(student, teacher, make_mapping('lad', 6, 3), norm='token', mask_padding=True)
    with pytest.raises(ValueError, match='120 rows, the training data 48'):
        check_cache(cache, lad, data.select(range(48)))
