"""A gate of one's own, from the recipe to the study: what it trains, what it tells, what is refused."""
import copy
import json

import pytest
import torch
from conftest import same_bytes
from torch import nn

from lad_nb.analysis import gate_openness, gate_shares, layer_map, shares_by_step
from lad_nb.cli import main
from lad_nb.experiment import open_run, rerun, resolve, run
from lad_nb.gates import GateBlock, GateChain, aggregate_parts, content_shares, gate_kinds, norm_parts
from lad_nb.movement import gate_movement
from lad_nb.recipes import FAST, Recipe
from lad_nb.results import read_results
from lad_nb.runs import read_log
from lad_nb.stepper import Stepper
from lad_nb.study import Study, run_study

B, S, H, T = 2, 5, 8, 4


class Tempered(GateBlock):
    """A temperature on the sigmoid."""
    temperature = 4.
    def openness(self, previous): return torch.sigmoid(self.linear(previous)/self.temperature)


class Adding(GateBlock):
    """Adds to what is there, and says so."""
    def forward(self, h, previous):
        z = self.openness(previous)
        return self.norm(previous + z*h), z

    def parts(self, k, h, z, before): return norm_parts(self.norm, before | {k: z*h})


class Halves(nn.Module):
    """Learns nothing and tells nothing."""
    def __init__(self, hidden_size, norm, seq_len): super().__init__()
    def forward(self, h, previous): return (h + previous)/2, None


@pytest.fixture(autouse=True)
def known(monkeypatch):
    for kind in (Tempered, Adding, Halves): monkeypatch.setitem(gate_kinds, kind.__name__.lower(), kind)


@pytest.fixture(scope='module')
def tempered(quick, tmp_path_factory):
    """A run with tempered gates, and one with the package's own beside it."""
    root, own = tmp_path_factory.mktemp('own'), quick.replace(gate_lr=1e-2)
    run(own, root, progress=False)
    with pytest.MonkeyPatch.context() as patch: # a kind that stayed would be known to other files' tests
        patch.setitem(gate_kinds, 'tempered', Tempered)
        return run(own.replace(experiment='tempered', gate='tempered'), root, progress=False)


def test_a_recipe_names_its_gates_only_where_they_are_others():
    assert 'gate' not in Recipe().to_dict() and 'gate' not in Recipe(gate='highway').to_dict()
    assert Recipe(gate='tempered').to_dict()['gate'] == 'tempered'


def test_a_gate_that_is_not_defined_is_refused_by_name(quick, tmp_path):
    with pytest.raises(ValueError, match="no gate 'temperd' here. Gates are: highway, tempered, adding"):
        resolve(quick.replace(gate='temperd'), tmp_path)


def test_it_trains_other_gates_and_says_so(tempered):
    other = tempered.with_name(tempered.name.replace('tempered', 'quick'))
    assert not same_bytes(tempered, other)
    said, plain = (json.loads((f/'recipe.json').read_text()) for f in (tempered, other))
    assert said['recipe']['gate'] == 'tempered' and 'gate' not in plain['recipe']
    assert said['versions']['classes'].keys() == {'gate tempered'} and plain['versions']['classes'] == {}
    assert isinstance(open_run(tempered)[0].objective.gates.gate['2'], Tempered)


def test_it_trains_to_the_same_bytes_again(tempered):
    assert same_bytes(tempered, rerun(tempered, progress=False))


def test_its_shares_are_those_of_highway_gates_with_weights_a_quarter_as_large(tempered):
    """A temperature of 4 is a linear map divided by 4: what arrives must be the same."""
    mine = open_run(tempered)[0].objective.gates.double()
    highway = GateChain(mine.segments, 16, 'token').double()
    state = copy.deepcopy(mine.state_dict())
    highway.load_state_dict({n: t/4 if '.linear.' in n else t for n, t in state.items()})
    torch.manual_seed(0)
    hidden = [torch.randn(B, S, 16, dtype=torch.float64) for _ in range(T)]
    assert torch.allclose(content_shares(mine, hidden), content_shares(highway, hidden), atol=1e-12)
    with torch.no_grad():
        for k, parts in aggregate_parts(mine, hidden):
            assert torch.allclose(sum(parts.values()), mine(hidden).state[k], atol=1e-12)


def test_every_analysis_takes_it(tempered):
    shares = gate_shares(tempered, rows=32)
    sums = shares.groupby('gate').agg(share=('share', 'sum'), bias=('bias', 'first')).sum(axis=1)
    assert len(sums) == T and (sums - 1).abs().max() < 1e-5
    fresh = shares_by_step(tempered, steps=[0], rows=8)
    openness = gate_openness(tempered, steps=[0], rows=8).openness
    assert len(fresh) == T*T and .3 < openness.min() and openness.max() < .7
    assert layer_map(tempered, rows=8).student.nunique() == 2
    assert list(gate_movement(tempered).block) == ['gate 2', 'gate 3', 'gate 4']


