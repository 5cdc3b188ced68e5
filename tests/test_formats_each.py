"Each format as its own tools write it, half-broken as such files are; checked against other implementations where there are any."

import base64, io, json, re, tarfile, zlib
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest, yaml
from PIL import Image
from pycocotools import mask as coco_mask

from cv_lab.core import Annotation, BadInput, digest
from cv_lab.data.exports import export_dataset
from cv_lab.data.imports import import_dataset
from cv_lab.data.dataset import Dataset
from cv_lab.data.manifest import make_table
from cv_lab.data.outlines import from_brush, mask_of, rotated_box, runs_of, to_brush, unrotated_box
from cv_lab.geometry import rle_decode, rle_encode

W, H = 40, 30


def image(path, seed=0, size=(W, H), **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(path, **kw)
    return path


def dump(path, obj): path.parent.mkdir(parents=True, exist_ok=True); path.write_text(json.dumps(obj)); return path


def get(r): return {row['id'].rsplit('/', 1)[-1]: row['annotations'] for row in r.dataset.table.to_pylist()}


def why(r): return sorted(zip(r.quarantine['reason'], r.quarantine['item']))


# COCO

def coco(
    tmp_path,
    anns,
    images=None,
    categories=({'id': 3, 'name': 'cat'}, {'id': 1, 'name': 'dog'}),
    name='annotations/instances_train2017.json',
    **more,
):
    image(tmp_path/'train2017/000000000139.jpg'); image(tmp_path/'train2017/000000000285.jpg', 1)
    images = images or [
        dict(id=139, file_name='000000000139.jpg', width=W, height=H),
        dict(id=285, file_name='000000000285.jpg', width=W, height=H),
    ]
    dump(tmp_path/name, dict(images=images, annotations=anns, categories=list(categories), **more)); return tmp_path


def test_coco_ids_order_and_crowds_are_kept(tmp_path):
    m = np.zeros((H, W), bool); m[3:9, 5:20] = True
    src = coco(
        tmp_path / 'src',
        [
            dict(id=900, image_id=285, category_id=3, bbox=[1, 2, 10.5, 8], area=84, iscrowd=0, segmentation=[]),
            dict(
                id=17,
                image_id=139,
                category_id=1,
                bbox=[5, 3, 15, 6],
                area=90,
                iscrowd=1,
                segmentation=dict(size=[H, W], counts=runs_of(m.ravel('F'))),
            ),
            dict(
                id=18,
                image_id=139,
                category_id=1,
                bbox=[0, 0, 9, 9],
                iscrowd=0,
                keypoints=[1, 2, 2],
                num_keypoints=1,
                segmentation=[[0, 0, 9, 0, 9, 9]],
            ),
        ],
    )
    r = import_dataset(src, 'auto', tmp_path / 'out')
    assert not len(r.quarantine) and r.dataset.classes == ['cat', 'dog'] and r.tally['splits'] == dict(train=2)
    crowd = get(r)['000000000139.jpg'][0]
    assert dict(crowd['attributes']) == dict(id='17', iscrowd='1') and (rle_decode(crowd['mask']) == m).all()
    export_dataset(r.dataset, 'coco', tmp_path / 'again')
    a, b = (
        json.loads(p.read_text())
        for p in (src / 'annotations/instances_train2017.json', tmp_path / 'again/annotations/instances_train.json')
    )
    assert {
        x['id']: (x['image_id'], x['category_id'], x['bbox'], x['iscrowd'], x.get('keypoints'))
        for x in a['annotations']
    } == {
        x['id']: (x['image_id'], x['category_id'], x['bbox'], x['iscrowd'], x.get('keypoints'))
        for x in b['annotations']
    }
    assert {c['id']: c['name'] for c in a['categories']} == {c['id']: c['name'] for c in b['categories']} and {
        i['id'] for i in a['images']
    } == {i['id'] for i in b['images']}


def test_coco_runs_as_numbers_are_what_pycocotools_makes_of_them():
    rng = np.random.default_rng(0)
    for _ in range(20):
        m = rng.random((H, W)) > .6; runs = runs_of(m.ravel('F'))
        theirs = coco_mask.frPyObjects(dict(size=[H, W], counts=runs), H, W)
        assert (
            theirs['counts'].decode() == rle_encode(mask_of(runs, H, W))['counts']
            and (coco_mask.decode(theirs).astype(bool) == m).all()
        )


def test_coco_loads_in_pycocotools(tmp_path):
    from contextlib import redirect_stdout
    from pycocotools.coco import COCO
    m = np.zeros((H, W), bool); m[3:9, 5:20] = m[20, 20] = True; image(tmp_path/'i/a.png')
    d = Dataset(
        make_table(
            [
                dict(
                    id='a.png',
                    uri='a.png',
                    sha256=digest((tmp_path / 'i/a.png').read_bytes()),
                    width=W,
                    height=H,
                    split='val',
                    annotations=[
                        Annotation('cat', mask=rle_encode(m), bbox=[5, 3, 21, 21]),
                        Annotation('dog', polygon=[[0, 0, 10, 0, 10, 10, 0, 10]], bbox=[0, 0, 10, 10]),
                        Annotation('dog', bbox=[1, 2, 3, 4]),
                    ],
                )
            ]
        ),
        'd',
        tmp_path / 'i',
        ['cat', 'dog'],
    )
    export_dataset(d, 'coco', tmp_path/'out')
    with redirect_stdout(io.StringIO()):
        c = COCO(str(tmp_path / 'out/annotations/instances_val.json'))
        res = c.loadRes([dict(image_id=1, category_id=1, bbox=[1, 2, 2, 2], score=0.5)])
    assert (
        (c.annToMask(c.anns[1]).astype(bool) == m).all()
        and c.anns[1]['area'] == m.sum()
        and c.annToMask(c.anns[2]).sum() == c.anns[2]['area'] == 100
        and len(res.anns) == 1
    )


def test_coco_faults(tmp_path):
    box = dict(bbox=[1, 1, 5, 5], category_id=3, image_id=139)
    src = coco(
        tmp_path / 'src',
        [
            dict(box, id=1),
            dict(box, id=1),
            dict(box, id=2, category_id=9),
            dict(box, id=3, image_id=7),
            dict(box, id=4, bbox=[1, 1, 0, 5]),
            dict(box, id=5, bbox=[90, 1, 5, 5]),
            dict(box, id=6, bbox=[35, 1, 50, 5]),
            dict(box, id=7, bbox=[1, 2, None, 4]),
            dict(box, id=8, segmentation=rle_encode(np.ones((9, 9), bool)), bbox=None),
            dict(box, id=9, segmentation=[[1, 2, 3, 4]], bbox=None),
        ],
        images=[
            dict(id=139, file_name='C:\\data\\train2017\\000000000139.JPG', width=W, height=H),
            dict(id=2, file_name='000000000285.jpg', width=9, height=9),
            dict(id=3, file_name='gone.jpg'),
            dict(id=4, file_name='../../../etc/passwd'),
            dict(id=5, file_name='000000000139.jpg'),
        ],
    )
    image(src/'train2017/extra.jpg', 5)
    r = import_dataset(src, 'coco', tmp_path / 'out')
    assert [a['bbox'] for a in get(r)['000000000139.jpg']] == [[1, 1, 6, 6], [35, 1, 40, 6]]
    assert {k: v for k, v in r.tally['left_out'].items()} == {
        'image is missing': 2,
        'image is listed twice': 1,
        'unknown category id': 1,
        'annotation of an image that is not there': 1,
        'annotation id is given twice': 1,
        'annotation cannot be read': 1,
        'box has no area': 1,
        'box lies outside the image': 1,
        'mask of another size than the image': 1,
        'polygon has fewer than three points': 1,
        'size in the file is not that of the image': 1,
        'image is not listed': 1,
    }
    assert r.tally['mended'] == {'box reached out of the image': 1}


def test_one_bad_entry_costs_only_itself(tmp_path):
    src = coco(tmp_path/'coco', [None, dict(id=1, image_id=139, category_id=3, bbox=[1, 1, 5, 5])], images=[
        'x', dict(id=139, file_name='000000000139.jpg'), dict(id=7, file_name='gone.jpg'),
        dict(id=7, file_name='000000000285.jpg')])
    r = import_dataset(src, 'coco', tmp_path/'o1')
    assert [a['bbox'] for a in get(r)['000000000139.jpg']] == [[1, 1, 6, 6]] and r.tally['left_out'] == {
        'entry is no object': 2, 'image is missing': 1, 'image id is given twice': 1, 'image is not listed': 1}

    for i in range(4): image(tmp_path/f'hf/train/{i}.png', i)
    two = dict(bbox=[[1, 1, 5, 5], [2, 2, 5, 5]])
    lines = [dict(file_name='0.png', objects=two | dict(categories=[0, 1])),  # as its handbook shows it
             dict(file_name='1.png', objects=two | dict(categories=[0])), dict(file_name='2.png', objects='x'),
             dict(file_name='3.png', caption='three')]
    (tmp_path/'hf/train/metadata.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n{broken')
    r = import_dataset(tmp_path/'hf', 'auto', tmp_path/'o2')
    assert [a['label'] for a in get(r)['0.png']] == ['0', '1'] and get(r)['3.png'][0]['caption'] == 'three'
    assert r.tally['left_out'] == {'line cannot be read': 3, 'image is not listed': 2}

    for i in range(2): image(tmp_path/f'fo/data/{i}.png', i)
    det = lambda *b: dict(_cls='Detection', label='cat', bounding_box=list(b))
    dump(tmp_path/'fo/samples.json', dict(samples=[
        dict(filepath='data/0.png', gt=dict(_cls='Detections', detections=[det(.1, .1), det(.1, .1, .2, .2), None]),
             also=dict(_cls='Detections', detections=5)),
        dict(nofile=1)]))
    r = import_dataset(tmp_path/'fo', 'auto', tmp_path/'o3')
    assert len(get(r)['0.png']) == 1 and r.tally['left_out'] == {
        'label cannot be read': 3, 'sample without a filepath': 1, 'image is not listed': 1}


def test_coco_instances_and_captions_of_one_image_meet(tmp_path):
    src = coco(tmp_path/'src', [dict(id=1, image_id=139, category_id=3, bbox=[1, 1, 5, 5])])
    coco(
        src,
        [dict(id=5, image_id=139, caption='A cat.'), dict(id=6, image_id=139, caption='Ein Kater.')],
        name='annotations/captions_train2017.json',
        categories=(),
    )
    anns = get(import_dataset(src, 'coco', tmp_path / 'out'))['000000000139.jpg']
    assert sorted(a['caption'] or a['label'] for a in anns) == ['A cat.', 'Ein Kater.', 'cat']


def test_labels_drawn_before_exif_turned_the_image_are_turned_with_it(tmp_path):
    "A marked pixel block stays under its box, polygon and mask for every orientation."
    from cv_lab.image import decode
    for o in range(5, 9):
        e = Image.Exif(); e[0x0112] = o; a = np.zeros((H, W, 3), np.uint8); a[4:10, 20:34] = 255; m = a[..., 0] > 0
        src = tmp_path/f'src{o}'; src.mkdir(); Image.fromarray(a).save(src/'x.png', exif=e)
        dump(
            src / 'a.json',
            dict(
                images=[dict(id=1, file_name='x.png', width=W, height=H)],
                categories=[dict(id=1, name='c')],
                annotations=[
                    dict(
                        id=1,
                        image_id=1,
                        category_id=1,
                        bbox=[20, 4, 14, 6],
                        segmentation=[[20, 4, 34, 4, 34, 10, 20, 10]],
                    ),
                    dict(id=2, image_id=1, category_id=1, bbox=[20, 4, 14, 6], segmentation=rle_encode(m)),
                ],
            ),
        )
        r = import_dataset(src, 'coco', tmp_path / f'out{o}')
        up = decode((src / 'x.png').read_bytes())[..., 0] > 0
        one, two = get(r)['x.png']
        assert (rle_decode(two['mask']) == up).all()
        x1, y1, x2, y2 = map(int, one['bbox'])
        assert up[y1:y2, x1:x2].all() and up.sum() == (x2 - x1) * (y2 - y1)
        assert (
            two['bbox'] == one['bbox']
            and sorted(one['polygon'][0][::2])[::3] == [x1, x2]
            and r.tally['mended'] == {'labels were of the image before EXIF turned it': 1}
        )


# VOC

def voc(tmp_path, name, boxes, filename=None, size=(W, H)):
    objects = ''.join(
        f'<object><name>{n}</name><difficult>{d}</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{e}</ymax></bndbox><part><name>head</name></part></object>'
        for n, d, a, b, c, e in boxes
    )
    p = tmp_path/f'Annotations/{name}.xml'; p.parent.mkdir(parents=True, exist_ok=True)
    p.write_text(
        f'<annotation><filename>{filename or name + ".jpg"}</filename><size><width>{size[0]}</width><height>{size[1]}</height></size>{objects}</annotation>'
    )


def test_voc_counts_from_one_unless_a_box_shows_otherwise(tmp_path):
    image(tmp_path/'one/JPEGImages/a.jpg'); voc(tmp_path/'one', 'a', [('cat', 1, 1, 1, 40, 30), ('cat', 0, 5, 5, 5, 5)])
    one = get(import_dataset(tmp_path / 'one', 'voc', tmp_path / 'o1'))['a.jpg']
    assert [a['bbox'] for a in one] == [[0, 0, 40, 30], [4, 4, 5, 5]] and dict(one[0]['attributes']) == dict(
        difficult='1'
    )
    image(tmp_path/'nil/JPEGImages/a.jpg'); voc(tmp_path/'nil', 'a', [('cat', 0, 0, 3, 40, 30), ('cat', 0, 5, 5, 6, 6)])
    assert [a['bbox'] for a in get(import_dataset(tmp_path / 'nil', 'voc', tmp_path / 'o2'))['a.jpg']] == [
        [0, 3, 40, 30],
        [5, 5, 6, 6],
    ]
    assert [a['bbox'] for a in get(import_dataset(tmp_path / 'one', 'voc', tmp_path / 'o3', origin=0))['a.jpg']] == [
        [1, 1, 40, 30]
    ]


def test_voc_faults_and_splits(tmp_path):
    src = tmp_path/'src'
    for n in 'abcdef': image(src/f'JPEGImages/{n}.jpg', ord(n))
    for n in 'abc': voc(src, n, [('cat', 0, 1, 1, 9, 9)])
    voc(src, 'd', [('cat', 0, 1, 1, 9, 9)], size=(0, 0))
    voc(src, 'e', [('cat', 0, 'x', 1, 9, 9)], filename='renamed.jpg')
    (src / 'Annotations/f.xml').write_text('<annotation><object>')
    voc(src, 'g', []); (src/'ImageSets/Main').mkdir(parents=True)
    for s, names in dict(train='a b', test='b c', trainval='a b d').items():
        (src / f'ImageSets/Main/{s}.txt').write_text('\n'.join(names.split()))
    r = import_dataset(src, 'voc', tmp_path / 'out', splits='keep')
    assert {k: r_['split'] for k, r_ in zip(get(r), r.dataset.table.to_pylist())} == {
        'a.jpg': 'train',
        'b.jpg': 'test',
        'c.jpg': 'test',
        'd.jpg': 'train',
        'e.jpg': None,
    }
    assert [w for w, _ in why(r)] == [
        'annotation cannot be read',
        'annotation file cannot be read',
        'image is in two split lists',
        'image is missing',
    ]


# YOLO

def test_yolo_layouts(tmp_path):
    "Ultralytics' folders, Roboflow's folders, lists of paths of another machine, and Darknet's: the same content."
    def layout(name, img, lab, yml):
        src = tmp_path/name
        for s in ('train', 'val'):
            image(src / img.format(s=s), ord(s[0]))
            p = src / lab.format(s=s)
            p.parent.mkdir(parents=True, exist_ok=True)
            p.write_text('1 0.5 0.5 0.25 0.2\n0 0.1 0.1 0.3 0.1 0.2 0.4 0.9\n')
        if yml: (src/'data.yaml').write_text(yaml.safe_dump(yml))
        return src
    names = ['cat', 'dog'];    srcs = [
        layout(
            'u',
            'images/{s}/{s}.jpg',
            'labels/{s}/{s}.txt',
            dict(path='/mnt/other/u', train='images/train', val='images/val', names=dict(enumerate(names))),
        ),
        layout(
            'r',
            '{s}/images/{s}.jpg',
            '{s}/labels/{s}.txt',
            dict(train='../train/images', val='../val/images', nc=2, names=names),
        ),
        layout('l', 'images/{s}.jpg', 'labels/{s}.txt', dict(train='train.txt', val='val.txt', names=names)),
        layout('d', 'obj_{s}_data/{s}.jpg', 'obj_{s}_data/{s}.txt', None),
    ]
    for s in ('train', 'val'): (tmp_path/f'l/{s}.txt').write_text(f'/home/x/l/images/{s}.jpg\n')
    (tmp_path/'d/obj.names').write_text('cat\ndog\n'); seen = set()
    for src in srcs:
        r = import_dataset(src, 'yolo', tmp_path/f'o_{src.name}'); assert not len(r.quarantine), why(r)
        seen.add(r.dataset.version); assert r.tally['splits'] == dict(train=1, val=1) and r.dataset.classes == names
    assert len(seen) == 1 and get(r)['val.jpg'][0]['bbox'] == [15, 12, 25, 18] and get(r)['val.jpg'][1]['score'] == .9


def test_yolo_numbers_are_independent_of_ours(tmp_path):
    "Our lines, turned back by the definition of the format."
    rng = np.random.default_rng(0)
    p = image(tmp_path / 'i/a.png')
    boxes = np.sort(rng.integers(0, 300, (50, 2, 2)) / 10, 1).reshape(50, 4)
    boxes = boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]
    d = Dataset(
        make_table(
            [
                dict(
                    id='a.png',
                    uri='a.png',
                    sha256=digest(p.read_bytes()),
                    width=W,
                    height=H,
                    split='train',
                    annotations=[Annotation('c', b.tolist()) for b in boxes],
                )
            ]
        ),
        'd',
        tmp_path / 'i',
        ['c'],
    )
    export_dataset(d, 'yolo', tmp_path/'out'); v = np.loadtxt(tmp_path/'out/labels/train/a.txt')[:, 1:]
    np.testing.assert_allclose(
        np.concatenate([v[:, :2] - v[:, 2:] / 2, v[:, :2] + v[:, 2:] / 2], 1) * [W, H, W, H], boxes, atol=1e-9
    )


