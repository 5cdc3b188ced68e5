"Anybody's predictions: every way of writing them gives the same figures, and what cannot be believed is refused by name."

import json
from dataclasses import replace

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest

from cv_lab.core import BadInput, Workspace, read_json
from cv_lab.data.exports import export_dataset
from cv_lab.data.imports import import_dataset
from cv_lab.data.dataset import load_dataset, save_dataset
from cv_lab.data.manifest import PREDICTIONS
from cv_lab.data.predictions import read_predictions
from cv_lab.evaluate import evaluate
from cv_lab.evidence import drafted, evaluate_predictions, find_evidence
from cv_lab.geometry import mask_iou, rle_decode, rle_encode
from cv_lab.tasks import classification, detection


@pytest.fixture(scope='module')
def house(tmp_path_factory):
    "A dataset and a noisy model's answers about its test split."
    home = tmp_path_factory.mktemp('house')
    d = save_dataset(detection.example(home / 'shapes'), home / 'shapes')
    rng = np.random.default_rng(0)
    rows = []
    for r in d.split('test').to_pylist():
        said = [
            dict(a, bbox=(np.array(a['bbox']) + rng.normal(0, 1, 4)).tolist(), score=float(rng.uniform(0.3, 1)))
            for a in r['annotations']
            if rng.random() > 0.2
        ]
        rows.append(dict(id=r['id'], annotations=said))
    t = pa.Table.from_pylist(rows, schema=PREDICTIONS); pq.write_table(t, home/'said.parquet'); return home, d, t


def coco(d, t, ids, name='id'):
    return [
        dict(
            image_id=ids[r['id']],
            category_id=d.classes.index(a['label']) + 1,
            bbox=[a['bbox'][0], a['bbox'][1], a['bbox'][2] - a['bbox'][0], a['bbox'][3] - a['bbox'][1]],
            score=a['score'],
        )
        for r in t.to_pylist()
        for a in r['annotations']
    ]


def figures(d, table): return evaluate(d.split('test'), table, drafted(d, 'x')[0])['metrics']


def test_boxes_are_judged_as_boxes_where_the_dataset_also_holds_text_and_masks(house):
    _, d, t = house
    mask = dict(size=[4, 4], counts='0P1')
    more = lambda rows, **kw: [dict(r, annotations=[dict(a, **kw) for a in r['annotations']]) for r in rows.to_pylist()]
    rich = replace(d, table=pa.Table.from_pylist(more(d.table, text='x', mask=mask), schema=d.table.schema))
    masks = pa.Table.from_pylist(more(t, mask=mask), schema=PREDICTIONS)
    assert [drafted(rich, 'x', s)[0].task for s in (None, t, masks)] == ['reading', 'detection', 'instances']


def test_table_coco_yolo_and_csv_say_the_same(house, tmp_path):
    home, d, t = house
    want = figures(d, read_predictions(home / 'said.parquet', d).table)
    assert 0.1 < want['map50']['value'] < 1
    export_dataset(d, 'coco', tmp_path / 'coco')
    file = tmp_path / 'coco/annotations/instances_test.json'
    ids = {i['file_name'].rsplit('/')[-1].split('.')[0]: i['id'] for i in json.loads(file.read_text())['images']}
    (tmp_path / 'r.json').write_text(json.dumps(coco(d, t, ids)))
    (tmp_path / 'names.json').write_text(json.dumps(coco(d, t, {i: f'{i}.png' for i in ids})))
    (tmp_path/'txt').mkdir(); size = {r['id']: (r['width'], r['height']) for r in d.table.to_pylist()}
    from cv_lab.data.format.yolo import line_of
    for r in t.to_pylist():
        if r['annotations']:
            (tmp_path / 'txt' / f'{r["id"]}.txt').write_text(
                '\n'.join(
                    line_of(d.classes.index(a['label']), a['bbox'], None, a['score'], *size[r['id']])
                    for a in r['annotations']
                )
            )
    (tmp_path / 'r.csv').write_text(
        'file_name,class,xmin,ymin,xmax,ymax,confidence\n'
        + '\n'.join(
            f'{r["id"]}.png,{a["label"]},{",".join(map(repr, a["bbox"]))},{a["score"]!r}'
            for r in t.to_pylist()
            for a in r['annotations']
        )
    )
    for path, more in (
        (tmp_path / 'r.json', dict(ids=file)),
        (tmp_path / 'names.json', {}),
        (tmp_path / 'txt', {}),
        (tmp_path / 'r.csv', {}),
    ):
        got = figures(d, read_predictions(path, d, **more).table)
        for k in ('map50', 'map50_95', 'ar100', 'precision'):
            assert got[k]['value'] == pytest.approx(want[k]['value'], abs=1e-6), (path, k)


