"""What the statistics of a study promise, each held to a second computation.
scipy's tests, Holm's rule by hand, loops, and simulated studies.
"""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.weightstats import ttost_paired

from lad_nb.inference import decide, pooled_model, power, seeds_to_decide, spread_check
from lad_nb.statistics import multi_bootstrap, probability_of_improvement


def study(methods=5, seeds=6, sd=.005, missing=(), seed=0, **means):
    """Scores of made-up methods m0, m1, ..., as a tidy frame."""
    rng = np.random.default_rng(seed)
    luck = rng.normal(0, .01, seeds)
    rows = [dict(task='toy', method=f'm{m}', seed=42 + s, metric='accuracy',
                 value=means.get(f'm{m}', .8) + luck[s] + rng.normal(0, sd))
            for m in range(methods) for s in range(seeds)]
    return pd.DataFrame(rows).drop(index=list(missing))


def claim(better, worse): return SimpleNamespace(text=f'{better} is better', better=better, worse=worse)


def values(results, method): return results[results.method == method].value.to_numpy()


# ---------------------------------------------------------------- the pooled model

@pytest.mark.parametrize('seeds', [2, 3, 9])
def test_two_methods_are_the_paired_t_test(seeds):
    two = study(2, seeds)
    found = pooled_model(two).difference('m1', 'm0', level=.9)
    paired = stats.ttest_rel(values(two, 'm1'), values(two, 'm0'))
    interval = paired.confidence_interval(.9)
    assert found['df'] == paired.df == seeds - 1
    np.testing.assert_allclose([found['p'], found['low'], found['high']],
                               [paired.pvalue, interval.low, interval.high], rtol=1e-9)


def test_a_complete_table_is_the_analysis_of_variance_by_hand():
    results = study(5, 6)
    table = results.pivot(index='method', columns='seed', values='value').to_numpy()
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    sd = ((rest**2).sum()/(4*5))**.5
    model = pooled_model(results)
    np.testing.assert_allclose(model.means, table.mean(1))
    np.testing.assert_allclose(model.residuals, rest, atol=1e-12)
    found = model.difference('m2', 'm4')
    np.testing.assert_allclose([model.sd, found['se']], [sd, sd*(2/6)**.5])
    assert model.df == found['df'] == 20


def test_a_missing_run_is_as_if_its_method_had_a_parameter_for_it():
    """A run that is dropped, and one that is made up and explained away, leave the same."""
    results = study(4, 5)
    gone = 7
    y = results.assign(value=results.value.where(results.index != gone, .123)).value.to_numpy()
    x = np.hstack([np.kron(np.eye(4), np.ones((5, 1))), np.kron(np.ones((4, 1)), np.eye(5))[:, 1:],
                   (np.arange(20) == gone)[:, None]])
    beta, ss, rank, _ = np.linalg.lstsq(x, y, rcond=None)
    c = np.array([-1, 1] + [0]*7)
    sd = (ss[0]/(20 - rank))**.5
    model = pooled_model(results.drop(index=gone))
    found = model.difference('m1', 'm0')
    np.testing.assert_allclose([found['mean'], model.sd, found['se'], found['df']],
                               [c @ beta, sd, sd*(c @ np.linalg.inv(x.T @ x) @ c)**.5, 20 - rank])
    assert np.isnan(model.residuals.loc['m1', 44]) and model.residuals.notna().sum().sum() == 19


def test_a_method_is_not_blamed_for_the_seeds_it_missed():
    """All runs are method + seed exactly; m1 lacks the best seed."""
    worth, luck = dict(m0=.8, m1=.82, m2=.7), [0, .1, -.05, .02]
    rows = [dict(task='toy', method=m, seed=s, metric='f1', value=v + luck[s])
            for m, v in worth.items() for s in range(4) if (m, s) != ('m1', 1)]
    model = pooled_model(pd.DataFrame(rows))
    assert model.sd == 0
    found = model.difference('m1', 'm0')
    np.testing.assert_allclose([found['mean'], found['se'], found['p']], [.02, 0, 0], atol=1e-12)


