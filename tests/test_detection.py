"Detection from files to answers: trained, exported, calibrated, asked; the boxes lie where the objects are."
import io

import numpy as np, pytest, torch
from PIL import Image
from torchvision.ops import batched_nms

from cv_lab.core import Annotation
from cv_lab.evaluate import evaluate
from cv_lab.geometry import box_iou, nms
from cv_lab.optimize import export_onnx, export_run, parity
from cv_lab.predict import Predictor, calibrate, golden_difference, predict_table, write_golden
from cv_lab.spec import Problem
from cv_lab.objects import SIZES
from cv_lab.tasks import detection
from cv_lab.train import fit

SMALL = dict(
    image=dict(height=64, width=96),
    strides=[8, 16],
    network_args=dict(channels=[16, 32, 64, 64], stem_width=8),
    width=32,
    augment=[{'Mosaic': dict(p=0.3)}, {'RandomHorizontalFlip': {}}],
)


def problem(**kw):
    return Problem(
        **dict(
            name='shapes',
            task='detection',
            classes=['disc', 'square', 'cross'],
            owner='o',
            intended_use='i',
            acceptance=[{'metric': 'map50', 'at_least': 0.5}],
            metrics=dict(primary='map50_95', resamples=100),
            slices=dict(many="crowding == 'many'"),
        )
        | kw
    )


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('WANDB_MODE', 'disabled')
        tmp = tmp_path_factory.mktemp('shapes')
        data = detection.example(tmp / 'data')
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
    data, run, folder = trained; rows = data.split('test'); model = Predictor(folder, 'cpu')
    found = evaluate(rows, predict_table(model, rows, data.read), problem())
    assert (
        found['metrics']['map50']['value'] > 0.5
        and found['metrics']['map50']['low'] <= found['metrics']['map50']['value']
        and 'map_large' not in found['metrics']
    )
    assert set(found['slices']['many']['metrics']) == set(found['metrics']) and set(found['classes']) == {
        'disc',
        'square',
        'cross',
    }


def test_the_exported_graph_answers_as_the_checkpoint(trained):
    data, run, folder = trained; found = parity(run, Predictor(folder, 'cpu'), data.table, data.read)
    assert found['ok'] and found['labels_equal'] and found['box_iou'] >= .999 and found['items'] == len(data)


def test_operating_points_are_fitted_and_used(trained):
    data, run, folder = trained
    t = calibrate(folder, data.split('val'), data.read, problem())
    model = Predictor(folder, 'cpu')
    assert set(t['scores']) == {'disc', 'square', 'cross'} == set(t['calibration'])
    for p in predict_table(model, data.split('test'), data.read)['annotations'].to_pylist():
        for a in p: assert a['accepted'] == (a['score'] >= t['scores'][a['label']])


def test_answers_are_in_pixels_of_the_upright_image(trained):
    "The same scene, larger, and lying on its side with an EXIF note; letterbox margins are in test_geometry."
    data, run, folder = trained; model = Predictor(folder, 'cpu'); rows = data.table.to_pylist()
    seen = lambda r: (
        len(r['annotations']) > 1
        and len(said := model.predict([data.read(r['uri'])])[0]['annotations'])
        and box_iou([a['bbox'] for a in r['annotations']], [a['bbox'] for a in said]).max(1).min()
    )
    row = max(rows, key=seen)
    im = Image.open(io.BytesIO(data.read(row['uri'])))
    truth = np.array([a['bbox'] for a in row['annotations']])  # one that it sees whole

    def ask(im, **kw):
        b = io.BytesIO()
        im.save(b, 'PNG', **kw)
        a = model.predict([b.getvalue()])[0]
        return a, np.array([x['bbox'] for x in a['annotations']])

    answer, boxes = ask(im)
    assert box_iou(truth, boxes).max(1).min() > 0.6 and 'accepted' not in answer['annotations'][0]
    _, larger = ask(im.resize((192, 128), Image.NEAREST)); assert np.median(box_iou(truth*2, larger).max(1)) > .6
    exif = Image.Exif()
    exif[0x0112] = 6
    _, turned = ask(im.rotate(90, expand=True), exif=exif)
    np.testing.assert_allclose(np.sort(turned, 0), np.sort(boxes, 0), atol=0.5)


def test_golden_answers_notice_another_model(trained, tmp_path):
    data, run, folder = trained
    model = Predictor(folder, 'cpu')
    rows = data.split('test')
    golden = write_golden(tmp_path / 'g.parquet', rows, data.read, predict_table(model, rows, data.read))
    assert golden_difference(model, golden) < 1e-6
    inner = model.infer
    model.infer = lambda x: {k: v + 2 if k == 'boxes' else v for k, v in inner(x).items()}
    assert golden_difference(model, golden) > 0.01
    model.infer = lambda x: {k: v - 9 if k == 'logits' else v for k, v in inner(x).items()}
    assert golden_difference(model, golden) == 1


