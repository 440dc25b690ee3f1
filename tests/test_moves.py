"""Runs that are moved, copied or given away.

Teachers, encoders, rows and precisions that are no longer what they were.
"""
import json
import os
import re
import shutil
import socket
import zipfile
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from two_processes import study

from lad_nb import devices, models
from lad_nb.analysis import gate_shares
from lad_nb.cli import main
from lad_nb.data import load_task
from lad_nb.devices import pick_precision
from lad_nb.durable import write_checksums
from lad_nb.encoders import load_classifier
from lad_nb.evaluation import evaluate, score_checkpoints
from lad_nb.experiment import assemble_distiller, open_run, rerun, resolve, run
from lad_nb.mappings import make_mapping, mapping_to_dict
from lad_nb.recipes import Recipe, recipe_from_dict
from lad_nb.results import read_results
from lad_nb.runs import run_description
from lad_nb.similarity import teacher_agreement
from lad_nb.sources import rows_hash
from lad_nb.stepper import Stepper
from lad_nb.study import missing, run_job, run_study
from lad_nb.toy import toy_examples

pytestmark = pytest.mark.faults
FEW = dict(task='rte', max_seq_len=32, batch_size=8, total_step=4, warmup_step=1, ckpt_step=2, log_step=2,
           device_id=-1)
FILES = ('model.safetensors', 'gates.safetensors', 'log.jsonl')


def tsv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f"{e['sentence1']}\t{e['sentence2']}\t{e['label']}" for e in toy_examples(rows))
    path.write_text('sentence1\tsentence2\tlabel\n' + '\n'.join(lines) + '\n')


@pytest.fixture(scope='session')
def made(tiny, tmp_path_factory):
    """Experiments: an encoder, a teacher of four updates, a student whose recipe names folders absolutely."""
    place = tmp_path_factory.mktemp('made')
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, place/'cache'
    home = place/'home'
    shutil.copytree(tiny, home/'encoder')
    for split in ('train', 'dev'): tsv(home/'RTE'/f'{split}.tsv', 48)
    where = dict(ptrain_ver=str(home/'encoder'), data_dir=str(home/'RTE'))
    run(Recipe('teacher', method='fine_tune', **where, **FEW), home, progress=False)
    run(Recipe('student', num_hidden_layers=2, teacher_exp='teacher', **where, **FEW), home, progress=False)
    datasets.config.HF_DATASETS_CACHE = before
    return home


@pytest.fixture(autouse=True)
def another_machine(tmp_path, monkeypatch):
    """What this machine remembers of models and rows is empty at first."""
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path/'cache')


@pytest.fixture
def home(made, tmp_path): return Path(shutil.copytree(made, tmp_path/'home'))


@pytest.fixture
def nobody_asked(monkeypatch):
    """Whoever asks the hub, or opens a connection, is written down."""
    asked = []
    def snapshot(name, *_, **__): asked.append(name); raise OSError('the hub was asked')
    def connect(self, address): asked.append(address); raise OSError('a connection was opened')
    monkeypatch.setattr(models, 'snapshot_download', snapshot)
    monkeypatch.setattr(socket.socket, 'connect', connect)
    return asked


def recipe_of(folder): return recipe_from_dict(run_description(folder))


def said_of(folder): return json.loads((folder/'recipe.json').read_text())


def same(a, b): return all((a/f).read_bytes() == (b/f).read_bytes() for f in FILES)


def refused(match, *deeds, error=ValueError):
    for deed in deeds:
        with pytest.raises(error, match=match): deed()


def cut(folder):
    """As it was at update 2 of 4."""
    shutil.rmtree(folder/'checkpoint-4')
    for name in ('model.safetensors', 'gates.safetensors'): (folder/name).unlink()


def other_weights(folder):
    model = load_classifier(folder)
    with torch.no_grad(): model.classifier.bias += 1
    model.save_pretrained(folder)


def edit(folder, change):
    """Another recipe.json: of an older version, or of somebody else."""
    said = said_of(folder)
    change(said)
    (folder/'recipe.json').write_text(json.dumps(said))
    return folder


def version_0_1(home):
    """The student as 0.1 described it: absolute paths, no rows, encoder or settled precision."""
    def change(said):
        for name in ('rows', 'encoder', 'precision'): del said[name]
        said['recipe'] |= dict(ptrain_ver=str(home/'encoder'), data_dir=str(home/'RTE'))
        said['teacher']['folder'] = str(home/'teacher_bert_rte'/'checkpoint-4')
    return edit(home/'student_bert_rte', change)