# masks

@pytest.mark.parametrize('kind', ['camvid colours', 'index', 'palette', 'voc rim'])
def test_masks_as_others_keep_them(tmp_path, kind):
    m = np.zeros((H, W), np.uint8); m[2:9, 3:12] = 1; m[15:20, 20:33] = 2; src = tmp_path/'src'
    if kind == 'camvid colours':
        image(src / 'train/a.png')
        colours = np.array([[0, 0, 0], [64, 128, 64], [192, 0, 128]], np.uint8)
        (src / 'trainannot').mkdir()
        Image.fromarray(colours[m]).save(src / 'trainannot/a.png')
        (src / 'label_colors.txt').write_text('0 0 0\tVoid\n64 128 64\tAnimal\n192 0 128\tArchway\n')
    elif kind == 'index':
        image(src / 'images/a.jpg')
        (src / 'labels').mkdir()
        Image.fromarray(m).save(src / 'labels/a_L.png')
        (src / 'codes.txt').write_text('Void\nAnimal\nArchway\n')
    else:
        image(src/'JPEGImages/a.jpg')
        for f in ('SegmentationClass', 'SegmentationObject'):
            (src/f).mkdir(); x = m.copy()
            if kind == 'voc rim': x[2, 3:12] = 255
            im = Image.frombytes('P', (W, H), x.tobytes())
            im.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 759)
            im.save(src / f'{f}/a.png')
        (src / 'labelmap.txt').write_text(
            '# label:color_rgb:parts:actions\nbackground:0,0,0::\nAnimal:128,0,0::\nArchway:0,128,0::\n'
        )
    r = import_dataset(src, 'auto', tmp_path/'out'); anns = next(iter(get(r).values()))
    assert (
        r.dataset.about['format'] == 'masks'
        and [a['label'] for a in anns] == ['Animal', 'Archway']
        and not len(r.quarantine)
    )
    first = m == 1
    if kind == 'voc rim': first[2] = False
    assert (rle_decode(anns[0]['mask']) == first).all() and (rle_decode(anns[1]['mask']) == (m == 2)).all()


