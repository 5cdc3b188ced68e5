"""Label errors and agreement against planted faults, published examples and other implementations."""
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import cohen_kappa_score
from cv_lab.core import Annotation, BadInput, digest
from cv_lab.data import agreement as g, label_errors as e
from cv_lab.data.manifest import PREDICTIONS, make_table
from cv_lab.data.orientation import layout
from cv_lab.geometry import rle_encode


def table(labels):
    return make_table(
        [
            dict(
                id=str(i),
                sha256=digest(str(i)),
                annotations=[Annotation(v) for v in ([l] if isinstance(l, str) else l)],
            )
            for i, l in enumerate(labels)
        ]
    )


def said(probs):
    return make_table([dict(id=str(i), probs=list(map(float, p))) for i, p in enumerate(probs)], PREDICTIONS)


def noisy(n=1500, classes=4, flips=.05, seed=0):
    rng = np.random.default_rng(seed); y = rng.choice(classes, n, p=np.arange(classes, 0, -1)/sum(range(classes + 1)))
    probs = rng.dirichlet(np.ones(classes)*.3, n)*.15; probs[np.arange(n), y] += .85
    bad = rng.choice(n, int(flips * n), replace=False)
    given_ = y.copy()
    given_[bad] = (y[bad] + rng.integers(1, classes, len(bad))) % classes
    return y, given_, probs, set(map(int, bad))


def test_confident_joint_with_loops():
    _, given_, probs, _ = noisy(300); k = probs.shape[1]
    t = [sum(p[j] for p, y in zip(probs, given_) if y == j) / sum(y == j for y in given_) for j in range(k)]
    want = np.zeros((k, k), int)
    for p, y in zip(probs, given_):
        above = [j for j in range(k) if p[j] >= t[j]]
        if above: want[y, max(above, key=lambda j: p[j])] += 1
    assert (e.confident_joint(given_, probs)[0] == want).all()
    q = want / want.sum(1, keepdims=True) * np.bincount(given_)[:, None]
    assert np.allclose(e.noise_joint(given_, probs), q / q.sum())


def test_flips_are_found_and_ranked():
    y, given_, probs, bad = noisy()
    found = e.label_errors(table([str(v) for v in given_]), said(probs), list('0123'))
    hit = found['id'].astype(int).isin(bad)
    assert hit.sum() >= .9*len(bad) and hit.mean() >= .9 and hit[:30].all()
    assert all(str(y[int(r.id)]) == r.suggested for r in found[:30].itertuples())


@pytest.mark.parametrize('seed', [3, 4])
def test_flips_of_real_scans_are_found_out_of_fold(seed):
    from sklearn.datasets import load_digits
    from PIL import Image

    scans = load_digits()
    rng = np.random.default_rng(seed)
    thumbs = np.stack(
        [
            np.asarray(Image.fromarray((x * 15.9).astype(np.uint8)).resize((64, 64), Image.Resampling.BILINEAR))
            for x in scans.images
        ]
    )
    truth = scans.target.astype(str).astype(object); bad = rng.choice(len(truth), round(.05*len(truth)), replace=False)
    given_ = truth.copy(); given_[bad] = [rng.choice([c for c in '0123456789' if c != v]) for v in truth[bad]]
    probs = e.out_of_fold(layout(thumbs), given_, list('0123456789'))
    found = e.label_errors(table(given_), said(probs), list('0123456789'))
    hit = found['id'].astype(int).isin(bad)
    assert hit.sum() >= .9*len(bad) and hit.mean() >= .9, (hit.sum()/len(bad), hit.mean())


def test_clean_labels_are_left_alone():
    y, _, probs, _ = noisy(flips=0)
    assert len(e.label_errors(table([str(v) for v in y]), said(probs), list('0123'))) == 0


def test_out_of_fold_never_sees_its_own_group():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 5))
    X = np.repeat(X, 2, 0)
    y = rng.choice(['a', 'b'], 60).repeat(2)  # twins; nothing to learn but the twin
    with_, without = (e.out_of_fold(X, y, ['a', 'b'], groups) for groups in (np.arange(60).repeat(2), None))
    right = lambda p: (np.array(['a', 'b'])[p.argmax(1)] == y).mean()
    assert right(with_) < .7 < right(without)
    with pytest.raises(BadInput): e.out_of_fold(X, y, ['a'])


def test_multilabel_faults():
    rng = np.random.default_rng(1)
    n = 400
    truth = rng.random((n, 3)) < [0.5, 0.3, 0.2]
    probs = np.where(truth, 0.93, 0.05) + rng.normal(0, 0.02, (n, 3))
    given_ = truth.copy()
    bad = {(int(i), int(c)) for i, c in zip(rng.choice(n, 20, replace=False), rng.integers(0, 3, 20))}
    for i, c in bad: given_[i, c] ^= True
    found = e.label_errors(
        table([[k for k, v in zip('xyz', row) if v] for row in given_]),
        said(probs.clip(0, 1)),
        list('xyz'),
        multilabel=True,
    )
    got = {(int(r.id), 'xyz'.index(r.suggested.removeprefix('no '))) for r in found.itertuples()}
    assert len(got & bad) >= .9*len(bad) and len(got & bad) >= .9*len(got)


