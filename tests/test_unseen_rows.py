"""Unseen rows are unseen: none is part of a row that was trained on, and no such row is part of one."""
import random

import pytest
from datasets import Dataset

from lad_nb import unseen
from lad_nb.data import find_data, load_task
from lad_nb.unseen import new_texts, unseen_rows

DRAWS = ((8000, 0),)


def spaced(texts):
    """Words between single spaces, with one at both ends: a run of words is then a substring."""
    return [' ' + ' '.join(text.lower().split()) + ' ' for text in texts]


def overlap(texts, seen):
    """Numbers of texts that are part of one that was seen, or the reverse; by looking at every pair."""
    texts, seen = spaced(texts), [s for s in spaced(seen) if s.strip()]
    all_seen = '\n'.join(seen)
    return [i for i, t in enumerate(texts) if t in all_seen or any(s in t for s in seen)]


def made_up(n, rng):
    """Texts of one to nine words out of four, so that many are parts of others; odd cases and spaces."""
    return [rng.choice([' ', '  ']).join(rng.choice(['a', 'B', 'c', 'Dd']) for _ in range(rng.randint(1, 9)))
            for _ in range(n)]


@pytest.mark.parametrize('least', [1, 2, 4])
@pytest.mark.parametrize('seed', range(5))
def test_new_texts_of_a_made_up_set(seed, least):
    """Found by words at their start: the same as by looking at every pair."""
    rng = random.Random(seed)
    texts, seen = made_up(300, rng), [t for t in made_up(40, rng) if len(t.split()) > 2]
    old = set(overlap(texts, seen))
    expected = [i not in old and len(t.split()) >= least for i, t in enumerate(texts)]
    assert 20 < sum(expected) < 290, 'the set shows nothing'
    assert new_texts(texts, seen, least) == expected


def test_a_short_row_counts():
    """A word that was trained on alone makes every row with it a row that was partly seen."""
    assert new_texts(['a very good film indeed'], ['good']) == [False]
    assert new_texts(['a very goodly film indeed'], ['good', '  ']) == [True]
    assert new_texts(['it is a good film'], ['I think it is a good film, no?']) == [True]  # 'film,' is a word
    assert new_texts(['It  is a GOOD film'], ['I think it is a good film , no ?']) == [False]


@pytest.fixture(scope='module')
def sst2():
    """Candidates, drawn rows, dev rows and what was found, of the real SST-2."""
    if find_data('sst2') is None:
        pytest.skip('no SST-2 data: LAD_NB_GLUE names the folder that has SST-2/train.tsv')
    data, drawn, dev = load_task('sst2'), load_task('sst2', size=8000), load_task('sst2', 'dev')
    return data, drawn, dev, unseen_rows('sst2', DRAWS)


def test_no_row_of_sst2_was_seen(sst2):
    """Not drawn, four words or more, no run of words shared whole; none twice. By a slow and simple way."""
    data, drawn, dev, found = sst2
    texts = found['sentence1'][:]
    assert min(len(t.split()) for t in texts) >= 4
    assert not set(found['idx']) & set(drawn['idx'])
    assert len(set(spaced(texts))) == len(texts) == len(set(found['idx']))
    every = '\n'.join(spaced(texts))
    for seen in (drawn['sentence1'][:], dev['sentence1'][:]):
        parts = '\n'.join(spaced(seen))
        assert not [t for t in spaced(texts) if t in parts], 'part of a row that was seen'
        assert not [s for s in spaced(seen) if s.strip() and s in every], 'a row that was seen is part of one'
    assert data[found['idx'][0]]['sentence1'] == texts[0]


def test_none_of_sst2_is_forgotten(sst2):
    """12,622 qualify beside the drawn; one is a double, seven share words with dev. Others have a reason."""
    data, drawn, dev, found = sst2
    assert len(found) == 12_622 - 1 - 7
    there, seen = set(found['idx']) | set(drawn['idx']), [*drawn['sentence1'], *dev['sentence1']]
    some = data.select(random.Random(0).sample(range(len(data)), 500))
    left_out = [r['sentence1'] for r in some if r['idx'] not in there]
    long = [t for t in left_out if len(t.split()) >= 4]
    assert len(long) > 100
    assert overlap(long, seen) == [*range(len(long))]


def test_the_order_is_a_seeded_shuffle(sst2):
    """Not that of the file, and labels are mixed; the same each time, another with another seed."""
    found = sst2[3]
    assert found['idx'][:] != sorted(found['idx'])
    assert abs(sum(found['label'][:1000]) / 1000 - sum(found['label']) / len(found)) < 0.05
    first, other = (unseen_rows('toy', ((500, 0),), seed=seed)['idx'][:] for seed in (0, 1))
    unseen._unseen.cache_clear()
    assert unseen_rows('toy', ((500, 0),))['idx'][:] == first != other
    assert sorted(first) == sorted(other)


def test_pairs_are_unseen_as_pairs():
    """In a task of two texts a row is left out if the pair was drawn, is in dev, or was there before."""
    rows = unseen_rows('toy', ((500, 0),))
    pairs = list(zip(rows['sentence1'], rows['sentence2']))
    drawn = load_task('toy', size=500)
    seen = {*zip(drawn['sentence1'], drawn['sentence2'])}
    dev = load_task('toy', 'dev')
    seen |= {*zip(dev['sentence1'], dev['sentence2'])}
    assert not seen & set(pairs) and len(set(pairs)) == len(pairs)
    train = load_task('toy')
    assert set(pairs) | seen >= set(zip(train['sentence1'], train['sentence2']))


def test_two_draws():
    """What any of the runs drew is seen; the order in which draws are named does not matter."""
    rows = unseen_rows('toy', ((200, 1), (100, 0)))
    for size, seed in ((200, 1), (100, 0)):
        assert not set(rows['idx']) & set(load_task('toy', size=size, sample_seed=seed)['idx'])
    assert unseen_rows('toy', [[100, 0], [200, 1]]) is rows
    assert isinstance(rows, Dataset)