def test_rows_may_come_in_any_order():
    results = study(4, 5, missing=[3, 11])
    a, b = (pooled_model(r).difference('m3', 'm0') for r in (results, results.sample(frac=1, random_state=1)))
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-9)


def test_runs_that_never_stray_are_no_accident():
    """A miniature's scores may all be equal."""
    results = study(3, 3).assign(value=.5)
    model = pooled_model(results)
    assert (model.sd, model.difference('m0', 'm1')['p'], model.p_same('m0', 'm1', .005)) == (0, 1, 0)
    assert decide(results, [claim('m0', 'm1')]).verdict.tolist() == ['the same within the margin']
    with pytest.raises(ValueError, match='No run strays at all'): spread_check(model)


@pytest.mark.parametrize('margin', [.001, .004, .02])
def test_equivalence_is_statsmodels(margin):
    two = study(2, 7, m1=.803)
    expected = ttost_paired(values(two, 'm1'), values(two, 'm0'), -margin, margin)[0]
    np.testing.assert_allclose(pooled_model(two).p_same('m1', 'm0', margin), expected, rtol=1e-9)


def test_the_spread_check_is_wrong_as_often_as_it_says():
    least = np.array([spread_check(pooled_model(study(5, 4, missing=[2, 13], seed=s)), 499).p.min()
                      for s in range(200)])
    for level in (.1, .5):
        assert stats.binomtest(int((least <= level).sum()), 200, level).pvalue > .01


# ---------------------------------------------------------------- claims

def holm(p):
    """Holm's adjusted p, as the rule reads: step by step from the smallest."""
    adjusted, so_far = np.empty(len(p)), 0
    for i, at in enumerate(np.argsort(p)):
        so_far = max(so_far, (len(p) - i)*p[at])
        adjusted[at] = min(so_far, 1)
    return adjusted


def test_verdicts_are_holms_over_all_claims_and_tasks():
    one = study(5, 6, sd=.002, m1=.81, m2=.801, m3=.79, m4=.8)
    results = pd.concat([one, study(3, 6, sd=.02, seed=1).assign(task='other')])
    claims = [claim(f'm{i}', 'm0') for i in (1, 2, 3, 4)]
    told = decide(results, claims, margin=.006)
    assert told.task.tolist() == ['toy', 'other', 'toy', 'other', 'toy', 'toy'] # m3 and m4 are in one task
    np.testing.assert_allclose(told.p_holm, holm(told.p.to_numpy()))
    np.testing.assert_allclose(told.p_same_holm, holm(told.p_same.to_numpy()))
    for row in told.itertuples():
        differs, same = row.p_holm <= .05, row.p_same_holm <= .05
        assert row.verdict.startswith('better') == (differs and row.mean > 0)
        assert row.verdict.startswith('worse') == (differs and row.mean < 0)
        assert ('same' in row.verdict) == (same and not differs)
        assert ('by less' in row.verdict) == (same and differs)
        assert (row.verdict == 'undecided') == (not differs and not same) == pd.notna(row.seeds_to_differ)
    assert {'better', 'worse', 'undecided', 'the same within the margin'} <= set(told.verdict)


def test_better_by_less_than_the_margin():
    told = decide(study(3, 40, sd=.002, m1=.802), [claim('m1', 'm0'), claim('m0', 'm1')])
    assert told.verdict.tolist() == ['better, by less than the margin', 'worse, by less than the margin']


def test_what_is_undecided_says_what_it_would_take():
    results = study(4, 4, sd=.005, seed=3)
    told = decide(results, [claim('m1', 'm0'), claim('m2', 'm0')], margin=.004)
    sd = pooled_model(results).sd
    assert told.verdict.tolist() == ['undecided']*2
    how = dict(methods=4, size=.004, alpha=.025)
    assert told.seeds_to_differ.tolist() == [seeds_to_decide(sd, **how)]*2
    assert told.seeds_to_same.tolist() == [seeds_to_decide(sd, question='same', **how)]*2