def test_masks_and_pictures_of_an_aerial_survey_are_tiff(tmp_path):
    for n in 'ab':
        image(tmp_path / f's/images/{n}.tif', ord(n))
        mask = np.zeros((H, W), np.uint8); mask[2:9, 3:12] = 2
        (tmp_path / 's/masks').mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / f's/masks/{n}.tif', compression='tiff_lzw')
    (tmp_path / 's/classes.txt').write_text('background\nroad\nroof\n')
    r = import_dataset(tmp_path / 's', 'auto', tmp_path / 'o', splits='keep')
    assert not len(r.quarantine) and sorted(get(r)) == ['a.tif', 'b.tif']
    assert r.dataset.about['format'] == 'masks'
    for x in r.dataset.table.to_pylist():
        (a,) = x['annotations']
        assert a['label'] == 'roof' and np.array_equal(rle_decode(a['mask']), mask == 2) and (x['width'], x['height']) == (W, H)


def test_masks_tell_touching_objects_apart_and_name_strange_colours(tmp_path):
    src, kind, whose = tmp_path / 'src', np.zeros((H, W), np.uint8), np.zeros((H, W), np.uint8)
    kind[5:10, 5:25] = 1
    whose[5:10, 5:15] = 1
    whose[5:10, 15:25] = 2
    kind[20, 20] = 7
    image(src/'JPEGImages/a.jpg')
    for f, a in dict(SegmentationClass=kind, SegmentationObject=whose).items():
        (src / f).mkdir()
        Image.fromarray(a).save(src / f'{f}/a.png')
    (src / 'classes.txt').write_text('background\ncat\n')
    image(src / 'JPEGImages/b.jpg', 3)
    (src / 'SegmentationClass/c.png').write_bytes((src / 'SegmentationClass/a.png').read_bytes())
    r = import_dataset(src, 'masks', tmp_path / 'out')
    assert [a['bbox'] for a in get(r)['a.jpg']] == [[5, 5, 15, 10], [15, 5, 25, 10]]
    assert [w for w, _ in why(r)] == [
        'colour that is no class',
        'image is not listed',
        'mask of an image that is not there',
    ]


