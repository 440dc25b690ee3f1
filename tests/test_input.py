"""Files and flags that came from anywhere: each is read right, or refused with its file and line; never a row
that is silently wrong."""
import argparse
import io
import json
import math
import os
import re
import time
import warnings
from dataclasses import fields

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from lad_nb.cli import parse, recipe_of
from lad_nb.flags import layer_list
from lad_nb.data import encode, load_task, read_tsv
from lad_nb.mappings import make_mapping, mapping_from_dict, mapping_to_dict, methods
from lad_nb.models import load_tokenizer
from lad_nb.settings import kind_of
from lad_nb.recipes import Recipe, check_recipe, mapping_of, recipe_from_dict
from lad_nb.runs import run_description
from lad_nb.tasks import tasks
from lad_nb.values import NAMES as SEVERAL

pytestmark = pytest.mark.faults
CASES = pytest.mark.parametrize('cases', [150, pytest.param(17_000, marks=pytest.mark.slow)])


def hold(cases, what, *args, **strategies):
    """A property, on so many cases, which follow from LAD_NB_SEED; how many there were. After LAD_NB_MINUTES
    no other 200 are begun."""
    count, begin = 0, int(os.environ['LAD_NB_SEED'])
    end = time.monotonic() + 60*float(os.environ.get('LAD_NB_MINUTES') or 'inf')
    def one(**drawn):
        nonlocal count
        count += 1
        what(*args, **drawn)
    while count < cases and time.monotonic() < end:
        how = settings(max_examples=min(cases - count, 200), deadline=None, database=None,
                       suppress_health_check=list(HealthCheck))
        seed(begin + count)(how(given(**strategies)(one)))()
    print(f'{what.__name__}: {count} cases, LAD_NB_SEED={begin}')
    return dict(cases=count)


# text that has burned other readers: quotes, separators of other formats, what looks like missing or like a
# number, other line ends of Unicode, marks and surrogates' neighbours
NASTY = ['"', '""', "'", '"open', 'close"', ',', ';', '#', '\\', '\\t', 'NA', 'nan', 'null', 'None', '', ' ',
         '  two ', '1e5', '0', 'label', '\u2028', '\x85', '\x0b', '\x0c', '\x1c', '\u00a0', '\ufeff',
         '\ufffd', '\U0001f600', 'ä', 'e\u0301']
PRINTED = st.characters(codec='utf-8', exclude_characters='\t\n\r\0')
FIELD = st.one_of(st.sampled_from(NASTY), st.text(PRINTED, max_size=12),
                  st.lists(st.sampled_from(NASTY), max_size=4).map(''.join))
SCORES = st.sampled_from(['0', '5', '2.5', '3.', '4.750', '0.0'])
OTHER_COLUMNS = st.lists(st.sampled_from(['index', 'id', 'genre', 'more']), unique=True, max_size=3)
MARK = '\ufeff'.encode()


def text_columns(task, labelled): return list(task.columns if labelled else task.test_columns or task.columns)


def headless(task, labelled): return labelled and task.headless


@st.composite
def headers(draw, task, labelled):
    """The columns of a task's file in any order, with others between them."""
    if headless(task, labelled): return list(task.headless)
    wanted = text_columns(task, labelled) + ([task.label_column] if labelled else [])
    return draw(st.permutations([*wanted, *draw(OTHER_COLUMNS)]))


def read_of(task, labelled, header, row, n):
    """What a row is to be read as."""
    found = {f'sentence{i + 1}': row[header.index(c)] for i, c in enumerate(text_columns(task, labelled))}
    if not labelled: return found | dict(idx=n)
    label = row[header.index(task.label_column)]
    return found | dict(label=float(label) if task.regression else task.spelling.index(label), idx=n)


