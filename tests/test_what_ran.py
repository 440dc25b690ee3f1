"""Code that is not as it was: said when a run is opened or run again, refused where one would go on."""
import json
import re
import shutil
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import same_bytes
from two_processes import study

from lad_nb.analysis import gate_openness, gate_shares, layer_map, shares_by_step
from lad_nb.experiment import open_run, rerun, run
from lad_nb.gates import GateBlock, gate_kinds
from lad_nb.mappings import Mapping, Pair, Source, methods
from lad_nb.movement import gate_movement
from lad_nb.results import append_result, read_results
from lad_nb.runs import class_told, end_of
from lad_nb.stepper import Stepper
from lad_nb.study import collect, jobs, run_job, run_study

SCALE, Ts = 2., 7


def helper(x): return x/SCALE


class Warm(GateBlock):
    """As it was."""
    temperature = 4.
    def openness(self, previous): return torch.sigmoid(self.linear(previous)/self.temperature)


def laid_out_otherwise():
    class Warm(GateBlock):
        temperature = 4.

        def openness(self, previous):  # the same
            return torch.sigmoid(
                self.linear(previous) / self.temperature)
    return Warm


def hotter():
    class Warm(GateBlock):
        temperature = 8.
        def openness(self, previous): return torch.sigmoid(self.linear(previous)/self.temperature)
    return Warm


def squared():
    class Warm(GateBlock):
        temperature = 4.
        def openness(self, previous): return torch.sigmoid(self.linear(previous)/self.temperature)**2
    return Warm


class Called(GateBlock):
    def openness(self, previous): return torch.sigmoid(helper(self.linear(previous)))


class Below(Warm):
    pass


def last_of(scale):
    """A source, `Last`, as it is in one of two states; and the method that asks for it."""
    if scale == 1:
        @dataclass(frozen=True)
        class Last(Source):
            k: int
            def __call__(self, states, m): return states.teacher[self.k - 1]
    else:
        @dataclass(frozen=True)
        class Last(Source):
            k: int
            def __call__(self, states, m): return 2*states.teacher[self.k - 1]
    return lambda T, M: Mapping('last_of', T, M, (Pair(M, Last(T)),))


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    monkeypatch.setitem(gate_kinds, 'warm', Warm)
    monkeypatch.setitem(methods, 'last_of', last_of(1))


@pytest.fixture(scope='module')
def made(quick, tmp_path_factory):
    """A run with a gate of one's own, and one that stopped after four updates of six."""
    root = tmp_path_factory.mktemp('what_ran')
    with pytest.MonkeyPatch.context() as patch: # a kind that stayed would be known to other files' tests
        patch.setitem(gate_kinds, 'warm', Warm)
        run(quick.replace(experiment='warm', gate='warm'), root, progress=False)
        with Stepper(quick.replace(experiment='half', gate='warm'), root) as stepper: stepper.step(4)
    return root


@pytest.fixture
def root(made, tmp_path): return shutil.copytree(made, tmp_path/'runs')


def warm(root): return root/'warm_bert_toy'
def half(root): return root/'half_bert_toy'


def edited(folder, change):
    """A run folder whose recipe.json says something else under versions."""
    said = json.loads((folder/'recipe.json').read_text())
    change(said['versions'])
    (folder/'recipe.json').write_text(json.dumps(said))
    return folder


def silently(do, *args, **how):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        return do(*args, **how)


def test_what_ran_stands_in_recipe_json(root):
    said = json.loads((warm(root)/'recipe.json').read_text())['versions']
    assert said['lad_nb'].keys() >= {'version', 'sha256'}
    assert said['classes'] == {'gate warm': class_told(Warm)} and len(class_told(Warm)['sha256']) == 16


def test_code_as_it_was_is_not_spoken_of(root):
    silently(open_run, warm(root))
    assert same_bytes(warm(root), silently(rerun, warm(root), progress=False))