# Label Studio, CVAT

def test_the_brush_is_label_studios():
    "Against a bit-by-bit reading of the format (thi.ng/rle-pack), written apart from ours."
    def slow(rle):
        bits = [b >> i & 1 for b in rle for i in range(7, -1, -1)]; at = 0
        def read(n):
            nonlocal at
            v = int(''.join(map(str, bits[at:at + n])), 2); at += n; return v
        num, size = read(32), read(5) + 1; rs = [read(4) + 1 for _ in range(4)]; out = []
        while len(out) < num:
            x = read(1); n = read(rs[read(2)]) + 1
            if x: out += [read(size)]*n
            else: out += [read(size) for _ in range(n)]
        return np.array(out).reshape(H, W, 4)[..., 3] > 0
    rng = np.random.default_rng(0)
    for p in (.5, .02, 1., 0.):
        m = rng.random((H, W)) < p
        code = to_brush(m)
        assert (slow(code) == m).all() and (from_brush(code, H, W) == m).all()
    raw = np.zeros((H, W, 4), np.uint8)
    raw[3:9, 4:9] = (9, 8, 7, 200)  # words written one by one, as the browser does for short runs
    bits = f'{raw.size:032b}{7:05b}{2:04b}{3:04b}{7:04b}{15:04b}' + ''.join(
        '011' + f'{15:016b}' + ''.join(f'{v:08b}' for v in raw.ravel()[i : i + 16]) for i in range(0, raw.size, 16)
    )
    bits += '0' * (-len(bits) % 8)
    assert (from_brush([int(bits[i:i + 8], 2) for i in range(0, len(bits), 8)], H, W) == (raw[..., 3] > 0)).all()
    with pytest.raises(BadInput): from_brush([0, 0, 0, 1], H, W)


def test_label_studio_as_its_server_exports_it(tmp_path):
    size = dict(original_width=W, original_height=H, image_rotation=0)
    src = tmp_path / 'src'
    image(src / 'images/photo 1.jpg')
    image(src / 'images/b.jpg', 1)
    region = lambda **k: (
        dict(
            size,
            id='r1',
            from_name='l',
            to_name='image',
            type='rectanglelabels',
            value=dict(x=10, y=10, width=50, height=20, rotation=0, rectanglelabels=['sign']),
        )
        | k
    )
    tasks = [
        dict(
            id=1,
            data=dict(image='/data/upload/3/0a1b2c3d-photo_1.jpg'),
            annotations=[
                dict(
                    completed_by=dict(id=4, email='ada@x.org'),
                    result=[
                        region(),
                        region(
                            id='r2', value=dict(x=50, y=10, width=25, height=20, rotation=90, rectanglelabels=['sign'])
                        ),
                        dict(
                            id='c', type='choices', from_name='w', to_name='image', value=dict(choices=['rain', 'fog'])
                        ),
                        dict(
                            id='t', type='textarea', from_name='caption', to_name='image', value=dict(text=['A sign.'])
                        ),
                        dict(id='k', type='keypointlabels', value=dict(x=1, y=1, width=1, keypointlabels=['p'])),
                        dict(type='relation', from_id='r1', to_id='r2'),
                    ],
                ),
                dict(completed_by=2, was_cancelled=True, result=[region()]),
                dict(completed_by=2, result=[region()]),
            ],
            predictions=[dict(model_version='v7', score=0.5, result=[region()])],
        ),
        dict(
            id=2,
            data=dict(image='s3://bucket/data/images/b.jpg'),
            annotations=[dict(result=[region(original_width=9)])],
        ),
        dict(id=3, data=dict(image='http://x/y/gone.jpg'), annotations=[]),
        dict(id=4, data=dict(text='no image'), annotations=[]),
    ]
    dump(src/'export.json', tasks); r = import_dataset(src, 'auto', tmp_path/'out'); anns = get(r)['photo 1.jpg']
    assert [(a['annotator'], a['label'] or a['caption']) for a in anns] == [
        ('ada@x.org', v) for v in ('rain', 'fog', 'A sign.', 'sign', 'sign')
    ] + [('2', 'sign')]
    assert (
        anns[3]['bbox'] == [4, 3, 24, 9]
        and np.allclose(anns[4]['polygon'], [[20, 3, 20, 13, 14, 13, 14, 3]])
        and dict(anns[4]['attributes']) == dict(rotation='90')
    )
    assert (
        r.tally['predictions'] == 1
        and r.predictions.to_pylist()[0]['annotations'][0]['annotator'] == 'v7'
        and (tmp_path / 'out/predictions.parquet').exists()
    )
    assert [w for w, _ in why(r)] == [
        'a kind of region that is not read',
        'a kind of region that is not read',
        'image is missing',
        'size in the file is not that of the image',
        'task without an image',
    ]


