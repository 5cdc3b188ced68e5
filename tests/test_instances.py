"Instance segmentation: masks against plain loops, mask AP against pycocotools, the loss, and the way from training to answers without torch."

import io, json, subprocess, sys

import numpy as np, pytest, torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cv_lab.core import Annotation, digest
from cv_lab.data.manifest import PREDICTIONS, make_table
from cv_lab.evaluate import evaluate
from cv_lab.geometry import mask_iou, polygon_mask, rle_decode, rle_encode
from cv_lab.image import Preprocess
from cv_lab.optimize import export_run, parity
from cv_lab.predict import Predictor, calibrate, predict_table
from cv_lab.spec import Problem
from cv_lab.tasks import instances
from cv_lab.train import fit

CLASSES = ['ring', 'square', 'cross']
SMALL = dict(
    image=dict(height=64, width=96),
    strides=[8, 16],
    network_args=dict(channels=[16, 32, 64, 64], stem_width=8),
    width=32,
    mask_width=16,
    prototypes=8,
    augment=[{'RandomHorizontalFlip': {}}],
)


def problem(**kw):
    return Problem(
        **dict(
            name='shapes',
            task='instances',
            classes=CLASSES,
            owner='o',
            intended_use='i',
            acceptance=[{'metric': 'mask_map50', 'at_least': 0.5}],
            metrics=dict(primary='mask_map50', resamples=100),
            slices=dict(many="crowding == 'many'"),
        )
        | kw
    )


def slow_masks(coefficients, prototypes, boxes, H, W, stride, margin):
    "A mask pixel by pixel: torch enlarges the whole mixture, and what lies outside the wider box is gone."
    out = []
    for c, (x1, y1, x2, y2) in zip(coefficients, boxes):
        z = sum(v * p for v, p in zip(c, prototypes))
        z = torch.nn.functional.interpolate(
            torch.tensor(z)[None, None], scale_factor=stride, mode='bilinear', align_corners=False
        )[0, 0, :H, :W].numpy()
        mx, my = margin*(x2 - x1), margin*(y2 - y1)
        out.append(
            np.array(
                [
                    [z[y, x] > 0 and x1 - mx <= x + 0.5 < x2 + mx and y1 - my <= y + 0.5 < y2 + my for x in range(W)]
                    for y in range(H)
                ]
            )
        )
    return out


