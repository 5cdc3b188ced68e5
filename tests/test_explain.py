"Maps of why: against captum and finite differences, on planted cues, in the image's own pixels, and the check that can fail."

from types import SimpleNamespace

import numpy as np, pytest, torch
from torch import nn

from cv_lab.backbone import image_network
from cv_lab.core import Annotation
from cv_lab.explain import (
    _run,
    cuts,
    explain,
    mistakes_explained,
    questions,
    randomised,
    rank_correlation,
    sanity,
    why_map,
)
from cv_lab.image import Preprocess, decode
from cv_lab.spec import Problem
from cv_lab.task import tasks
from cv_lab.tasks import classification, detection
from cv_lab.loading import Images

CLASSES = ['a', 'b', 'c']


def one(c, n=3): return dict(logits=np.eye(n, dtype=np.float32)[c])


def test_a_layer_of_a_network_against_captum():
    captum = pytest.importorskip('captum.attr')
    torch.manual_seed(0)
    net = image_network('resnet10t', 3, channels=[16, 16, 24, 32]).eval()
    x = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    layer = cuts(net, x)[0]
    assert layer is net.body.layer4
    ask = lambda images: net(images)['logits']
    theirs = captum.LayerGradientXActivation(ask, layer).attribute(x, target=1).sum(1, keepdim=True)
    cam = captum.LayerGradCam(ask, layer).attribute(x, target=1)
    big = lambda m: (
        nn.functional.interpolate(m, (224, 224), mode='bilinear', align_corners=False)[0, 0].detach().numpy()
    )
    ours = why_map(net, x, one(1))
    assert np.allclose(ours*224*224/49, big(theirs), atol=1e-4*np.abs(ours).max()*1024)
    assert np.corrcoef(ours.ravel(), big(cam).ravel())[0, 1] > .9999     # the last map is averaged: Grad-CAM's too


def test_every_map_of_a_detector_against_finite_differences():
    torch.manual_seed(1)
    cfg = detection.Config(image=Preprocess(64, 96), width=16)
    net = detection.network(cfg, CLASSES).eval().double()
    x = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad(): w = torch.randn(net(x)['logits'].shape[1:], dtype=torch.double)
    out, maps = _run(net, net.pyramid.features, x)
    grads = torch.autograd.grad((out['logits'][0]*w).sum(), maps)
    assert [tuple(m.shape[2:]) for m in maps] == [(8, 12), (4, 6), (2, 3)]

    def scaled(level, y, x_, by):      # the weighted logits, when one place of one map is scaled
        def hook(m, _, o): o = [v.clone() for v in o]; o[level][..., y, x_] *= by; return o
        h = net.pyramid.features.register_forward_hook(hook)
        with torch.no_grad(): v = float((net(x)['logits'][0]*w).sum())
        h.remove(); return v
    for level, y, x_ in ((0, 3, 5), (1, 1, 2), (2, 1, 1)):
        slope = (scaled(level, y, x_, 1 + 1e-5) - scaled(level, y, x_, 1 - 1e-5))/2e-5
        assert float((grads[level]*maps[level])[0, :, y, x_].sum().detach()) == pytest.approx(slope, rel=1e-4, abs=1e-6)
    total = sum(float((g*m).sum().detach()) for g, m in zip(grads, maps))
    assert why_map(net, x, dict(logits=w.numpy())).sum() == pytest.approx(total, rel=.1)   # enlarged, but not more


@pytest.mark.parametrize('name, size', [('vit_tiny_patch16_224', 112), ('swin_tiny_patch4_window7_224', 112)])
def test_tokens_and_channels_last(name, size):
    more = dict(depth=2) if 'vit' in name else dict(depths=(1, 1, 1, 1), embed_dim=24, num_heads=(1, 1, 1, 1))
    torch.manual_seed(0); net = image_network(name, 3, img_size=size, **more).eval()
    m = why_map(net, torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8), one(0))
    assert m.shape == (size, size) and np.isfinite(m).all() and np.ptp(m) > 0


@pytest.mark.parametrize('name', [n for n, t in tasks().items() if hasattr(t, 'why')])
def test_every_task_that_says_what_speaks(name, tmp_path):
    task = tasks()[name]; data = task.example(tmp_path); torch.manual_seed(0)
    cfg = task.Config(image=Preprocess(64, 96)) if hasattr(task, 'GEOMETRY') else task.Config()
    model = SimpleNamespace(
        net=task.network(cfg, data.classes).eval(), task=task, cfg=cfg, image=cfg.image, classes=data.classes
    )
    row = next(r for r in data.table.to_pylist() if r['annotations'])
    a = {k: v for k, v in row['annotations'][0].items() if v is not None}; rgb = decode(data.read(row['uri']))
    m, other = explain(model, rgb, a, [randomised(model.net)])
    assert m.shape == other.shape == rgb.shape[:2] and np.ptp(m) > 0 and abs(rank_correlation(m, other)) < .9


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    data = detection.example(tmp_path_factory.mktemp('shapes')); torch.manual_seed(0)
    p = Problem(name='s', task='detection', classes=data.classes, owner='us', intended_use='tests',
                acceptance=[{'metric': 'map50', 'at_least': .5}], metrics=dict(primary='map50'))
    cfg = detection.Config(image=Preprocess(64, 96), width=32, augment=[])
    net, images = detection.network(cfg, p.classes), Images(data, data.split('train'), p, cfg)
    opt = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(60):
        some = [images[int(i)] for i in torch.randint(len(images), (8,))]
        loss = detection.loss(net(torch.stack([s[0] for s in some])), torch.stack([s[1] for s in some]), cfg)
        opt.zero_grad(); loss.backward(); opt.step()
    return data, SimpleNamespace(net=net.eval(), task=detection, cfg=cfg, image=cfg.image, classes=p.classes)