@st.composite
def tables(draw):
    """A task's file: its bytes, and the rows that are in it."""
    task, labelled = tasks[draw(st.sampled_from([t for t in tasks if t != 'toy']))], draw(st.booleans())
    header = draw(headers(task, labelled))
    label = SCORES if task.regression else st.sampled_from(task.spelling)
    value = lambda column: draw(label if column == task.label_column and labelled else FIELD)
    rows = [[*map(value, header)] for _ in range(draw(st.integers(1, 5)))]
    end, mark, last = draw(st.sampled_from(['\n', '\r\n'])), draw(st.booleans()), draw(st.booleans())
    lines = ['\t'.join(r) for r in ([] if headless(task, labelled) else [header]) + rows]
    if lines[-1] == '': last = True  # an empty last line without its end is no line
    raw = MARK*mark + end.join(lines).encode() + end.encode()*last
    if not mark and raw.startswith(MARK): raw = MARK + raw  # text that itself begins with a mark
    return task, labelled, raw, [read_of(task, labelled, header, row, n) for n, row in enumerate(rows)]


def is_read_right(path, table):
    task, labelled, raw, rows = table
    path.write_bytes(raw)
    assert read_tsv(path, task, labelled) == rows


@CASES
def test_what_is_written_is_read(tmp_path, cases, counted):
    counted(**hold(cases, is_read_right, tmp_path/'a.tsv', table=tables()))


def oracle(raw, task, labelled):
    """Another reader's rows: pandas', in its rawest form."""
    text = io.StringIO(re.sub('\r(\n|$)', '\\1', raw.decode('utf-8-sig')), newline='')
    frame = pd.read_csv(text, sep='\t', quoting=3, header=None, dtype=str, keep_default_na=False,
                        na_filter=False, lineterminator='\n', skip_blank_lines=False, low_memory=False)
    header = list(task.headless) if headless(task, labelled) else list(frame.iloc[0])
    if not headless(task, labelled): frame = frame.iloc[1:]
    wanted = text_columns(task, labelled) + ([task.label_column] if labelled else [])
    return [[r[header.index(c)] for c in wanted] for r in frame.values.tolist()]


def flat(rows, task, labelled):
    spell = lambda label: label if task.regression else task.spelling[label]
    texts = lambda row: [v for k, v in row.items() if k.startswith('sentence')]
    return [texts(row) + ([spell(row['label'])] if labelled else []) for row in rows]


BYTES = [b'\0', b'\xff', b'\xc3', b'\xed\xa0\x80', b'\r', b'\n', b'\t', b'"', b'\xef\xbb\xbf', b' ',
         b'x', b'_', b'\xd9\xa3', b'\r\r\n', b'\xfe\xff', b'-', b'y'*200_000]


def harms(raw, at, more, task):
    """A file, each time with one thing wrong."""
    lines, label = raw.split(b'\n'), (task.spelling or ('5',))[0].encode()
    header = lines[0].split(b'\t')
    headed = lambda first: b'\n'.join([first, *lines[1:]])
    spelled = b' ' + label, label + b' ', label.upper(), label + b'_0', b''
    return [raw[:at] + more + raw[at:], raw[:at] + raw[at + 1:], raw[:at],
            raw[:at] + raw[at:].replace(b'\t', b'    ', 1), raw.replace(b'\n', b'\r'),
            raw.decode('utf-8', 'replace').encode('utf-16'),
            headed(b'\t'.join(header[::-1])), b'\n'.join([lines[0], *lines]),
            headed(lines[0] + b'\t' + header[-1]), headed(b'\t'.join(header[1:])), raw + b'\n\n',
            *[raw.replace(label, other) for other in spelled]]


@st.composite
def harmed(draw):
    task, labelled, raw, _ = draw(tables())
    for _ in range(draw(st.integers(1, 2))):
        at, more = draw(st.integers(0, len(raw))), draw(st.sampled_from(BYTES))
        raw = draw(st.sampled_from(harms(raw, at, more, task)))
    return task, labelled, raw


def is_read_right_or_refused(path, table):
    task, labelled, raw = table
    path.write_bytes(raw)
    try: rows = read_tsv(path, task, labelled)
    except ValueError as e:
        assert str(path) in str(e) and re.search(r'line \d+|is empty|no rows', str(e)), e
        return
    expected, found = oracle(raw, task, labelled), flat(rows, task, labelled)
    scored = lambda rows: [[*r[:-1], float(r[-1])] for r in rows]
    if labelled and task.regression: expected, found = scored(expected), scored(found)
    assert found == expected and [r['idx'] for r in rows] == list(range(len(rows)))


