"Semantic segmentation: figures against scikit-learn, torchmetrics and plain loops; planted faults; networks, losses, masks there and back."

import numpy as np, pytest, torch
from sklearn import metrics as sk
from torch.nn import functional as F
from torchmetrics.detection import PanopticQuality
from torchmetrics.segmentation import MeanIoU

from cv_lab.core import Annotation, BadInput, digest
from cv_lab.data.manifest import make_table
from cv_lab.decoders import DECODERS, pixel_network
from cv_lab.errors import in_words, mistakes, without_specks
from cv_lab.evaluate import evaluate
from cv_lab.geometry import mask_iou, rle_decode, rle_encode, to_input
from cv_lab.image import Preprocess, placement
from cv_lab.labelmaps import (
    CODE,
    IGNORE,
    count,
    edges,
    explain,
    label_map,
    map_pairs,
    mended,
    near,
    reach_of,
    reasons,
    segmentation_figures,
)
from cv_lab.spec import Problem
from cv_lab.task import Prediction, in_image, predictions_table
from cv_lab.tasks import segmentation

CLASSES = ['a', 'b', 'c', 'never']


def problem(classes=CLASSES, **kw):
    return Problem(
        **dict(
            name='p',
            task='segmentation',
            classes=classes,
            owner='o',
            intended_use='i',
            acceptance=[{'metric': 'mean_iou', 'at_least': 0.5}],
            metrics=dict(primary='mean_iou', resamples=200),
        )
        | kw
    )


def maps(seed, n=12, size=(40, 56), ignore=True):
    "Random blobs: pairs of maps that mostly agree; an empty image and one without a prediction among them."
    rng = np.random.default_rng(seed); out = []
    for k in range(n):
        blob = lambda: np.kron(
            rng.integers(0, 4, (size[0] // 8, size[1] // 8)) * (rng.random((size[0] // 8, size[1] // 8)) < 0.6),
            np.ones((8, 8)),
        ).astype(np.int16)
        t = np.zeros(size, np.int16) if k == 0 else blob()
        p = (
            np.where(rng.random(size) < 0.1, blob(), np.roll(t, rng.integers(-2, 3, 2), (0, 1)))
            if k != 1
            else np.zeros(size, np.int16)
        )
        if ignore and k % 3 == 2: t[:10, :20] = IGNORE; p[:10, :20] = IGNORE
        out.append((t, p))
    return out


@pytest.mark.parametrize('weighted', [False, True])
def test_figures_against_scikit_learn_and_torchmetrics(weighted):
    pairs = maps(0); w = np.random.default_rng(1).integers(0, 3, len(pairs)) if weighted else np.ones(len(pairs), int)
    got = {k: v[0] for k, v in segmentation_figures(count(pairs, 4))(w[None].astype(float)).items()}
    again = [pairs[i] for i in np.repeat(np.arange(len(pairs)), w)]
    t, p = (np.concatenate([m[k][m[0] != IGNORE] for m in again]) for k in (0, 1))
    iou = sk.jaccard_score(t, p, labels=[1, 2, 3], average=None)
    near_ = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
    near_(got['iou'][:3], iou)
    near_(got['mean_iou'], iou.mean())
    assert np.isnan(got['iou'][3]) and np.isnan(got['dice'][3])
    near_(got['dice'][:3], sk.f1_score(t, p, labels=[1, 2, 3], average=None))
    near_(got['recall'][:3], sk.recall_score(t, p, labels=[1, 2, 3], average=None))
    near_(got['pixel_accuracy'], (t == p).mean())
    near_(got['foreground_iou'], sk.jaccard_score(t, p, labels=[1, 2, 3, 4], average='micro'))
    theirs = MeanIoU(num_classes=4, per_class=True, input_format='index')
    theirs.update(torch.tensor(t[None]).long(), torch.tensor(p[None]).long())
    np.testing.assert_allclose(got['iou'][:3], theirs.compute().numpy()[1:], atol=1e-6)


def test_panoptic_quality_against_torchmetrics():
    pairs = maps(2, ignore=False); got = segmentation_figures(count(pairs, 3))(np.ones((1, len(pairs))))
    theirs = PanopticQuality(
        things=set(), stuffs={0, 1, 2, 3}, return_per_class=True
    )  # the background has a class of its own there
    for t, p in pairs:
        theirs.update(*(torch.stack([torch.tensor(m).long(), torch.zeros(m.shape).long()], -1)[None] for m in (p, t)))
    np.testing.assert_allclose(got['pq'][0], theirs.compute().numpy()[0, 1:], atol=1e-6)


def slow_edge(m):
    "Loops over pixels and their four neighbours."
    out = {}
    for y in range(m.shape[0]):
        for x in range(m.shape[1]):
            around = [
                m[y + dy, x + dx]
                for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))
                if 0 <= y + dy < m.shape[0] and 0 <= x + dx < m.shape[1]
            ]
            if m[y, x] > 0 and any(v not in (m[y, x], IGNORE) for v in around):
                out.setdefault(int(m[y, x]), []).append((y, x))
    return {c: np.array(v) for c, v in out.items()}