@pytest.mark.parametrize('angle', [0.5, 30, 90, 179, -45, 270])
def test_rotated_boxes_go_round_between_tools(tmp_path, angle):
    "CVAT turns about the middle, Label Studio about the corner: the corners are the same."
    p = image(tmp_path / 'i/a.png')
    box = rotated_box(20, 15, 12, 6, angle)
    assert unrotated_box(box['polygon'], angle) == pytest.approx((20, 15, 12, 6), abs=1e-5)
    d = Dataset(
        make_table(
            [
                dict(
                    id='a.png',
                    uri='a.png',
                    sha256=digest(p.read_bytes()),
                    width=W,
                    height=H,
                    split='train',
                    annotations=[Annotation('sign', **box)],
                )
            ]
        ),
        'd',
        tmp_path / 'i',
        ['sign'],
    )
    for k, name in enumerate(('cvat', 'labelstudio', 'cvat', 'coco', 'csv')):
        export_dataset(d, name, tmp_path / f'{k}')
        d = import_dataset(tmp_path / f'{k}', name, tmp_path / f'o{k}').dataset
        a = d.table.to_pylist()[0]['annotations'][0]
        assert (
            np.allclose(a['polygon'], box['polygon'], atol=1e-5) and float(dict(a['attributes'])['rotation']) == angle
        )
    assert (
        'rotation="' in (tmp_path / '0/annotations.xml').read_text()
        and '<box' in (tmp_path / '0/annotations.xml').read_text()
    )


def film(tmp_path, n=5):
    rows = []
    for k in range(n):
        p = image(tmp_path / f'film/{k}.png', k)
        anns = (
            [Annotation('car', [k, 2, k + 9.5, 12], track_id='3', attributes=dict(occluded='1') if k == 1 else None)]
            if k != 2
            else []
        )
        rows.append(
            dict(
                id=p.name,
                uri=p.name,
                sha256=digest(p.read_bytes()),
                width=W,
                height=H,
                group='film',
                split='val',
                annotations=[
                    *anns,
                    Annotation('dog', polygon=[[1, 1, 9, 1 + k, 9, 9]], bbox=[1, 1, 9, 9], track_id='12'),
                ],
            )
        )
    return Dataset(make_table(rows), 'film', tmp_path/'film', ['car', 'dog'])


def test_cvat_tracks_go_out_and_come_back(tmp_path):
    d = film(tmp_path)
    out = export_dataset(d, 'cvat', tmp_path / 'out')
    r = import_dataset(tmp_path / 'out', 'auto', tmp_path / 'back')
    assert not out.lost and not len(r.quarantine)
    key = lambda t: sorted(
        (x['sha256'], x['split'], x['group'], sorted(json.dumps(a, sort_keys=True) for a in x['annotations']))
        for x in t.to_pylist()
    )
    assert key(r.dataset.table) == key(d.table)


def test_a_cvat_track_has_one_label_and_no_label_changes(tmp_path):
    d = film(tmp_path)
    rows = d.table.to_pylist()
    for k, r in enumerate(rows):  # id 7: a car, once called a dog, and once two of it
        more = [dict(r['annotations'][-1], label='dog' if k == 1 else 'car', track_id='7', polygon=None)]
        if k == 0: more.append(dict(more[0], bbox=[3.0, 3.0, 8.0, 8.0]))
        r['annotations'] = [*r['annotations'], *more]
    d = Dataset(make_table(rows), 'film', d.root, d.classes)
    out = export_dataset(d, 'cvat', tmp_path / 'out')
    (lost,) = out.lost.items()
    assert lost == ('track_id where a track has a second label, or two shapes in a frame', 2)
    (xml,) = (tmp_path / 'out').rglob('annotations.xml')
    ids = re.findall(r'<track id="(.*?)"', xml.read_text())
    assert len(ids) == len(set(ids)) and '7' in ids
    r = import_dataset(tmp_path / 'out', 'auto', tmp_path / 'back', splits='keep')
    assert not len(r.quarantine)  # and no label, no place is another one
    said = lambda t, *keys: {
        x['sha256']: sorted(json.dumps([a[k] for k in ('label', 'bbox', *keys)]) for a in x['annotations'])
        for x in t.to_pylist()
    }
    assert said(r.dataset.table) == said(d.table) and said(r.dataset.table, 'track_id') != said(d.table, 'track_id')
    cars = [a for x in r.dataset.table.to_pylist() for a in x['annotations'] if a['track_id'] == '7']
    assert len(cars) == len(rows) - 1 and {a['label'] for a in cars} == {'car'}


def test_cvat_faults(tmp_path):
    image(tmp_path/'s/a.jpg'); box = 'occluded="0" xtl="1" ytl="1" xbr="9" ybr="9"'
    (tmp_path / 's/x.xml').write_text(
        f'<annotations><version>1.1</version><meta><task><labels><label><name>cat</name></label></labels></task></meta><image id="0" name="a.jpg" width="{W}" height="{H}"><box label="cat" {box}/><box label="cow" {box}/>'
        f'<polyline label="cat" points="1,1;2,2"/><mask label="cat" rle="1,2" left="0" top="0" width="9" height="9"/><box label="cat" xtl="a" ytl="1" xbr="9" ybr="9"/><box label="cat" xtl="5" ytl="1" xbr="5" ybr="9"/></image><image id="1" name="gone.jpg"/></annotations>'
    )
    (tmp_path/'s/bomb.xml').write_text('<!DOCTYPE a [<!ENTITY x "y">]><annotations>&x;</annotations>')
    r = import_dataset(tmp_path/'s', 'cvat', tmp_path/'o'); assert len(get(r)['a.jpg']) == 1
    assert r.tally['left_out'] == {
        'shape cannot be read': 3,
        'annotation file cannot be read': 1,
        'label is not defined': 1,
        'image is missing': 1,
        'box has no area': 1,
    }