# ---------------------------------------------------------------- power

@pytest.mark.parametrize('seeds, methods', [(3, 2), (8, 2), (8, 16)])
@pytest.mark.parametrize('question', ['difference', 'same'])
def test_power_is_what_simulated_studies_find(seeds, methods, question):
    rng, sd, size, n = np.random.default_rng(5), .003, .006, 40_000
    se, df = sd*(2/seeds)**.5, (methods - 1)*(seeds - 1)
    measured = se*(rng.chisquare(df, n)/df)**.5
    mean = rng.normal(size if question == 'difference' else 0, se, n)
    if question == 'difference': found = np.abs(mean)/measured > stats.t.ppf(.975, df)
    else: found = (size - np.abs(mean))/measured > stats.t.ppf(.95, df)
    assert abs(power(sd, seeds, methods, size, question) - found.mean()) < 4*.5/n**.5


@pytest.mark.parametrize('how', [dict(), dict(methods=16), dict(question='same', methods=3),
                                 dict(alpha=.001)])
def test_seeds_to_decide_are_the_fewest(how):
    n = seeds_to_decide(.004, .9, **how)
    assert power(.004, n - 1, **how) < .9 <= power(.004, n, **how)


# ---------------------------------------------------------------- seeds and rows redrawn

def answers(seeds=4, rows=30, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=rows)
    index = pd.MultiIndex.from_product([['a', 'b'], range(seeds)], names=['method', 'seed'])
    wrong = rng.random((2*seeds, rows)) < np.repeat([.15, .3], seeds)[:, None]
    return pd.DataFrame(np.where(wrong, 1 - labels, labels), index), labels


def plain_f1(labels, said):
    hits, misses = ((labels == 1) & (said == 1)).sum(), (labels != said).sum()
    return 2*hits/(2*hits + misses)


def matthews(labels, said): return np.corrcoef(labels, said)[0, 1]


@pytest.mark.parametrize('metric, slow', [('accuracy', lambda labels, said: (labels == said).mean()),
                                          ('f1', plain_f1), (matthews, matthews)])
def test_the_multi_bootstrap_is_a_slow_loop_over_the_same_draws(metric, slow):
    said, labels = answers()
    seeds, rows, times = 4, len(labels), 300 # more than one batch of resamples
    rng = np.random.default_rng(7)
    counts, drawn = rng.multinomial(seeds, [1/seeds]*seeds, size=times), []
    alike = {} # rows with one label and the same answers: kinds, in order
    for row, kind in enumerate(zip(labels, *said.to_numpy())): alike.setdefault(kind, []).append(row)
    alike = [alike[kind] for kind in sorted(alike)]
    assert 10 < len(alike) < rows
    for count in counts:
        often = rng.multinomial(rows, [len(same)/rows for same in alike])
        at = np.repeat([same[0] for same in alike], often)
        scores = {m: [slow(labels[at], said.loc[(m, s)].to_numpy()[at])
                      for s in range(seeds) for _ in range(count[s])] for m in 'ab'}
        drawn.append(np.mean(scores['a']) - np.mean(scores['b']))
    found = multi_bootstrap(said, labels, 'a', 'b', metric, resamples=times, seed=7)
    whole = {m: np.mean([slow(labels, own) for own in said.loc[m].to_numpy()]) for m in 'ab'}
    mean = whole['a'] - whole['b']
    p = min(1, 2*(1 + min(np.sum(np.array(drawn) <= 1e-12), np.sum(np.array(drawn) >= -1e-12)))/(times + 1))
    np.testing.assert_allclose([found['mean'], found['se'], found['low'], found['high'], found['p']],
                               [mean, np.std(drawn, ddof=1), *np.quantile(drawn, [.025, .975]), p],
                               atol=1e-12)
    assert (found['seeds'], found['rows']) == (4, 30)


