"Slices: facts counted from annotations, gaps that block a release, weak slices found without crying wolf, and items that got worse."

import numpy as np, pyarrow as pa, pytest
from scipy.stats import permutation_test

from cv_lab.core import Annotation, BadInput, digest
from cv_lab.data.facts import facts_of
from cv_lab.data.manifest import PREDICTIONS, make_table
from cv_lab.evaluate import compare, evaluate, per_item, write_evidence
from cv_lab.geometry import rle_encode
from cv_lab.release import judge_rules
from cv_lab.spec import Problem, Rule, parse_problem, select
from cv_lab.weak import find_weak, slices_of, weak_slices

BASE = dict(
    name='p',
    task='classification',
    classes=['a', 'b'],
    owner='us',
    intended_use='tests',
    slices=dict(day="light == 'day'", night="light == 'night'", rare="light == 'fog'"),
)


def world(right, light, **columns):
    "Truth and predictions of items that are right where they are said to be."
    n = len(right)
    truth = make_table(
        [
            dict(
                id=str(i),
                sha256=digest(str(i)),
                tags=dict(light=light[i], **{k: v[i] for k, v in columns.items()}),
                annotations=[dict(label='a')],
            )
            for i in range(n)
        ]
    )
    said = lambda r: pa.Table.from_pylist(
        [
            dict(
                id=str(i),
                annotations=[dict(label='a' if r[i] else 'b', score=0.9)],
                probs=[0.9, 0.1] if r[i] else [0.1, 0.9],
            )
            for i in range(n)
        ],
        schema=PREDICTIONS,
    )
    return truth, said


@pytest.mark.parametrize('where, chosen', [
    ("day >= '2025-02'", [0, 0, 1]), ("day < '2025-02'", [1, 0, 0]), ('day < site', [1, 0, 0]), ('not day', [0, 1, 0]),
    ("site in ['n', 'x']", [1, 0, 0]), ('level > -1', [1, 0, 1]), ('not level > 1', [1, 1, 0])])
def test_an_item_that_lacks_a_tag_is_before_and_after_nothing(where, chosen):
    tags = dict(day=['2025-01-01', None, '2025-03-01'], site=['n', 's', None], level=['0', None, '2'])
    assert select(where, tags).tolist() == list(map(bool, chosen))


@pytest.mark.parametrize('where', ['day ==', '', '-day', "day in 'x'", "day == ['x']", "'a' < 3", '[day]', 'f(day)', 'dat'])
def test_a_sentence_that_chooses_nothing_says_so(where):
    with pytest.raises(BadInput): select(where, dict(day=['1', None]))


def test_facts_are_counted_and_a_tag_wins():
    box = lambda *b: dict(label='x', bbox=list(b))
    t = make_table(
        [
            dict(id='a', width=9, height=9, annotations=[box(0, 0, 2, 2), box(1, 0, 3, 2), dict(label='y')]),
            dict(id='b', width=99, height=9, tags=dict(objects='many')),
        ]
    )
    f = facts_of(t); assert f['objects'] == [None, 'many']
    assert (
        f['crowding'][0] == f'{1 / 3:.6g}'
        and f['smallest'] == ['2', None]
        and list(select('width > 50', f)) == [False, True]
        and list(select('crowding > .3 and smallest < 3', f)) == [True, False]
    )