def test_cvat_tracks_of_the_same_id_are_told_apart(tmp_path):
    for k in range(2): image(tmp_path / f's/images/frame_{k:06}.jpg', k)
    box = lambda k, x: f'<box frame="{k}" outside="0" keyframe="1" xtl="{x}" ytl="1" xbr="{x + 8}" ybr="9"/>'
    track = lambda i, x: f'<track id="{i}" label="car">{box(0, x)}{box(1, x)}</track>'
    (tmp_path / 's/annotations.xml').write_text(
        f'<annotations><version>1.1</version><meta><task><mode>interpolation</mode></task></meta>'
        f'{track(0, 1)}{track(0, 20)}{track(1, 10)}</annotations>'
    )
    r = import_dataset(tmp_path / 's', 'cvat', tmp_path / 'o')
    for x in r.dataset.table.to_pylist():
        assert {a['track_id']: a['bbox'][0] for a in x['annotations']} == {'0': 1, '1': 10, '2': 20}
    assert [(x['item'], x['part'], x['action'], x['reason'], x['detail']) for x in r.quarantine.to_dict('records')] == [
        ('annotations.xml', 'track', 'mended', 'track id was given twice', 'a second track 0 (car) is track 2 now')
    ]


# the rest

def test_mot_boxes_may_reach_out(tmp_path):
    for k in (1, 2): image(tmp_path/f's/train/MOT17-02/img1/{k:06}.jpg', k)
    gt = tmp_path / 's/train/MOT17-02/gt/gt.txt'
    gt.parent.mkdir()
    gt.write_text(
        '1,1,-5,3,20,40,1,1,0.8\n2,1,-4,3,20,40,1,1,1\n2,2,1,1,5,5,0,7,0.5\n3,1,0,0,5,5,1,1,1\n1,9,1,1\n1,4,1,1,5,5,1,99,1\n'
    )
    (tmp_path / 's/train/MOT17-02/seqinfo.ini').write_text(
        f'[Sequence]\nname=MOT17-02\nimDir=img1\nimWidth={W}\nimHeight={H}\nimExt=.jpg\n'
    )
    r = import_dataset(tmp_path/'s', 'auto', tmp_path/'o'); rows = r.dataset.table.to_pylist()
    assert (
        rows[0]['annotations'][0]['bbox'] == [-5, 3, 15, 43]
        and dict(rows[1]['annotations'][1]['attributes']) == dict(ignored='1', visibility='0.5')
        and rows[1]['annotations'][1]['label'] == 'static person'
    )
    assert (
        {x['group'] for x in rows} == {'MOT17-02'}
        and {x['split'] for x in rows} == {'train'}
        and [w for w, _ in why(r)] == ['image is missing', 'line cannot be read', 'line cannot be read']
    )


def test_tracks_that_are_no_numbers_get_free_ones(tmp_path):
    d = film(tmp_path); rows = d.table.to_pylist()
    for r in rows:
        for a in r['annotations']: a['track_id'] = 'red car' if a['track_id'] == '3' else '1'
    out = export_dataset(Dataset(make_table(rows), 'f', d.root, d.classes), 'mot', tmp_path / 'out')
    back = import_dataset(tmp_path / 'out', 'mot', tmp_path / 'b')
    assert {(a['label'], a['track_id']) for r in back.dataset.table.to_pylist() for a in r['annotations']} == {
        ('car', '2'),
        ('dog', '1'),
    } and out.lost['names of tracks'] == 1


def test_text_formats(tmp_path):
    image(tmp_path / 'icdar/img_1.jpg')
    (tmp_path / 'icdar/gt_img_1.txt').write_bytes(
        '\ufeff2,3,20,4,20,12,2,11,Grün, ja\r\n1,1,9,1,9,5,1,5,###\r\nx\r\n'.encode()
    )
    r = import_dataset(tmp_path/'icdar', 'auto', tmp_path/'o1'); a, b = get(r)['img_1.jpg']
    assert (
        a['text'] == 'Grün, ja'
        and a['polygon']
        and b['bbox'] == [1, 1, 9, 5]
        and dict(b['attributes']) == dict(ignore='1')
        and len(r.quarantine) == 1
    )
    image(tmp_path / 'rec/train/word_1.png')
    (tmp_path / 'rec/rec_gt_train.txt').write_text('train/word_1.png\tGrün 10 €\ntrain/gone.png\tx\n')
    r = import_dataset(tmp_path / 'rec', 'auto', tmp_path / 'o2')
    assert (
        get(r)['word_1.png'][0]['text'] == 'Grün 10 €'
        and r.dataset.about['format'] == 'textlines'
        and r.tally['splits'] == dict(train=1)
    )
    image(tmp_path / 'i3/word_1.png')
    (tmp_path / 'i3/gt.txt').write_text('word_1.png, "a ""b"" c"\n')
    assert get(import_dataset(tmp_path / 'i3', 'textlines', tmp_path / 'o3'))['word_1.png'][0]['text'] == 'a ""b"" c'