def test_boundary_f1_against_loops():
    pairs = maps(3, n=6); total = {c: np.zeros(4) for c in (1, 2, 3)}
    for t, p in pairs:
        a, b, r = slow_edge(p), slow_edge(t), reach_of(*t.shape)
        for c in total:
            u, v = a.get(c, np.zeros((0, 2))), b.get(c, np.zeros((0, 2)))
            d = np.sqrt(((u[:, None] - v[None]) ** 2).sum(-1))
            ok = d <= r
            total[c] += [len(u), ok.any(1).sum() if len(v) else 0, len(v), ok.any(0).sum() if len(u) else 0]
    got = segmentation_figures(count(pairs, 3))(np.ones((1, len(pairs))))['boundary'][0]
    for c, (said, right, true, found) in total.items():
        assert got[c - 1] == pytest.approx(
            2 * (right / said) * (found / true) / (right / said + found / true), abs=1e-12
        )
    t = np.zeros((30, 30), np.int16)
    t[10:20, 10:20] = 1
    own, ok = near(edges(np.roll(t, 1, 1)), edges(t), 1)
    assert ok.all() and not near(edges(np.roll(t, 3, 1)), edges(t), 1)[1].all()


def test_painting():
    m = lambda x1, y1, x2, y2: dict(polygon=[[x1, y1, x2, y1, x2, y2, x1, y2]]); size = (20, 20)
    assert label_map([dict(label='a') | m(0, 0, 10, 10), dict(label='b') | m(5, 5, 15, 15)], *size, CLASSES)[7, 7] == 2
    assert (
        label_map(
            [dict(label='a', score=0.9) | m(0, 0, 10, 10), dict(label='b', score=0.4) | m(5, 5, 15, 15)], *size, CLASSES
        )[7, 7]
        == 1
    )
    assert (
        label_map(
            [
                dict(label='b', score=0.4, accepted=False) | m(5, 5, 15, 15),
                dict(label=None, text='7', bbox=[0, 0, 5, 5]),
                dict(caption='nothing'),
            ],
            *size,
            CLASSES,
        ).max()
        == 0
    )
    hidden = label_map(
        [dict(label='a') | m(0, 0, 20, 20), dict(attributes={'ignore': '1'}) | m(0, 0, 4, 4)], *size, CLASSES
    )
    assert hidden[2, 2] == IGNORE and hidden[8, 8] == 1
    with pytest.raises(BadInput, match='no class'): label_map([dict(label='z') | m(0, 0, 4, 4)], *size, CLASSES)
    with pytest.raises(BadInput, match='a mask of'):
        label_map([dict(label='a', mask=rle_encode(np.ones((4, 4), bool)))], *size, CLASSES)


