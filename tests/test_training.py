"""What a run promises: the same bytes again, the same bytes after a stop, a batch that is what it says, each gate clipped alone."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import FEW

from lad_nb.experiment import build, make_trainer, open_run, rerun, run
from lad_nb.runs import find_checkpoint, read_log

FILES = ('model.safetensors', 'gates.safetensors', 'log.jsonl')


def same_bytes(a, b): return all((a/f).read_bytes() == (b/f).read_bytes() for f in FILES)


def in_a_process(code, cwd, **kwargs):
    return subprocess.run([sys.executable, '-c', code], cwd=cwd, capture_output=True, text=True, **kwargs)


def test_same_run_in_another_process(experiments, lad):
    here = run(lad.replace(experiment='here', total_step=6), experiments, progress=False)
    done = in_a_process(f"from lad_nb.recipes import rerun; rerun({str(here)!r}, 'there', progress=False)", experiments)
    assert done.returncode == 0, done.stderr
    assert same_bytes(here, experiments/'there_bert_toy')


@pytest.mark.parametrize('stop', [2, 3, 5])
def test_stopped_and_resumed(experiments, lad, stop):
    """A process that dies between two log lines; a new one goes on from the last checkpoint."""
    whole = experiments/'whole_bert_toy'
    settings = dict(total_step=7, ckpt_step=2, log_step=3)
    if not whole.exists(): run(lad.replace(experiment='whole', **settings), experiments, progress=False)
    name = f'stopped{stop}'
    recipe = lad.replace(experiment=name, **settings)
    die = ("import os\nfrom transformers import TrainerCallback\nfrom lad_nb.recipes import recipe_from_dict, run\n"
           f"class Die(TrainerCallback):\n    def on_step_begin(self, args, state, control, **k):\n        if state.global_step == {stop}: os._exit(9)\n"
           f"run(recipe_from_dict({recipe.to_dict()!r}), {str(experiments)!r}, progress=False, callbacks=[Die()])")
    assert in_a_process(die, experiments).returncode == 9
    stopped = experiments/f'{name}_bert_toy'
    assert not (stopped/'model.safetensors').exists() and find_checkpoint(stopped).name == f'checkpoint-{stop//2*2}'
    run(recipe, experiments, resume=True, progress=False)
    assert same_bytes(whole, stopped)


def test_resuming_what_is_done_or_what_has_changed(experiments, lad):
    folder = run(lad.replace(experiment='done'), experiments, progress=False)
    before = {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    run(lad.replace(experiment='done'), experiments, resume=True, progress=False)
    assert {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()} == before
    with pytest.raises(ValueError, match='lr is 0.001, it began with 0.0003'): run(lad.replace(experiment='done', lr=1e-3), experiments, resume=True, progress=False)
    assert {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()} == before


def test_micro_batches_sum_to_the_batch(experiments, lad):
    """Without dropout, four micro-batches of four rows give the gradient of one batch of sixteen."""
    logs = [read_log(run(lad.replace(experiment=f'accum{n}', accum_step=n, dropout=0., total_step=3, log_step=1), experiments, progress=False)) for n in (1, 4)]
    for one, four in zip(*logs):
        for part in ('loss', 'hard', 'soft', 'hidden_1', 'hidden_3'): assert four[part] == pytest.approx(one[part], rel=2e-4, abs=1e-6)
        assert four['grad_norm'] == pytest.approx(one['grad_norm'], rel=2e-3)


def test_log_has_parts_and_both_learning_rates(experiments, lad):
    log = read_log(run(lad.replace(experiment='log', gate_lr=1e-3, gate_total_step=8, gate_warmup_step=4, log_step=1), experiments, progress=False))
    assert [line['step'] for line in log] == [1, 2, 3, 4]
    for line in log:
        assert line['loss'] == pytest.approx(.3*line['hard'] + .7*line['soft'] + 500/3*sum(line[f'hidden_{m}'] for m in (1, 2, 3)), rel=1e-4)
    assert [line['learning_rate'] for line in log] == pytest.approx([0, 3e-4, 2e-4, 1e-4])
    assert [line['gate_learning_rate'] for line in log] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4])


def test_each_gate_is_clipped_by_itself(experiments, lad):
    trainer = make_trainer(lad.replace(experiment='clip', max_norm=.5, gate_max_norm=.01), experiments, progress=False)
    seen = {}
    def look(*_):
        norm = lambda module: torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm().item()
        seen.setdefault('student', norm(trainer.model.student))
        for name, block in trainer.model.objective.blocks().items(): seen.setdefault(name, norm(block))
    trainer.create_optimizer().register_step_pre_hook(look)
    trainer.train()
    assert seen['student'] == pytest.approx(.5, rel=1e-3)
    gates = [n for k, n in seen.items() if k.startswith('gate')]
    assert len(gates) == 5 and gates == pytest.approx([.01]*5, rel=1e-3)


def test_run_folder_holds_no_teacher_and_no_pickles_of_ours(experiments, lad):
    folder = run(lad.replace(experiment='folder'), experiments, progress=False)
    assert {p.name for p in folder.iterdir()} >= {'recipe.json', 'log.jsonl', 'config.json', 'model.safetensors', 'gates.safetensors', 'tokenizer.json', 'checkpoint-2', 'checkpoint-4'}
    assert not list(folder.rglob('training_args.bin'))
    student = open_run(folder)[0].student
    assert (folder/'model.safetensors').stat().st_size < 4.1*sum(p.numel() for p in student.parameters())
    assert any((folder/'tensorboard').iterdir())


def test_pipeline_answers_with_label_names(experiments, lad):
    from transformers import AutoModelForSequenceClassification, pipeline
    folder = run(lad.replace(experiment='pipe'), experiments, progress=False)
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_hidden_layers == 3
    answer = pipeline('text-classification', model=str(folder), device='cpu')('Anna sleeps.')
    assert answer[0]['label'] in ('entailment', 'not_entailment')


def test_rerun_refuses_another_teacher(experiments, lad, tmp_path):
    folder = run(lad.replace(experiment='first'), experiments, progress=False)
    said = json.loads((folder/'recipe.json').read_text())
    said['teacher']['sha256'] = '0'*64
    (folder/'recipe.json').write_text(json.dumps(said))
    with pytest.raises(ValueError, match='is not the one that'): rerun(folder, progress=False)


@pytest.mark.parametrize('norm', ['token', 'sequence'])
def test_a_wider_teacher_is_reached_through_a_projection(experiments, lad, norm):
    recipe = lad.replace(experiment=f'narrow_{norm}', d_model=96, d_ff=192, num_attention_heads=4, norm=norm)
    with pytest.warns(UserWarning, match='random weights'): folder = run(recipe, experiments, progress=False)
    with pytest.warns(UserWarning, match='random weights'): fresh = build(recipe, experiments)[0]
    trained = open_run(folder)[0]
    assert list(trained.objective.blocks())[-3:] == ['projection 1', 'projection 2', 'projection 3']
    for name, block in trained.objective.blocks().items():
        assert not torch.equal(block.state_dict()[(first := next(iter(block.state_dict())))], fresh.objective.blocks()[name].state_dict()[first]), f'{name} did not learn'


@pytest.mark.parametrize('method', ['lad', 'lad_cls', 'lad_no', 'lad_reversed', 'partial_lad', 'bert_pkd', 'bert_pkd_cls', 'bert_pkd_odd', 'kd', 'alp_kd', 'alp_kd_hidden', 'alp_kd_hidden_v2'])
def test_every_method_trains_and_opens(experiments, lad, method):
    folder = run(lad.replace(experiment=method, method=method, total_step=2), experiments, progress=False)
    assert open_run(folder)[0].mapping.name == method
    assert (folder/'gates.safetensors').exists() == ('lad' in method)


def test_losses_fall_when_there_is_something_to_learn(experiments, lad):
    log = read_log(run(lad.replace(experiment='falls', lr=2e-3, total_step=30, warmup_step=3, log_step=5), experiments, progress=False))
    assert log[-1]['hidden_1'] < .7*log[0]['hidden_1'] and log[-1]['loss'] < .7*log[0]['loss']
    assert FEW['total_step'] < 30