def test_nothing_that_people_share_has_an_absolute_path(home, made):
    for folder in ('teacher_bert_rte', 'student_bert_rte'):
        for path in (made/folder).rglob('*.json*'):
            if path.name in ('tokenizer.json', 'tokenizer_config.json'): continue
            assert str(made.parent) not in path.read_text(), path
    said = said_of(made/'student_bert_rte')
    assert said['teacher']['folder'] == 'teacher_bert_rte/checkpoint-4'
    assert said['encoder']['folder'] == 'encoder'
    assert (said['recipe']['ptrain_ver'], said['recipe']['data_dir']) == ('./encoder', './RTE')
    rows = load_task('rte', data_dir=str(made/'RTE'))
    assert said['precision'] == 'fp32' and said['rows'] == dict(count=48, sha256=rows_hash(rows))


@pytest.mark.parametrize('old', [False, True])
def test_a_moved_folder_of_experiments(home, tmp_path, old):
    """Opened, analysed, scored, run again and resumed, though nothing lies where it was."""
    if old: version_0_1(home)
    moved = Path(shutil.move(home, tmp_path/'elsewhere'/'experiments'))
    folder = moved/'student_bert_rte'
    distiller, _, recipe = open_run(folder)
    assert distiller.teacher is not None and len(gate_shares(folder, data_dir=str(moved/'RTE'), device_id=-1))
    if old: return
    assert (recipe.ptrain_ver, recipe.data_dir) == (str(moved/'encoder'), str(moved/'RTE'))
    assert len(teacher_agreement(folder, device_id=-1))
    assert len(score_checkpoints(folder, 'rte', device_id=-1)) == 2
    line = f'run_fine_tune_eval --experiment student --task rte --root {moved} --device_id -1'
    assert main(line.split()) == 0
    assert same(rerun(folder, progress=False), folder)
    shutil.copytree(folder, moved/'kept_bert_rte')
    cut(folder)
    run(recipe, moved, resume=True, progress=False)
    assert same(folder, moved/'kept_bert_rte')


def test_zipped_and_unpacked_elsewhere(home, tmp_path):
    with zipfile.ZipFile(tmp_path/'gift.zip', 'w') as z:
        for path in home.rglob('*'): z.write(path, path.relative_to(home))
    shutil.rmtree(home)
    with zipfile.ZipFile(tmp_path/'gift.zip') as z: z.extractall(tmp_path/'a'/'b')
    folder = tmp_path/'a'/'b'/'student_bert_rte'
    assert open_run(folder)[0].teacher is not None and same(rerun(folder, progress=False), folder)


def with_encoder(place): return replace(study(place/'encoder', 6), seeds=(42,))


@pytest.fixture(scope='module')
def stopped(tiny, tmp_path_factory):
    """Encoder, experiments and results in one folder: a teacher, its cache, one run of two."""
    home = tmp_path_factory.mktemp('stopped')
    shutil.copytree(tiny, home/'encoder')
    def stop(line):
        if line.startswith('[1/2]'): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run_study(with_encoder(home), home/'runs', home/'results', say=stop)
    return home


def test_a_study_that_moves_in_the_middle(stopped, tmp_path):
    """Nothing is done again: not the teacher, not the cache, not the run; what it wrote names no folder."""
    def written(place):
        return {p.relative_to(place): p.stat().st_mtime_ns for p in place.rglob('*.safetensors')}
    before, there = written(stopped), with_encoder
    assert any('teacher_cache' in path.parts for path in before)
    assert str(stopped.parent) not in (stopped/'results'/'runs.jsonl').read_text()
    home = shutil.copytree(stopped, tmp_path/'home') # with its times, as `unzip` does
    moved = Path(shutil.move(home, tmp_path/'elsewhere'/'study'))
    assert [job['method'] for job in missing(there(moved), moved/'results')] == ['KD']
    assert len(run_study(there(moved), moved/'runs', moved/'results', say=print)) == 2
    assert before.items() < written(moved).items() and len(read_results(moved/'results')) == 3


def test_another_encoder_at_the_place_of_a_studys(stopped, tmp_path):
    """A folder counts by its last name, so what is in it is compared."""
    home, there = shutil.copytree(stopped, tmp_path/'home'), with_encoder
    other_weights(home/'encoder')
    before = (home/'results'/'runs.jsonl').read_bytes()
    refused('The encoder .* is not the one of the results in',
            lambda: run_study(there(home), home/'runs', home/'results', say=print),
            lambda: run_job(there(home), 1, home/'runs', home/'results', say=print))
    assert (home/'results'/'runs.jsonl').read_bytes() == before


