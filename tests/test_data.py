"""Readers against the real files, against the layouts of tasks that are not here, and against the hub's."""
import gc

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset

from lad_nb import data
from lad_nb.data import encode, load_task, read_tsv
from lad_nb.models import SMALL, load_tokenizer, model_folder
from lad_nb.tasks import features, splits, tasks
from lad_nb.toy import PHENOMENA, toy_examples


def test_rte_is_as_large_as_the_run_book_says(glue, monkeypatch):
    monkeypatch.setenv('LAD_NB_GLUE', str(glue))
    assert [len(load_task('rte', s)) for s in ('train', 'dev', 'test')] == [2490, 277, 3000]


@pytest.mark.parametrize('task', ['rte', 'mrpc', 'sst2'])
def test_real_glue(glue, monkeypatch, task):
    monkeypatch.setenv('LAD_NB_GLUE', str(glue))
    for split in splits(task):
        loaded, raw = load_task(task, split), (glue/tasks[task].folder/f'{split}.tsv').read_bytes()
        assert len(loaded) == raw.count(b'\n') - 1 # no line is swallowed
        assert all(loaded[f'sentence{i + 1}'][0] for i in range(len(tasks[task].columns)))
        if split == 'test': assert 'label' not in loaded.column_names
        else:
            assert set(loaded['label']) == {0, 1}
            assert loaded.features['label'].names == list(tasks[task].labels)


def test_a_lone_quote_is_a_character(glue):
    lines = (glue/'MRPC'/'train.tsv').read_text('utf-8-sig').split('\n')
    first = [line.split('\t')[3] if line else '' for line in lines[1:]]
    quoted = [i for i, sentence in enumerate(first) if sentence.count('"') % 2]
    rows = read_tsv(glue/'MRPC'/'train.tsv', 'mrpc')
    assert quoted
    for i in quoted: assert rows[i]['sentence1'] == first[i]


LAYOUTS = dict(  # the header, a row, what it reads as
    qnli=('index question sentence label', ['0', 'Who?', 'Anna.', 'not_entailment'],
          dict(sentence1='Who?', sentence2='Anna.', label=1)),
    qqp=('id qid1 qid2 question1 question2 is_duplicate', ['9', '1', '2', 'Why?', 'How?', '0'],
         dict(sentence1='Why?', sentence2='How?', label=0)),
    mnli=('index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse '
          'sentence2_parse sentence1 sentence2 label1 gold_label',
          [*'0 1 1n fiction ( ) ( )'.split(), 'A man runs.', 'He sits.', 'neutral', 'contradiction'],
          dict(sentence1='A man runs.', sentence2='He sits.', label=2)),
    cola=('', ['gj04', '1', '', 'They drank the pub dry.'],
          dict(sentence1='They drank the pub dry.', label=1)),
    stsb=('index genre filename year old_index source1 source2 sentence1 sentence2 score',
          [*'0 news f 2012 1 n n'.split(), 'A plane.', 'An air plane.', '4.750'],
          dict(sentence1='A plane.', sentence2='An air plane.', label=4.75)))


@pytest.mark.parametrize('task', LAYOUTS)
def test_layouts(tmp_path, task):
    header, row, first = LAYOUTS[task]
    lines = [header.split()]*bool(header) + [row]
    (tmp_path/'train.tsv').write_text('\n'.join('\t'.join(fields) for fields in lines) + '\n')
    assert read_tsv(tmp_path/'train.tsv', task) == [first | {'idx': 0}]


@pytest.mark.parametrize('task', [t for t in tasks if t != 'toy'])
def test_hub_layout(tmp_path, monkeypatch, task):
    """The hub's parquet files, in the hub's columns, become the same splits as a folder does."""
    task = tasks[task]
    columns = task.hub_columns or task.columns
    labels = [0., 2.5, 5.] if task.regression else [0, 1, 0]
    rows = {c: [f'{c} {i}' for i in range(3)] for c in columns} | {'label': labels, 'idx': [0, 1, 2]}
    hub = Dataset.from_dict(rows)
    if not task.regression: hub = hub.cast_column('label', ClassLabel(names=list(task.labels)))
    hub_name = {'dev': 'validation'}.get(task.dev[0], task.dev[0].replace('dev', 'validation'))
    (tmp_path/task.name).mkdir()
    hub.to_parquet(tmp_path/task.name/f'{hub_name}-00000-of-00001.parquet')
    monkeypatch.delenv('LAD_NB_GLUE', raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, 'snapshot_download', lambda *a, **k: str(tmp_path))
    loaded = load_task(task, task.dev[0])
    assert loaded['sentence1'][1] == f'{columns[0]} 1' and loaded.features == features(task)
    assert list(loaded['label']) == labels