def tables(pairs, scores=None):
    said = lambda m, s: [Annotation(CLASSES[c - 1], mask=rle_encode(m == c), score=s) for c in np.unique(m[m > 0])]
    hide = lambda m: (
        [Annotation(mask=rle_encode(m == IGNORE), attributes={'ignore': '1'})] if (m == IGNORE).any() else []
    )
    ids = [f'i{k}' for k in range(len(pairs))]
    truth = make_table(
        [
            dict(
                id=i,
                sha256=digest(i),
                width=t.shape[1],
                height=t.shape[0],
                annotations=said(t, None) + hide(t),
                tags=dict(half=str(k % 2)),
            )
            for k, (i, (t, _)) in enumerate(zip(ids, pairs))
        ]
    )
    return truth, predictions_table(
        ids, [Prediction(said(p, 0.9 if scores is None else scores[k])) for k, (_, p) in enumerate(pairs)]
    )


def test_tables_give_the_maps_back_and_slices_are_their_items():
    pairs = maps(4); truth, said = tables(pairs)
    for (t, p), (t2, p2) in zip(pairs, map_pairs(truth, said, CLASSES)): assert (t == t2).all() and (p == p2).all()
    found = evaluate(truth, said, problem(slices=dict(odd="half == '1'")))
    alone = segmentation_figures(count(pairs[1::2], 4))(np.ones((1, 6)))
    assert (
        found['slices']['odd']['metrics']['mean_iou']['value'] == pytest.approx(alone['mean_iou'][0])
        and found['classes']['a']['iou'] is not None
        and found['classes']['never']['iou']['value'] is None
    )
    with pytest.raises(BadInput, match='no prediction: i11'): evaluate(truth, said.slice(0, 11), problem())


def scene(*regions): # (class, y1, y2, x1, x2)
    m = np.zeros((60, 80), np.int16)
    for c, y1, y2, x1, x2 in regions: m[y1:y2, x1:x2] = c
    return m


def test_planted_mistakes_have_their_kind():
    true = scene((1, 5, 15, 5, 15), (2, 5, 15, 30, 40), (1, 30, 50, 5, 25), (3, 30, 50, 40, 60))
    said = scene((3, 5, 15, 30, 40), (1, 31, 51, 6, 26), (3, 30, 50, 40, 60), (2, 30, 50, 54, 60), (2, 2, 8, 60, 70))
    kind, regions = explain(true, said, 4)
    assert sorted((r.kind, r.true, r.said, r.pixels) for r in regions) == [
        ('invented', None, 2, 60),
        ('missed', 1, None, 100),
        ('swap', 2, 3, 100),
        ('swap', 3, 2, 120),
    ]
    assert (kind[30, 10], kind[50, 10], kind[5, 5], kind[10, 35], kind[35, 58], kind[3, 65], kind[40, 10]) == tuple(
        CODE.get(k, 0) for k in ('boundary', 'boundary', 'missed', 'swap', 'swap', 'invented', '')
    )
    assert (kind > 0).sum() == (true != said).sum()
    table = segmentation.mistakes(*tables([(true, said)]), problem())
    assert table['kind'].value_counts().to_dict() == dict(swap=2, missed=1, invented=1)
    rough = segmentation.mistakes(*tables([(scene((1, 10, 20, 10, 20)), scene((1, 10, 20, 13, 23)))]), problem())
    assert rough['kind'].tolist() == ['boundary'] and rough['what'][0] == 'the boundary of a'


def test_the_paragraph_is_about_what_weighs_and_not_about_specks():
    dots = [(1, y, y + 1, x, x + 1) for y in range(0, 40, 4) for x in range(60, 80, 10)]  # 20 invented ones of a pixel
    truth, said = tables([(scene((2, 5, 30, 10, 40)), scene(*dots))] + [(scene(), scene((1, 3, 4, 3, 4)))] * 3)
    found = mistakes(truth, said, problem())
    assert found['kind'].value_counts()['invented'] == 23 and found['pixels'].max() == 750
    heavy = without_specks(found, problem())
    assert heavy['kind'].tolist() == ['missed'] and heavy['pixels'].sum() >= 0.95 * found['pixels'].sum()
    told = ' '.join(in_words(truth, found, problem()))
    assert 'specks' in told and '100% of the wrong pixels are of the kind “missed”' in told and 'invented' not in told


