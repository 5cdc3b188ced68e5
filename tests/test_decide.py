"Curves and lines: against scikit-learn, torchmetrics and brute force; what is fitted is what evaluation and service apply."

import numpy as np, pyarrow as pa, pytest
from sklearn.isotonic import IsotonicRegression

from cv_lab.calibration import calibration_error, fit_thresholds, temper
from cv_lab.core import BadInput, digest
from cv_lab.data.manifest import PREDICTIONS, make_table
from cv_lab.decide import NEVER, cheapest, class_stairs, fit_stairs, on_stairs
from cv_lab.spec import Problem, parse_problem
from cv_lab.task import check_decision
from cv_lab.tasks import classification, detection
from cv_lab.runs import settings


def test_stairs_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    s = rng.random(500).round(2)
    right = rng.random(500) < s**2
    x = rng.random(99)
    e = 1 / 502
    want = IsotonicRegression(y_min=e, y_max=1 - e, out_of_bounds='clip').fit(s, right.astype(float)).predict(x)
    assert np.allclose(on_stairs(x, fit_stairs(s, right)), want)
    assert fit_stairs(s[:9], np.ones(9, bool)) == [[0., 1.], [0., 1.]]


@pytest.mark.parametrize('seed', range(6))
def test_the_cheapest_line_is_that_of_trying_all(seed):
    rng = np.random.default_rng(seed)
    s = rng.random(60).round(1 + seed % 2)
    right = rng.random(60) < s
    wrong, missing = rng.uniform(0.2, 5, 2)
    for there in (None, int(right.sum()) + 7):
        cost = lambda t, there=there: (
            wrong * ((s >= t) & ~right).sum()
            + missing * ((s < t).sum() if there is None else there - ((s >= t) & right).sum())
        )
        best = min(cost(t) for t in [*np.unique(s), 2.0])
        assert cost(cheapest(s, right, wrong, missing, there)) == pytest.approx(best)
    assert (
        cheapest(s, np.zeros(60, bool), 1e9, 1.0) == NEVER
        and cheapest(s, np.ones(60, bool)) <= s.min()
        and cheapest(s[:0], right[:0]) == NEVER
    )


def test_calibration_error_is_that_of_torchmetrics():
    torch = pytest.importorskip('torch'); from torchmetrics.functional.classification import binary_calibration_error

    rng = np.random.default_rng(0)
    s = rng.random(800) * 0.98 + 0.01
    right = rng.random(800) < s**1.5
    got = calibration_error(right, s)
    want = float(binary_calibration_error(torch.tensor(s), torch.tensor(right.astype(int)), n_bins=15))
    assert (
        got['value'] == pytest.approx(want, abs=1e-6) and got['low'] <= got['value'] + 0.02 and got['low'] < got['high']
    )
    wide = calibration_error(np.repeat(right[:80], 10), np.repeat(s[:80], 10), np.repeat(np.arange(80), 10))
    assert wide['high'] - wide['low'] > 2 * (got['high'] - got['low'])  # ten answers of one item are one fact


def held_out(n=600, seed=0):
    rng = np.random.default_rng(seed)
    C = list('abc')
    z = rng.normal(0, 2, (n, 3))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    soft = temper(p, 2.0)
    y = [C[rng.choice(3, p=q)] for q in soft]
    truth = make_table([dict(id=str(i), sha256=digest(str(i)), annotations=[dict(label=l)]) for i, l in enumerate(y)])
    said = pa.Table.from_pylist(
        [
            dict(id=str(i), annotations=[dict(label=C[q.argmax()], score=float(q.max()))], probs=q.tolist())
            for i, q in enumerate(p)
        ],
        schema=PREDICTIONS,
    )
    return C, z, p, np.array(y), truth, said