def test_a_run_that_is_copied_alone(home, tmp_path):
    """On another machine it says what it lacks, and its student needs no teacher.

    On a machine that saw the teacher, or beside the teacher, it opens.
    """
    folder = Path(shutil.copytree(home/'student_bert_rte', tmp_path/'mail'/'student_bert_rte'))
    refused("teacher_bert_rte/checkpoint-4'.* no such folder here. Put it beside the run",
            lambda: open_run(folder), lambda: gate_shares(folder), error=FileNotFoundError)
    refused("names the encoder './encoder', and there is no such folder here",
            lambda: rerun(folder), error=FileNotFoundError)
    scores = evaluate(folder, 'rte', data_dir=str(home/'RTE'), max_seq_len=32, device_id=-1)
    assert scores.keys() == {'accuracy'}
    assert run_description(folder)['recipe']['method'] == 'lad'
    assert load_classifier(folder, 'rte').config.num_hidden_layers == 2
    shutil.copytree(home/'teacher_bert_rte', folder.parent/'teacher_bert_rte')
    assert open_run(folder)[0].teacher is not None
    shutil.rmtree(folder.parent/'teacher_bert_rte')
    another = recipe_of(home/'student_bert_rte').replace(experiment='another')
    run(another, home, progress=False)  # this machine has seen the teacher now
    assert open_run(folder)[0].teacher is not None and same(rerun(folder, progress=False), folder)


def test_a_teacher_that_moves_alone(home, tmp_path):
    """To the side of its students it is found by name and hash; elsewhere it is missed in words."""
    teacher = Path(shutil.copytree(home/'teacher_bert_rte'/'checkpoint-4', tmp_path/'models'/'good'))
    changes = dict(experiment='outside', teacher_exp=None, teacher=teacher)
    folder = run(recipe_of(home/'student_bert_rte').replace(**changes), home, progress=False)
    assert said_of(folder)['teacher']['folder'] == 'good'
    assert str(tmp_path) not in (folder/'recipe.json').read_text()
    assert open_run(folder)[2].teacher == str(teacher)
    shutil.move(teacher, home/'good')
    assert open_run(folder)[0].teacher is not None and same(rerun(folder, progress=False), folder)
    shutil.move(home/'good', tmp_path/'lost')
    refused("the teacher 'good', and there is no such folder here",
            lambda: open_run(folder), error=FileNotFoundError)


@pytest.mark.parametrize('old', [False, True])
def test_another_teacher_at_its_place(home, capsys, old):
    """Retrained in place: opening, every analysis, resume, the stepper and rerun say both hashes."""
    if old: version_0_1(home)
    folder, recipe = home/'student_bert_rte', recipe_of(home/'student_bert_rte')
    other_weights(home/'teacher_bert_rte'/'checkpoint-4')
    write_checksums(home/'teacher_bert_rte'/'checkpoint-4') # as a second training leaves them
    cut(folder)
    before = sorted(home.rglob('*'))
    says = r'teacher .* is not the one that .*: sha256 [0-9a-f]{12}\.\., [0-9a-f]{12}\.\. was expected'
    for deed in (lambda: open_run(folder, 2),
                 lambda: gate_shares(folder, step=2),
                 lambda: rerun(folder, progress=False),
                 lambda: run(recipe, home, resume=True, progress=False),
                 lambda: Stepper(recipe, home, resume=True)):
        with pytest.raises(ValueError, match=says) as e: deed()
        assert len(set(re.findall(r'[0-9a-f]{12}\.\.', str(e.value)))) == 2
    assert main(['rerun', str(folder)]) == 2 and re.search(says, capsys.readouterr().err)
    assert sorted(home.rglob('*')) == before


def test_another_encoder_at_its_place(home):
    other_weights(home/'encoder')
    refused('encoder encoder is not the one that .* was cut from',
            lambda: rerun(home/'student_bert_rte', progress=False))


def swapped(text):
    first, second, third, *rest = text.splitlines()
    return '\n'.join([first, third, second, *rest]) + '\n'


CHANGES = {
    'a label': lambda text: text.replace('not_entailment', 'entailment', 1),
    'a word': lambda text: text.replace(' is ', ' was ', 1),
    'a line less': lambda text: '\n'.join(text.splitlines()[:-1]) + '\n',
    'two lines swapped': swapped}


@pytest.mark.parametrize('change', CHANGES)
def test_other_training_rows(home, change):
    folder, recipe = home/'student_bert_rte', recipe_of(home/'student_bert_rte')
    path = home/'RTE'/'train.tsv'
    path.write_text(CHANGES[change](path.read_text()))
    cut(folder)
    refused('training rows are not those of .*student_bert_rte: '
            '4[78] rows, sha256 .* 48 rows, sha256 .* were expected',
            lambda: rerun(folder, progress=False), lambda: run(recipe, home, resume=True, progress=False))
    assert not (home/'student_rerun_bert_rte').exists() and open_run(folder, 2)