def test_mending_all_kinds_mends_everything():
    pairs = maps(5)
    c, r = count(pairs, 4), reasons(pairs, 4)
    iou = lambda v: segmentation_figures(v)(np.ones((1, len(pairs))))['mean_iou'][0]
    assert (
        all(iou(v) >= iou(c) - 1e-12 for k, v in mended(c, r).items() if k != 'swap')
        and max(iou(v) for v in mended(c, r).values()) < 1
    )
    every = type(c)(c.both + r.lost.sum(1), c.true, c.said + (r.lost - r.taken).sum(1), c.edge, c.segment, c.confusion)
    assert iou(every) == 1
    kinds = [explain(t, p, 4)[0] for t, p in pairs]
    one = [(t, np.where(k == CODE['boundary'], t, p)) for (t, p), k in zip(pairs, kinds)]
    assert iou(mended(c, r)['boundary']) == pytest.approx(iou(count(one, 4)), abs=1e-12)


def test_operating_points_are_fitted_per_class():
    good, bad = scene((1, 5, 30, 5, 30)), scene((1, 40, 55, 40, 70))
    pairs = [(good, good)] * 6 + [(scene((2, 5, 30, 5, 30)), bad)] * 2
    truth, said = tables(pairs, [0.9, 0.8, 0.95, 0.7, 0.85, 0.9, 0.4, 0.3])
    found = segmentation.calibrate(truth, said, problem())['scores']
    assert .4 < found['a'] < .7 and found['b'] == 0
    strict = segmentation.calibrate(truth, said, problem(decision=dict(target_precision=0.7)))['scores']
    assert strict['a'] < 0.4
    z = np.full((1, 5, 8, 8), -4.0, np.float32)
    z[0, 1] = -3.5
    (out,) = segmentation.decode(dict(logits=z), segmentation.Config(), CLASSES, dict(scores=found))
    assert [a.accepted for a in out.annotations] == [False]


def test_the_loss_is_focal_and_dice():
    torch.manual_seed(0)
    z = torch.randn(2, 5, 6, 7, requires_grad=True)
    y = torch.randint(0, 5, (2, 6, 7)).short()
    y[0, :3] = IGNORE
    w = torch.tensor([0.2, 1, 2, 1, 1])
    target = dict(classes=y, weight=w.repeat(2, 1))
    each = F.cross_entropy(z, y.long(), w, ignore_index=IGNORE, reduction='none')
    some = w[y[y > 0].long()].sum()
    torch.testing.assert_close(
        segmentation.loss(dict(logits=z), target, segmentation.Config(dice=0, focus=0)), each.sum() / some
    )
    plain = F.cross_entropy(z, y.long(), ignore_index=IGNORE, reduction='none')
    focal = (each * (1 - torch.exp(-plain)) ** 2).sum() / some
    torch.testing.assert_close(segmentation.loss(dict(logits=z), target, segmentation.Config(dice=0)), focal)
    nothing = dict(classes=torch.zeros_like(y), weight=target['weight'])
    empty = F.cross_entropy(z, nothing['classes'].long(), reduction='mean') * 100
    torch.testing.assert_close(segmentation.loss(dict(logits=z), nothing, segmentation.Config(dice=0, focus=0)), empty)
    ok = y.flatten() != IGNORE
    p, t = z.softmax(1).movedim(1, -1).reshape(-1, 5)[ok], F.one_hot(y.flatten()[ok].long(), 5)
    by_hand = [1 - (2 * (p[:, c] * t[:, c]).sum() + 1) / (p[:, c].sum() + t[:, c].sum() + 1) for c in range(1, 5)]
    got = segmentation.loss(dict(logits=z), target, segmentation.Config(dice=0.5))
    torch.testing.assert_close(got, focal + 0.5 * sum(by_hand) / 4)
    got.backward(); assert (z.grad[0, :, :3] == 0).all() and (z.grad[0, :, 3:] != 0).all()


