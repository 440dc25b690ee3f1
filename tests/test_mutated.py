"""Plans and configs that somebody or something changed: each is read as what it says, or refused in words."""
import json
import shutil

import pytest
import torch
from hypothesis import strategies as st
from test_input import CASES, JSON, hold

from lad_nb.encoders import load_classifier
from lad_nb.experiment import resolve
from lad_nb.mappings import mapping_from_dict
from lad_nb.recipes import mapping_of, recipe_from_dict

pytestmark = pytest.mark.faults
SIZES = 'num_hidden_layers', 'hidden_size', 'num_attention_heads', 'intermediate_size', 'vocab_size'


def places(said, at=()):
    """Every place in nested names and lists, from the top down."""
    found = [at]
    inner = said.items() if isinstance(said, dict) else enumerate(said) if isinstance(said, list) else ()
    for key, value in inner: found += places(value, (*at, key))
    return found


@st.composite
def one_changed(draw, said):
    """JSON data, with another value in one or two places, or without one."""
    said = json.loads(json.dumps(said))
    for _ in range(draw(st.integers(1, 2))):
        *way, last = draw(st.sampled_from(places(said)[1:]))
        here = said
        for key in way: here = here[key]
        if draw(st.integers(0, 5)) == 0: del here[last]
        else: here[last] = draw(JSON | st.integers(-2, 99))
    return said


@pytest.fixture
def planned(quick, tmp_path):
    """What a run says of itself, as recipe.json keeps it."""
    return json.loads(json.dumps(resolve(quick, tmp_path/'root').to_dict()))


def same_sources(said, told):
    """Whether what a description names by content is what is there."""
    named = {what: said[what] for what in ('teacher', 'encoder', 'rows') if isinstance(said.get(what), dict)}
    return all(about.get('sha256') in (None, told[what]['sha256']) for what, about in named.items())


def is_planned_or_refused(root, said):
    """A description that is gone on with: refused, or a plan of these sources that says the same when it is
    read back."""
    (root/'like').mkdir(parents=True, exist_ok=True)
    (root/'like'/'recipe.json').write_text(json.dumps(said))
    try: plan = resolve(recipe_from_dict(said), root, like=root/'like')
    except (ValueError, OSError) as e: assert len(str(e)) > 20, e; return
    told = json.loads(json.dumps(plan.to_dict()))
    assert same_sources(said, told)
    assert mapping_from_dict(told['mapping']) == plan.mapping == mapping_of(plan.recipe, 4)
    assert resolve(recipe_from_dict(told), root).to_dict() == plan.to_dict()


@CASES
def test_plans_of_others(planned, tmp_path, monkeypatch, cases, counted):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    counted(**hold(cases//10, is_planned_or_refused, tmp_path/'root', said=one_changed(planned)))


def is_a_model_or_refused(folder, said):
    """Refused by name, or a model with the sizes that were said, which answers."""
    (folder/'config.json').write_text(json.dumps(said))
    try: model = load_classifier(folder, 'toy')
    except (ValueError, OSError) as e: assert str(folder) in str(e), e; return
    found = model.config.to_dict()
    assert all(found[name] == said[name] for name in SIZES if name in said)
    with torch.no_grad(): assert model(input_ids=torch.tensor([[2, 9, 3]])).logits.shape == (1, 2)


@CASES
def test_configs_of_others(tiny, tmp_path, cases, counted):
    folder = shutil.copytree(tiny, tmp_path/'model')
    said = json.loads((tiny/'config.json').read_text())
    counted(**hold(cases//5, is_a_model_or_refused, folder, said=one_changed(said)))


def test_labels_that_are_no_text(tiny, tmp_path):
    """What the test above found with LAD_NB_SEED=85994."""
    folder = shutil.copytree(tiny, tmp_path/'model')
    said = json.loads((tiny/'config.json').read_text())
    is_a_model_or_refused(folder, said | dict(id2label={'0': 'entailment', '1': None}))


def test_tables_of_labels_that_are_none(tiny, tmp_path):
    """What it found with LAD_NB_SEED=2."""
    folder = shutil.copytree(tiny, tmp_path/'model')
    said = json.loads((tiny/'config.json').read_text())
    for table in 'id2label', 'label2id':
        for found in (99, [7], 'entailment'): is_a_model_or_refused(folder, said | {table: found})
