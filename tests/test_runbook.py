"""The run books' commands: every flag of all 67 held to what is made of it, each one resolved as written, and
RTE's run with nothing changed but the size."""
import csv
import json
import os
import re
import shlex
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest

from lad_nb import cli
from lad_nb.models import SMALL, local_model
from lad_nb.tasks import get_task, tasks
from lad_nb.settings import kind_of
from lad_nb.recipes import Evaluation, Recipe
from lad_nb.run_books import run_books

SHARED = Path(__file__).parents[2]/'shared'
BOOK = Path(os.environ.get('LAD_NB_RUNBOOK') or SHARED/'seed'/'fine_tune_rte.md')
SHEET = Path(os.environ.get('LAD_NB_COMMANDS') or SHARED/'recipes'/'commands.csv')


def rows():
    """The sheet's commands: (task, command, {flag: text}), the flags that are given."""
    with open(SHEET, encoding='utf-8', newline='') as f: lines = list(csv.DictReader(f))
    return [(line['task'], line.pop('command'), {k: v for k, v in line.items() if v}) for line in lines]


def commands():
    """Every `python3.8 X.py ..` block of RTE's book as a list: X and its flags."""
    blocks = re.findall(r'```sh\n(.*?)```', BOOK.read_text(), re.S)
    lines = [shlex.split(b.replace('\\\n', ' ')) for b in blocks if 'python3.8' in b]
    return [[words[1].removesuffix('.py'), *words[2:]] for words in lines]


def line_of(command, flags):
    words = [[f'--{flag}', value] for flag, value in flags.items()]
    return [command, *sum(words, [])]


def named(row): return f"{row[0]} {row[1]} {row[2]['experiment']} {row[2].get('dataset', '')}".strip()


def absent(path, variable): return f'{path} is not there; {variable} names another'


skipped = [pytest.param(None, marks=pytest.mark.skip(reason=absent(SHEET, 'LAD_NB_COMMANDS')), id='no sheet')]
all_rows = [pytest.param(row, id=named(row)) for row in rows()] if SHEET.is_file() else skipped
sheet = pytest.mark.parametrize('row', all_rows)


def needs(path, variable): return pytest.mark.skipif(not path.is_file(), reason=absent(path, variable))


needs_sheet, needs_book = needs(SHEET, 'LAD_NB_COMMANDS'), needs(BOOK, 'LAD_NB_RUNBOOK')

METHODS = dict(run_fine_tune='fine_tune', run_lad_distil='lad', run_lad_no_distil='lad_no',
               run_pkd_distill='bert_pkd')
PLACES = ('device_id', 'tdevice_id', 'gate_device_id')  # where a run is: a book's value leaves it open
BERT_BASE = dict(d_model=768, d_ff=3072, num_attention_heads=12, type_vocab_size=2)  # None is the teacher's
SAME = dict(gate_total_step='total_step', gate_warmup_step='warmup_step')  # None is the student's


def trains(command): return command not in ('run_fine_tune_eval', 'generate_test_prediction', 'eval_dev_loss')


def value_of(command): return Recipe if trains(command) else Evaluation


def meant(flag, text, command):
    """The field that a flag sets, and the value that its text has there."""
    if flag in ('probing_exp', 'alp_exp'): return 'method', text.replace('-', '_')
    if flag.endswith('_indices'): return flag, tuple(int(k) for k in text.split(','))
    flag = dict(texperiment='teacher_exp').get(flag, flag)
    kind = next(kind_of(f) for f in fields(value_of(command)) if f.name == flag)
    return flag, kind(text)


def held(value, field):
    """What a recipe says of a field, or what its silence comes to."""
    said = getattr(value, field)
    if said is not None: return said
    return getattr(value, SAME[field]) if field in SAME else BERT_BASE.get(field)


def in_the_book(task, command, flags):
    """The one value of `run_books` that is this command."""
    kind = value_of(command)
    found = [r for r in run_books[task].values() if (type(r), r.experiment) == (kind, flags['experiment'])]
    if kind is Evaluation: found = [r for r in found if (r.command, r.dataset) == (command, flags['dataset'])]
    assert len(found) == 1, found
    return found[0]


def made(command, flags):
    """What the command line makes of a command."""
    args = cli.parse(line_of(command, flags))
    return (cli.recipe_of if trains(command) else cli.evaluation_of)(args)