def test_a_gap_blocks_the_release(tmp_path):
    light = ['day'] * 100 + ['night'] * 100 + ['fog'] * 5
    right = np.r_[np.ones(100), np.arange(100) % 5 > 0, np.zeros(5)] > 0
    truth, said = world(right, light)
    rule = lambda **k: dict(metric='accuracy', **k)
    problem = Problem(
        **BASE,
        acceptance=[
            rule(between=['day', 'night'], gap_at_most=0.3),
            rule(between=['day', 'night'], gap_at_most=0.1),
            rule(between='each', gap_at_most=0.3),
            rule(between=['day', 'all'], gap_at_most=0.15, judge='point'),
            rule(between=['rare', 'day'], gap_at_most=0.1),
        ],
    )
    found = write_evidence(tmp_path/'evaluation', truth, said(right), problem); g = found['gaps']
    assert (
        g[0]['value'] == pytest.approx(0.2)
        and g[0]['low'] < 0.2 < g[0]['high']
        and (g[0]['best'], g[0]['worst']) == ('day', 'night')
        and g[3]['value'] == pytest.approx(1 - right.mean())
    )
    rows = judge_rules(problem, tmp_path / 'evaluation')['rules']
    assert [r['verdict'] for r in rows[:5]] == ['pass', 'fail', 'pass', 'pass', 'not judged'], rows[:5]
    assert 'day 1, night 0.8' in rows[1]['said'] and rows[1]['rule'] == 'accuracy, gap between day, night <= 0.1'
    again = Problem(**BASE, acceptance=[rule(between=['day', 'night'], gap_at_most=0.3, min_support=50)])
    assert (
        judge_rules(again, tmp_path / 'evaluation')['rules'][0]['said'] == 'was not measured'
    )  # another rule than was evaluated


@pytest.mark.parametrize(
    'rule',
    [
        '{metric: accuracy, gap_at_most: .1}',
        '{metric: accuracy, between: each, at_most: .1}',
        '{metric: accuracy, between: [day], gap_at_most: .1}',
        '{metric: accuracy, between: [day, dusk], gap_at_most: .1}',
        '{metric: accuracy, between: [day, night], gap_at_most: -1}',
        '{metric: accuracy, between: each, slice: day, gap_at_most: .1}',
    ],
)
def test_gap_rules_that_make_no_sense(rule):
    with pytest.raises(BadInput, match='acceptance|between|asks for'):
        parse_problem(
            f"{{name: p, task: classification, classes: [a], owner: u, intended_use: t, slices: {{day: \"light == 'day'\", night: \"light == 'night'\"}}, acceptance: [{rule}]}}"
        )
    assert str(Rule(metric='map50', between='each', gap_at_most=.1)) == 'map50, gap between each slice <= 0.1'


def test_the_test_is_that_of_scipy():
    rng = np.random.default_rng(0); v = rng.normal(size=40); m = np.arange(40) < 15; v[m] -= .6
    ours = weak_slices(v, {'s': m}, resamples=5000, alpha=1.0)['p'].iloc[0]
    theirs = permutation_test(
        (v[~m], v[m]),
        lambda a, b: a.mean() - b.mean(),
        alternative='greater',
        n_resamples=5000,
        rng=np.random.default_rng(1),
    ).pvalue
    assert ours == pytest.approx(theirs, abs=.02)


def test_a_planted_weakness_is_found_and_none_is_made_up():
    rng = np.random.default_rng(0)
    n = 400
    facts = dict(
        light=rng.choice(['day', 'dusk', 'night'], n).tolist(),
        cam=rng.choice(list('ABC'), n).tolist(),
        objects=[str(k) for k in rng.integers(1, 30, n)],
    )
    s = slices_of(facts)
    assert (
        all(20 <= m.sum() <= n - 20 for m in s.values())
        and any(' and ' in e for e in s)
        and (s["light == 'dusk' and cam == 'B'"] == select("light == 'dusk' and cam == 'B'", facts)).all()
    )
    bad = s["light == 'dusk' and cam == 'B'"]
    t = weak_slices((rng.random(n) < np.where(bad, 0.4, 0.95)).astype(float), s, resamples=500)
    assert set(t['slice'].iloc[0].split(' and ')) == {"light == 'dusk'", "cam == 'B'"} and t['p'].iloc[0] < 0.01
    false = [
        len(weak_slices((np.random.default_rng(k).random(n) < 0.8).astype(float), s, resamples=200)) > 0
        for k in range(60)
    ]
    assert sum(false) <= 9  # 3 expected; P(more than 9) < 0.001
    groups = np.repeat(np.arange(20), 20)
    by_group = dict(site=np.where(groups < 6, 'x', 'y').tolist())
    s = slices_of(by_group)
    fooled = [0, 0]
    for k in range(40):  # whole groups fail together: 400 items are 20 facts
        v = np.random.default_rng(k).normal(size=20)[groups]
        fooled = [f + (len(weak_slices(v, s, g, 200)) > 0) for f, g in zip(fooled, (groups, None))]
    assert fooled[0] <= 7 and fooled[1] >= 15, fooled