def test_a_box_rests_on_its_own_object_and_on_what_was_learnt(trained):
    data, model = trained
    asked = [
        (decode(data.read(r['uri'])), a)
        for r in data.table.to_pylist()
        if len(r['annotations']) > 1
        for a in r['annotations']
    ]
    own, hits = [], 0
    for rgb, a in asked[:20]:
        a = {k: a[k] for k in ('label', 'bbox')}
        m = explain(model, rgb, a)[0]
        x1, y1, x2, y2 = (round(v) for v in a['bbox'])
        y, x = np.unravel_index(m.argmax(), m.shape)               # the pointing game (Zhang et al. 2016)
        hits += y1 - 3 <= y < y2 + 3 and x1 - 3 <= x < x2 + 3; up = m.clip(0)
        own.append(up[max(0, y1 - 8):y2 + 8, max(0, x1 - 8):x2 + 8].sum()/up.sum())
    assert hits >= 16 and np.mean(own) > .6, (hits, own)
    some = [(rgb, {k: a[k] for k in ('label', 'bbox')}) for rgb, a in asked[:6]]
    assert sanity(model, some, (0, 1))['mean'] < .5
    shown = SimpleNamespace(**vars(model) | dict(net=Blind()))
    assert sanity(shown, some, (0, 1))['mean'] > .99


class Blind(nn.Module):
    "A detector that answers by brightness: it has no weights."
    def __init__(self): super().__init__(); self.look = nn.AvgPool2d(4)
    def forward(self, images):
        m = self.look(images.float()); z = (m**2).mean((1, 2, 3)).reshape(-1, 1, 1).expand(-1, 4, 3)
        return dict(logits=z, boxes=torch.tensor([[0., 0, 9, 9]]*4).expand(len(images), 4, 4))


def test_a_mark_that_gives_the_class_away_is_found():
    torch.manual_seed(0); rng = np.random.default_rng(0)
    x = rng.integers(60, 200, (64, 32, 32, 3), dtype=np.uint8); y = rng.integers(0, 2, 64)
    x[y == 1, 24:30, 2:8] = 255; x[y == 0, 24:30, 24:30] = 255              # left or right: that is the class
    net = image_network('resnet10t', 2, channels=[16, 16, 24, 32]); opt = torch.optim.AdamW(net.parameters(), 3e-3)
    t, want = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(y)
    for _ in range(40):
        loss = nn.functional.cross_entropy(net(t)['logits'], want); opt.zero_grad(); loss.backward(); opt.step()
    cfg = classification.Config()
    model = SimpleNamespace(net=net.eval(), task=classification, cfg=cfg, image=cfg.image, classes=['right', 'left'])
    hits = 0
    for im, c in zip(x[:12], y[:12]):
        m = explain(model, im, Annotation(model.classes[c]))[0]; i, j = np.unravel_index(m.argmax(), m.shape)
        hits += i >= 20 and (j < 12 if c else j >= 20)
    assert hits >= 10


class Bright(nn.Module):
    "One place of eight pixels' brightness decides."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 8, 8)
        nn.init.ones_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, images): return dict(logits=self.conv(images.float()).amax((2, 3)))


@pytest.mark.parametrize('shape, spot', [((40, 160), (24, 120)), ((160, 40), (120, 8)), ((64, 64), (40, 16))])
def test_a_map_lies_in_the_pixels_of_the_image(shape, spot):
    im = np.full((*shape, 3), 30, np.uint8); y, x = spot; im[y:y + 12, x:x + 12] = 250
    cfg = classification.Config(image=Preprocess(64, 96, pad=0))
    model = SimpleNamespace(net=Bright(), task=classification, cfg=cfg, image=cfg.image, classes=['a'])
    m, = explain(model, im, Annotation('a')); i, j = np.unravel_index(m.argmax(), m.shape)
    reach = 14*max(shape[0]/64, shape[1]/96, 1)
    assert m.shape == shape and abs(i - y - 6) <= reach and abs(j - x - 6) <= reach


def test_questions_and_what_cannot_be_asked(tmp_path):
    boxed = dict(id='1', kind='Miss', label='disc', bbox=None, object=[1., 2, 3, 4])
    assert questions(boxed, [], []) == [('what speaks for disc', dict(label='disc', bbox=[1., 2, 3, 4]))]
    assert [c for c, _ in questions(dict(id='1', what='7 → 1'), [dict(label='1')], [dict(label='7')])] == \
        ['what speaks for 1', 'what speaks for 7']
    assert questions(dict(id='1', said='', true='12', bbox=[0., 0, 9, 9]), [], [])[0][0] == 'where “12” was missed'
    assert mistakes_explained(tmp_path, []) == ([], {}, 'No checkpoint is at hand, so nothing can be said about why.')
