"""What a run promises: the same bytes again, the same bytes after a stop, a batch that is what it says, each
gate clipped alone."""
import json

import pytest
import torch
from conftest import FEW, program, ready, same_bytes
from transformers import AutoModelForSequenceClassification, pipeline

from lad_nb.experiment import assemble_distiller, open_run, rerun, resolve, run
from lad_nb.runs import find_checkpoint, read_log


def test_same_run_in_another_process(experiments, lad):
    here = run(lad.replace(experiment='here', total_step=6), experiments, progress=False)
    done = program('reruns.py', here, 'there', cwd=experiments)
    assert done.returncode == 0, done.stderr
    assert same_bytes(here, experiments/'there_bert_toy') and (here/'gates.safetensors').exists()


@pytest.mark.parametrize('stop', [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5))])
def test_stopped_and_resumed(experiments, lad, stop):
    """A process that dies between two log lines; a new one goes on from the last checkpoint."""
    whole = experiments/'whole_bert_toy'
    settings = dict(total_step=7, ckpt_step=2, log_step=3)
    if not whole.exists(): run(lad.replace(experiment='whole', **settings), experiments, progress=False)
    name = f'stopped{stop}'
    recipe = lad.replace(experiment=name, **settings)
    died = program('dies.py', experiments, json.dumps(recipe.to_dict()), stop, cwd=experiments)
    assert died.returncode == 9, died.stderr
    stopped = experiments/f'{name}_bert_toy'
    assert not (stopped/'model.safetensors').exists()
    assert find_checkpoint(stopped).name == f'checkpoint-{stop//2*2}'
    run(recipe, experiments, resume=True, progress=False)
    assert same_bytes(whole, stopped) and (whole/'gates.safetensors').exists()


def test_resuming_what_is_done_or_what_has_changed(experiments, lad):
    recipe = lad.replace(experiment='done')
    folder = run(recipe, experiments, progress=False)
    content = lambda: {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    before = content()
    run(recipe, experiments, resume=True, progress=False)
    assert content() == before
    with pytest.raises(ValueError, match='lr is 0.001, it began with 0.0003'):
        run(recipe.replace(lr=1e-3), experiments, resume=True, progress=False)
    assert content() == before


def test_micro_batches_sum_to_the_batch(experiments, lad):
    """Without dropout, four micro-batches of four rows give the gradient of one batch of sixteen."""
    recipe = lad.replace(dropout=0., total_step=3, log_step=1)
    recipes = [recipe.replace(experiment=f'accum{n}', accum_step=n) for n in (1, 4)]
    logs = [read_log(run(r, experiments, progress=False)) for r in recipes]
    for one, four in zip(*logs):
        for part in ('loss', 'hard', 'soft', 'hidden_1', 'hidden_3'):
            assert four[part] == pytest.approx(one[part], rel=2e-4, abs=1e-6)
        assert four['grad_norm'] == pytest.approx(one['grad_norm'], rel=2e-3)


def test_log_has_parts_and_both_learning_rates(experiments, lad):
    recipe = lad.replace(experiment='log', gate_lr=1e-3, gate_total_step=8, gate_warmup_step=4, log_step=1)
    log = read_log(run(recipe, experiments, progress=False))
    assert [line['step'] for line in log] == [1, 2, 3, 4]
    for line in log:
        hidden = sum(line[f'hidden_{m}'] for m in (1, 2, 3))
        assert line['loss'] == pytest.approx(.3*line['hard'] + .7*line['soft'] + 500/3*hidden, rel=1e-4)
    assert [line['learning_rate'] for line in log] == pytest.approx([0, 3e-4, 2e-4, 1e-4])
    assert [line['gate_learning_rate'] for line in log] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4])


def norm_of_gradients(module):
    norms = [p.grad.norm() for p in module.parameters() if p.grad is not None]
    return torch.stack(norms).norm().item()


