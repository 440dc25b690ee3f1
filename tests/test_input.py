"""Files and flags that came from anywhere: each is read right, or refused with its file and line; never a row that is silently wrong."""
import argparse
import io
import json
import math
import re
import warnings
from dataclasses import fields

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lad_nb.cli import indices, parse, recipe_of
from lad_nb.data import encode, load_task, read_tsv
from lad_nb.models import load_tokenizer
from lad_nb.tasks import tasks
from lad_nb.mappings import make_mapping, mapping_from_dict, mapping_to_dict, methods
from lad_nb.recipes import Recipe, mapping_of, recipe_from_dict
from lad_nb.experiment import _check
from lad_nb.runs import run_description

pytestmark = pytest.mark.faults
CASES = pytest.mark.parametrize('cases', [150, pytest.param(1700, marks=pytest.mark.slow)])


def hold(cases, what, *args, **strategies):
    """A property, on so many cases: the same ones every time."""
    count = [0]
    def counted(**drawn): count[0] += 1; what(*args, **drawn)
    settings(max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))(given(**strategies)(counted))()
    assert count[0] >= cases
    print(f'{what.__name__}: {count[0]} cases')


# text that has burned other readers: quotes, separators of other formats, what looks like missing or like a number, other line ends of Unicode, marks and surrogates' neighbours
NASTY = ['"', '""', "'", '"open', 'close"', ',', ';', '#', '\\', '\\t', 'NA', 'nan', 'null', 'None', '', ' ', '  two ', '1e5', '0', 'label', '\u2028', '\x85', '\x0b', '\x0c', '\x1c', '\u00a0', '\ufeff', '\ufffd', '\U0001f600', 'ä', 'e\u0301']
FIELD = st.one_of(st.sampled_from(NASTY), st.text(st.characters(codec='utf-8', exclude_characters='\t\n\r\0'), max_size=12), st.lists(st.sampled_from(NASTY), max_size=4).map(''.join))


@st.composite
def tables(draw):
    """A task's file: its bytes, and the rows that are in it."""
    task, labelled = tasks[draw(st.sampled_from([t for t in tasks if t != 'toy']))], draw(st.booleans())
    columns = list(task.columns if labelled else task.test_columns or task.columns)
    wanted = columns + ([task.label_column] if labelled else [])
    header = list(task.headless) if labelled and task.headless else draw(st.permutations([*wanted, *draw(st.lists(st.sampled_from(['index', 'id', 'genre', 'more']), unique=True, max_size=3))]))
    label = st.sampled_from(['0', '5', '2.5', '3.', '4.750', '0.0']) if task.regression else st.sampled_from(task.spelling)
    rows = [[draw(label) if c == task.label_column and labelled else draw(FIELD) for c in header] for _ in range(draw(st.integers(1, 5)))]
    end, bom, last = draw(st.sampled_from(['\n', '\r\n'])), draw(st.booleans()), draw(st.booleans())
    lines = ['\t'.join(r) for r in ([] if labelled and task.headless else [header]) + rows]
    if last is False and lines[-1] == '': last = True # an empty last line without its end is no line
    raw = ('\ufeff' if bom else '').encode() + end.join(lines).encode() + (end.encode() if last else b'')
    if not bom and raw.startswith(b'\xef\xbb\xbf'): raw = b'\xef\xbb\xbf' + raw # text that itself begins with a mark
    read = [{f'sentence{i + 1}': r[header.index(c)] for i, c in enumerate(columns)} | ({'label': float(r[header.index(task.label_column)]) if task.regression else task.spelling.index(r[header.index(task.label_column)])} if labelled else {})
            | {'idx': n} for n, r in enumerate(rows)]
    return task, labelled, raw, read


def is_read_right(path, table):
    task, labelled, raw, rows = table
    path.write_bytes(raw)
    assert read_tsv(path, task, labelled) == rows


@CASES
def test_what_is_written_is_read(tmp_path, cases): hold(cases, is_read_right, tmp_path/'a.tsv', table=tables())


def oracle(raw, task, labelled):
    """Another reader's rows: pandas', in its rawest form."""
    text = raw.decode('utf-8-sig')
    frame = pd.read_csv(io.StringIO(re.sub('\r(\n|$)', '\\1', text), newline=''), sep='\t', quoting=3, header=None, dtype=str, keep_default_na=False, na_filter=False, lineterminator='\n', skip_blank_lines=False, low_memory=False)
    header = list(task.headless) if labelled and task.headless else list(frame.iloc[0])
    if not (labelled and task.headless): frame = frame.iloc[1:]
    columns = list(task.columns if labelled else task.test_columns or task.columns)
    return [[r[header.index(c)] for c in columns] + ([r[header.index(task.label_column)]] if labelled else []) for r in frame.values.tolist()]