@pytest.mark.parametrize('shape', ['bbox', 'mask'])
def test_objects(shape):
    def one(label, x, y, w=20, h=20, **kw):
        if shape == 'bbox': return Annotation(label, [x, y, x + w, y + h], **kw)
        m = np.zeros((100, 100), bool)
        m[y : y + h, x : x + w] = True
        return Annotation(label, [x, y, x + w, y + h], mask=rle_encode(m), **kw)

    truth = [
        [one('a', 5, 5)],
        [one('a', 5, 5)],
        [one('a', 5, 5)],
        [one('a', 5, 5), one('a', 60, 60)],
        [one('a', 5, 5)],
        [],
    ]
    pred = [
        [one('a', 6, 5, score=0.9)],
        [one('a', 5, 5, score=0.9), one('b', 60, 5, score=0.9)],
        [one('b', 6, 5, score=0.9)],
        [one('a', 5, 6, score=0.9)],
        [one('a', 5, 17, score=0.9)],
        [one('a', 5, 5, score=0.3)],
    ]
    f = e.object_errors(
        make_table([dict(id=str(i), sha256=digest(str(i)), annotations=t) for i, t in enumerate(truth)]),
        make_table([dict(id=str(i), annotations=p) for i, p in enumerate(pred)], PREDICTIONS),
    )
    assert set(zip(f['id'], f['kind'])) == {
        ('1', 'overlooked'),
        ('2', 'misnamed'),
        ('3', 'unsupported'),
        ('4', 'misplaced'),
    }


def test_cohen_kappa_as_in_sklearn():
    rng = np.random.default_rng(0)
    for w in (None, 'linear', 'quadratic'):
        a = rng.integers(0, 4, 80); b = np.where(rng.random(80) < .6, a, rng.integers(0, 4, 80))
        assert g.cohen_kappa(a, b, weights=w) == pytest.approx(cohen_kappa_score(a, b, weights=w), abs=1e-12)
    assert g.cohen_kappa(['x', None, 'y'], ['x', 'y', None]) == 1.


def test_fleiss_published_example():
    counts = [
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ]
    x = pd.DataFrame([[str(k) for k, c in enumerate(r) for _ in range(c)] for r in counts], dtype=object)
    assert g.fleiss_kappa(x) == pytest.approx(0.210, abs=5e-4)


def test_krippendorff_published_example():  # Krippendorff (2011), four observers, twelve units
    n = None
    a = [1, 2, 3, 3, 2, 1, 4, 1, 2, n, n, n]
    b = [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, n, 3]
    c = [n, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, n]
    d = [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, n]
    x = pd.DataFrame(dict(a=a, b=b, c=c, d=d), dtype=object)
    for level, want in dict(nominal=0.743, ordinal=0.815, interval=0.849).items():
        assert g.krippendorff_alpha(x, level) == pytest.approx(want, abs=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from(['a', 'b', 'c', None]), min_size=3, max_size=3), min_size=2, max_size=20))
def test_alpha_against_all_pairs(rows):
    x = pd.DataFrame(rows, dtype=object)
    units = [[v for v in r if v is not None] for r in rows]
    units = [u for u in units if len(u) > 1]
    values = [v for u in units for v in u]
    if len(set(values)) < 2: return
    seen = sum(
        sum(p != q for i, p in enumerate(u) for j, q in enumerate(u) if i != j) / (len(u) - 1) for u in units
    ) / len(values)
    chance = sum(p != q for i, p in enumerate(values) for j, q in enumerate(values) if i != j) / (
        len(values) * (len(values) - 1)
    )
    assert g.krippendorff_alpha(x) == pytest.approx(1 - seen/chance, abs=1e-9)


@settings(max_examples=80, deadline=None)
@given(st.text('abcé', max_size=9), st.text('abcé', max_size=9))
def test_edits_against_the_recursion(a, b):
    from functools import lru_cache
    @lru_cache(None)
    def d(i, j):
        return (
            i + j if not i or not j else min(d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + (a[i - 1] != b[j - 1]))
        )

    assert g.edits(a, b) == d(len(a), len(b))


def test_agreement_on_objects():
    box = lambda who, x, label='a': Annotation(label, [x, 0, x + 10, 10], annotator=who)
    t = make_table(
        [
            dict(id='0', sha256=digest('0'), annotations=[box('p', 0), box('p', 50), box('q', 1), box('q', 90)]),
            dict(id='1', sha256=digest('1'), annotations=[box('p', 0, 'b'), box('q', 0, 'a')]),
        ]
    )
    r = g.object_agreement(t, 'p', 'q')
    assert (
        r['matched'] == 1
        and r['only_a'] == r['only_b'] == 2
        and r['f1'] == pytest.approx(2 / 6)
        and r['mean_iou'] == pytest.approx(90 / 110)
    )
    assert g.character_error_rate(['abcd', ''], ['abxd', 'z']) == .5


def test_consensus_beats_the_majority_and_knows_the_weak():
    rng = np.random.default_rng(2); truth = rng.choice(['a', 'b', 'c'], 600); skill = [.95, .5, .5, .5]
    x = pd.DataFrame(
        {f'w{k}': [t if rng.random() < s else rng.choice(['a', 'b', 'c']) for t in truth] for k, s in enumerate(skill)}
    ).astype(object)
    x.iloc[::7, 1] = None
    (ds, people), (mv, _) = g.consensus(x), g.consensus(x, 'majority')
    right = lambda c: (c['label'].to_numpy() == truth).mean()
    assert right(ds) > right(mv) + .02 and people['accuracy'].idxmax() == 'w0'
    assert g.answers(table(['a'])).empty