def test_each_gate_is_clipped_by_itself(experiments, lad):
    recipe = lad.replace(experiment='clip', max_norm=.5, gate_max_norm=.01)
    trainer = ready(recipe, experiments)
    seen = {}
    def look(*_):
        seen.setdefault('student', norm_of_gradients(trainer.model.student))
        for name, block in trainer.model.objective.blocks().items():
            seen.setdefault(name, norm_of_gradients(block))
    trainer.create_optimizer().register_step_pre_hook(look)
    trainer.train()
    assert seen['student'] == pytest.approx(.5, rel=1e-3)
    gates = [n for k, n in seen.items() if k.startswith('gate')]
    assert len(gates) == 5 and gates == pytest.approx([.01]*5, rel=1e-3)


def test_run_folder_holds_no_teacher_and_no_pickles_of_ours(experiments, lad):
    folder = run(lad.replace(experiment='folder'), experiments, progress=False)
    expected = {'recipe.json', 'log.jsonl', 'config.json', 'model.safetensors', 'gates.safetensors',
                'tokenizer.json', 'checkpoint-2', 'checkpoint-4'}
    assert {p.name for p in folder.iterdir()} >= expected
    assert not list(folder.rglob('training_args.bin'))
    parameters = sum(p.numel() for p in open_run(folder)[0].student.parameters())
    assert (folder/'model.safetensors').stat().st_size < 4.1*parameters
    assert any((folder/'tensorboard').iterdir())


def test_pipeline_answers_with_label_names(experiments, lad):
    folder = run(lad.replace(experiment='pipe'), experiments, progress=False)
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_hidden_layers == 3
    answers = pipeline('text-classification', model=str(folder), device='cpu')
    answer = answers('Anna sleeps.')
    assert answer[0]['label'] in ('entailment', 'not_entailment')


def test_rerun_refuses_another_teacher(experiments, lad, tmp_path):
    folder = run(lad.replace(experiment='first'), experiments, progress=False)
    said = json.loads((folder/'recipe.json').read_text())
    said['teacher']['sha256'] = '0'*64
    (folder/'recipe.json').write_text(json.dumps(said))
    with pytest.raises(ValueError, match='is not the one that'):
        rerun(folder, progress=False)


@pytest.mark.parametrize('norm', ['token', 'sequence'])
def test_a_wider_teacher_is_reached_through_a_projection(experiments, lad, norm):
    recipe = lad.replace(experiment=f'narrow_{norm}', d_model=96, d_ff=192, num_attention_heads=4, norm=norm)
    with pytest.warns(UserWarning, match='random weights'):
        folder = run(recipe, experiments, progress=False)
    with pytest.warns(UserWarning, match='random weights'):
        fresh = assemble_distiller(resolve(recipe, experiments))[0].objective.blocks()
    trained = open_run(folder)[0].objective.blocks()
    assert list(trained)[-3:] == ['projection 1', 'projection 2', 'projection 3']
    for name, block in trained.items():
        first, weights = next(iter(block.state_dict().items()))
        assert not torch.equal(weights, fresh[name].state_dict()[first]), f'{name} did not learn'


METHODS = ['lad', 'lad_cls', 'lad_no', 'lad_reversed', 'partial_lad', 'bert_pkd', 'bert_pkd_cls',
           'bert_pkd_odd', 'kd', 'alp_kd', 'alp_kd_hidden', 'alp_kd_hidden_v2']


@pytest.mark.parametrize('method', METHODS)
def test_every_method_trains_and_opens(experiments, lad, method):
    folder = run(lad.replace(experiment=method, method=method, total_step=2), experiments, progress=False)
    assert open_run(folder)[0].mapping.name == method
    assert (folder/'gates.safetensors').exists() == ('lad' in method)


@pytest.mark.slow
def test_losses_fall_when_there_is_something_to_learn(experiments, lad):
    recipe = lad.replace(experiment='falls', lr=2e-3, total_step=30, warmup_step=3, log_step=5)
    log = read_log(run(recipe, experiments, progress=False))
    assert log[-1]['hidden_1'] < .7*log[0]['hidden_1'] and log[-1]['loss'] < .7*log[0]['loss']
    assert FEW['total_step'] < 30