def flat(rows, task, labelled):
    spell = lambda label: label if task.regression else task.spelling[label]
    return [[v for k, v in row.items() if k.startswith('sentence')] + ([spell(row['label'])] if labelled else []) for row in rows]


BYTES = [b'\0', b'\xff', b'\xc3', b'\xed\xa0\x80', b'\r', b'\n', b'\t', b'"', b'\xef\xbb\xbf', b' ', b'x', b'_', b'\xd9\xa3', b'\r\r\n', b'\xfe\xff', b'-', b'y'*200_000]


@st.composite
def harmed(draw):
    task, labelled, raw, _ = draw(tables())
    for _ in range(draw(st.integers(1, 2))):
        at, lines = draw(st.integers(0, len(raw))), raw.split(b'\n')
        header = lines[0].split(b'\t')
        raw = draw(st.sampled_from([
            raw[:at] + draw(st.sampled_from(BYTES)) + raw[at:], raw[:at] + raw[at + 1:], raw[:at], raw[:at] + raw[at:].replace(b'\t', b'    ', 1), raw.replace(b'\n', b'\r'), raw.decode('utf-8', 'replace').encode('utf-16'),
            b'\n'.join([b'\t'.join(header[::-1]), *lines[1:]]), b'\n'.join([lines[0], *lines]), b'\n'.join([lines[0] + b'\t' + header[-1], *lines[1:]]), b'\n'.join([b'\t'.join(header[1:]), *lines[1:]]), raw + b'\n\n',
            *[raw.replace(s.encode(), t) for s in ((task.spelling or ('5',))[0],) for t in (b' ' + s.encode(), s.encode() + b' ', s.upper().encode(), s.encode() + b'_0', b'')]]))
    return task, labelled, raw


def is_read_right_or_refused(path, table):
    task, labelled, raw = table
    path.write_bytes(raw)
    try: rows = read_tsv(path, task, labelled)
    except ValueError as e:
        assert str(path) in str(e) and (re.search(r'line \d+', str(e)) or 'is empty' in str(e) or 'no rows' in str(e)), e
        return
    expected, found = oracle(raw, task, labelled), flat(rows, task, labelled)
    if labelled and task.regression: expected, found = ([[*r[:-1], float(r[-1])] for r in rs] for rs in (expected, found))
    assert found == expected and [r['idx'] for r in rows] == list(range(len(rows)))


@CASES
def test_what_is_harmed_is_read_right_or_refused(tmp_path, cases): hold(2*cases, is_read_right_or_refused, tmp_path/'a.tsv', table=harmed())


@pytest.mark.parametrize('score', ['1_0', '0_3', ' 3', '3 ', '٣', '+3', '1e0', 'nan', 'inf', '-0', '5.1', '', '0x3', '3,5'])
def test_scores_that_python_would_read(tmp_path, score):
    """Python's float takes underscores, spaces and digits of other scripts; a file that has them is not what it seems."""
    path = tmp_path/'train.tsv'
    path.write_text(f'sentence1\tsentence2\tscore\na\tb\t{score}\n')
    with pytest.raises(ValueError, match='train.tsv, line 2: the score is'): read_tsv(path, 'stsb')


def test_a_row_arrives_whole_at_the_model(tiny, tmp_path):
    """A field of a million characters, and one of nothing, take one row each."""
    path = tmp_path/'train.tsv'
    path.write_text('sentence1\tsentence2\tlabel\n' + 'alice '*200_000 + '\t\tentailment\n\t"\tnot_entailment\n')
    data = encode(load_task('rte', data_dir=str(tmp_path)), load_tokenizer(tiny), 32)
    assert [len(ids) for ids in data['input_ids']][0] == 32 and list(data['labels']) == [0, 1] and len(data) == 2


JSON = st.recursive(st.none() | st.booleans() | st.integers(-3, 10**12) | st.floats() | st.text(max_size=8) | st.sampled_from(['../x', '/etc', 'lad', 'rte', 'nan', '3e-4', '', '\0', 'kd']),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)
FIELDS = {f.name: f for f in fields(Recipe)}
RIGHT = {str: st.sampled_from(['a', 'toy', 'lad', 'even']), int: st.integers(-2, 99), float: st.floats() | st.integers(0, 9), bool: st.booleans(), tuple: st.lists(st.integers(-1, 13), max_size=4)}


@st.composite
def recipes(draw):
    names = draw(st.lists(st.sampled_from([*FIELDS, *FIELDS, *FIELDS, 'learning_rate', '__class__', 'recipe']), unique=True, max_size=6))
    return {n: draw(JSON if n not in FIELDS or draw(st.integers(0, 3)) == 0 else RIGHT[kind_of(FIELDS[n])]) for n in names}