def test_the_same_rows_from_another_place(home, tmp_path):
    """Where they lie does not matter, nor a missing last newline, nor columns that nobody reads."""
    folder, recipe = home/'student_bert_rte', recipe_of(home/'student_bert_rte')
    shutil.copytree(folder, tmp_path/'kept')
    lines = (home/'RTE'/'train.tsv').read_text().splitlines()
    shutil.move(home/'RTE', tmp_path/'GLUE'/'RTE')
    (tmp_path/'GLUE'/'RTE'/'train.tsv').write_text('\n'.join(f'{i}\t{line}' for i, line in enumerate(lines)))
    cut(folder)
    run(recipe.replace(data_dir=tmp_path/'GLUE'/'RTE'), home, resume=True, progress=False)
    assert same(folder, tmp_path/'kept')


def test_the_draw_is_part_of_the_rows(home):
    def rows(**which): return rows_hash(load_task('rte', data_dir=str(home/'RTE'), **which))
    assert len({rows(), rows(size=16), rows(size=16, sample_seed=1), rows(size=17)}) == 4
    assert rows(size=16) == rows(size=16)


def with_units(monkeypatch, has):
    """A processor that has bf16 units, or has none."""
    monkeypatch.setattr(devices, '_bf16_units', lambda device: (has, 'this processor is made up'))


def test_precision_is_settled_once(home, monkeypatch):
    """`auto` came to bf16; elsewhere the run goes on, and is repeated, in bf16, with a warning."""
    with_units(monkeypatch, True)
    recipe = recipe_of(home/'student_bert_rte').replace(experiment='auto', precision='auto')
    folder = run(recipe, home, progress=False)
    shutil.copytree(folder, home/'kept_bert_rte')
    said = said_of(folder)
    assert (said['precision'], said['recipe']['precision']) == ('bf16', 'auto')
    cut(folder)
    with_units(monkeypatch, False)
    assert pick_precision('auto')[0] == 'fp32'
    refused("precision is 'fp32', .* began in 'bf16'",
            lambda: run(recipe.replace(precision='fp32'), home, resume=True, progress=False))
    for deed in (lambda: run(recipe, home, resume=True, progress=False),
                 lambda: rerun(home/'kept_bert_rte', 'again', progress=False)):
        with pytest.warns(UserWarning, match='updates will be slower'):
            assert same(deed(), home/'kept_bert_rte')
    assert said_of(home/'again_bert_rte')['precision'] == 'bf16'


def test_runs_of_0_1_open_rerun_and_resume(home):
    folder = version_0_1(home)
    shutil.copytree(folder, home/'kept_bert_rte')
    assert open_run(folder)[0].teacher is not None and same(rerun(folder, progress=False), folder)
    cut(folder)
    run(recipe_of(folder), home, resume=True, progress=False)
    assert same(folder, home/'kept_bert_rte')


def names_a_hub_id(folder, **ids): return edit(folder, lambda said: said['recipe'].update(ids))


def test_a_gift_that_names_hub_ids(home, nobody_asked, capsys):
    """Neither rerun nor a student of a gift's teacher asks for them, until that is allowed.

    What you name yourself is asked for.
    """
    gift = names_a_hub_id(home/'student_bert_rte', ptrain_ver='stranger/encoder')
    names_a_hub_id(home/'teacher_bert_rte', ptrain_ver='stranger/encoder')
    mine = recipe_of(gift).replace(experiment='mine', ptrain_ver=None)
    before = sorted(home.rglob('*'))
    refused("names the encoder 'stranger/encoder'.*allow_hub=True.*ptrain_ver='stranger/encoder'",
            lambda: rerun(gift, progress=False), lambda: run(mine, home, progress=False),
            lambda: assemble_distiller(resolve(mine, home)), lambda: Stepper(mine, home))
    train = ['run_lad_distil', *'--experiment mine --task rte --teacher_exp teacher'.split(),
             *'--num_hidden_layers 2 --device_id -1 --max_seq_len 32'.split(),
             '--data_dir', str(home/'RTE'), '--root', str(home)]
    for line in (['rerun', str(gift)], train):
        assert main(line) == 2 and '--allow_hub' in capsys.readouterr().err
    assert any('--allow_hub' in what for what in resolve(mine, home, fetch=False).missing)
    assert open_run(gift)[0].teacher is not None and nobody_asked == []
    refused("No model 'stranger/encoder'",
            lambda: rerun(gift, progress=False, allow_hub=True),
            lambda: run(mine, home, progress=False, allow_hub=True),
            lambda: run(mine.replace(ptrain_ver='stranger/encoder'), home, progress=False),
            error=FileNotFoundError)
    assert nobody_asked == ['stranger/encoder']*3
    for line in (['rerun', str(gift), '--allow_hub'], [*train, '--allow_hub']): assert main(line) == 2
    assert nobody_asked == ['stranger/encoder']*5 and sorted(home.rglob('*')) == before