@pytest.mark.parametrize('other', [hotter, squared], ids=['value', 'formula'])
def test_an_edited_gate_is_heard_of_and_a_run_does_not_go_on_with_it(root, quick, monkeypatch, other):
    monkeypatch.setitem(gate_kinds, 'warm', other())
    was, now = class_told(Warm)['sha256'][:12], class_told(other())['sha256'][:12]
    words = f'gate warm was sha256 {was}.., here it is sha256 {now}..'
    with pytest.warns(UserWarning, match=re.escape(words)): open_run(warm(root))
    with pytest.warns(UserWarning, match=re.escape(words)): again = rerun(warm(root), progress=False)
    assert not same_bytes(warm(root), again)
    with pytest.raises(ValueError, match='cannot go on with other code: gate warm was'):
        run(quick.replace(experiment='half', gate='warm'), root, resume=True, progress=False)
    with pytest.raises(ValueError, match='cannot go on with other code: gate warm was'):
        Stepper(quick.replace(experiment='half', gate='warm'), root, resume=True)


def test_a_gate_that_is_laid_out_otherwise_is_the_same(root, quick, monkeypatch):
    monkeypatch.setitem(gate_kinds, 'warm', laid_out_otherwise())
    silently(open_run, warm(root))
    recipe = quick.replace(experiment='half', gate='warm')
    assert same_bytes(warm(root), silently(run, recipe, root, resume=True, progress=False))


def test_a_name_that_is_another_class_now_is_heard_of(root, quick, monkeypatch):
    """The package's own gate under a name that was one's own, and the other way round."""
    monkeypatch.setitem(gate_kinds, 'warm', GateBlock)
    with pytest.warns(UserWarning, match="here it is lad_nb's own"): open_run(warm(root))
    plain = run(quick, root, progress=False)
    monkeypatch.setitem(gate_kinds, 'highway', Warm)
    with pytest.warns(UserWarning, match="gate highway was lad_nb's own, here it is sha256"): open_run(plain)


def test_an_edited_source_is_heard_of(root, quick, monkeypatch):
    recipe = quick.replace(experiment='last', method='last_of')
    with Stepper(recipe, root) as stepper: stepper.step(2)
    whole = run(recipe.replace(experiment='whole'), root, progress=False)
    silently(open_run, whole)
    monkeypatch.setitem(methods, 'last_of', last_of(2))
    with pytest.warns(UserWarning, match='source Last was sha256'): open_run(whole)
    with pytest.raises(ValueError, match='cannot go on with other code: source Last was'):
        run(recipe, root, resume=True, progress=False)


def test_a_class_is_told_by_what_it_calls_and_by_its_bases(monkeypatch):
    before, below = class_told(Called), class_told(Below)
    assert before['sha256'] != class_told(Warm)['sha256']
    monkeypatch.setitem(globals(), 'Ts', 8)
    assert class_told(Called) == before, 'a value that it does not name'
    monkeypatch.setitem(globals(), 'SCALE', 3.)
    assert class_told(Called) != before, 'a value that what it calls names'
    monkeypatch.setattr(Warm, 'temperature', 5.)
    assert class_told(Below) != below
    space = dict(GateBlock=GateBlock, __name__='somewhere')
    exec('class Made(GateBlock):\n    def openness(self, previous): return previous\n', space)
    assert class_told(space['Made']) == dict(name='Made'), 'no source was kept'
    assert class_told(GateBlock) == {}


def test_another_version_of_the_package_is_heard_of_and_a_run_goes_on(root, quick):
    def older(versions): versions['lad_nb'] = dict(version='0.0.9', sha256='0'*16, commit='abcdef0')
    said = r'by other code: lad_nb was 0.0.9 \(sha256 000000000000.., commit abcdef0\), here it is \d'
    with pytest.warns(UserWarning, match=said): open_run(edited(warm(root), older))
    with pytest.warns(UserWarning, match=said): again = rerun(warm(root), progress=False)
    assert same_bytes(warm(root), again)
    edited(half(root), older)
    recipe = quick.replace(experiment='half', gate='warm')
    assert same_bytes(warm(root), run(recipe, root, resume=True, progress=False))