def test_stopped_and_resumed_it_ends_as_if_it_had_not_been(tempered, quick, tmp_path):
    recipe = quick.replace(gate_lr=1e-2, gate='tempered', experiment='tempered')
    with Stepper(recipe, tmp_path) as stepper: record = stepper.step(3)
    assert record.openness[2][1] < .5 and abs(sum(record.taken['content'][4]) - 1) < 1e-4
    assert same_bytes(tempered, run(recipe, tmp_path, resume=True, progress=False))


def test_it_learns_from_a_cache(quick, tmp_path):
    recipe = quick.replace(gate='tempered', **FAST | dict(precision='fp32'))
    losses = []
    for cached in (True, False):
        folder = run(recipe.replace(experiment=f'c{cached}', teacher_cache=cached), tmp_path, progress=False)
        losses.append([line['loss'] for line in read_log(folder)])
    assert torch.allclose(*map(torch.tensor, losses), rtol=1e-5)


@pytest.mark.slow
def test_a_study_compares_gates(quick, tmp_path):
    own = dict(LAD=dict(method='lad'), tempered=dict(method='lad', gate='tempered'),
               halves=dict(method='lad', gate='halves'))
    teacher = Recipe('teacher', method='fine_tune', ptrain_ver=quick.ptrain_ver, task='toy', device_id=-1,
                     **{n: getattr(quick, n) for n in ('total_step', 'warmup_step', 'max_seq_len')})
    study = Study('gates', quick.replace(teacher=None, total_step=2), teachers=dict(toy=teacher),
                  tasks=dict(toy={}), methods=own, seeds=(42,), snapshots=('gates_content', 'gates_mixing'))
    run_study(study, tmp_path, tmp_path/'results', say=lambda line: None)
    kept = {line['method']: set(line['snapshots']) for line in read_results(tmp_path/'results')
            if line['method'] in own}
    both = {'gates_content', 'gates_mixing'}
    assert kept == dict(LAD=both, tempered=both, halves=set()), 'what gates do not tell is not kept'


def test_the_command_line_names_it(quick, tmp_path, capsys):
    flags = f'--experiment x --task toy --num_hidden_layers 2 --teacher {quick.teacher} --device_id -1'
    line = f'run_lad_distil {flags} --ptrain_ver {quick.teacher} --max_seq_len 32 --root {tmp_path} --dry_run'
    assert main([*line.split(), '--gate', 'tempered']) == 0
    assert json.loads(capsys.readouterr().out)['recipe']['gate'] == 'tempered'
    assert main([*line.split(), '--gate', 'temperd']) != 0
    assert "no gate 'temperd' here" in capsys.readouterr().err


@pytest.mark.parametrize('again', [open_run, rerun, gate_shares])
def test_a_run_whose_gate_is_not_defined_says_what_to_do(tempered, again, monkeypatch):
    monkeypatch.delitem(gate_kinds, 'tempered')
    with pytest.raises(ValueError, match='run the cell that defines it first: gate_kinds..tempered.. = '):
        again(tempered)


def test_a_gate_with_a_formula_of_its_own_says_its_parts(quick, tmp_path):
    folder = run(quick.replace(gate='adding'), tmp_path, progress=False)
    shares = gate_shares(folder, rows=32)
    sums = shares.groupby('gate').agg(share=('share', 'sum'), bias=('bias', 'first')).sum(axis=1)
    assert (sums - 1).abs().max() < 1e-5


def test_parts_that_are_not_the_aggregate_are_refused():
    class Wrong(Adding): parts = GateBlock.parts
    chain = GateChain([(1, 2, 3)], H, 'token', gate=Wrong)
    with pytest.raises(ValueError, match='parts of the gate Wrong do not sum to its aggregate'):
        content_shares(chain, [torch.randn(B, S, H) for _ in range(3)])


def test_a_gate_that_tells_nothing_trains_and_its_shares_are_refused(quick, tmp_path):
    recipe = quick.replace(gate='halves')
    with Stepper(recipe, tmp_path) as stepper:
        record = stepper.step(3)
        assert 'nan' in str(record) and record.openness == {} and record.mixing.isna().any(axis=None)
        record._repr_html_()
        for what in ('content', 'mixing'):
            for drawn in (record.draw(what), stepper.draw(what)): assert drawn._repr_png_()
    folder = run(recipe, tmp_path, resume=True, progress=False)
    assert read_log(folder)[-1]['hidden_2'] > 0
    with pytest.raises(ValueError, match=r'Add a method parts\(k, h, z, before\)'): gate_shares(folder)
    with pytest.raises(ValueError, match='gives no openness'): gate_shares(folder, what='mixing')
    with pytest.raises(ValueError, match='gives no openness'): gate_openness(folder, rows=8)