def test_hub_is_asked_once_and_fails_fast(tmp_path, monkeypatch):
    monkeypatch.delenv('LAD_NB_GLUE', raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    asked = []
    def no_network(*args, **kwargs):
        asked.append(args)
        raise ConnectionError('no network')
    monkeypatch.setattr(data, 'snapshot_download', no_network)
    with pytest.raises(FileNotFoundError, match="take the built-in task 'toy'"): load_task('qqp')
    assert len(asked) == 1
    with pytest.raises(FileNotFoundError, match='which works offline'): model_folder('bert-base-uncased')


def test_toy_task():
    loaded = {s: load_task('toy', s) for s in splits('toy')}
    pairs = [(r['sentence1'], r['sentence2']) for rows in loaded.values() for r in rows]
    assert len(set(pairs)) == len(pairs)
    for s in ('train', 'dev'): assert abs(np.mean(loaded[s]['label']) - .5) < .01
    assert 'label' not in loaded['test'].column_names
    assert max(map(len, encode(loaded['train'], load_tokenizer(SMALL), 64)['input_ids'])) <= 32
    assert {e['phenomenon'] for e in toy_examples(64)} == {f.__name__ for f in PHENOMENA}


def test_sampling_is_the_runs_own(glue, monkeypatch):
    monkeypatch.setenv('LAD_NB_GLUE', str(glue))
    a, b, c = (load_task('sst2', 'train', size=50, sample_seed=s)['idx'] for s in (0, 0, 1))
    assert list(a) == list(b) != list(c)


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """Writes an RTE folder of so many rows and one more, of which every size counts as large."""
    monkeypatch.setattr(data, 'IN_MEMORY', 0)
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path/'cache')
    folder = tmp_path/'RTE'
    folder.mkdir()
    def write(n, last='b'):
        labels = 'entailment', 'not_entailment'
        lines = [f'{i}\tsentence {i} "\tthe other {i}\t{labels[i % 2]}' for i in range(n)]
        lines = ['index\tsentence1\tsentence2\tlabel', *lines, f'{n}\ta\t{last}\tentailment', '']
        (folder/'train.tsv').write_text('\n'.join(lines))
        return str(folder)
    return write


def arrow_holds():
    gc.collect()
    return pa.total_allocated_bytes()


def test_large_files_stay_on_disk(on_disk, tmp_path, monkeypatch):
    """The same rows as from memory, and the same token ids; Arrow holds none of them in memory.
    A copy is found again, and made anew when the file changes."""
    where, copies = on_disk(25_000), lambda: sorted((tmp_path/'cache').glob('lad_nb/*/rows.arrow'))
    tokenizer, before = load_tokenizer(SMALL), arrow_holds()
    rows = load_task('rte', data_dir=where)
    ids = encode(rows, tokenizer, 32)
    assert rows.cache_files and ids.cache_files and len(copies()) == 1
    assert arrow_holds() - before < 1e5
    assert rows.to_list() == read_tsv(f'{where}/train.tsv', 'rte')
    monkeypatch.setattr(data, 'IN_MEMORY', 2**25)
    before = arrow_holds()
    held = load_task('rte', data_dir=where)
    assert not held.cache_files and held.features == rows.features and arrow_holds() - before > 1e6
    assert encode(held.select(range(300)), tokenizer, 32).to_list() == ids.select(range(300)).to_list()
    assert load_task('rte', data_dir=where, size=50)['idx'] == rows.shuffle(seed=0).select(range(50))['idx']
    monkeypatch.setattr(data, 'IN_MEMORY', 0)
    made = copies()[0].stat().st_mtime_ns
    assert load_task('rte', data_dir=where)[0] == rows[0] and copies()[0].stat().st_mtime_ns == made
    again = load_task('rte', data_dir=on_disk(25_000, 'c'))
    assert again[25_000]['sentence2'] == 'c' and len(copies()) == 2
    assert rows[25_000]['sentence2'] == 'b'


def test_a_large_file_with_a_bad_line_leaves_nothing(on_disk, tmp_path):
    where = on_disk(12_000, 'b\tone field too many')
    for _ in range(2):
        with pytest.raises(ValueError, match='train.tsv, line 12002: 5 fields; 4 were expected'):
            load_task('rte', data_dir=where)
        assert not [f for f in (tmp_path/'cache').rglob('rows.*')]
    for _ in range(2):
        with pytest.warns(UserWarning, match='left out 1 lines'):
            assert len(load_task('rte', data_dir=where, bad_rows='skip')) == 12_000
