"COCO's figures against pycocotools to 1e-9, TIDE's against tidecv, and weights against repetition."
import contextlib, io, sys, types

import numpy as np, pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cv_lab.coco import average_precision, average_recall, columns, match
from cv_lab.core import Annotation, BadInput
from cv_lab.data.manifest import PREDICTIONS, make_table
from cv_lab.geometry import rle_encode
from cv_lab.spec import Problem
from cv_lab.tasks import detection
from cv_lab.tide import KINDS, gains, mistakes_of

NAMES = ['a', 'b', 'c', 'never']


def tables(seed, images=40, masks=False, crowd=.1, ties=True, per=6, empty=.15):
    "Random scenes: crowds, empty images, images without predictions, ties, a class that never occurs and one that is never found."
    rng = np.random.default_rng(seed); there, found = [], []
    y, x = np.mgrid[:96, :128]
    def one():
        size = rng.choice([8, 24, 60, 110])
        p = rng.uniform(0, 40, 2)
        return np.r_[p, p + rng.uniform(0.5, 1.2, 2) * size]

    def blob(b):
        cx, cy, rx, ry = (b[0] + b[2]) / 2, (b[1] + b[3]) / 2, (b[2] - b[0]) / 2, (b[3] - b[1]) / 2
        return rle_encode(((x + 0.5 - cx) / rx) ** 2 + ((y + 0.5 - cy) / ry) ** 2 <= 1)

    def said(label, b, **kw):
        b = np.r_[b[:2], np.maximum(b[2:], b[:2] + 2)]
        return Annotation(label, bbox=b, mask=blob(b) if masks else None, **kw)

    for k in range(images):
        boxes = [] if rng.random() < empty else [one() for _ in range(rng.integers(0, per))]
        labels = [NAMES[i] for i in rng.integers(0, 3, len(boxes))]
        there.append(
            dict(
                id=f'{k:03}',
                sha256=f'{k:064x}',
                annotations=[
                    said(l, b, attributes={'iscrowd': '1'} if rng.random() < crowd else None)
                    for b, l in zip(boxes, labels)
                ],
            )
        )
        guesses = [
            (b + rng.normal(0, 1.5, 4), l) for b, l in zip(boxes, labels) for _ in range(rng.integers(0, 3)) if l != 'c'
        ] + [(one(), NAMES[rng.integers(0, 4)]) for _ in range(rng.integers(0, 4))]
        if rng.random() < .1: guesses = []
        found.append(
            dict(
                id=f'{k:03}',
                annotations=[
                    said(l, b, score=round(float(rng.random()), 1 if ties else 9)) for b, l in guesses if l != 'c'
                ],
            )
        )
    return make_table(there), make_table(found, PREDICTIONS)


def pycoco(truth, said, kind='bbox', areas=None):
    gt, dt = COCO(), []; xywh = lambda b: [b[0], b[1], b[2] - b[0], b[3] - b[1]]
    gt.dataset = dict(
        info={},
        images=[dict(id=i + 1, height=96, width=128) for i in range(len(truth))],
        categories=[dict(id=c + 1) for c in range(len(NAMES))],
        annotations=[],
    )
    from pycocotools import mask as m
    for i, anns in enumerate(truth['annotations'].to_pylist()):
        for a in anns:
            seg = a['mask'] and dict(size=a['mask']['size'], counts=a['mask']['counts'].encode()); b = a['bbox']
            gt.dataset['annotations'].append(
                dict(
                    id=len(gt.dataset['annotations']) + 1,
                    image_id=i + 1,
                    category_id=NAMES.index(a['label']) + 1,
                    bbox=xywh(b),
                    segmentation=seg,
                    area=float(m.area(seg)) if seg else (b[2] - b[0]) * (b[3] - b[1]),
                    iscrowd=int(dict(a['attributes'] or {}).get('iscrowd', 0)),
                )
            )
    for i, anns in enumerate(said['annotations'].to_pylist()):
        for a in anns:
            dt.append(
                dict(
                    image_id=i + 1,
                    category_id=NAMES.index(a['label']) + 1,
                    score=a['score'],
                    **(
                        dict(bbox=xywh(a['bbox']))
                        if kind == 'bbox'
                        else dict(segmentation=dict(size=a['mask']['size'], counts=a['mask']['counts'].encode()))
                    ),
                )
            )
    with contextlib.redirect_stdout(io.StringIO()):
        gt.createIndex(); e = COCOeval(gt, gt.loadRes(dt) if dt else COCO(), kind)
        if not dt: e.cocoDt.dataset = dict(gt.dataset, annotations=[]); e.cocoDt.createIndex()
        if areas: e.params.areaRng, e.params.areaRngLbl = [list(v) for v in areas.values()], list(areas)
        e.evaluate(); e.accumulate()
        if not areas: e.summarize()
    return e