@needs_sheet
def test_the_sheet_has_all_commands_and_the_books_no_others():
    assert Counter(task for task, *_ in rows()) == dict(rte=11, mrpc=10, sst2=11, qnli=14, qqp=10, mnli=11)
    assert sum(len(flags) for *_, flags in rows()) == 1775
    known = [id(in_the_book(*row)) for row in rows()]
    everything = {(task, name): id(r) for task, book in run_books.items() for name, r in book.items()}
    others = [name for name, value in everything.items() if value not in known]
    assert len(set(known)) == 67 and others == [('rte', 'fine_tune_later'), ('rte', 'lad_later')]


@sheet
def test_every_flag(row):
    task, command, flags = row
    parsed, kept = made(command, flags), in_the_book(task, command, flags)
    for flag, text in flags.items():
        if flag == 'num_class':
            assert get_task(task).num_labels == int(text)
            continue
        field, wanted = meant(flag, text, command)
        if field == 'teacher_indices' and kept.method == 'lad_user_defined': field = 'gate_indices'
        assert held(parsed, field) == wanted, flag
        if field not in PLACES: assert held(kept, field) == wanted, flag
    open_fields = {f.name: None for f in fields(kept) if f.name in (*PLACES, *BERT_BASE, *SAME)}
    assert parsed.replace(**open_fields) == kept   # and nothing that the command does not say
    if command in METHODS: assert kept.method == METHODS[command]


@sheet
def test_resolves_as_written(row, tmp_path, monkeypatch, capsys):
    """Under --dry_run: a plan, what is missing, and nothing on the disk. Data that is not there is named."""
    task, command, flags = row
    glue = Path(os.environ.get('LAD_NB_GLUE') or SHARED/'data'/'glue')
    monkeypatch.setenv('LAD_NB_GLUE', str(glue)); monkeypatch.chdir(tmp_path)
    assert cli.main([*line_of(command, flags), '--dry_run']) == 0
    planned = json.loads(capsys.readouterr().out)
    missing = dict(Counter(said.partition(':')[0] for said in planned['missing']))
    there = (glue/tasks[task].folder).is_dir()
    assert missing.pop('data', 0) == (0 if there else 1)
    if not there: assert any(f'no folder {tasks[task].folder}' in said for said in planned['missing'])
    if not trains(command):
        assert missing == dict(experiment=1) | (dict(teacher=1) if command == 'eval_dev_loss' else {})
        assert planned['splits'] == [flags['dataset']] and planned['batch_size'] == int(flags['batch_size'])
    else:
        lacking = 'encoder' if command == 'run_fine_tune' else 'teacher'
        there = lacking == 'encoder' and local_model(flags['ptrain_ver']) is not None
        assert missing == ({} if there else {lacking: 1})
        resolved(planned, command, flags)
    assert not list(tmp_path.iterdir())


def resolved(planned, command, flags):
    steps = dict(warmup_step=int(flags['warmup_step']), total_step=int(flags['total_step']))
    recipe = planned['recipe']
    assert planned['schedule']['student'] == steps and recipe['seed'] == int(flags['seed'])
    assert recipe['lr'] == float(flags['lr'])
    assert ('gates' in planned['schedule']) == ('gate_lr' in flags)
    if command == 'run_fine_tune': return
    mapping, M = planned['mapping'], int(flags['num_hidden_layers'])
    assert mapping['T'] == 12 and recipe['mu'] == float(flags['mu'])
    lists = [flags[k].split(',') for k in ('gate_indices', 'teacher_indices') if k in flags]
    user_defined = 'user_defined' in flags.get('probing_exp', '')
    assert len(mapping['reads']) == (len(lists[0]) if user_defined else M)
    if user_defined:
        source = 'layer' if command == 'run_probing' else 'gate'
        pairs = zip(flags['student_indices'].split(','), lists[0])
        assert mapping['reads'] == [f'{m} <- {source} {k}' for m, k in pairs]
    if 'partial' in flags['experiment']: assert mapping['reads'][-1] == '6 <- layer 12'
    if flags.get('probing_exp') == 'lad_cls': assert (mapping['on'], recipe['norm']) == ('cls', 'token')


