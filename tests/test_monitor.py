"Drift: the statistics against others' implementations, planted changes, and a log that was cut short."
import json, shutil

import numpy as np, pytest
from scipy.spatial.distance import pdist, squareform
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score

from cv_lab.core import BadInput, NotFound
from cv_lab.monitor import IMAGE, _auc, _ks, drift, features, kernel, mmd, read_log, told, told_apart, watch


def two(n=70, m=50, d=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n + m, d)) * [1, 5, 0.1], np.arange(n + m) >= n


def test_statistics_against_others():
    x, now = two()
    k = kernel(x)
    z = (x - np.median(x, 0)) / (np.percentile(x, 84, axis=0) - np.percentile(x, 16, axis=0))
    sq = squareform(pdist(z, 'sqeuclidean'))
    np.testing.assert_allclose(k, np.exp(-sq/np.median(pdist(z, 'sqeuclidean'))), rtol=1e-6)
    a, b = np.flatnonzero(~now), np.flatnonzero(now)
    mean = lambda p, q: np.mean([k[i, j] for i in p for j in q if i != j])
    assert mmd(k, now) == pytest.approx(mean(a, a) + mean(b, b) - 2*mean(a, b))
    np.testing.assert_allclose(_ks(x, now), [ks_2samp(x[now, i], x[~now, i]).statistic for i in range(3)])
    assert _auc(x[:, 0], now) == pytest.approx(roc_auc_score(now, x[:, 0]))


def test_planted_changes_are_found_and_named_and_nothing_is_found_in_nothing():
    x, now = two(100, 60); assert not drift(x[~now], x[now], list('abc'), .05, 99).alarm
    y = x.copy()
    y[now, 1] += 5
    found = drift(y[~now], y[now], list('abc'), 0.05, 99)
    assert found.alarm and list(found.moved) == ['b'] and found.auc > 0.6
    w = x.copy()
    w[now] *= 2
    assert (
        drift(w[~now], w[now], list('abc'), 0.05, 99).alarm
        and told_apart(w[np.random.default_rng(0).permutation(160)], np.zeros(160, bool)) == 0.5
    )
    alarms = sum(
        drift(v[:40], v[40:], list('abc'), 0.2, 19, i).alarm for i in range(60) for v in [two(40, 20, seed=i)[0]]
    )
    assert alarms <= 20  # stated: a fifth; 21 or more have a chance of 1 in 300
    with pytest.raises(BadInput, match='19'): drift(x[:19], x[19:], list('abc'))
    with pytest.raises(BadInput, match='99 deals'): drift(x[:80], x[80:], list('abc'), .001, 99)


def line(i, brightness, digest='a' * 64):
    return json.dumps(
        dict(
            id=f'p{i}',
            time=float(i),
            digest=digest,
            labels=['7'],
            scores=[0.9],
            entropy=0.1,
            brightness=brightness,
            contrast=3.1 + i % 7,
            sharpness=i % 5,
            warmth=0.0,
            bytes=10,
        )
    )


def test_logs(tmp_path):
    rng = np.random.default_rng(0)
    for day, level in dict(then=100, now=100, dark=60).items():
        (tmp_path/day).mkdir(); lines = [line(i, rng.normal(level, 10)) for i in range(60)]
        (tmp_path / day / 'predictions-1.jsonl').write_text(
            '\n'.join(lines[30:] + ['{"kind": "disagreement", "id": "x"}', '{"id": "torn", "ti'])
        )
        (tmp_path / day / 'predictions-2.jsonl').write_text('\n'.join(lines[:30]))
    log = read_log(tmp_path / 'then')
    assert len(log) == 60 and list(log['id']) == [f'p{i}' for i in range(60)] and features(log)[1][:4] == list(IMAGE)
    assert not watch(tmp_path / 'then', tmp_path / 'now', alpha=0.02)[0].alarm
    found = watch(tmp_path / 'then', tmp_path / 'dark', alpha=0.02)[0]
    assert found.alarm and list(found.moved) == ['brightness']
    for day, shift in dict(then=0, now=0, dark=0, other=2).items():  # embeddings see what the figures do not
        if day == 'other': shutil.copytree(tmp_path / 'now', tmp_path / day)
        at = tmp_path / day / 'samples/digits/2026-11-30'
        at.mkdir(parents=True, exist_ok=True)
        places = rng.normal(0, 1, (60, 40)) * np.linspace(3, 0.1, 40) + shift
        rows = [dict(id=f'p{i}', embedding=p.tolist()) for i, p in enumerate(places[::2])]
        (at / 'embeddings.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    quiet, moved = (watch(tmp_path / 'then', tmp_path / day, alpha=0.02)[0] for day in ('now', 'other'))
    assert not quiet.alarm and quiet.embeddings.present == 30 and 'embeddings: no drift' in str(quiet)
    assert moved.alarm and moved.embeddings.alarm and not moved.moved and 'embeddings: DRIFT' in str(moved)
    (tmp_path / 'dark/predictions-2.jsonl').write_text(line(1, 60, 'b' * 64))
    assert watch(tmp_path / 'then', tmp_path / 'dark')[0].embeddings is None  # of other weights: another space
    assert 'moved: brightness' in str(watch(tmp_path / 'then', tmp_path / 'dark')[0])  # other weights: images alone
    t = told(log, {f'p{i}': '7' if i < 8 else '1' for i in range(10)}).iloc[0]
    assert (t.n, t.right) == (10, 0.8) and (t.low, t.high) == pytest.approx(
        (0.490, 0.943), abs=0.001
    )  # statsmodels' proportion_confint
    (tmp_path/'none').mkdir()
    with pytest.raises(NotFound, match='no predictions'): read_log(tmp_path/'none')