def test_a_gift_whose_teacher_is_a_hub_id(home, nobody_asked):
    def change(said):
        said['recipe'].update(teacher='stranger/teacher', teacher_exp=None)
        said['teacher'].update(folder='stranger/teacher')
    gift = edit(home/'student_bert_rte', change)
    refused("the teacher 'stranger/teacher', and there is no such folder here",
            lambda: open_run(gift), lambda: rerun(gift), error=FileNotFoundError)
    assert nobody_asked == []
    refused("No model 'stranger/teacher'",
            lambda: rerun(gift, progress=False, allow_hub=True), error=FileNotFoundError)
    assert nobody_asked == ['stranger/teacher']


def test_what_was_fetched_before_is_found_without_asking(home, tmp_path, nobody_asked, monkeypatch):
    """Students of a teacher that was fine-tuned from a hub id are cut from the copy in the hub's cache."""
    cache = tmp_path/'hub'
    snapshot = cache/'models--some--encoder'/'snapshots'/('c0ffee'*7)[:40]
    shutil.copytree(home/'encoder', snapshot)
    (cache/'models--some--encoder'/'refs').mkdir()
    (cache/'models--some--encoder'/'refs'/'main').write_text(snapshot.name)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(cache))
    names_a_hub_id(home/'teacher_bert_rte', ptrain_ver='some/encoder')
    mine = recipe_of(home/'student_bert_rte').replace(experiment='mine', ptrain_ver=None)
    folder = run(mine, home, progress=False)
    assert same(folder, home/'student_bert_rte') and nobody_asked == []
    said = said_of(folder)
    assert said['encoder']['folder'] == 'some/encoder' and said['recipe']['ptrain_ver'] is None


HOSTILE = [
    dict(rows=5),
    dict(rows=dict(sha256='../../x', count='many')),
    dict(encoder=['x']),
    dict(precision='fp64'),
    dict(precision=5),
    dict(teacher=dict(folder='../../..', sha256='../../../etc/passwd')),
    dict(teacher=dict(folder='x\x1b[2J', sha256=5))]


@pytest.mark.parametrize('change', HOSTILE, ids=str)
def test_descriptions_of_others(home, change):
    folder = edit(home/'student_bert_rte', lambda said: said.update(change))
    before = sorted(home.rglob('*'))
    if change in (HOSTILE[0], HOSTILE[2]): assert open_run(folder); return
    with pytest.raises((ValueError, FileNotFoundError)) as e: rerun(folder, progress=False)
    assert '\x1b' not in str(e.value) and sorted(home.rglob('*')) == before


def test_a_link_to_the_root(home, tmp_path):
    """Experiments behind a symbolic link, as on a larger disk, are the same experiments."""
    os.symlink(home, tmp_path/'link')
    folder = tmp_path/'link'/'student_bert_rte'
    assert open_run(folder)[0].teacher is not None and same(rerun(folder, progress=False), folder)


def test_a_method_that_means_something_else_now(quick, tmp_path):
    """A run of before: its method's name stands for another mapping."""
    folder = run(quick.replace(method='alp_kd_hidden_v2'), tmp_path, progress=False)
    was = mapping_to_dict(make_mapping('alp_kd_hidden_by_cls', 4, 2))  # what 0.1 called v2
    edit(folder, lambda said: said.update(mapping=was))
    open_run(folder)
    refused('learned by another mapping than alp_kd_hidden_v2 is here', lambda: rerun(folder, progress=False))
    assert not (tmp_path/'quick_rerun_bert_toy').exists()


def test_a_setting_that_came_later(quick, tmp_path):
    """A run of before knows nothing of it, and goes on with its default alone."""
    older = quick.replace(experiment='older')
    folder = run(older, tmp_path, progress=False)
    edit(folder, lambda said: said['recipe'].pop('keep_last_batch'))
    for path in folder.glob('checkpoint-*'):
        if path.name != 'checkpoint-2': shutil.rmtree(path)
    refused('began without keep_last_batch, and keep_last_batch is True now',
            lambda: run(older.replace(keep_last_batch=True), tmp_path, resume=True, progress=False))
    run(older, tmp_path, resume=True, progress=False)