def test_seeds_are_paired_whatever_their_order_and_rows_too():
    said, labels = answers()
    assert multi_bootstrap(said[::-1], labels, 'a', 'b')['mean'] == pytest.approx(
        multi_bootstrap(said, labels, 'a', 'b')['mean'])
    twin = pd.concat({'c': said.loc['a'].iloc[::-1], 'a': said.loc['a']})
    found = multi_bootstrap(twin, labels, 'a', 'c')
    assert (found['mean'], found['se'], found['low'], found['high'], found['p']) == (0, 0, 0, 0, 1)


def test_a_seed_that_one_method_lacks_is_left_out():
    said, labels = answers(5)
    found = multi_bootstrap(said.drop(index=('b', 3)), labels, 'a', 'b')
    assert found == multi_bootstrap(said.drop(index=[('a', 3), ('b', 3)]), labels, 'a', 'b')
    assert found['seeds'] == 4


def test_teachers_that_suit_a_method_widen_its_interval():
    """With teacher 0 a is always right; with the others never better than b: one teacher in three."""
    labels = np.ones(500, int)
    index = pd.MultiIndex.from_product([['a', 'b'], range(9)])
    right = pd.DataFrame(1, index, range(500))
    right.loc[[('b', s) for s in (0, 3, 6)]] = 0
    right.loc[[(m, s) for m in 'ab' for s in range(9) if s % 3]] = 1
    alone = multi_bootstrap(right, labels, 'a', 'b')
    told = multi_bootstrap(right, labels, 'a', 'b', teachers={s: f'teacher {s % 3}' for s in range(9)})
    assert alone['mean'] == told['mean'] == pytest.approx(1/3)
    spread = (1/3*2/3)**.5
    assert alone['se'] == pytest.approx(spread/3, rel=.05)      # nine seeds
    assert told['se'] == pytest.approx(spread/3**.5, rel=.05)   # three teachers


def test_its_standard_error_is_that_of_all_possible_draws():
    """The counts of two of n things have the mean product 1 - 1/n; a count with itself, 1 more."""
    said, labels = answers(seeds=5, rows=40)
    right = (said == labels).astype(int)
    gain = (right.loc['a'] - right.loc['b']).to_numpy()
    of_seeds, of_rows = (((1 - 1/n) + np.eye(n))/n**2 for n in gain.shape)
    exact = ((of_seeds @ gain @ of_rows*gain).sum() - gain.mean()**2)**.5
    found = multi_bootstrap(said, labels, 'a', 'b', resamples=20_000)
    assert found['se'] == pytest.approx(exact, rel=.02)
    by_seeds, by_rows = (gain.mean(axis).std()/len(gain.mean(axis))**.5 for axis in (1, 0))
    assert max(by_seeds, by_rows) < .9*exact # neither by itself is enough


def test_the_probability_of_improvement_is_mann_whitneys():
    two = pd.concat([study(3, 6, m1=.805), study(3, 5, seed=1).assign(task='other')])
    found = probability_of_improvement(two, 'm1', 'm0')
    own = [[values(two[two.task == t], m) for m in ('m1', 'm0')] for t in ('toy', 'other')]
    expected = np.mean([stats.mannwhitneyu(a, b).statistic/(len(a)*len(b)) for a, b in own])
    assert found['mean'] == pytest.approx(expected) and found['tasks'] == 2
    assert found['low'] <= found['mean'] <= found['high']
    rng, drawn = np.random.default_rng(0), []
    for _ in range(4000): # each method's runs again within each task, one draw at a time
        again = [(rng.choice(a, len(a))[:, None], rng.choice(b, len(b))) for a, b in own]
        drawn.append(np.mean([(a > b).mean() for a, b in again]))
    np.testing.assert_allclose([found['low'], found['high']], np.quantile(drawn, [.025, .975]), atol=.03)


