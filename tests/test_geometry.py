"What is said about an image goes with it: to the network's input, through the augmentation, and back."
import numpy as np, pytest, torch
from scipy.ndimage import binary_dilation, binary_erosion

from cv_lab.augment import Augment
from cv_lab.core import Annotation, BadInput
from cv_lab.geometry import box_iou, mask_box, mask_iou, polygon_mask, rle_decode, rle_encode, to_image, to_input
from cv_lab.image import Preprocess, placement, preprocess

CONFIGS = [Preprocess(64, 96), Preprocess(96, 64), Preprocess(50, 50, 'squash'), Preprocess(200, 130)]
ALL = ('bbox', 'mask', 'polygon')


def scene(height, width, box):
    "A red box on black: the pixels themselves say where it is."
    x1, y1, x2, y2 = box; px = np.zeros((height, width, 3), np.uint8); px[y1:y2, x1:x2, 0] = 255; mask = px[..., 0] > 0
    return px, Annotation('box', bbox=box, mask=rle_encode(mask), polygon=[[x1, y1, x2, y1, x2, y2, x1, y2]])


def seen(image): # (3, H, W): where it is red
    return mask_box(np.asarray(image)[0] > 127) if (np.asarray(image)[0] > 127).any() else None


@pytest.mark.parametrize('cfg', CONFIGS, ids=str)
@pytest.mark.parametrize('size', [(48, 80), (80, 48), (61, 61), (7, 90)])
def test_annotations_lie_where_preprocess_puts_the_pixels(cfg, size):
    h, w = size
    box = (w // 4, h // 4, w // 4 + w // 2, h // 4 + max(2, h // 2))
    px, a = scene(h, w, box)
    p = placement(w, h, cfg)
    there, out = to_input(a, p), preprocess(px, cfg)
    np.testing.assert_allclose(there.bbox, seen(out), atol=1.)
    assert mask_iou(there.mask, rle_encode(out[0] > 127)) > .8 and out.shape == (3, cfg.height, cfg.width)
    back = to_image(there, p)
    np.testing.assert_allclose(back.bbox, a.bbox, atol=1e-9)
    np.testing.assert_allclose(back.polygon, a.polygon, atol=1e-9)
    if min(size) > 20: assert mask_iou(back.mask, a.mask) > .85


def test_what_lies_in_the_margins_is_gone_and_what_leaves_is_cut():
    p = placement(100, 50, Preprocess(100, 100))                     # margins above and below
    assert to_image(Annotation('x', bbox=(10, 2, 20, 20)), p) is None
    assert to_image(Annotation('x', bbox=(-10, 20, 20, 30)), p).bbox == [0, 0, 20, 5]


def test_overlap_against_torchvision():
    from torchvision.ops import box_iou as theirs

    rng = np.random.default_rng(0)
    boxes = lambda n: np.concatenate([a := rng.uniform(0, 50, (n, 2)), a + rng.uniform(1, 40, (n, 2))], 1)
    a, b = boxes(40), boxes(30)
    np.testing.assert_allclose(box_iou(a, b), theirs(torch.tensor(a), torch.tensor(b)), atol=1e-12)
    assert box_iou([[0, 0, 1, 1]], []).shape == (1, 0)


def test_polygons_and_masks_agree():
    m = polygon_mask([[10, 10, 40, 10, 40, 30, 10, 30]], 50, 60)
    want = np.zeros((50, 60), bool)
    want[10:30, 10:40] = True
    assert (m == want).all() and mask_box(m) == [10, 10, 40, 30] and (rle_decode(rle_encode(m)) == m).all()
    with pytest.raises(BadInput, match='no mask'): rle_decode(dict(size=[2], counts='x'))


@pytest.mark.parametrize(
    'steps',
    [
        [],
        [{'RandomHorizontalFlip': dict(p=1.0)}],
        [{'RandomVerticalFlip': dict(p=1.0)}],
        [{'RandomScale': dict(scale=[0.5, 1.6])}],
        [{'ProgressiveResize': {}}, {'RandomHorizontalFlip': {}}],
        [{'Mosaic': dict(p=1.0)}],
        [{'RandomAffine': dict(degrees=0, translate=[0.2, 0.2], scale=[0.7, 1.3], fill=114)}],
        [{'Mosaic': dict(p=1.0)}, {'RandomScale': {}}, {'RandomHorizontalFlip': {}}],
        [{'RandomCrop': dict(size=[40, 40])}],
        [{'RandomResizedCrop': dict(size=[60, 60])}],
    ],
    ids=lambda s: '+'.join(k for d in s for k in d) or 'nothing',
)
def test_boxes_masks_and_polygons_move_with_the_pixels(steps):
    "Every kept object's own mask is red in the picture; its box is the mask's; the polygon fills it."
    rng = np.random.default_rng(1); items = []
    for _ in range(6):
        x, y = rng.integers(5, 50, 2)
        px, a = scene(80, 80, (int(x), int(y), int(x + rng.integers(8, 25)), int(y + rng.integers(8, 25))))
        items.append((torch.from_numpy(px).permute(2, 0, 1), [a.said()]))
    torch.manual_seed(0); kept = 0
    for k in range(24):
        image, said = Augment(steps, ALL)(items.__getitem__, k % 6, 6)
        red = image[0].numpy() > 128; union = np.zeros_like(red)
        for a in said:
            m = rle_decode(a['mask']); union |= m; kept += 1
            np.testing.assert_allclose(a['bbox'], mask_box(m), atol=1e-6)
            assert red[binary_erosion(m, iterations=max(1, len(steps) - 1))].all()  # to a pixel for every resize
            p = np.reshape(a['polygon'][0], (-1, 2))
            np.testing.assert_allclose([*p.min(0), *p.max(0)], a['bbox'], atol=1.6)
        if 'RandomResizedCrop' not in str(steps):
            assert (red & ~binary_dilation(union)).sum() <= 0.25 * red.sum() + 40  # only slivers are dropped
    assert kept >= 10


def test_parts_that_are_not_asked_for_stay_out():
    px, a = scene(60, 60, (10, 10, 30, 30)); image = torch.from_numpy(px).permute(2, 0, 1)
    _, said = Augment([{'RandomHorizontalFlip': dict(p=1.0)}], ('bbox',))(
        lambda i: (image, [a.said(), Annotation('whole image').said()]), 0, 1
    )
    assert len(said) == 1 and said[0]['bbox'] == [30, 10, 50, 30]


@pytest.mark.parametrize('steps', [[], [{'RandomHorizontalFlip': dict(p=1.)}]], ids=['as it is', 'mirrored'])
def test_what_has_left_the_image_is_told(steps):
    px, _ = scene(60, 60, (10, 10, 30, 30))
    image = torch.from_numpy(px).permute(2, 0, 1)
    cut = Annotation('blob', bbox=[-10, 10, 10, 30])
    _, said = Augment(steps, ('bbox',))(
        lambda i: (image, [Annotation('blob', bbox=[10, 10, 30, 30]).said(), cut.said()]), 0, 1
    )
    assert [a['visible'] for a in said] == [1., .5]