def test_ids_are_those_of_the_file_that_was_imported(house, tmp_path):
    home, d, t = house
    export_dataset(d, 'coco', tmp_path / 'coco')
    src = tmp_path / 'coco'
    d2 = import_dataset(src, 'coco', tmp_path / 'in', workers=1).dataset
    ids = {
        i['file_name'].rsplit('/')[-1].split('.')[0]: i['id']
        for i in json.loads((src / 'annotations/instances_test.json').read_text())['images']
    }
    (tmp_path / 'r.json').write_text(json.dumps(coco(d, t, ids)))
    s = read_predictions(tmp_path / 'r.json', d2)  # three files count from 1: the split decides
    want = figures(d, read_predictions(home / 'said.parquet', d).table)
    assert figures(d2, s.table)['map50_95']['value'] == pytest.approx(want['map50_95']['value'], abs=1e-6)
    with pytest.raises(BadInput, match='not in the dataset, first image_id'):
        read_predictions(tmp_path / 'r.json', d)  # a dataset that never had ids: no guess


@pytest.mark.parametrize(
    'change, why',
    [
        (dict(score=float('nan')), 'NaN'),
        (dict(score=1.5), r'\[0, 1\]'),
        (dict(score=None), 'no score'),
        (dict(image_id='nobody.png'), 'not in the dataset'),
        (dict(image_id=10**9), 'not in the dataset'),
        (dict(category_id=77), 'no class'),
        (dict(category_id=None), 'no class'),
        (dict(bbox=[0, 0, -3, 4]), 'a box that is none'),
        (dict(bbox=[1, 2]), 'cannot be read'),
        (dict(bbox='x'), 'cannot be read'),
        (dict(bbox=[1e999, 0, 1, 1]), 'NaN|Infinity|none'),
        (dict(segmentation=dict(size=[64, 96], counts='11111111')), 'no mask'),
        (dict(segmentation=dict(size=[10**6, 10**6], counts='0')), 'no mask'),
        (dict(segmentation=dict(size=[64, 96], counts=[5, 7])), 'cannot be read'),
        (dict(segmentation=rle_encode(np.ones((9, 9), bool))), 'another size'),
        (dict(segmentation=[[1, 2, 3]]), 'outline'),
    ],
)
def test_what_cannot_be_believed_is_refused(house, tmp_path, change, why):
    home, d, t = house
    one = coco(d, t, {r['id']: r['id'] for r in t.to_pylist()})
    (tmp_path / 'r.json').write_text(json.dumps([*one[:3], one[3] | change]))
    with pytest.raises(BadInput, match=why): read_predictions(tmp_path/'r.json', d)