@pytest.mark.parametrize(
    'decision',
    [
        dict(curve='isotonic'),
        dict(costs=dict(wrong=4, missing=1)),
        dict(costs=dict(wrong=4, missing=1), per_class=True),
        dict(target_precision=0.8, per_class=True, curve='isotonic'),
    ],
)
def test_what_is_fitted_is_what_answers(decision):
    C, z, p, y, truth, said = held_out()
    problem = Problem(
        name='x',
        task='classification',
        classes=C,
        owner='u',
        intended_use='t',
        acceptance=[dict(metric='accuracy', at_least=0)],
        decision=decision,
    )
    t = fit_thresholds(truth, said, problem)
    out = classification.decode(dict(logits=z), classification.Config(), C, t)
    got = np.array([o.probs for o in out])
    want = class_stairs(p, [t['stairs'][c] for c in C]) if 'stairs' in t else temper(p, t['temperature'])
    assert np.allclose(got, want) and np.allclose(got.sum(1), 1)
    right = np.array([C[q.argmax()] == l for q, l in zip(p, y)])
    assert calibration_error(right, got.max(1))['value'] < 0.5 * calibration_error(right, p.max(1))['value']
    accepted = np.array([o.accepted for o in out]); ok = np.array([o.annotations[0].label == l for o, l in zip(out, y)])
    if 'costs' in decision:
        assert (
            4 * (accepted & ~ok).sum() + (~accepted).sum() <= min(4 * (~ok).sum(), len(ok))
            and 0.1 < accepted.mean() < 0.95
        )
    if 'target_precision' in decision:
        assert all(ok[accepted & (np.array([o.annotations[0].label for o in out]) == c)].mean() >= 0.8 for c in C)


@pytest.mark.parametrize('wish', [dict(costs=dict(wrong=4)), dict(curve='isotonic')], ids=['costs', 'isotonic'])
@pytest.mark.parametrize('name', ['classification', 'detection', 'instances', 'segmentation', 'reading'])
def test_a_wish_that_a_task_does_not_heed_is_refused_before_training(name, wish):
    asked = Problem(
        name='x',
        task=name,
        classes=['a', 'b'],
        owner='u',
        intended_use='t',
        acceptance=[dict(metric='f1', at_least=0)],
        decision=wish,
    )
    if name not in ('segmentation', 'reading'): return check_decision(asked)
    with pytest.raises(BadInput, match=f'{name} does not heed'): settings(asked)


def test_objects_have_stairs_and_costs_too(tmp_path):
    rng = np.random.default_rng(0); rows, said = [], []
    for i in range(150):
        box = [10.0, 10.0, 30.0, 30.0]
        s = float(rng.uniform(0.05, 0.95))
        rows.append(
            dict(id=str(i), sha256=digest(str(i)), width=64, height=64, annotations=[dict(label='a', bbox=box)])
        )
        hit = rng.random() < s**2
        said.append(dict(id=str(i), annotations=[dict(label='a', bbox=box if hit else [40., 40., 60., 60.], score=s)]))
    truth, said = make_table(rows), pa.Table.from_pylist(said, schema=PREDICTIONS); lines = {}
    for wrong in (.2, 5.):
        problem = Problem(
            name='x',
            task='detection',
            classes=['a'],
            owner='u',
            intended_use='t',
            acceptance=[dict(metric='map50', at_least=0)],
            decision=dict(costs=dict(wrong=wrong, missing=1), curve='isotonic'),
        )
        t = detection.calibrate(truth, said, problem)
        lines[wrong] = t['scores']['a']
        cfg = detection.Config(floor=0.01)
        z = np.array([[0.5], [2.0]])
        out = detection.decode(
            dict(logits=z[None], boxes=np.array([[[0, 0, 9, 9], [20, 20, 40, 40]]], float)), cfg, ['a'], t
        )[0].annotations
        assert [a.score for a in out] == pytest.approx(
            sorted(on_stairs(1 / (1 + np.exp(-z[:, 0])), t['stairs']['a']), reverse=True)
        ) and [a.accepted for a in out] == [a.score >= lines[wrong] for a in out]
    assert lines[0.2] < lines[5.0]
    right, sure, of, item = detection.answers(truth, said, problem)
    assert len(right) == len(item) and set(of) == {0} and (sure >= 0.5).all()


def test_one_aim_only():
    with pytest.raises(BadInput, match='two ways to draw one line'):
        parse_problem(
            '{name: p, task: classification, classes: [a], owner: u, intended_use: t, acceptance: [{metric: accuracy, at_least: 0}], decision: {target_precision: 0.9, costs: {wrong: 2}}}'
        )
