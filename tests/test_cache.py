"""The teacher cache changes time and nothing else, for every kind of source; and survives being killed, and being shared."""
import errno
import json
import subprocess
import sys
from unittest.mock import patch

import pytest
from test_training import FILES, in_a_process, same_bytes

from lad_nb.cache import _write, teacher_cache
from lad_nb.models import SMALL, load_tokenizer
from lad_nb.data import encode, load_task
from lad_nb.recipes import FAST
from lad_nb.experiment import make_trainer, run
from lad_nb.encoders import load_classifier

METHODS = ['lad', 'bert_pkd', 'alp_kd_hidden', *(pytest.param(m, marks=pytest.mark.slow) for m in ('lad_cls', 'lad_no', 'partial_lad', 'lad_reversed', 'alp_kd', 'alp_kd_hidden_v2', 'layer_mean', 'kd'))]


@pytest.mark.parametrize('method', METHODS)
def test_same_bytes_with_and_without(experiments, lad, method):
    recipe = lad.replace(method=method, **FAST).replace(precision='fp32')
    folders = [run(recipe.replace(experiment=f'{method}{cached}', teacher_cache=cached), experiments, progress=False) for cached in (False, True)]
    for file in FILES:
        if (folders[0]/file).exists(): assert (folders[0]/file).read_bytes() == (folders[1]/file).read_bytes(), file
    assert (folders[0]/'gates.safetensors').exists() == (folders[1]/'gates.safetensors').exists() == ('lad' in method)


def test_the_teacher_is_not_asked_again(experiments, lad):
    recipe = lad.replace(**FAST).replace(precision='fp32')
    make_trainer(recipe, experiments, progress=False) # builds it
    def refuse(*args, **kwargs): raise AssertionError('the teacher was asked')
    with patch('transformers.BertForSequenceClassification.forward', new=refuse): trainer = make_trainer(recipe.replace(experiment='second'), experiments, progress=False)
    with patch.object(trainer.model.teacher, 'forward', new=refuse): trainer.train()


def test_resumed_within_an_epoch(experiments, lad):
    """Length groups come in the same order after a stop, in the second epoch as well (48 rows: 3 updates an epoch)."""
    settings = dict(total_step=7, ckpt_step=2, log_step=1, train_size=48) | FAST | dict(precision='fp32')
    whole = run(lad.replace(experiment='grouped', **settings), experiments, progress=False)
    recipe = lad.replace(experiment='cut', **settings)
    die = ("import os\nfrom transformers import TrainerCallback\nfrom lad_nb.recipes import recipe_from_dict, run\n"
           "class Die(TrainerCallback):\n    def on_step_begin(self, args, state, control, **k):\n        if state.global_step == 5: os._exit(9)\n"
           f"run(recipe_from_dict({recipe.to_dict()!r}), {str(experiments)!r}, progress=False, callbacks=[Die()])")
    assert in_a_process(die, experiments).returncode == 9
    cut = run(recipe.replace(teacher_cache=False), experiments, resume=True, progress=False) # where states come from may change
    assert same_bytes(whole, cut)


def test_settings_that_look_at_padding_are_refused(experiments, lad):
    for change in (dict(norm='sequence', padding='max_length'), dict(mask_padding=False)):
        with pytest.raises(ValueError, match='the cache keeps no padding'): run(lad.replace(**FAST).replace(**change), experiments, progress=False)
    assert not (experiments/'lad_bert_toy').exists()


@pytest.fixture
def rows(experiments):
    tokenizer = load_tokenizer(SMALL)
    return load_classifier(experiments/'teacher_bert_toy', 'toy').eval(), encode(load_task('toy', size=120), tokenizer, 32), tokenizer


BUILD = """
import sys, time
from lad_nb import cache
from lad_nb.models import SMALL, load_tokenizer
from lad_nb.data import encode, load_task
from lad_nb.encoders import load_classifier
tokenizer = load_tokenizer(SMALL)
teacher, data = load_classifier({teacher!r}, 'toy').eval(), encode(load_task('toy', size=120), tokenizer, 32)
ask, count = cache._ask, []
def slowly(*args):
    count.append(1)
    if len(count) == {die}: import os; os.kill(os.getpid(), 9)
    time.sleep({nap})
    return ask(*args)
cache._ask = slowly
found = cache.teacher_cache(teacher, data, tokenizer, {root!r}, progress=False, shard_bytes=2**18)
print(len(count), len(found.shards), float(found.batch([0, 60, 119], 32)[1].double().sum()))
"""


def build_code(experiments, root, die=0, nap=0): return BUILD.format(teacher=str(experiments/'teacher_bert_toy'), root=str(root), die=die, nap=nap)


def test_killed_while_building(experiments, tmp_path):
    """Each process dies at its second shard; the next one goes on with it."""
    deaths = 0
    while (done := in_a_process(build_code(experiments, tmp_path, die=2), tmp_path)).returncode: deaths += 1; assert done.returncode == -9, done.stderr
    shards = int(done.stdout.split()[1])
    assert shards > 4 and deaths == shards - 1


def test_two_processes_build_the_same_cache(experiments, tmp_path):
    code = build_code(experiments, tmp_path, nap=.3)
    both = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate() for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    (one, shards, logits), (other, _, same) = (out.split() for out, _ in said)
    assert sorted([int(one), int(other)]) == [0, int(shards)] and logits == same # one asked for every shard, the other for none
    assert sum('another process builds' in err for _, err in said) == 1


def test_a_full_disk_keeps_what_was_written(rows, tmp_path):
    teacher, data, tokenizer = rows
    written = []
    def full(tensors, folder, number):
        if number == 2:
            with patch('os.fsync', side_effect=OSError(errno.ENOSPC, 'No space left on device')): return _write(tensors, folder, number)
        written.append(number)
        return _write(tensors, folder, number)
    with patch('lad_nb.cache._write', new=full), pytest.raises(OSError, match=r'could not write [\d,]+ bytes to .*00002-.*No space left'):
        teacher_cache(teacher, data, tokenizer, tmp_path, progress=False, shard_bytes=2**18)
    folder, = tmp_path.iterdir()
    assert written == [0, 1] and len(list(folder.glob('*.safetensors'))) == 2 and not list(folder.glob('*.part'))
    with patch('lad_nb.cache._write', side_effect=lambda t, f, n: written.append(n) or _write(t, f, n)): cache = teacher_cache(teacher, data, tokenizer, tmp_path, progress=False, shard_bytes=2**18)
    assert written == list(range(len(cache.shards)))
    assert json.loads((folder/'cache.json').read_text())['bytes'] == cache.nbytes


def test_a_teacher_in_training_mode_is_refused(rows, tmp_path):
    teacher, data, tokenizer = rows
    with pytest.raises(ValueError, match='dropout'): teacher_cache(teacher.train(), data, tokenizer, tmp_path)
    teacher.eval()
    with pytest.raises(ValueError, match='120 rows, the training data 48'):
        from lad_nb.training import check_cache
        check_cache(teacher_cache(teacher, data, tokenizer, tmp_path, progress=False), build_lad(teacher), data.select(range(48)))


def build_lad(teacher):
    from lad_nb.distiller import Distiller
    from lad_nb.mappings import make_mapping
    from lad_nb.students import make_student
    return Distiller(make_student(teacher.bert, 3, 'toy'), teacher, make_mapping('lad', 6, 3), norm='token', mask_padding=True)