def same_as_pycocotools(truth, said, kind='bbox', **kw):
    masks = kind == 'segm'
    m = match(columns(truth, NAMES, masks=masks), columns(said, NAMES, masks=masks), **kw)
    e = pycoco(truth, said, kind, kw.get('areas'))
    w = np.ones((1, len(truth)))
    p = e.eval['precision'][..., -1]; p = np.where(p > -1, p, np.nan).mean(1)                               # (T, C, A)
    np.testing.assert_allclose(average_precision(m, len(NAMES))(w)[0], p.transpose(2, 0, 1), rtol=0, atol=1e-9)
    r = e.eval['recall']
    r = np.where(r > -1, r, np.nan).mean(0)  # (C, A, limits)
    np.testing.assert_allclose(average_recall(m, len(NAMES))(w)[0], r.transpose(1, 2, 0), rtol=0, atol=1e-9)
    return e


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('ties', [True, False])
def test_boxes_against_pycocotools(seed, ties): same_as_pycocotools(*tables(seed, ties=ties))


@pytest.mark.parametrize('seed', range(3))
def test_masks_against_pycocotools(seed): same_as_pycocotools(*tables(seed, images=20, masks=True), kind='segm')


@pytest.mark.parametrize(
    'kw', [dict(crowd=1.0), dict(crowd=0.0), dict(empty=1.0), dict(per=40, images=6), dict(images=1)], ids=str
)
def test_hard_cases_against_pycocotools(kw): same_as_pycocotools(*tables(11, **kw))


def test_more_masks_than_a_byte_counts():
    truth, _ = tables(5, images=180, masks=True, ties=False); o = columns(truth, NAMES, masks=True)
    assert len(o.area) > 256 and (o.area > 0).all() and o.area.max() > 1000

def test_custom_areas_against_pycocotools():
    same_as_pycocotools(*tables(3), areas=dict(all=(0, 1e10), tiny=(0, 100), rest=(100, 1e10)))


def test_no_detections_at_all():
    truth, said = tables(1); none = make_table([dict(id=i) for i in said['id'].to_pylist()], PREDICTIONS)
    m = match(columns(truth, NAMES), columns(none, NAMES)); p = average_precision(m, 4)(np.ones((1, len(truth))))
    assert np.nanmax(p) == 0 and np.isnan(p[0, 0, :, 3]).all()


def problem():
    return Problem(
        name='p',
        task='detection',
        classes=NAMES,
        owner='o',
        intended_use='i',
        acceptance=[{'metric': 'map50_95', 'at_least': 0.5}],
        metrics=dict(primary='map50_95'),
    )


def test_the_task_gives_cocos_twelve_figures():
    truth, said = tables(5, images=80)
    got = detection.score(truth, said, problem())(np.ones((1, 80)))
    e = pycoco(truth, said)
    names = ['map50_95', 'map50', 'map75', 'map_small', 'map_medium', 'map_large', 'ar1', 'ar10', 'ar100']
    np.testing.assert_allclose([got[n][0] for n in names], e.stats[:9], rtol=0, atol=1e-9)


def test_weights_are_repetition():
    truth, said = tables(7, ties=False)
    w = np.random.default_rng(0).integers(0, 4, len(truth))
    again = np.repeat(np.arange(len(truth)), w)
    renamed = lambda t: t.take(again).set_column(0, 'id', [[str(i) for i in range(len(again))]])
    one = detection.score(renamed(truth), renamed(said), problem())(np.ones((1, len(again))))
    by = detection.score(truth, said, problem())(w[None].astype(float))
    for k in one: np.testing.assert_allclose(by[k], one[k], atol=1e-9, err_msg=k)