@CASES
def test_what_is_harmed_is_read_right_or_refused(tmp_path, cases, counted):
    counted(**hold(2*cases, is_read_right_or_refused, tmp_path/'a.tsv', table=harmed()))


def test_half_of_a_last_line_end(tmp_path):
    """What it found with LAD_NB_SEED=729991: a carriage return at the end is no row of its own."""
    for raw in (b'sentence\r\n\r', b'sentence\r\nfine\r\n\r', b'sentence\nfine\r'):
        is_read_right_or_refused(tmp_path/'a.tsv', (tasks['sst2'], False, raw))


READ_BY_PYTHON = ['1_0', '0_3', ' 3', '3 ', '٣', '+3', '1e0', 'nan', 'inf', '-0', '5.1', '', '0x3', '3,5']


@pytest.mark.parametrize('score', READ_BY_PYTHON)
def test_scores_that_python_would_read(tmp_path, score):
    """Python's float takes underscores, spaces and digits of other scripts; a file with them misleads."""
    path = tmp_path/'train.tsv'
    path.write_text(f'sentence1\tsentence2\tscore\na\tb\t{score}\n')
    with pytest.raises(ValueError, match='train.tsv, line 2: the score is'): read_tsv(path, 'stsb')


def test_a_row_arrives_whole_at_the_model(tiny, tmp_path):
    """A field of a million characters, and one of nothing, take one row each."""
    path = tmp_path/'train.tsv'
    long, empty = 'alice '*200_000 + '\t\tentailment', '\t"\tnot_entailment'
    path.write_text('\n'.join(['sentence1\tsentence2\tlabel', long, empty]) + '\n')
    data = encode(load_task('rte', data_dir=str(tmp_path)), load_tokenizer(tiny), 32)
    assert len(data['input_ids'][0]) == 32 and list(data['labels']) == [0, 1] and len(data) == 2


SCALARS = (st.none() | st.booleans() | st.integers(-3, 10**12) | st.floats() | st.text(max_size=8)
           | st.sampled_from(['../x', '/etc', 'lad', 'rte', 'nan', '3e-4', '', '\0', 'kd']))
NESTED = lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
JSON = st.recursive(SCALARS, NESTED, max_leaves=5)
FIELDS = {f.name: f for f in fields(Recipe)}
NAMES = st.sampled_from([*FIELDS, *FIELDS, *FIELDS, 'learning_rate', '__class__', 'recipe'])
RIGHT = {str: st.sampled_from(['a', 'toy', 'lad', 'even']), int: st.integers(-2, 99),
         float: st.floats() | st.integers(0, 9), bool: st.booleans(),
         tuple: st.lists(st.integers(-1, 13), max_size=4)}


@st.composite
def recipes(draw):
    """Names and values, most of them a recipe's, and most of those of the right type."""
    def value(name):
        odd = name not in FIELDS or draw(st.integers(0, 3)) == 0
        return draw(JSON if odd else RIGHT[kind_of(FIELDS[name])])
    return {n: value(n) for n in draw(st.lists(NAMES, unique=True, max_size=6))}


def is_a_recipe_or_refused(said):
    asked = said.get('recipe', said) if isinstance(said, dict) else said
    try: recipe = recipe_from_dict(json.loads(json.dumps(said)))
    except ValueError as e:
        names = asked if isinstance(said, dict) else []
        assert 'names and values' in str(e) or any(repr(n)[1:-1] in str(e) for n in names), e
        return
    found = {f.name: f.default for f in FIELDS.values()} | recipe.to_dict() # later ones may be unsaid
    same = lambda a, b: a == b or isinstance(a, float) and math.isnan(a) and math.isnan(b)
    asked = {k: os.path.expanduser(v) if v and FIELDS[k].metadata['place'] else v for k, v in asked.items()}
    names = lambda k, v: (v,) if FIELDS[k].metadata['allowed'] is SEVERAL and isinstance(v, str) else v
    asked = {k: names(k, v) for k, v in asked.items()}  # a text is the only name of several
    assert all(same(found[k], v) and (type(found[k]) is type(v)) for k, v in asked.items())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: check_recipe(recipe)
        except ValueError: pass