def is_a_recipe_or_refused(said):
    try: recipe = recipe_from_dict(json.loads(json.dumps(said)))
    except ValueError as e:
        assert 'names and values' in str(e) or any(repr(n)[1:-1] in str(e) for n in (said.get('recipe', said) if isinstance(said, dict) else [])), e
        return
    asked = said.get('recipe', said) if isinstance(said, dict) else said
    found = recipe.to_dict()
    same = lambda a, b: a == b or isinstance(a, float) and math.isnan(a) and math.isnan(b)
    assert all(same(found[k], v) and (type(found[k]) is type(v)) for k, v in asked.items())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: _check(recipe)
        except ValueError: pass


@CASES
def test_recipes_of_others(cases): hold(cases, is_a_recipe_or_refused, said=recipes() | JSON)


def is_described_or_refused(folder, at, byte, cut):
    raw = json.dumps(dict(recipe=Recipe().to_dict(), mapping=mapping_to_dict(make_mapping('lad', 6, 3))), indent=1).encode()
    at = at % len(raw)
    raw = raw[:at] if cut else raw[:at] + byte + raw[at + 1:]
    (folder/'recipe.json').write_bytes(raw)
    try: said = run_description(folder)
    except ValueError as e: assert 'recipe.json' in str(e); return
    assert said == json.loads(raw)
    try: recipe_from_dict(said), mapping_from_dict(said.get('mapping'))
    except ValueError: pass


@CASES
def test_damaged_descriptions(tmp_path, cases): hold(cases//2, is_described_or_refused, tmp_path, at=st.integers(0, 5000), byte=st.binary(min_size=0, max_size=2), cut=st.booleans())


@st.composite
def mappings(draw):
    """A saved mapping, one of whose values is another."""
    said = json.loads(json.dumps(mapping_to_dict(make_mapping(draw(st.sampled_from(['lad', 'lad_no', 'bert_pkd', 'alp_kd', 'layer_mean', 'kd'])), 6, 3))))
    here, key = dict(d=said), 'd'
    while isinstance(here[key], (dict, list)) and len(here[key]) and draw(st.integers(0, 3)): here, key = here[key], draw(st.sampled_from(sorted(here[key]) if isinstance(here[key], dict) else range(len(here[key]))))
    here[key] = draw(JSON | st.integers(0, 7))
    return said if key != 'd' else here['d']


def is_a_mapping_or_refused(said):
    try: mapping = mapping_from_dict(said)
    except ValueError: return
    assert mapping_to_dict(mapping) == said


@CASES
def test_mappings_of_others(cases): hold(cases, is_a_mapping_or_refused, said=mappings())


def are_layers_or_refused(gates, students, command):
    argv = [*command.split(), '--experiment', 'x', '--task', 'toy', '--num_hidden_layers', '3', *([f'--gate_indices={gates}'] if gates is not None else []), *([f'--student_indices={students}'] if students is not None else [])]
    plain = lambda text: None if text is None else [int(k) for k in text.split(',')] if re.fullmatch(r' *[0-9]+ *(, *[0-9]+ *)*', text) else 'refused'
    try: mapping = mapping_of(recipe_of(*parse(argv)), 6)
    except (ValueError, SystemExit): return
    assert 'refused' not in (plain(gates), plain(students))
    wanted = [2, 4, 6] if gates is None else plain(gates)
    assert [(p.student, p.source.k) for p in mapping.pairs] == [*zip([1, 2, 3] if students is None else plain(students), wanted, strict=True)] and all(1 <= k <= 6 for k in wanted)


LAYERS = st.none() | st.lists(st.integers(0, 7), min_size=1, max_size=4).map(lambda ks: ','.join(map(str, ks))) | st.permutations([1, 2, 3]).map(lambda ks: ','.join(map(str, ks))) | st.sampled_from(['', ',', '1,', '1_2', '٣', ' 1, 2 ,3', '+1', '1.0', '1;2', '1 2', '-1', '²', '1,2,3,']) | st.text('0123,_ +-', max_size=6)


@CASES
def test_mapping_flags(cases, capsys): hold(cases, are_layers_or_refused, gates=LAYERS, students=LAYERS, command=st.sampled_from(['run_lad_distil', 'run_pkd_distill', 'run_probing_lad --probing_exp lad_user_defined']))


def test_lists_of_layers():
    assert indices('3, 2 ,1') == (3, 2, 1)
    for text in ('1_2', '٣', '+1', '', '1,', '²'):
        with pytest.raises(argparse.ArgumentTypeError, match='is no list of layers'): indices(text)
    assert set(methods) >= {'lad', 'kd'}
