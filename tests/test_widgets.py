"""What stepping promises: the bytes of a run that ran free, a clean boundary, records that are right."""
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from lad_nb.experiment import assemble, resolve, run
from lad_nb.models import SMALL
from lad_nb.panel import LiveView, Panel
from lad_nb.runs import checkpoints, find_checkpoint, read_log
from lad_nb.stepper import Stepper
from lad_nb.training import train

HERE = Path(__file__).parent
FILES = ('model.safetensors', 'gates.safetensors', 'log.jsonl')
SETTINGS = dict(total_step=7, ckpt_step=3, log_step=2)


def same_bytes(a, b): return [f for f in FILES if (a/f).read_bytes() != (b/f).read_bytes()] == []


@pytest.fixture
def whole(experiments, lad):
    """The run that ran free, of two micro-batches an update, over the end of an epoch."""
    folder = experiments/'whole_widgets_bert_toy'
    if folder.exists(): return folder
    recipe = lad.replace(experiment='whole_widgets', accum_step=2, train_size=50, **SETTINGS)
    return run(recipe, experiments, progress=False)


@pytest.fixture
def recipe(whole, lad): return lad.replace(experiment='held', accum_step=2, train_size=50, **SETTINGS)


def saved(recipe, folder):
    """The recipe as a file, for a process of its own."""
    file = folder/'recipe.json'
    file.write_text(json.dumps(recipe.to_dict()))
    return str(file)


def test_stepped_with_a_panel_and_noise_between(experiments, recipe, whole):
    """50 rows are 3 updates an epoch: steps 3 and 6 end one."""
    with Stepper(recipe, experiments) as stepper:
        board = Panel(stepper)
        assert stepper.state == 'held' and stepper.done == 0 and stepper.record is None
        while not stepper.over:
            record = stepper.step()
            torch.rand(7), np.random.rand(3), torch.manual_seed(record.step)
            assert record.full and record.step == stepper.done
    stepper.thread.join(20)  # it draws once more
    assert same_bytes(whole, stepper.folder) and stepper.state == 'done'
    assert '<span class="lad-step">7</span>' in board.places['status'].value
    assert list(stepper.history.step) == [*range(1, 8)]