def test_ties_count_half():
    same = study(2, 3).assign(value=.5)
    assert probability_of_improvement(same, 'm0', 'm1') == dict(tasks=1, mean=.5, low=.5, high=.5)


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize('ask, says', [
    (lambda r: pooled_model(r[r.seed == 42]), '5 runs of 5 methods with 1 seeds leave nothing'),
    (lambda r: pooled_model(r[r.method == 'm0']), '6 runs of 1 methods with 6 seeds leave nothing'),
    (lambda r: pooled_model(r.assign(value=np.nan)), 'not a finite number'),
    (lambda r: pooled_model(r[:0]), 'There are: none'),
    (lambda r: pooled_model(pd.concat([r, r.assign(task='other')])), r'toy \(accuracy\), other \(accuracy\)'),
    (lambda r: pooled_model(pd.concat([r, r])), 'two values'),
    (lambda r: pooled_model(pd.concat([r, r[r.method == 'm0'].assign(method='new', seed=range(6))])),
     'new shares no seed with m0'),
    (lambda r: pooled_model(r).difference('m0', 'LAD'), "no method 'LAD'. There are: m0, m1"),
    (lambda r: pooled_model(r).difference('m0', 'm0'), 'm0 can.t be compared with itself'),
    (lambda r: pooled_model(r).p_same('m0', 'm1', 0), 'margin is 0; a difference above 0'),
    (lambda r: decide(r, [claim('m0', 'm1')], margin=-.005), 'margin is -0.005'),
    (lambda r: decide(r, [claim('m0', 'm1')], margin=float('nan')), 'margin is nan'),
    (lambda r: decide(r, [claim('m0', 'm1')], level=95), 'level is 95; a share between 0 and 1'),
    (lambda r: decide(r, [claim('m0', 'LAD')]), "No task has both m0 and LAD, of the claim 'm0 is better'"),
    (lambda r: decide(r, []), 'no claims to decide'),
    (lambda r: decide(r.drop(columns='metric'), [claim('m0', 'm1')]), 'no column metric'),
    (lambda r: power(.005, 1), '2 methods with 1 seeds leave nothing'),
    (lambda r: power(.005, 8, question='equal'), "question is 'equal'; it is 'difference' or 'same'"),
    (lambda r: power(.005, 8, size=0), 'size is 0'),
    (lambda r: power(float('nan'), 8), 'sd is nan'),
    (lambda r: seeds_to_decide(.005, 80), 'odds is 80; a share'),
    (lambda r: probability_of_improvement(r, 'm0', 'LAD'), '6 runs of m0 and 0 of LAD; two of each'),
    (lambda r: probability_of_improvement(pd.concat([r, r.assign(metric='f1')]), 'm0', 'm1'),
     'toy has 2 metrics'),
])
def test_a_wrong_question_says_what_to_do(ask, says):
    with pytest.raises(ValueError, match=says): ask(study())


@pytest.mark.parametrize('change, says', [
    (lambda a, y: dict(answers=a.reset_index(drop=True)), 'two levels, method and seed; it has 1'),
    (lambda a, y: dict(labels=y[1:]), 'answers to 30 rows, and labels of 29'),
    (lambda a, y: dict(answers=a.reindex(columns=range(1, 31))), r'missing \(NaN\)'),
    (lambda a, y: dict(answers=pd.concat([a, a])), r"two rows of answers for \('a', 0\)"),
    (lambda a, y: dict(worse='LAD'), "no method 'LAD'. There are: a, b"),
    (lambda a, y: dict(answers=a.drop(index=[('a', 0), ('a', 1), ('b', 2)])), 'share 1 seeds; two are'),
    (lambda a, y: dict(metric='mcc'), "metric is 'mcc'; it is 'accuracy', 'f1', or a function"),
    (lambda a, y: dict(teachers={0: 'x', 1: 'y'}), 'teachers has no entry for seed 2'),
    (lambda a, y: dict(teachers=dict.fromkeys(range(4), 'x')), 'All seeds have one teacher'),
])
def test_answers_that_are_no_table_are_refused(change, says):
    a, y = answers()
    with pytest.raises(ValueError, match=says):
        multi_bootstrap(**dict(answers=a, labels=y, better='a', worse='b') | change(a, y))