def test_cityscapes_kitti_open_images_as_published(tmp_path):
    image(tmp_path/'c/leftImg8bit/val/bonn/bonn_000001_000019_leftImg8bit.png');    dump(
        tmp_path / 'c/gtFine/val/bonn/bonn_000001_000019_gtFine_polygons.json',
        dict(
            imgHeight=H,
            imgWidth=W,
            objects=[
                dict(label='cargroup', polygon=[[1, 1], [9, 1], [9, 9]]),
                dict(label='sky', polygon=[[0, 0], [50, 0], [20, 20]]),
                dict(label='x', deleted=1, polygon=[[0, 0], [5, 0], [5, 5]]),
                dict(label='y'),
            ],
        ),
    )
    Image.new('L', (W, H)).save(tmp_path/'c/gtFine/val/bonn/bonn_000001_000019_gtFine_labelIds.png')
    r = import_dataset(tmp_path / 'c', 'auto', tmp_path / 'o1')
    row = r.dataset.table.to_pylist()[0]
    assert (
        row['group'] == 'bonn_000001'
        and row['split'] == 'val'
        and [a['label'] for a in row['annotations']] == ['car', 'sky']
        and len(r.quarantine) == 2
    )
    image(tmp_path / 'k/training/image_2/000000.png')
    (tmp_path / 'k/training/label_2').mkdir()
    (tmp_path / 'k/training/label_2/000000.txt').write_text(
        'Car 0.00 1 -1.57 1.24 1.78 27.31 20.77 1.57 1.73 4.15 1.00 1.75 13.22 -1.62\nDontCare -1 -1 -10 1 1 9 9 -1 -1 -1 -1000 -1000 -1000 -10\nbad\n'
    )
    r = import_dataset(tmp_path / 'k', 'auto', tmp_path / 'o2')
    a = get(r)['000000.png']
    assert (
        [x['label'] for x in a] == ['Car', 'DontCare']
        and a[0]['bbox'] == [1.24, 1.78, 27.31, 20.77]
        and r.tally['splits'] == dict(train=1)
        and len(r.quarantine) == 1
    )
    image(tmp_path / 'o/validation/0001.jpg')
    (tmp_path / 'o/validation-annotations-bbox.csv').write_text(
        'ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n0001,xclick,/m/1,1,0.1,0.5,0.2,0.4,0,1,1,0,-1\n0009,xclick,/m/1,1,0.1,0.5,0.2,0.4,0,1,1,0,0\n'
    )
    (tmp_path / 'o/validation-annotations-human-imagelabels.csv').write_text(
        'ImageID,Source,LabelName,Confidence\n0001,verification,/m/2,0\n0001,verification,/m/1,1\n'
    )
    (tmp_path / 'o/class-descriptions-boxable.csv').write_text('/m/1,Cat\n/m/2,Dog\n')
    r = import_dataset(tmp_path / 'o', 'auto', tmp_path / 'o3')
    row = r.dataset.table.to_pylist()[0]
    assert (
        row['split'] == 'val'
        and dict(row['tags']) == dict(absent='Dog')
        and row['annotations'][0]['bbox'] == [4, 6, 20, 12]
        and dict(row['annotations'][0]['attributes']) == dict(iscrowd='1', truncated='1')
        and [a['label'] for a in row['annotations']] == ['Cat', 'Cat']
    )
    assert why(r) == [('image is missing', '0009')]


def test_open_images_sets_labels_aside_that_the_class_file_does_not_name(tmp_path):
    image(tmp_path / 'o/validation/0001.jpg')
    (tmp_path / 'o/validation-annotations-human-imagelabels.csv').write_text(
        'ImageID,Source,LabelName,Confidence\n0001,verification,/m/1,1\n0001,verification,/m/09,1\n0001,verification,/m/08,0\n'
    )
    r = import_dataset(tmp_path / 'o', 'openimages', tmp_path / 'o1')
    assert r.dataset.classes == ['/m/1', '/m/09'] and not len(r.quarantine) # no class file: the names are all there is
    (tmp_path / 'o/class-descriptions.csv').write_text('/m/1,Cat\n')
    r = import_dataset(tmp_path / 'o', 'openimages', tmp_path / 'o2')
    row = r.dataset.table.to_pylist()[0]
    assert r.dataset.classes == ['Cat'] and [a['label'] for a in row['annotations']] == ['Cat'] and not row['tags']
    file = 'validation-annotations-human-imagelabels.csv'
    assert [(x['item'], x['part'], x['reason'], x['detail']) for x in r.quarantine.to_dict('records')] == [
        ('validation/0001.jpg', 'annotation', 'unknown class', f'{file}:3: /m/09'),
        ('validation/0001.jpg', 'annotation', 'unknown class', f'{file}:4: /m/08'),
    ]


def test_what_was_wrong_is_said_in_plain_words(tmp_path):
    for k in range(2): image(tmp_path / f'c/leftImg8bit/val/bonn/bonn_000001_00001{k}_leftImg8bit.png', k)
    home = tmp_path / 'c/gtFine/val/bonn'
    objects = [dict(polygon=[[1, 1]]), dict(label='car'), dict(label='car', polygon=[['x', 1]]), 7,
               dict(label='car', polygon=None), dict(label='car', polygon=[[1, 1], [9, 1], [9, 9]])]
    dump(home / 'bonn_000001_000010_gtFine_polygons.json', dict(imgHeight=H, imgWidth=W, objects=objects))
    (home / 'bonn_000001_000011_gtFine_polygons.json').write_text('{"objects": [')
    r = import_dataset(tmp_path / 'c', 'cityscapes', tmp_path / 'o')
    assert len(r.dataset) == 1
    said = r.quarantine['detail'].tolist(); kind = 'a value is missing, or is not of the kind it should be'
    assert said[:5] == ['object 0: `label` is missing', 'object 1: `polygon` is missing',
                        "object 2: 'x' is not a number", f'object 3: {kind}', f'object 4: {kind}']
    assert said[5].startswith('gtFine/val/bonn/bonn_000001_000011_gtFine_polygons.json is not JSON')
    assert str(tmp_path) not in ' '.join(said)


