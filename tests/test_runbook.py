"""The run book's commands on the real RTE: each as written under --dry_run, and each run with nothing changed but the size."""
import json
import os
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest

from lad_nb import cli
from lad_nb.data import SMALL

BOOK = Path(os.environ.get('LAD_NB_RUNBOOK') or Path(__file__).parents[2]/'shared'/'seed'/'fine_tune_rte.md')
if not BOOK.is_file(): pytest.skip(f'no run book: {BOOK} is not there; LAD_NB_RUNBOOK names another', allow_module_level=True)


def commands():
    """Every `python3.8 X.py ..` block as a list: X and its flags."""
    blocks = re.findall(r'```sh\n(.*?)```', BOOK.read_text(), re.S)
    lines = [shlex.split(b.replace('\\\n', ' ')) for b in blocks if 'python3.8' in b]
    return [[words[1].removesuffix('.py'), *words[2:]] for words in lines]


def smaller(words):
    """12 -> 6 layers become 6 -> 3, 12 -> 4 becomes 6 -> 2, and few updates of them."""
    flags = dict(zip(words[1::2], words[2::2]))
    small = dict(ptrain_ver=SMALL, d_model='384', d_ff='1536', total_step='3', warmup_step='1', gate_total_step='3', gate_warmup_step='1', ckpt_step='2', tckpt='3', ckpt='3', device_id='-1', tdevice_id='-1', gate_device_id='-1')
    flags |= {f: v for f, v in ((f'--{n}', v) for n, v in small.items()) if f in flags}
    halves = lambda text: ','.join(str(int(k)//2) for k in text.split(','))
    if flags.get('--probing_exp') == 'lad_user_defined': flags['--teacher_indices'] = halves(flags['--teacher_indices'])  # six pairs of a six-layer student
    elif '--num_hidden_layers' in flags: flags['--num_hidden_layers'] = str(int(flags['--num_hidden_layers'])//2)
    if flags.get('--probing_exp') == 'partial_lad': flags['--student_indices'] = '1,2,3'
    return [words[0], *(w for pair in flags.items() for w in pair)], flags


def test_the_book_has_all_its_commands():
    assert [c[0] for c in commands()] == ['run_fine_tune', 'run_lad_distil', 'run_probing_lad', 'run_lad_no_distil', 'run_probing_lad', 'run_alp_distil', 'run_alp_distil',
                                          'run_pkd_distill', 'run_fine_tune_eval', 'run_fine_tune_eval', 'generate_test_prediction']


@pytest.mark.parametrize('words', [c for c in commands() if c[0] in cli._training], ids=lambda w: f"{w[0]} {w[2]}")
def test_as_written_dry(words, glue, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('LAD_NB_GLUE', str(glue)); monkeypatch.chdir(tmp_path)
    assert cli.main([*words, '--dry_run']) == 0
    planned = json.loads(capsys.readouterr().out)
    flags = dict(zip(words[1::2], words[2::2]))
    assert planned['data']['rows'] == 2490 and planned['seed'] == int(flags['--seed'])
    assert planned['optimiser']['student']['lr'] == float(flags['--lr'])
    assert planned['schedule']['student'] == dict(warmup_step=int(flags['--warmup_step']), total_step=int(flags['--total_step']))
    if words[0] != 'run_fine_tune':
        assert len(planned['missing']) == 1 and 'teacher_huggingface' in planned['missing'][0]
        assert planned['teacher']['num_hidden_layers'] == 12 and len(planned['mapping']['reads']) == int(flags['--num_hidden_layers'])
        assert planned['loss']['mu'] == float(flags['--mu'])
        if '--gate_lr' in flags: assert planned['optimiser']['gates']['lr'] == float(flags['--gate_lr'])
    assert not list(tmp_path.iterdir())


def test_in_order_on_the_real_rte(glue, tmp_path, monkeypatch, capsys):
    """Teacher, all distillations, scores on train and dev, predictions."""
    (tmp_path/'data').mkdir(); (tmp_path/'data'/'fine_tune').symlink_to(glue)   # where the run book puts it
    monkeypatch.delenv('LAD_NB_GLUE', raising=False); monkeypatch.chdir(tmp_path)
    for words in commands():
        line, flags = smaller(words)
        assert cli.main(line) == 0, f"{line}: {capsys.readouterr().err}"
        folder = Path('experiments')/f"{flags['--experiment']}_bert_rte"
        assert (folder/'model.safetensors').is_file()
        if words[0] in cli._training: assert sorted(p.name for p in folder.glob('checkpoint-*')) == ['checkpoint-2', 'checkpoint-3']
    scored = Path('experiments')/'LAD_soft_3_26_bert_rte'
    for split in ('train', 'dev'): assert list(pd.read_csv(scored/f'eval-{split}.csv').step) == [2, 3]
    predictions = (scored/'predictions'/'checkpoint-3'/'RTE.tsv').read_text().splitlines()
    assert len(predictions) == 3001 and {line.split('\t')[1] for line in predictions[1:]} <= {'entailment', 'not_entailment'}
    assert len([p for p in Path('experiments').iterdir() if p.is_dir()]) == 8