@pytest.mark.parametrize('fit, size', [('letterbox', (150, 90)), ('squash', (70, 110)), ('letterbox', (96, 64))])
def test_masks_go_to_the_network_and_back(fit, size):
    W, H = size
    y, x = np.mgrid[:H, :W]
    said = [
        Annotation('a', mask=rle_encode((x - W * 0.3) ** 2 + (y - H * 0.5) ** 2 < (H * 0.3) ** 2)),
        Annotation('b', polygon=[[W * 0.6, H * 0.2, W * 0.9, H * 0.2, W * 0.75, H * 0.9]]),
    ]
    cfg = segmentation.Config(image=Preprocess(64, 96, fit=fit)); place = placement(W, H, cfg.image)
    m = torch.tensor(segmentation.targets([to_input(a, place).said() for a in said], cfg, CLASSES)['classes']).long()
    (found,) = segmentation.decode(dict(logits=(9 * F.one_hot(m, 5)).movedim(-1, 0)[None].numpy()), cfg, CLASSES, {})
    back = {a.label: a for a in in_image(found, place).annotations}
    truth = label_map([a.said() for a in said], H, W, CLASSES)
    for i, c in enumerate('ab', 1):
        assert back[c].mask['size'] == [H, W] and mask_iou(back[c].mask, rle_encode(truth == i)) > (
            0.999 if (W, H) == (96, 64) else 0.93
        )


def test_small_classes_can_be_left_out():
    z = np.zeros((1, 5, 16, 16), np.float32); z[0, 0] = 5; z[0, 2, :2, :2] = 9
    say = lambda **kw: segmentation.decode(dict(logits=z), segmentation.Config(**kw), CLASSES, {})[0].annotations
    assert [a.label for a in say()] == ['b'] and say(min_pixels=5) == [] and rle_decode(say()[0].mask).sum() == 4


@pytest.mark.parametrize('decoder', DECODERS)
def test_every_decoder_trains_and_exports(decoder, tmp_path):
    import onnxruntime as ort
    from cv_lab.optimize import export_onnx
    torch.manual_seed(0); strides, args = ([4, 16], dict(output_stride=16)) if decoder == 'deeplab' else ([2, 4, 8], {})
    net = pixel_network('resnet10t', 3, decoder, strides, 8, frozen=True, channels=[8, 8, 16, 16], stem_width=8, **args)
    x = torch.randint(0, 256, (3, 3, 48, 80), dtype=torch.uint8); net.train()(x)['logits'].square().mean().backward()
    grads = {n: p.grad is not None for n, p in net.named_parameters()}
    assert {n for n, g in grads.items() if not g} == {n for n in grads if '.body.' in n}
    export_onnx(net.eval(), 48, 80, tmp_path / 'm.onnx')
    (got,) = ort.InferenceSession(str(tmp_path / 'm.onnx')).run(None, dict(images=x.numpy()))
    with torch.inference_mode(): want = net(x)['logits'].numpy()
    assert got.shape == (3, 3, 48, 80); np.testing.assert_allclose(got, want, atol=2e-4)


def test_other_backbones_by_name():
    for name, strides in (('mobilenetv3_small_050', [2, 4, 8]), ('convnext_atto', [4, 8, 16])):
        out = pixel_network(name, 2, 'fpn', strides, 8).eval()(torch.zeros((1, 3, 50, 70), dtype=torch.uint8))
        assert out['logits'].shape == (1, 2, 50, 70)
    with pytest.raises(BadInput, match='no features'): pixel_network('convnext_atto', 2, 'fpn', [2, 4], 8)