@pytest.mark.parametrize('stop', [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5))])
def test_stopped_and_resumed(experiments, recipe, whole, stop):
    """At a checkpoint that was due, at the end of an epoch, and in between; two log lines apart."""
    stepper = Stepper(recipe.replace(experiment=f'stop{stop}'), experiments)
    stepper.step(stop)
    torch.rand(3)
    stepper.stop()
    assert stepper.state == 'stopped' and max(checkpoints(stepper.folder)) == stop
    assert not (stepper.folder/'model.safetensors').exists()
    with pytest.raises(RuntimeError, match=f'stopped after {stop} of 7 updates'): stepper.step()
    again = Stepper(recipe.replace(experiment=f'stop{stop}'), experiments, resume=True)
    assert again.done == stop and list(again.history.step) == [2, 4][:stop//2]  # as logged
    assert again.draw().png() and Panel(again).full.step == stop
    again.run_until()
    assert same_bytes(whole, again.folder)


def test_stopped_and_gone_on_in_the_same_panel(experiments, recipe, whole):
    """Losses, records and the panel's ear stay; asking for a score and for the gates leaves the bytes."""
    stepper = Stepper(recipe, experiments)
    board, heard = Panel(stepper), []
    stepper.listen(heard.append)
    stepper.step(3)
    board.buttons['stop'].click()
    stepper.thread.join()
    assert '>stopped<' in board.places['status'].value and not board.buttons['resume'].disabled
    board.buttons['resume'].click()
    assert stepper.state == 'held' and stepper.done == 3 and list(stepper.history.step) == [1, 2, 3]
    scores = stepper.score()
    assert stepper.read_gates().step == 3 and 0 <= scores['accuracy'] <= 1
    stepper.step()
    assert heard.count('step') == 4 and stepper.session.records[-1].step == 4
    stepper.run_until()
    stepper.thread.join(20)
    assert same_bytes(whole, stepper.folder) and list(stepper.history.step) == [*range(1, 8)]
    with pytest.raises(RuntimeError, match='done after 7 of 7'): stepper.resume()


def test_stopped_without_a_checkpoint(experiments, recipe):
    stepper = Stepper(recipe, experiments)
    stepper.step(2)
    stepper.stop(save=False)
    assert stepper.state == 'stopped' and checkpoints(stepper.folder) == {}


def test_scores_on_dev_are_drawn_from_the_log(experiments, recipe):
    stepper = Stepper(recipe, experiments)
    board = Panel(stepper)
    stepper.step(2)
    assert 'On dev' not in board.places['dev'].value
    with (stepper.folder/'log.jsonl').open('a') as log:
        for step in (1, 2):
            log.write(json.dumps(dict(step=step, eval_loss=.7, eval_accuracy=.5 + step/10)) + '\n')
    board.draw()
    assert 'accuracy 0.700' in board.places['dev'].value and len(stepper.history) == 2
    stepper.stop(save=False)


@pytest.mark.slow
def test_two_runs_side_by_side(experiments, recipe, whole):
    """They share torch's random numbers, and neither notices the other."""
    one, two = (Stepper(recipe.replace(experiment=n), experiments) for n in ('left', 'right'))
    while not two.over: one.step(), two.step()
    assert same_bytes(whole, one.folder) and same_bytes(whole, two.folder)


def test_an_interrupt_holds_at_a_boundary(experiments, recipe, whole, capsys):
    class Interrupt(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 2: os.kill(os.getpid(), signal.SIGINT)  # amid the third update

    before, stepper = signal.getsignal(signal.SIGINT), Stepper(recipe, experiments)
    stepper.trainer.add_callback(Interrupt())
    record = stepper.run_until()
    assert stepper.interrupted and stepper.state == 'held' and 3 <= record.step == stepper.done < 7
    assert f'held after update {stepper.done} of 7' in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before
    stepper.run_until()
    assert same_bytes(whole, stepper.folder)


def test_what_goes_wrong_in_training_is_said_in_the_callers_cell(experiments, recipe):
    trainer = assemble(resolve(recipe, experiments), progress=False)
    stepper = Stepper(trainer)
    stepper.step()
    def broken(*args, **kwargs): raise ZeroDivisionError('a loss that divides by zero')
    trainer.model.objective.register_forward_pre_hook(broken)
    with pytest.raises(ZeroDivisionError, match='divides by zero'): stepper.step(3)
    assert stepper.state == 'failed' and stepper.done == 1 and not stepper.thread.is_alive()
    with pytest.raises(RuntimeError, match='failed after 1 of 7'): stepper.step()
    assert stepper.stop() == stepper.folder


def test_one_stepper_holds_a_folder(experiments, recipe):
    stepper = Stepper(recipe, experiments)
    with pytest.raises(ValueError, match='held by another Stepper, after 0 updates'):
        Stepper(recipe, experiments, resume=True)
    stepper.step()
    for n in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match='whole number of updates'): stepper.step(n)
    with pytest.raises(ValueError, match='Update 1 is behind'): stepper.run_until(1)
    stepper.stop()
    with pytest.raises(FileExistsError, match='Resume it'): Stepper(recipe, experiments)


@pytest.mark.slow
def test_a_forgotten_stepper_goes_away(experiments, recipe, tmp_path):
    stepper = Stepper(recipe, experiments)
    thread = stepper.thread
    del stepper
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()
    file = saved(recipe.replace(experiment='forgotten'), tmp_path)
    command = [sys.executable, HERE/'forgotten.py', file, experiments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0 and 'leaving running' in done.stdout, done.stderr


SLOW = [pytest.param(m, marks=pytest.mark.slow) for m in
        ('alp_kd_hidden', 'lad_no', 'partial_lad', 'bert_pkd', 'alp_kd')]


@pytest.mark.parametrize('method', ['lad', 'kd', *SLOW])
def test_records_of_every_kind(experiments, recipe, method):
    """Loss parts are the log's; shares sum to 1; what trains has a gradient and moves."""
    recipe = recipe.replace(experiment=method, method=method, log_step=1, total_step=3, warmup_step=0)
    kind = 'gate' if 'lad' in method else 'student' if 'alp' in method else None
    with Stepper(recipe, experiments) as stepper:
        record = stepper.step(2)
        line, mapping = read_log(stepper.folder)[-1], stepper.trainer.model.mapping
        check_losses(record, line, gates='lad' in method)
        check_groups(record, line)
        check_examples(record)
        assert (record.shares is None) == (kind is None)
        if kind: check_shares(record, kind)
        if kind == 'gate':
            assert set(record.openness) <= set(mapping.gates)
            assert all(0 < m < 1 and 0 < sd < .5 for m, sd in record.openness.values())
        assert str(record).startswith('update 2 of 3')
        assert len(record.draw().png()) > 5000 and len(stepper.draw().png()) > 5000
        assert Panel(stepper).places['mapping'].value.count('<circle') == 6 + 3 + len(mapping.gates)


def check_losses(record, line, gates):
    assert line['step'] == 2 and record.parts == {part: line[part] for part in record.parts}
    assert set(record.parts) >= {'loss', 'hard', 'soft'}
    rates = {'student': line['learning_rate']} | ({'gates': line['gate_learning_rate']} if gates else {})
    assert record.learning_rates == rates
    assert sum(record.terms.values()) == pytest.approx(line['loss'], rel=1e-4)


def check_groups(record, line):
    student = [name for name in record.groups.index if not name.startswith('gate')]
    assert (record.groups.gradient[student]**2).sum()**.5 == pytest.approx(line['grad_norm'], rel=1e-3)
    assert (record.groups.moved > 0).all() and (record.groups.relative < .2).all()


def check_examples(record):
    examples = record.examples
    assert len(examples) == 16 == len(record.student_logits)
    assert examples.gap.is_monotonic_decreasing and examples.text.str.contains(r'\.').all()


def check_shares(record, kind):
    for shares in (record.shares, record.mixing):
        sums = shares.groupby(kind).share.sum() + shares.groupby(kind).bias.first()
        assert sums.tolist() == pytest.approx([1.]*len(sums), abs=1e-4)


def test_movement_is_what_the_weights_did(experiments, recipe):
    """Against a copy of all weights, taken from outside."""
    with Stepper(recipe, experiments) as stepper:
        stepper.step()
        model = stepper.trainer.model
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        record = stepper.step()
        moved = {n: (p.detach() - before[n]).flatten() for n, p in model.named_parameters()}
        change = lambda start: torch.cat([d for n, d in moved.items() if n.startswith(start)]).norm().item()
        assert record.moved['layer 2'] == pytest.approx(change('student.bert.encoder.layer.1.'), rel=1e-4)
        assert record.moved['gate 3'] == pytest.approx(change('objective.gates.gate.3.'), rel=1e-4)


def test_fine_tuning_can_be_stepped_as_well(experiments, recipe):
    recipe = recipe.replace(experiment='tuned', method='fine_tune', ptrain_ver=SMALL)
    with Stepper(recipe, experiments) as stepper:
        record = stepper.step()
        assert record.teacher_logits is None and record.shares is None and set(record.terms) == {'hard'}
        assert len(record.draw().png()) > 5000
        assert 'student' in str(record) and Panel(stepper).places['examples'].value


def test_live_view_leaves_the_bytes_and_no_hook(experiments, recipe, whole):
    live = LiveView(every=2)
    plan = resolve(recipe.replace(experiment='live'), experiments)
    trainer = assemble(plan, progress=False, callbacks=[live])
    folder = train(trainer, trainer.description)
    assert same_bytes(whole, folder)
    assert live.record.step == 7 and live.record.shares is not None and not live.record.full
    assert not trainer.model._forward_hooks and not trainer.model._forward_pre_hooks


class Kernel:
    """A kernel as Jupyter starts one; what a cell says is in `said`."""
    def __init__(self):
        from jupyter_client.manager import start_new_kernel
        (self.manager, self.client), self.said = start_new_kernel(kernel_name='python3'), ''

    def run(self, code, timeout=120, interrupt=None):
        """A cell, interrupted after so many seconds: True if it ended well."""
        heard = []
        if interrupt: threading.Timer(interrupt, self.manager.interrupt_kernel).start()
        listen = lambda message: heard.append(message['content'])
        reply = self.client.execute_interactive(code, timeout=timeout, output_hook=listen)
        text = lambda content: content.get('text', '') or str(content.get('data', {}).get('text/plain', ''))
        self.said = ''.join(map(text, heard))
        return reply['content']['status'] == 'ok'

    def restart(self):
        self.manager.restart_kernel(now=True)
        self.client.wait_for_ready(timeout=60)

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.mark.slow
def test_a_kernel_that_is_interrupted_and_restarted(experiments, recipe, whole, tmp_path):
    """As in Jupyter: a cell is interrupted, the kernel is killed amid a run, and a new one goes on."""
    folder, recipe = experiments/'kernel_bert_toy', saved(recipe.replace(experiment='kernel'), tmp_path)
    opening, kernel = f"%run '{HERE/'open_stepper.py'}' '{recipe}' '{experiments}' resume", Kernel()
    try:
        assert kernel.run(opening)
        assert kernel.run('import time; stepper.listen(lambda what: time.sleep(.15))')  # a second in all
        assert kernel.run('stepper.run_until()', interrupt=.4)
        assert 'Interrupted: held after update' in kernel.said
        assert kernel.run('stepper.state, 1 + 1') and "('held', 2)" in kernel.said
        background = 'stepper.step(max(1, 4 - stepper.done)); stepper.start()'
        assert kernel.run(background)  # past the checkpoint of update 3
        kernel.restart()
        assert not (folder/'model.safetensors').exists() and find_checkpoint(folder)
        assert kernel.run(opening)
        assert kernel.run('stepper.run_until(); stepper.state') and "'done'" in kernel.said
    finally: kernel.close()
    assert same_bytes(whole, folder)