def test_weak_slices_of_a_model_and_items_that_got_worse():
    rng = np.random.default_rng(0)
    light = rng.choice(['day', 'night'], 300).tolist()
    night = np.array(light) == 'night'
    before, now = rng.random(300) < 0.95, rng.random(300) < np.where(night, 0.5, 0.99)
    truth, said = world(now, light)
    problem = Problem(**BASE, acceptance=[dict(metric='regressions', against='production', lose_at_most=0.1)])
    t = find_weak(truth, said(now), problem, resamples=300)
    assert t['slice'].iloc[0] == "light == 'night'" and t['value'].iloc[0] == pytest.approx(now[night].mean())
    gold = truth['sha256'].to_pylist()[:40]
    c = compare(truth, said(now), said(before), problem, golden=gold)
    worse = before & ~now
    assert (
        len(c['flips']['worse']) == worse.sum()
        and len(c['flips']['better']) == (now & ~before).sum()
        and c['metrics']['regressions']['value'] == pytest.approx(worse.mean())
        and c['metrics']['golden_regressions']['value'] == pytest.approx(worse[:40].mean())
    )
    ids = truth['id'].to_pylist()
    assert (
        c['golden']['items'] == sorted(gold)
        and c['golden']['compared'] == 40
        and sorted(c['golden']['worse']) == sorted(i for i, w in zip(ids[:40], worse) if w)
        and set(c['golden']['better']) == {i for i, w in zip(ids[:40], now & ~before) if w}
    )
    some = compare(truth.slice(10), said(now), said(before), problem, golden=gold)['golden']
    assert some['compared'] == 30 and len(some['items']) == 40
    r = c['slices']['night']['regressions']
    assert (
        r['value'] == pytest.approx(worse[night].mean())
        and r['low'] < r['value'] < r['high']
        and not r['higher_is_better']
    )
    assert evaluate(truth, said(now), problem)['gaps'] == []


@pytest.mark.parametrize('task, metric', [('detection', 'map50_95'), ('segmentation', 'mean_iou')])
def test_a_new_false_object_where_there_is_none_is_a_regression(task, metric):
    pixel = rle_encode(np.pad(np.ones((4, 4), bool), 6))
    thing = lambda **kw: Annotation('a', bbox=(6, 6, 10, 10), mask=pixel, **kw)
    crowd = thing(attributes=dict(iscrowd='1', ignore='1'))
    ids = ['there', 'empty', 'still', 'faint', 'crowd']
    truth = make_table(
        [
            dict(id=i, sha256=digest(i), width=16, height=16, annotations=a)
            for i, a in zip(ids, ([thing()], [], [], [], [crowd]))
        ]
    )
    table = lambda *said: pa.Table.from_pylist(
        [dict(id=i, annotations=[a.said() for a in s]) for i, s in zip(ids, said)], schema=PREDICTIONS
    )
    sure, faint = thing(score=0.9, accepted=True), thing(score=0.3, accepted=False)
    before = table([sure], [], [], [], [])
    now = table([sure], [sure], [], [faint], [sure])
    problem = Problem(
        **BASE | dict(task=task, slices={}),
        acceptance=[dict(metric=metric, at_least=0.1)],
        metrics=dict(primary=metric),
    )
    same = np.testing.assert_allclose
    same(per_item(truth, before, problem), [1, 1, 1, 1, np.nan])
    same(per_item(truth, now, problem), [1, 0, 1, 1, np.nan])
    c = compare(truth, now, before, problem, golden=[digest('empty'), digest('still')])
    assert c['flips']['worse'] == ['empty'] == c['golden']['worse']
    assert c['metrics']['golden_regressions']['value'] == 0.5 and c['metrics']['regressions']['value'] == 0.2
    plain = table([thing(score=0.9)], [thing(score=0.9)], [], [thing(score=0.3)], [])  # somebody's, without `accepted`
    if task == 'detection': same(per_item(truth, plain, problem), [1, 0, 1, 1, np.nan])