def test_nms_inside_the_graph_and_outside_are_the_same(trained, tmp_path):
    import onnxruntime as ort
    from cv_lab.optimize import checkpoint_network

    data, run, folder = trained
    net, cfg = checkpoint_network(run)
    inside = cfg.model_copy(update=dict(nms='inside'))
    net2 = detection.network(inside, data.classes).eval()
    net2.load_state_dict(net.state_dict())
    session = ort.InferenceSession(export_onnx(net2, 64, 96, tmp_path / 'inside.onnx').read_bytes())
    model = Predictor(folder, 'cpu')
    prepared = [model.prepare(data.read(u)) for u in data.table['uri'].to_pylist()]
    x = np.stack([p.pixels for p in prepared])
    out = dict(zip([o.name for o in session.get_outputs()], session.run(None, {'images': x})))
    assert {'logits', 'boxes', 'top', 'keep'} == set(out)
    a, b = (
        detection.decode(out, inside, data.classes, {}),
        detection.decode({k: out[k] for k in ('logits', 'boxes')}, cfg, data.classes, {}),
    )
    assert a == b and sum(len(p.annotations) for p in a) > len(data)


@pytest.mark.parametrize('seed', range(4))
def test_nms_against_torchvision(seed):
    rng = np.random.default_rng(seed)
    p = rng.uniform(0, 60, (200, 2))
    boxes = np.c_[p, p + rng.uniform(5, 40, (200, 2))]
    labels = rng.integers(0, 3, 200)
    scores = np.sort(rng.random(200))[::-1].copy()
    want = np.zeros(200, bool)
    want[batched_nms(torch.tensor(boxes), torch.tensor(scores), torch.tensor(labels), 0.5).numpy()] = True
    assert (nms(boxes, labels, .5) == want).all()


def test_every_size_can_be_built_and_a_crowd_teaches_nothing():
    from cv_lab.detector import detection_loss
    with torch.device('meta'):
        for size in SIZES: detection.Config(size=size).of_size()
    cfg = detection.Config(**SMALL)
    net = detection.network(cfg, ['a']).eval()
    x = torch.zeros((1, 3, 64, 96), dtype=torch.uint8)
    out = {k: v.detach() for k, v in net(x).items()}
    y = lambda *anns: torch.from_numpy(detection.targets([a.said() for a in anns], cfg, ['a']))[None]
    crowd = Annotation('a', bbox=(0, 0, 96, 64), attributes={'iscrowd': '1'}); size = (64, 96)
    assert detection_loss(out, y(crowd), size, cfg.strides) == 0 < detection_loss(out, y(), size, cfg.strides)
    assert (y(Annotation(text='a line', bbox=(0, 0, 9, 9)))[0, 0, 0]) == -1


def test_a_slanted_affine_and_frozen_backbone_train(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'disabled'); data = detection.example(tmp_path/'data')
    a = fit(
        problem(),
        data,
        tmp_path / 'r',
        epochs=2,
        batch_size=14,
        balance=0.5,
        **SMALL | dict(frozen=True, augment=[{'RandomAffine': dict(degrees=10, fill=114)}]),
    )
    b = fit(
        problem(),
        data,
        tmp_path / 's',
        epochs=2,
        batch_size=14,
        balance=0.5,
        **SMALL | dict(frozen=True, augment=[{'RandomAffine': dict(degrees=10, fill=114)}]),
    )
    assert a.done['weights'] == b.done['weights'] and a.history.equals(b.history)


@pytest.mark.parametrize('name', ['fcos_resnet50_fpn', 'retinanet_resnet50_fpn_v2'])
def test_torchvisions_detectors_by_name(name):
    cfg = detection.Config(network=name, image=dict(height=64, width=64), nms='inside')
    net = detection.network(cfg, ['a', 'b']).train()
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    y = torch.from_numpy(
        np.stack([detection.targets([Annotation('b', bbox=(8, 8, 50, 40)).said()], cfg, ['a', 'b'])] * 2)
    )
    before = detection.loss(net(x), y, cfg)
    before.backward()
    assert torch.isfinite(before) and sum(p.grad is not None for p in net.parameters()) > 50
    with torch.inference_mode(): out = {k: v.numpy() for k, v in net.eval()(x).items()}
    assert len(detection.decode(out, cfg, ['a', 'b'], {})) == 2


def test_the_gallery_shows_every_kind_and_an_item_once_while_there_are_others():
    import pandas as pd

    from cv_lab.errors import worst_of_each
    found = pd.DataFrame(
        [dict(id=f'i{k % 3}', kind='Miss', what='a missed', severity=1 - k/100, gain=.01) for k in range(30)]
        + [dict(id='j', kind='Bkg', what='a where there is nothing', severity=.2, gain=.08)]
    )
    got = worst_of_each(found, problem(), 6)
    assert list(got) == ['Bkg', 'Miss'] and len(got['Bkg']) == 1 and got['Miss']['id'].tolist() == ['i0', 'i1', 'i2']
    assert got['Miss']['severity'].tolist() == [1., .99, .98]
    assert worst_of_each(found.head(0), problem(), 6) == {}