def test_predictions_in_another_order_and_missing_ones():
    truth, said = tables(2); w = np.ones((1, len(truth))); order = np.random.default_rng(0).permutation(len(said))
    assert (
        detection.score(truth, said.take(order), problem())(w)['map50_95']
        == detection.score(truth, said, problem())(w)['map50_95']
    )
    with pytest.raises(BadInput, match='have no prediction: 039'): detection.score(truth, said.slice(0, 39), problem())
    with pytest.raises(BadInput, match="no class: \\['a'"): columns(truth, ['b'])


def test_annotations_without_a_label_are_no_objects():
    t = make_table(
        [
            dict(
                id='x',
                sha256='0' * 64,
                annotations=[
                    Annotation(text='a line', bbox=(0, 0, 9, 9)),
                    Annotation('a', bbox=(0, 0, 9, 9)),
                    Annotation(caption='a page'),
                ],
            )
        ]
    )
    assert len(columns(t, NAMES)) == 1


def tide(truth, said, masks=False):
    try:
        import cv2  # noqa: F401
    except ImportError:
        sys.modules['cv2'] = types.SimpleNamespace(
            FONT_HERSHEY_SIMPLEX=0
        )  # tidecv draws with it; nothing is drawn here
    tidecv = pytest.importorskip('tidecv')
    gt, dt = tidecv.Data('gt'), tidecv.Data('dt')
    def place(a):
        b, m = a['bbox'], a['mask'] and dict(size=a['mask']['size'], counts=a['mask']['counts'].encode())
        return [b[0], b[1], b[2] - b[0], b[3] - b[1]], m
    for i, anns in enumerate(truth['annotations'].to_pylist()):
        gt.add_image(i, str(i)); dt.add_image(i, str(i))
        for a in anns:
            (gt.add_ignore_region if dict(a['attributes'] or {}).get('iscrowd') else gt.add_ground_truth)(
                i, NAMES.index(a['label']), *place(a)
            )
    for i, anns in enumerate(said['annotations'].to_pylist()):
        for a in anns: dt.add_detection(i, NAMES.index(a['label']), a['score'], *place(a))
    run = tidecv.TIDE().evaluate(gt, dt, mode=tidecv.TIDE.MASK if masks else tidecv.TIDE.BOX)
    return (
        {e.short_name: v for e, v in run.count_errors().items()},
        {e.short_name: v / 100 for e, v in run.fix_main_errors().items()},
        run.ap / 100,
    )


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('crowd', [0., .15])
@pytest.mark.parametrize('masks', [False, True], ids=['boxes', 'masks'])
def test_kinds_and_gains_against_tidecv(seed, crowd, masks, monkeypatch):
    monkeypatch.setattr(
        'cv_lab.coco.RECALLS', np.arange(101) / 100
    )  # tidecv's, which differ from COCO's in the last bit
    truth, said = tables(seed, images=60, ties=False, crowd=crowd, masks=masks)
    drop = lambda t: make_table(
        [dict(r, annotations=[a for a in r['annotations'] if a['label'] in ('a', 'b')]) for r in t.to_pylist()],
        t.schema,
    )  # tidecv counts a class without objects as 0
    truth, said = drop(truth), drop(said)
    count, gain, ap = tide(truth, said, masks)
    t, p = columns(truth, NAMES, masks=masks), columns(said, NAMES, masks=masks)
    x = mistakes_of(t, p); ours = {k: int((x.kind == k).sum()) for k in KINDS} | dict(Miss=len(x.missed))
    assert ours == count
    w = np.ones((1, len(truth))); got = gains(t, p, 4)(w)
    assert abs(float(np.nanmean(average_precision(x.m, 4)(w)[0, 0, 0])) - ap) < 1e-9
    for k in KINDS: assert abs(got[k][0] - gain[k]) < 1e-9, k