def bright(
    folder, image, classes=('bright',)
):  # a model folder that says `bright` where a pixel is, and is blind at the edges of its input
    import onnx
    from onnx import TensorProto as T, helper as h, numpy_helper as nh
    from cv_lab.predict import describe_model

    seen = np.zeros((1, 1, image.height, image.width), np.float32)
    seen[..., 4:-4, 4:-4] = 1
    const = lambda name, v: nh.from_array(np.asarray(v), name)
    graph = h.make_graph(
        [
            h.make_node('Cast', ['images'], ['x'], to=T.FLOAT),
            h.make_node('ReduceMean', ['x', 'axes'], ['m'], keepdims=1),
            h.make_node('Sub', ['m', 'middle'], ['c']),
            h.make_node('Mul', ['c', 'seen'], ['s']),
            h.make_node('Neg', ['s'], ['n']),
            h.make_node('Concat', ['n', 's'], ['logits'], axis=1),
        ],
        'bright',
        [h.make_tensor_value_info('images', T.UINT8, ['n', 3, image.height, image.width])],
        [h.make_tensor_value_info('logits', T.FLOAT, ['n', 2, image.height, image.width])],
        [const('axes', [1]), const('middle', np.float32(100)), const('seen', seen)],
    )
    folder.mkdir()
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid('', 18)], ir_version=10), folder / 'model.onnx')
    describe_model(folder, 'p', 'segmentation', list(classes), segmentation.Config(image=image)); return folder


def test_a_large_image_is_seen_in_windows(tmp_path):
    import io
    from PIL import Image
    from cv_lab.predict import Predictor

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:230, :410]
    true = np.any(
        [(x - a) ** 2 + (y - b) ** 2 < r * r for a, b, r in rng.uniform([20, 20, 5], [390, 210, 30], (14, 3))], axis=0
    )
    file = io.BytesIO()
    Image.fromarray(np.repeat(np.where(true, 220, 20).astype(np.uint8)[..., None], 3, 2)).save(file, 'PNG')
    iou = {}
    for name, kw in dict(
        windows=dict(shrink=1.0), coarse=dict(shrink=2.0), edges=dict(shrink=1.0, overlap=0.0), whole={}
    ).items():
        model = Predictor(bright(tmp_path / name, Preprocess(64, 64, **kw)), 'cpu')
        ready = model.prepare(file.getvalue())
        (said,) = model.answers([ready])
        (a,) = said.annotations
        iou[name] = mask_iou(a.mask, rle_encode(true))
        inner = (rle_decode(a.mask) == true)[4:-4, 4:-4].all()
        assert (
            inner == (name == 'windows')
            and a.mask['size'] == [230, 410]
            and (len(ready.parts) > 1) == (name != 'whole')
            and a.score > 0.9
        )
        assert model.predict([file.getvalue()]*2)[1]['annotations'][0]['mask'] == a.mask
    assert iou['windows'] > iou['edges'] > iou['coarse'] > iou['whole']


def test_a_pixel_at_a_tie_is_no_difference_and_a_score_of_the_same_pixels_is():
    from cv_lab.predict import differences

    speck = np.zeros((128, 192), bool)
    speck[60:62, 90:93] = True
    less, more = speck.copy(), speck.copy()
    less[60, 90] = False
    more[40:60, 90:93] = True

    def said(mask, score): return Prediction([Annotation('3', mask=rle_encode(mask), score=score)])

    tie = differences(said(speck, 0.9), said(less, 0.9 - 1 / 7))  # one of six pixels, and what it does to their mean
    assert tie['mask'] == 0 and tie['score'] == 0 and tie['labels'] == 0
    assert differences(said(speck, 0.9), said(less, 0.5))['score'] > 0.2  # more than that pixel can have done
    assert differences(said(speck, 0.9), said(speck, 0.901))['score'] == pytest.approx(0.001)
    large = differences(
        said(more, 0.9), said(more & ~speck, 0.9)
    )  # 6 of 24,576 pixels are more than one in ten thousand
    assert large['mask'] == pytest.approx(6 / 66)