def test_packed_formats(tmp_path):
    png = image(tmp_path/'a.png').read_bytes(); jpg = image(tmp_path/'a.jpg', 1).read_bytes()
    def shard(name, files):
        with tarfile.open(name, 'w') as t:
            for n, b in files: i = tarfile.TarInfo(n); i.size = len(b); t.addfile(i, io.BytesIO(b))

    (tmp_path / 'w').mkdir()
    shard(
        tmp_path / 'w/train-000000.tar',
        [
            ('0001.jpg', jpg),
            ('0001.cls', b'1'),
            ('0001.txt', b'A cat.'),
            ('0002.PNG', png),
            ('0002.json', b'{"caption": "Two", "license": "CC0"}'),
            ('0003.cls', b'0'),
            ('../../evil.jpg', jpg),
            ('0004.jpg', jpg[:300]),
        ],
    )
    (tmp_path / 'w/train-000001.tar').write_bytes((tmp_path / 'w/train-000000.tar').read_bytes()[:2500])
    (tmp_path / 'w/classes.txt').write_text('dog\ncat\n')
    r = import_dataset(tmp_path/'w', 'auto', tmp_path/'o1'); rows = {x['id']: x for x in r.dataset.table.to_pylist()}
    assert (
        [a['label'] or a['caption'] for a in rows['0001.jpg']['annotations']] == ['cat', 'A cat.']
        and rows['0002.png']['license'] == 'CC0'
        and not (tmp_path / 'evil.jpg').exists()
    )
    assert {'sample without an image', 'name leads out of the folder'} <= {w for w, _ in why(r)}, why(r)
    assert import_dataset(tmp_path/'w/train-000000.tar', 'auto', tmp_path/'o1b').dataset.about['format'] == 'webdataset'
    features = dict(image=dict(_type='Image'), label=dict(names=['dog', 'cat'], _type='ClassLabel'))
    (tmp_path / 'h/data').mkdir(parents=True)
    t = pa.table(
        dict(
            image=pa.array(
                [dict(bytes=png, path='x/a.png'), dict(bytes=jpg, path=None), dict(bytes=None, path='gone.png')],
                pa.struct([('bytes', pa.binary()), ('path', pa.string())]),
            ),
            label=pa.array([1, 0, 1]),
        )
    )
    pq.write_table(
        t.replace_schema_metadata({'huggingface': json.dumps(dict(info=dict(features=features)))}),
        tmp_path / 'h/data/test-00000-of-00001.parquet',
    )
    r = import_dataset(tmp_path / 'h', 'auto', tmp_path / 'o2')
    assert (
        [[a['label'] for a in x['annotations']] for x in r.dataset.table.to_pylist()] == [['cat'], ['dog']]
        and r.tally['splits'] == dict(test=2)
        and r.dataset.classes == ['dog', 'cat']
        and len(r.quarantine) == 1
    )
    with pa.OSFile(str(tmp_path / 'h/data-00000-of-00001.arrow'), 'wb') as f, pa.ipc.new_stream(f, t.schema) as w:
        w.write_table(t)
    assert len(import_dataset(tmp_path/'h/data-00000-of-00001.arrow', 'huggingface', tmp_path/'o3').dataset) == 2
    image(tmp_path / 'm/train/a b.png')
    (tmp_path / 'm/train/metadata.jsonl').write_text(
        '{"file_name": "a b.png", "objects": {"bbox": [[1, 2, 10, 5]], "categories": ["cat"]}, "site": "north"}\n{"file_name": "gone.png"}\nno json\n'
    )
    r = import_dataset(tmp_path / 'm', 'auto', tmp_path / 'o4')
    row = r.dataset.table.to_pylist()[0]
    assert (
        row['annotations'][0]['bbox'] == [1, 2, 11, 7]
        and dict(row['tags']) == dict(site='north')
        and len(r.quarantine) == 2
    )


def test_csv_of_other_people(tmp_path):
    for n in 'ab': image(tmp_path/f's/img/{n}.JPG', ord(n), format='JPEG')
    (tmp_path / 's/t.csv').write_text(
        'filename;width;height;class;xmin;ymin;xmax;ymax\nimg\\a.jpg;40;30;NA;1;2;10;12\nimg\\a.jpg;40;30;007;3;2;10;12\nimg\\b.jpg;99;30;x;1;1;2;2\n'
    )
    r = import_dataset(tmp_path / 's', 'auto', tmp_path / 'o1')
    assert [a['label'] for a in get(r)['a.JPG']] == ['NA', '007'] and [w for w, _ in why(r)] == [
        'size in the file is not that of the image'
    ]
    (tmp_path / 's/t.csv').unlink()
    (tmp_path / 's/t.tsv').write_text('file\tkinds\tsplit\na.jpg\tcat|dog\tvalid\nb.jpg\tcat\tnonsense\n')
    r = import_dataset(tmp_path / 's', 'csv', tmp_path / 'o2', label='kinds', separator='|', splits='keep')
    assert (
        [a['label'] for a in get(r)['a.JPG']] == ['cat', 'dog']
        and [w for w, _ in why(r)] == ['no split of that name']
        and r.dataset.table['split'].to_pylist() == ['val', None]
    )
    with pytest.raises(BadInput, match='no column .kind.'):
        import_dataset(tmp_path / 's', 'csv', tmp_path / 'o3', label='kind')


def test_fiftyone_masks_and_hostile_numpy(tmp_path):
    m = np.ones((6, 8), bool)
    f = io.BytesIO()
    np.save(f, m)
    good = base64.b64encode(zlib.compress(f.getvalue())).decode()
    f = io.BytesIO()
    np.save(f, np.array([print], object), allow_pickle=True)
    bad = base64.b64encode(zlib.compress(f.getvalue())).decode()
    image(tmp_path / 's/data/a.png')
    det = lambda mask: dict(_cls='Detection', label='cat', bounding_box=[0.1, 0.1, 0.2, 0.2], mask=mask)
    dump(
        tmp_path / 's/samples.json',
        dict(
            samples=[
                dict(
                    filepath='/home/x/s/data/a.png',
                    tags=['validation', 'night'],
                    metadata=dict(width=W, height=H),
                    gt=dict(
                        _cls='Detections', detections=[det(good), det({'$binary': {'base64': good, 'subType': '00'}})]
                    ),
                    pred=dict(_cls='Detections', detections=[det(bad)]),
                    kp=dict(_cls='Keypoints'),
                )
            ]
        ),
    )
    r = import_dataset(tmp_path / 's', 'auto', tmp_path / 'o')
    row = r.dataset.table.to_pylist()[0]
    assert (
        [a['bbox'] for a in row['annotations']] == [[4, 3, 12, 9]] * 2
        and row['split'] == 'val'
        and dict(row['tags']) == dict(night='yes')
        and len(r.quarantine) == 2
    )


def test_two_equal_claims_are_not_decided_by_a_coin(tmp_path):
    image(tmp_path / 's/a.jpg')
    dump(tmp_path / 's/coco.json', dict(images=[dict(id=1, file_name='a.jpg')], annotations=[], categories=[]))
    voc(tmp_path / 's', 'a', [('cat', 0, 1, 1, 9, 9)])
    with pytest.raises(BadInput, match='could be coco .* or voc'): import_dataset(tmp_path/'s', 'auto', tmp_path/'o')
    assert import_dataset(tmp_path/'s/coco.json', 'auto', tmp_path/'o').dataset.about['format'] == 'coco'


def test_run_lengths_are_checked_before_they_are_trusted():
    from cv_lab.geometry import sound_rle
    rng = np.random.default_rng(0)
    for k in range(60):
        m = rng.random((1 + k*7 % 50, 1 + k*3 % 70)) < (k % 11)/10; rle = rle_encode(m); assert sound_rle(rle) == rle
        for bad in (
            dict(rle, counts=rle['counts'] + '1'),
            dict(rle, counts=rle['counts'][:-1]),
            dict(rle, size=[rle['size'][0] + 1, rle['size'][1]]),
            dict(rle, counts=''),
        ):
            with pytest.raises(BadInput): sound_rle(bad)
    for bad in (
        dict(size=[10**9, 10**9], counts='12'),
        dict(size=[-1, 4], counts='12'),
        dict(size=[3], counts='1'),
        dict(counts='1'),
        dict(size=[3, 4], counts=5),
        dict(size=[3, 4], counts='ä'),
    ):
        with pytest.raises(BadInput): sound_rle(bad)