@pytest.mark.parametrize(
    'name, text, why',
    [
        ('r.json', '{', 'not JSON'),
        ('r.json', '"x"', 'no COCO results'),
        ('r.json', '[1]', 'no COCO results'),
        ('r.json', '{"a": 1}', 'no COCO results'),
        ('r.json', '[{"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 1}]', 'name it with --ids'),
        ('r.csv', 'a,b\n1,2', 'no column names the images'),
        ('r.csv', 'image,xmin,ymin,xmax,ymax\nscene-00.png,1,1,9,9\n', 'without a label'),
        ('r.csv', 'image,label,score\nscene-00.png,disc\n', 'cannot be read'),
        ('r.parquet', 'x', 'cannot be read'),
        ('r.doc', 'x', 'no format'),
        ('txt/scene-00.txt', '0 .5 .5 .1 .1', 'cannot be read'),
        ('txt/scene-00.txt', '9 .5 .5 .1 .1 .9', 'cannot be read'),
        ('txt/scene-00.txt', '0 nan .5 .1 .1 .9', 'a box that is none'),
        ('txt/nobody.txt', '0 .5 .5 .1 .1 .9', 'not in the dataset'),
    ],
)
def test_broken_files_are_refused(house, tmp_path, name, text, why):
    p = tmp_path/name; p.parent.mkdir(exist_ok=True); p.write_text(text)
    with pytest.raises(BadInput, match=why): read_predictions(p if '/' not in name else p.parent, house[1])


def test_run_lengths_are_checked_wherever_they_are_read():
    good = rle_encode(np.ones((4, 6), bool)); bad = dict(size=[4, 6], counts='1000000')
    with pytest.raises(BadInput): rle_decode(bad)
    with pytest.raises(BadInput): mask_iou(good, bad)
    with pytest.raises(BadInput, match='masks of one image'): mask_iou(good, rle_encode(np.ones((4, 7), bool)))
    assert mask_iou(good, good) == 1


def test_json_has_no_nan(tmp_path):
    (tmp_path/'a.json').write_text('{"a": NaN}')
    with pytest.raises(BadInput, match='NaN'): read_json(tmp_path/'a.json')
    assert np.isnan(read_json(tmp_path/'a.json', nan=True)['a'])


def test_probabilities_in_columns_make_a_classifier(tmp_path):
    d = save_dataset(classification.example(tmp_path / 's'), tmp_path / 's')
    rows = d.split('test').to_pylist()
    rng = np.random.default_rng(0)
    P = rng.dirichlet(np.ones(3), len(rows))
    (tmp_path / 'r.csv').write_text(
        f'image,{",".join(d.classes)}\n'
        + '\n'.join(f'{r["uri"]},{",".join(map(repr, p.tolist()))}' for r, p in zip(rows, P))
    )
    s = read_predictions(tmp_path/'r.csv', d); assert np.allclose(s.table['probs'].to_pylist(), P) and s.silent == 0
    right = np.mean([d.classes[p.argmax()] == r['annotations'][0]['label'] for r, p in zip(rows, P)])
    got = figures(d, s.table)
    assert got['accuracy']['value'] == pytest.approx(right)
    (tmp_path / 'r.csv').write_text('image,label\n' + '\n'.join(f'{r["uri"]},standing' for r in rows[:-1]))
    s = read_predictions(tmp_path / 'r.csv', d)
    assert s.silent == 1 and len(s.table) == len(rows) - 1
    with pytest.raises(BadInput, match='1 items have no prediction'):
        figures(d, s.table)  # a label cannot be "nothing found"


def test_evidence_without_a_model(house, tmp_path):
    home, d, t = house; (tmp_path/'problems').mkdir(); (tmp_path/'settings.ini').touch(); ws = Workspace(tmp_path)
    found = evaluate_predictions(home / 'shapes', home / 'said.parquet', ws=ws, report=False)
    again = evaluate_predictions(home / 'shapes', home / 'said.parquet', ws=ws, report=False)
    assert (
        found.folder == again.folder == find_evidence(found.folder.name, ws=ws)
        and (found.folder / 'problem.yaml').exists()
        and not (found.folder / 'done.json').exists()
    )
    assert (
        read_json(found.folder / 'evaluation/metrics.json')['metrics'] == found.figures['metrics']
        and load_dataset(home / 'shapes').version == found.figures['dataset']
    )
