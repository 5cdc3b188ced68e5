"The metrics against scikit-learn and torchmetrics, to 1e-9."
import numpy as np, pyarrow as pa, pytest, torch
from sklearn import metrics as sk
from torchmetrics.functional.classification import multiclass_calibration_error

from cv_lab.core import Annotation, BadInput, digest
from cv_lab.data.manifest import make_table
from cv_lab.evaluate import compare, evaluate, resample_weights
from cv_lab.spec import Problem, select
from cv_lab.task import Prediction, predictions_table
from cv_lab.tasks import classification


def problem(classes, **kw):
    return Problem(name='p', task='classification', classes=classes, owner='o', intended_use='i',
                   acceptance=[{'metric': 'accuracy', 'at_least': .5}], **kw)


def single(seed, n=300, c=5, ties=False, absent=False):
    "Truth, probabilities and the tables, with ties and a class that never occurs where asked."
    rng = np.random.default_rng(seed); classes = [f'c{i}' for i in range(c)]
    y = rng.integers(0, c - absent, n)
    p = (
        rng.dirichlet(np.ones(c) * 0.5, n) * 0.6
        + 0.4 * np.eye(c)[np.where(rng.random(n) < 0.7, y, rng.integers(0, c - absent, n))]
    )
    if ties: p = np.round(p, 1) + 1e-3; p /= p.sum(1, keepdims=True)
    ids = [f'i{k}' for k in range(n)]
    truth = make_table(
        [
            dict(id=i, sha256=digest(i), annotations=[Annotation(classes[k])], tags=dict(half='a' if k < 2 else 'b'))
            for i, k in zip(ids, y)
        ]
    )
    said = predictions_table(
        ids, [Prediction([Annotation(classes[q.argmax()], score=float(min(1, q.max())))], q) for q in p]
    )
    return y, p, truth, said, classes


@pytest.mark.parametrize('seed,ties,absent', [(0, False, False), (1, True, False), (2, False, True), (3, True, True)])
@pytest.mark.parametrize('weighted', [False, True])
def test_single_label(seed, ties, absent, weighted):
    y, p, truth, said, classes = single(seed, ties=ties, absent=absent)
    w = np.random.default_rng(9).integers(0, 4, len(y)).astype(float) if weighted else np.ones(len(y))
    got = {k: v[0] for k, v in classification.score(truth, said, problem(classes))(w[None]).items()}
    yhat, labels, kw = p.argmax(1), list(range(len(classes))), dict(sample_weight=w)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
    near(got['accuracy'], sk.accuracy_score(y, yhat, **kw))
    near(got['balanced_accuracy'], sk.balanced_accuracy_score(y, yhat, **kw))
    for avg in ('macro', 'micro', 'weighted'):
        near(got[f'{avg}_f1'], sk.f1_score(y, yhat, average=avg, zero_division=0, **kw))
    near(got['macro_precision'], sk.precision_score(y, yhat, average='macro', zero_division=0, **kw))
    near(got['macro_recall'], sk.recall_score(y, yhat, average='macro', zero_division=0, **kw))
    near(got['precision'], sk.precision_score(y, yhat, labels=labels, average=None, zero_division=0, **kw))
    near(got['recall'], sk.recall_score(y, yhat, labels=labels, average=None, zero_division=0, **kw))
    near(got['log_loss'], sk.log_loss(y, p, labels=labels, **kw))
    near(got['brier'], np.average(((p - np.eye(len(classes))[y])**2).sum(1), weights=w))
    present = [c for c in labels if (y[w > 0] == c).any()]
    near(got['roc_auc'], np.mean([sk.roc_auc_score(y == c, p[:, c], **kw) for c in present]))
    near(got['average_precision'], np.mean([sk.average_precision_score(y == c, p[:, c], **kw) for c in present]))
    if not ties: near(got['top3_accuracy'], sk.top_k_accuracy_score(y, p, k=3, labels=labels, **kw))
    if not weighted and not ties:
        conf, right = p.max(1), yhat == y; bins = [(conf >= i/15) & (conf < (i + 1)/15) for i in range(15)]
        near(got['ece'], sum(b.mean()*abs(conf[b].mean() - right[b].mean()) for b in bins if b.any()))
        theirs = float(multiclass_calibration_error(torch.tensor(p), torch.tensor(y), len(classes), n_bins=15))
        np.testing.assert_allclose(got['ece'], theirs, atol=1e-6)      # torchmetrics sums its bins in single precision
        near(got['roc_auc'], sk.roc_auc_score(y, p, multi_class='ovr', labels=labels) if not absent else got['roc_auc'])