@CASES
def test_recipes_of_others(cases, counted):
    counted(**hold(cases, is_a_recipe_or_refused, said=recipes() | JSON))


def is_described_or_refused(folder, at, byte, cut):
    said = dict(recipe=Recipe().to_dict(), mapping=mapping_to_dict(make_mapping('lad', 6, 3)))
    raw = json.dumps(said, indent=1).encode()
    at = at % len(raw)
    raw = raw[:at] if cut else raw[:at] + byte + raw[at + 1:]
    (folder/'recipe.json').write_bytes(raw)
    try: said = run_description(folder)
    except ValueError as e: assert 'recipe.json' in str(e); return
    assert said == json.loads(raw)
    try: recipe_from_dict(said), mapping_from_dict(said.get('mapping'))
    except ValueError: pass


@CASES
def test_damaged_descriptions(tmp_path, cases, counted):
    damage = dict(at=st.integers(0, 5000), byte=st.binary(min_size=0, max_size=2), cut=st.booleans())
    counted(**hold(cases//2, is_described_or_refused, tmp_path, **damage))


METHODS = st.sampled_from(['lad', 'lad_no', 'bert_pkd', 'alp_kd', 'layer_mean', 'kd'])


@st.composite
def mappings(draw):
    """A saved mapping, one of whose values is another."""
    said = json.loads(json.dumps(mapping_to_dict(make_mapping(draw(METHODS), 6, 3))))
    here, key = dict(d=said), 'd'
    while isinstance(here[key], (dict, list)) and len(here[key]) and draw(st.integers(0, 3)):
        here = here[key]
        key = draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
    here[key] = draw(JSON | st.integers(0, 7))
    return said if key != 'd' else here['d']


def is_a_mapping_or_refused(said):
    try: mapping = mapping_from_dict(said)
    except ValueError: return
    assert mapping_to_dict(mapping) == said


@CASES
def test_mappings_of_others(cases, counted):
    counted(**hold(cases, is_a_mapping_or_refused, said=mappings()))


def numbers_in(text, default):
    """The layers that a flag names, or 'refused'."""
    if text is None: return default
    return [int(k) for k in text.split(',')] if re.fullmatch(r' *[0-9]+ *(, *[0-9]+ *)*', text) else 'refused'


def are_layers_or_refused(gates, students, command):
    lists = dict(gate_indices=gates, student_indices=students)
    argv = [*command.split(), *'--experiment x --task toy --num_hidden_layers 3'.split()]
    argv += [f'--{name}={text}' for name, text in lists.items() if text is not None]
    try: mapping = mapping_of(recipe_of(parse(argv)), 6)
    except (ValueError, SystemExit): return
    sources, readers = numbers_in(gates, [2, 4, 6]), numbers_in(students, [1, 2, 3])
    assert 'refused' not in (sources, readers) and all(1 <= k <= 6 for k in sources)
    assert [(p.student, p.source.k) for p in mapping.pairs] == [*zip(readers, sources, strict=True)]


ODD_LISTS = ['', ',', '1,', '1_2', '٣', ' 1, 2 ,3', '+1', '1.0', '1;2', '1 2', '-1', '²', '1,2,3,']
joined = lambda layers: ','.join(map(str, layers))
LAYERS = (st.none() | st.lists(st.integers(0, 7), min_size=1, max_size=4).map(joined)
          | st.permutations([1, 2, 3]).map(joined)
          | st.sampled_from(ODD_LISTS)
          | st.text('0123,_ +-', max_size=6))
COMMANDS = ['run_lad_distil', 'run_pkd_distill', 'run_probing_lad --probing_exp lad_user_defined']


@CASES
def test_mapping_flags(cases, capsys, counted):
    flags = dict(gates=LAYERS, students=LAYERS, command=st.sampled_from(COMMANDS))
    counted(**hold(min(cases, 3400), are_layers_or_refused, **flags)) # a command takes long


def test_lists_of_layers():
    assert layer_list('3, 2 ,1') == (3, 2, 1)
    for text in ('1_2', '٣', '+1', '', '1,', '²'):
        with pytest.raises(argparse.ArgumentTypeError, match='is not a list of layers'): layer_list(text)
    assert set(methods) >= {'lad', 'kd'}