@pytest.mark.parametrize('size, fine, margin', [((32, 48), 4, .1), ((30, 46), 4, 0.), ((24, 40), 2, .3)])
def test_masks_against_plain_loops(size, fine, margin):
    rng = np.random.default_rng(fine)
    H, W = size
    cfg = instances.Config(image=Preprocess(H, W), fine=[fine], margin=margin)
    p = rng.normal(size=(5, -(-H // fine), -(-W // fine))).astype(np.float32)
    c = rng.normal(size=(9, 5)).astype(np.float32)
    at = rng.uniform(-6, [W - 6, H - 6], (9, 2)); boxes = np.concatenate([at, at + rng.uniform(2, 25, (9, 2))], 1)
    got, want = instances.object_masks(c, p, boxes, cfg), slow_masks(c, p, boxes, H, W, fine, margin)
    assert all((a == b).all() for a, b in zip(got, want)) and sum(m.sum() for m in got) > 100


def test_an_object_without_a_pixel_is_not_said():
    cfg = instances.Config(image=Preprocess(32, 48))
    out = dict(
        logits=np.full((1, 2, 3), 2.0),
        boxes=np.array([[[4.0, 4, 20, 20], [20, 4, 40, 20]]]),
        prototypes=np.ones((1, 1, 8, 12), np.float32),
        coefficients=np.array([[[1.0], [-1.0]]], np.float32),
    )
    (said,) = instances.decode(out, cfg, CLASSES, {})
    assert len(said.annotations) == 3 and {a.bbox[0] for a in said.annotations} == {4.0}


def noisy_tables(seed):
    "Truth and predictions with crowds, polygons, misses, doubles, wrong classes and empty images; and the same as COCO has it."
    rng = np.random.default_rng(seed); y, x = np.mgrid[:60, :80] + .5; truth, said, coco, results = [], [], [], []
    def blob(cx, cy, r, hole): d = np.hypot(x - cx, (y - cy)*1.3); return (d < r) & (d >= hole)
    for i in range(25):
        objects, found = [], []
        for _ in range(rng.integers(0, 6) if i % 6 else 0):
            cx, cy, r = rng.uniform(10, 70), rng.uniform(10, 50), rng.uniform(5, 20)
            hole = rng.choice([0, r * 0.6])
            c = int(rng.integers(3))
            crowd = rng.random() < 0.1
            m = blob(cx, cy, r, hole)
            ring = None if rng.random() < 0.7 else [[cx - r, cy - r, cx + r, cy - r, cx, cy + r]]
            m = polygon_mask(ring, 60, 80) if ring else m
            objects.append((c, m, ring, crowd)); n = rng.choice([0, 1, 1, 1, 2])
            for _ in range(n):
                found.append(
                    (
                        c if rng.random() < 0.8 else int(rng.integers(3)),
                        blob(cx + rng.normal(0, 2), cy + rng.normal(0, 2), r * rng.uniform(0.8, 1.2), hole),
                        float(np.round(rng.uniform(0.05, 1), 1)),
                    )
                )
        found = [f for f in found if f[1].any()]
        truth.append(
            dict(
                id=f'{i}',
                sha256=digest(f'{i}'),
                width=80,
                height=60,
                annotations=[
                    Annotation(
                        CLASSES[c],
                        mask=None if ring else rle_encode(m),
                        polygon=ring,
                        attributes={'iscrowd': '1'} if crowd else None,
                    )
                    for c, m, ring, crowd in objects
                ],
            )
        )
        said.append(
            dict(id=f'{i}', annotations=[Annotation(CLASSES[c], mask=rle_encode(m), score=s) for c, m, s in found])
        )
        coco += [
            dict(
                id=len(coco) + k + 1,
                image_id=i + 1,
                category_id=c + 1,
                iscrowd=int(crowd),
                area=float(m.sum()),
                bbox=[0, 0, 1, 1],
                segmentation=ring if ring and not crowd else rle_encode(m),
            )
            for k, (c, m, ring, crowd) in enumerate(objects)
        ]
        results += [dict(image_id=i + 1, category_id=c + 1, score=s, segmentation=rle_encode(m)) for c, m, s in found]
    gt = COCO()
    gt.dataset = dict(
        info={},
        images=[dict(id=i + 1, width=80, height=60) for i in range(25)],
        categories=[dict(id=c + 1, name=n) for c, n in enumerate(CLASSES)],
        annotations=coco,
    )
    gt.createIndex()
    return make_table(truth), make_table(said, PREDICTIONS), gt, results


@pytest.mark.parametrize('seed', range(3))
def test_mask_ap_against_pycocotools(seed, capsys):
    truth, said, gt, results = noisy_tables(seed)
    got = {
        k: float(v[0])
        for k, v in instances.score(truth, said, problem())(np.ones((1, len(truth)))).items()
        if v.ndim == 1
    }
    e = COCOeval(gt, gt.loadRes(results), 'segm'); e.evaluate(); e.accumulate(); e.summarize()
    for k, v in zip(
        ('map50_95', 'map50', 'map75', 'map_small', 'map_medium', 'map_large', 'ar1', 'ar10', 'ar100'), e.stats
    ):
        assert (v == -1 and f'mask_{k}' not in got) or got[f'mask_{k}'] == pytest.approx(v, abs=1e-9), k
    assert .1 < got['mask_map50'] < .95


@pytest.mark.parametrize('seed', range(3))
def test_which_answers_are_right_against_pycocotools(seed, capsys):
    truth, said, gt, results = noisy_tables(seed)
    right, sure, of, item = instances.answers(truth, said, problem())
    e = COCOeval(gt, gt.loadRes(results), 'segm'); e.params.areaRng = e.params.areaRng[:1]; e.evaluate()
    theirs = [
        (im['image_id'] - 1, im['category_id'] - 1, s, m > 0)
        for im in e.evalImgs
        if im
        for s, m, out in zip(im['dtScores'], im['dtMatches'][0], im['dtIgnore'][0])
        if s >= 0.5 and not out
    ]
    ours = zip(item.tolist(), of.tolist(), sure.tolist(), right.tolist())
    assert sorted(ours) == sorted(theirs) and 5 < right.sum() < len(right) - 5


def test_what_an_object_teaches():
    "A mask moves the prototypes under its box alone; a box without a mask moves none."
    cfg = instances.Config(**SMALL); torch.manual_seed(0); y, x = np.mgrid[:64, :96]
    batch = lambda *anns: {
        k: torch.as_tensor(v)[None] for k, v in instances.targets([a.said() for a in anns], cfg, CLASSES).items()
    }
    base = {
        k: v.detach()
        for k, v in instances.network(cfg, CLASSES)(torch.zeros((1, 3, 64, 96), dtype=torch.uint8)).items()
    }

    def gradient(*anns):
        out = base | dict(prototypes=base['prototypes'].clone().requires_grad_())
        instances.loss(out, batch(*anns), cfg).backward()
        return out['prototypes'].grad

    ring = Annotation('ring', bbox=(20, 16, 44, 40), mask=rle_encode(np.hypot(x - 32, y - 28) < 12))
    g = gradient(ring).abs().sum((0, 1)) > 0
    rows, cols = np.flatnonzero(g.any(1)), np.flatnonzero(g.any(0))
    assert (rows[0], rows[-1], cols[0], cols[-1]) == (
        3,
        10,
        4,
        11,
    )  # the middles of cells, 4k + 2, from 13.6 to 42.4 and 17.6 to 46.4
    assert not gradient(Annotation('ring', bbox=(20, 16, 44, 40))).any() and not gradient().any()
    t = instances.targets(
        [
            Annotation('cross', mask=ring.mask).said(),
            Annotation('square', bbox=(0, 0, 9, 9), polygon=[[0, 0, 8, 0, 8, 8, 0, 8]]).said(),
        ],
        cfg,
        CLASSES,
    )
    assert (
        t['objects'][0].tolist() == [2, 21, 17, 44, 40]
        and t['known'].sum() == 2
        and (t['masks'][1, :2, :2] == 255).all()
        and t['masks'][1].sum() == 4 * 255
    )


def test_the_best_mixture_is_the_mask_and_costs_least():
    from cv_lab.prototypes import mask_loss

    m = torch.zeros(1, 1, 16, 24, dtype=torch.uint8)
    m[0, 0, 4:10, 5:11] = 255
    objects = torch.tensor([[[0.0, 16, 12, 48, 44]]])
    which, target = torch.tensor([[0, -1]]), torch.tensor([[0.8, 0]])
    cost = lambda p: float(
        mask_loss(
            dict(prototypes=p[None], coefficients=torch.ones(1, 2, 1)),
            m,
            torch.tensor([[True]]),
            objects,
            which,
            target,
            4,
        )
    )
    right = (m[0].float() / 255 * 2 - 1) * 20
    moved = right.roll(2, 2)
    inside = torch.nn.functional.pad(torch.ones(1, 8, 8), (4, 12, 3, 5))
    assert (
        cost(right) == pytest.approx(0, abs=1e-4)
        and cost(right * inside + 20 * (1 - inside)) > 0
        and cost(-right) > cost(moved) > 1 > cost(right * 0.05)
    )


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('WANDB_MODE', 'disabled')
        tmp = tmp_path_factory.mktemp('shapes')
        data = instances.example(tmp / 'data')
        run = fit(
            problem(),
            data,
            tmp / 'runs',
            epochs=30,
            batch_size=14,
            lr=8e-3,
            warmup=0.1,
            ema=0.95,
            clip=10.0,
            monitor='metric',
            patience=60,
            val_every=15,
            **SMALL,
        )
    return data, run, export_run(run, problem())


def test_it_learns_and_is_evaluated(trained):
    data, run, folder = trained
    rows = data.split('test')
    found = evaluate(rows, predict_table(Predictor(folder, 'cpu'), rows, data.read), problem())
    m = found['metrics']
    assert (
        m['mask_map50']['value'] > 0.4
        and m['map50']['value'] > 0.5
        and m['mask_map50']['low'] <= m['mask_map50']['value']
        and set(found['classes']['ring']) >= {'mask_ap', 'mask_ap50'}
    )


def test_the_exported_graph_answers_as_the_checkpoint(trained):
    data, run, folder = trained; found = parity(run, Predictor(folder, 'cpu'), data.table, data.read)
    assert (
        found['ok']
        and found['labels_equal']
        and found['box_iou'] >= 0.999
        and found['mask_iou'] >= 0.99
        and found['items'] == len(data)
    ), found


def test_operating_points_are_fitted_and_used(trained):
    data, run, folder = trained
    t = calibrate(folder, data.split('val'), data.read, problem())
    said = predict_table(Predictor(folder, 'cpu'), data.split('test'), data.read)
    assert all(
        a['accepted'] == (a['score'] >= t['scores'][a['label']]) for p in said['annotations'].to_pylist() for a in p
    )


def test_answers_without_torch_are_masks_in_pixels_of_the_image(trained, tmp_path):
    "Another process, in which torch cannot be imported, is asked about a scene as it is and twice as large."
    data, run, folder = trained
    row = max(data.table.to_pylist(), key=lambda r: len(r['annotations']))
    small = Image.open(io.BytesIO(data.read(row['uri'])))
    for k in (1, 2): small.resize((96*k, 64*k), Image.NEAREST).save(tmp_path/f'{k}.png')
    code = (
        "import sys, json\nfor m in ('torch', 'lightning', 'torchvision'): sys.modules[m] = None\nfrom pathlib import Path\nfrom cv_lab.predict import Predictor\n"
        "p = Predictor(sys.argv[1], 'cpu'); print(json.dumps(p.predict([Path(f).read_bytes() for f in sys.argv[2:]])))"
    )
    done = subprocess.run(
        [sys.executable, '-c', code, str(folder), str(tmp_path / '1.png'), str(tmp_path / '2.png')],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (a['annotations'] for a in json.loads(done.stdout)); assert one and len(one) == len(two)
    for a, b in zip(one, two):
        assert a['mask']['size'] == [64, 96] and b['mask']['size'] == [128, 192] and a['label'] == b['label']
        assert mask_iou(rle_encode(np.kron(rle_decode(a['mask']), np.ones((2, 2), bool))), b['mask']) > .8