def test_what_the_books_ask_for_is_what_they_train():
    """Checkpoints that exist, of experiments that a command trains; these four are published without."""
    found = set()
    for task, book in run_books.items():
        trained = {r.experiment: r for r in book.values() if isinstance(r, Recipe)}
        asked = [(r.experiment, r.ckpt) for r in book.values() if isinstance(r, Evaluation)]
        taught = [(r.teacher_exp, r.tckpt) for r in book.values() if r.teacher_exp]
        for experiment, step in [*asked, *taught]:
            if experiment not in trained: found.add((task, experiment))
            elif step:
                run = trained[experiment]
                assert step % run.ckpt_step == 0 or step == run.total_step
    assert found == {('mrpc', 'teacher_base'), ('sst2', 'partial_LAD_0_42'), ('qqp', 'AKD_soft_9_42'),
                     ('qqp', 'partial_LAD_0_42')}


def test_the_later_release():
    """SPEC.md, Recipes: the settings that it names."""
    teacher, student = (run_books['rte'][name] for name in ('fine_tune_later', 'lad_later'))
    named = dict(num_hidden_layers=6, lr=7e-4, gate_lr=3e-5, epoch=10., warmup_rate=.1, softmax_temp=10.,
                 soft_weight=.5, hard_weight=.5, mu=1000.)
    assert {k: getattr(student, k) for k in named} == named and teacher.lr == 7e-5
    assert student.teacher_exp == teacher.experiment and student.tckpt == teacher.total_step


@needs_book
@needs_sheet
def test_the_book_of_rte_is_in_the_sheet():
    of_sheet = [(command, flags) for task, command, flags in rows() if task == 'rte']
    flags = lambda words: dict(zip([w.removeprefix('--') for w in words[1::2]], words[2::2]))
    assert [(words[0], flags(words)) for words in commands()] == of_sheet


def smaller(words):
    """12 -> 6 layers become 6 -> 3, 12 -> 4 becomes 6 -> 2, and few updates of them."""
    flags = dict(zip(words[1::2], words[2::2]))
    small = dict(ptrain_ver=SMALL, d_model='384', d_ff='1536', ckpt_step='2', tckpt='3', ckpt='3')
    small |= dict(total_step='3', warmup_step='1', gate_total_step='3', gate_warmup_step='1')
    small |= dict.fromkeys(PLACES, '-1')
    flags |= {f'--{n}': v for n, v in small.items() if f'--{n}' in flags}
    halves = lambda text: ','.join(str(int(k)//2) for k in text.split(','))
    if flags.get('--probing_exp') == 'lad_user_defined':
        flags['--teacher_indices'] = halves(flags['--teacher_indices'])  # six pairs of a six-layer student
    elif '--num_hidden_layers' in flags: flags['--num_hidden_layers'] = halves(flags['--num_hidden_layers'])
    if flags.get('--probing_exp') == 'partial_lad': flags['--student_indices'] = '1,2,3'
    return [words[0], *(w for pair in flags.items() for w in pair)], flags


@pytest.mark.slow
@needs_book
def test_in_order_on_the_real_rte(glue, tmp_path, monkeypatch, capsys):
    """Teacher, all distillations, scores on train and dev, predictions."""
    (tmp_path/'data').mkdir(); (tmp_path/'data'/'fine_tune').symlink_to(glue)   # where the run book puts it
    monkeypatch.delenv('LAD_NB_GLUE', raising=False); monkeypatch.chdir(tmp_path)
    for words in commands():
        line, flags = smaller(words)
        assert cli.main(line) == 0, f"{line}: {capsys.readouterr().err}"
        folder = Path('experiments')/f"{flags['--experiment']}_bert_rte"
        assert (folder/'model.safetensors').is_file()
        saved = ['checkpoint-2', 'checkpoint-3']
        if trains(words[0]): assert sorted(p.name for p in folder.glob('checkpoint-*')) == saved
    scored = Path('experiments')/'LAD_soft_3_26_bert_rte'
    for split in ('train', 'dev'): assert list(pd.read_csv(scored/f'eval-{split}.csv').step) == [2, 3]
    predictions = (scored/'predictions'/'checkpoint-3'/'RTE.tsv').read_text().splitlines()
    answers = {line.split('\t')[1] for line in predictions[1:]}
    assert len(predictions) == 3001 and answers <= {'entailment', 'not_entailment'}
    assert len([p for p in Path('experiments').iterdir() if p.is_dir()]) == 8