@pytest.mark.parametrize('left', [{}, dict(lad_nb=[], classes=3), dict(lad_nb={}, classes={'gate warm': 7})])
def test_a_run_that_does_not_say_what_ran_is_not_spoken_of(root, left, monkeypatch):
    """One of an older version, or of somebody who wrote something else there."""
    def forget(versions):
        for name in ('lad_nb', 'classes'): versions.pop(name)
        versions |= left
    if 'classes' not in left or left['classes'] == 3: monkeypatch.setitem(gate_kinds, 'warm', hotter())
    else: monkeypatch.setitem(gate_kinds, 'warm', GateBlock)
    silently(open_run, edited(warm(root), forget))


def test_a_study_does_not_go_on_with_an_edited_gate(tiny, tmp_path, monkeypatch):
    """One run of two is done when the gate is edited. A table of both, made by hand, is refused as well."""
    asked = replace(study(tiny, 6), methods=dict(LAD=dict(method='lad', gate='warm')))
    def stop(text):
        if text.startswith('[1/2]'): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run_study(asked, tmp_path, tmp_path, say=stop)
    line = read_results(tmp_path)[-1]
    monkeypatch.setitem(gate_kinds, 'warm', other := hotter())
    was, now = (class_told(gate)['sha256'] for gate in (Warm, other))
    assert line['classes'] == {'gate warm': was}
    words = f'LAD on toy cannot go on with other code: gate warm was sha256 {was}, here it is {now}'
    for deed in (lambda: run_study(asked, tmp_path, tmp_path), lambda: run_job(asked, 2, tmp_path, tmp_path)):
        with pytest.raises(ValueError, match=words): deed()
    assert len(read_results(tmp_path)) == 2 and not (tmp_path/'two_LAD_43_bert_toy').exists()
    assert run_job(asked, 1, tmp_path, tmp_path) == line, 'what is done may be read'
    append_result(tmp_path, jobs(asked, tmp_path)[1] | {k: v for k, v in line.items() if k not in (
        'seed', 'recipe')} | dict(classes={'gate warm': now}))
    with pytest.raises(ValueError, match=f'code of gates and sources differs .*{was}.*{now}'):
        collect(asked, tmp_path)


STOPPED = 'half_bert_toy did not finish; its last checkpoint, update 4 of 6, is taken'


@pytest.mark.parametrize('look', [gate_shares, gate_openness, shares_by_step, layer_map, gate_movement],
                         ids=lambda f: f.__name__)
def test_what_is_asked_of_a_stopped_run_is_told_of_its_last_checkpoint(root, look):
    with pytest.warns(UserWarning, match=STOPPED) as heard: found = look(half(root))
    assert len([w for w in heard if 'did not finish' in str(w.message)]) == 1
    if look in (gate_shares, layer_map): assert found.equals(silently(look, half(root), step=4))
    else: assert len(found)


def test_a_run_that_never_reached_a_checkpoint_says_so(root):
    for checkpoint in half(root).glob('checkpoint-*'): shutil.rmtree(checkpoint)
    with pytest.raises(FileNotFoundError, match='or its training never reached one'): gate_shares(half(root))


def test_a_checkpoint_is_not_a_run(root):
    with pytest.raises(FileNotFoundError, match=r'is a checkpoint. Name its run and its update: .*step=4'):
        gate_shares(half(root)/'checkpoint-4')


def test_a_finished_run_that_lost_its_model_is_damaged_not_stopped(root):
    (warm(root)/'model.safetensors').unlink()
    assert silently(end_of, warm(root)) == warm(root)
    with pytest.raises((ValueError, FileNotFoundError), match='model.safetensors'): open_run(warm(root))