def test_multi_label():
    rng = np.random.default_rng(4); classes = ['a', 'b', 'c', 'd']; n = 200
    y = rng.random((n, 4)) < [0.5, 0.3, 0.1, 0.6]
    p = np.clip(0.5 * rng.random((n, 4)) + 0.5 * np.where(rng.random((n, 4)) < 0.8, y, ~y), 0, 1)
    yhat = p >= 0.5
    ids = [f'i{k}' for k in range(n)]
    truth = make_table(
        [
            dict(id=i, sha256=digest(i), annotations=[Annotation(c) for c, on in zip(classes, row) if on])
            for i, row in zip(ids, y)
        ]
    )
    cfg = classification.Config(multilabel=True); logits = np.log(p + 1e-300) - np.log1p(-p + 1e-16)
    said = predictions_table(ids, classification.decode({'logits': logits}, cfg, classes, dict(threshold=.5)))
    got = {
        k: v[0]
        for k, v in classification.score(truth, said, problem(classes, multilabel=True))(np.ones((1, n))).items()
    }
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
    near(got['accuracy'], sk.accuracy_score(y, yhat))
    for avg in ('macro', 'micro', 'weighted'):
        near(got[f'{avg}_f1'], sk.f1_score(y, yhat, average=avg, zero_division=0))
    near(got['roc_auc'], sk.roc_auc_score(y, p, average='macro'))
    near(got['average_precision'], sk.average_precision_score(y, p, average='macro'))
    near(got['log_loss'], np.mean([sk.log_loss(y[:, c], p[:, c]) for c in range(4)]))
    near(got['brier'], np.mean([sk.brier_score_loss(y[:, c], p[:, c]) for c in range(4)]))


def test_weights_are_repetition():
    "A resample's figure is the figure of the table with its rows repeated."
    y, p, truth, said, classes = single(5, n=60); w = np.random.default_rng(1).integers(0, 3, 60)
    by_weight = classification.score(truth, said, problem(classes))(w[None].astype(float))
    again = np.repeat(np.arange(60), w)
    rows = truth.take(again).to_pylist(); ids = [f'r{k}' for k in range(len(again))]
    truth2 = make_table([dict(r, id=i, tags=dict(r['tags'])) for i, r in zip(ids, rows)])
    said2 = predictions_table(
        ids,
        [
            Prediction([Annotation(**a) for a in r['annotations']], np.array(r['probs']))
            for r in said.take(again).to_pylist()
        ],
    )
    whole = classification.score(truth2, said2, problem(classes))(np.ones((1, len(again))))
    for k in whole: np.testing.assert_allclose(by_weight[k], whole[k], atol=1e-9, err_msg=k)


def test_resamples_keep_groups_together():
    w = resample_weights(['a', 'a', 'b', 'c', 'c', 'c'], 500)
    assert (w[:, 0] == w[:, 1]).all() and (w[:, 3] == w[:, 5]).all() and (w[:, [0, 2, 3]].sum(1) == 3).all()


def test_slice_figures_equal_the_subset():
    y, p, truth, said, classes = single(6)
    spec = problem(classes, slices=dict(first="half == 'a'"), metrics=dict(resamples=200))
    got = evaluate(truth, said, spec)['slices']['first']; mask = y < 2
    assert (
        got['support'] == mask.sum()
        and abs(got['metrics']['accuracy']['value'] - (p.argmax(1) == y)[mask].mean()) < 1e-12
    )


def test_labels_without_probabilities_are_evaluated():
    y, p, truth, said, classes = single(7)
    at = said.schema.get_field_index('probs')
    bare = said.set_column(at, said.schema.field(at), pa.nulls(len(said), said.schema.field(at).type))
    assert (
        abs(
            evaluate(truth, bare, problem(classes, metrics=dict(resamples=100)))['metrics']['accuracy']['value']
            - (p.argmax(1) == y).mean()
        )
        < 1e-12
    )


def test_a_missing_prediction_is_refused():
    _, _, truth, said, classes = single(8)
    with pytest.raises(BadInput, match='have no prediction: i299'):
        evaluate(truth, said.slice(0, 299), problem(classes))


def test_an_unknown_label_is_refused():
    _, _, truth, said, classes = single(8)
    with pytest.raises(BadInput, match="no class of p: \\['c4'\\]"): evaluate(truth, said, problem(classes[:4]))


def test_paired_comparison():
    y, p, truth, said, classes = single(10); q = p.copy(); wrong = np.flatnonzero(p.argmax(1) == y)[:12]
    q[wrong] = np.roll(q[wrong], 1, axis=1)
    worse = predictions_table(
        truth['id'].to_pylist(),
        [Prediction([Annotation(classes[r.argmax()], score=float(min(1, r.max())))], r) for r in q],
    )
    got = compare(truth, said, worse, problem(classes)); d = got['metrics']['accuracy']
    assert (
        len(got['flips']['better']) == 12
        and not got['flips']['worse']
        and abs(d['value'] - 12 / 300) < 1e-12
        and d['low'] > 0
    )
    assert d['high'] - d['low'] < .06     # unpaired it would be about .15


@pytest.mark.parametrize(
    'expression,want',
    [
        ("a == 'x'", [1, 0, 0]),
        ('n < 3', [1, 0, 0]),
        ('not n < 3', [0, 1, 1]),
        ("a in ['x', 'y'] and n >= 1", [1, 1, 0]),
        ("1 < n < 20", [1, 1, 0]),
        ("a != 'x' or n == 2", [1, 1, 1]),
    ],
)
def test_slice_expressions(expression, want):
    assert select(expression, dict(a=['x', 'y', None], n=['2', '10', None])).astype(int).tolist() == want
