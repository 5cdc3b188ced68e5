"What is chosen, against plain implementations; and a batch on its way out and back: predictions stay predictions, test and golden items stay as they are."

import json, zipfile

import numpy as np, onnx, pytest
from onnx import helper as h, numpy_helper as nh
from PIL import Image

from cv_lab.core import Annotation, BadInput, digest
from cv_lab.data.batches import absorb, import_into
from cv_lab.data.exports import export_dataset
from cv_lab.data.imports import import_dataset
from cv_lab.data.dataset import Dataset, load_dataset, save_dataset
from cv_lab.data.manifest import PREDICTIONS, make_table
from cv_lab.data.versions import freeze_golden, golden_changes, versions
from cv_lab.geometry import rle_encode
from cv_lab.mining import (
    Mined,
    Pool,
    badge,
    choose,
    disagreement,
    embedding_graph,
    with_embedding,
    entropy,
    free_items,
    k_centre,
    margin,
    write_batch,
)
from cv_lab.task import Prediction


def images(folder, n, **item):
    "Rows of a manifest with real files."
    folder.mkdir(parents=True, exist_ok=True); rows = []
    for i in range(n):
        path = folder / f'photo {i}.png'
        Image.fromarray(
            np.random.default_rng(int(digest(f'{folder} {i}'.split('/')[-1])[:8], 16)).integers(
                0, 255, (20, 30, 3), np.uint8
            )
        ).save(path)
        rows.append(
            dict(
                id=f'{folder.name}-{i}',
                uri=path.name,
                sha256=digest(path.read_bytes()),
                width=30,
                height=20,
                group=f'film {folder.name} {i}',
            )
            | {k: v(i) if callable(v) else v for k, v in item.items()}
        )
    return rows


# ---- choosing

def test_k_centre_is_the_greedy_one():
    rng = np.random.default_rng(0); x, known = rng.normal(0, 1, (60, 5)), rng.normal(0, 1, (7, 5)); chosen = []
    for _ in range(12):
        there = np.r_[known, x[chosen]]
        chosen.append(
            int(np.argmax([-1 if i in chosen else min(np.linalg.norm(x[i] - c) for c in there) for i in range(60)]))
        )
    assert k_centre(x, known, 12).tolist() == chosen
    assert sorted(k_centre(x, None, 99).tolist()) == list(range(60))


def test_badge_draws_as_k_means_does_on_the_whole_gradient():
    rng = np.random.default_rng(1)
    a, x = rng.normal(0, 1, (40, 3)), rng.normal(0, 1, (40, 4))
    g = np.einsum('na,nd->nad', a, x).reshape(40, -1)
    draw, out = np.random.default_rng(5), [int((g*g).sum(1).argmax())]
    while len(out) < 10:
        d = ((g[:, None] - g[out])**2).sum(-1).min(1); d[out] = 0; out.append(int(draw.choice(40, p=d/d.sum())))
    assert badge(a, x, 10, np.random.default_rng(5)).tolist() == out
    assert sorted(badge(np.zeros((6, 2)), x[:6], 6, rng).tolist()) == list(range(6))


def test_unsure_answers_come_first():
    from scipy.stats import entropy as shannon

    p = np.random.default_rng(2).dirichlet(np.ones(4), 50)
    pool = Pool([Prediction([], q) for q in p], np.zeros((50, 0)))
    assert choose(pool, 'entropy', 9).tolist() == np.argsort(-shannon(p.T))[:9].tolist()
    two = np.sort(p)[:, -2:]
    assert choose(pool, 'margin', 9).tolist() == np.argsort(two[:, 1] - two[:, 0])[:9].tolist()
    boxes = Prediction([Annotation('a', [0, 0, 5, 5], score=s) for s in (0.5, 0.99)])
    sure = Prediction([Annotation('a', [0, 0, 5, 5], score=0.99)] * 9)
    assert entropy(boxes) > entropy(sure) > entropy(Prediction([])) == 0 and margin(boxes) > margin(sure)
    assert (
        entropy(Prediction([], np.array([0.5, 0.5, 0.5]))) == pytest.approx(1)
        and entropy(Prediction([], np.array([0.99, 0.01, 0.01]))) < 0.1
    )  # multi-label
    with pytest.raises(BadInput, match='neither'):
        choose(Pool([Prediction([Annotation(text='x')])], np.zeros((1, 0))), 'entropy', 1)
    with pytest.raises(BadInput, match='no strategy'): choose(pool, 'best', 1)
    with pytest.raises(BadInput, match='no held-out'): choose(pool, 'hard', 1)


def test_disagreement_is_mutual_information():
    p = np.random.default_rng(3).dirichlet(np.ones(5), 3); q = np.full(3, 1/3)[:, None]*p
    information = (q*np.log(q/(q.sum(0)*q.sum(1, keepdims=True)))).sum()/np.log(3)
    assert disagreement([Prediction([], r) for r in p]) == pytest.approx(information)


@pytest.mark.parametrize('kind', ['linear', 'map', 'named'])
def test_a_place_is_found_in_any_graph(tmp_path, kind):
    w = np.random.default_rng(0).normal(0, 1, (4, 3, 3, 3)).astype(np.float32)
    at = lambda n, v: nh.from_array(np.asarray(v), n)
    info = lambda n, *d: h.make_tensor_value_info(n, 1, list(d))
    nodes = [h.make_node('Cast', ['images'], ['f'], to=1), h.make_node('Conv', ['f', 'w'], ['map'], strides=[2, 2])]
    inits = [at('w', w)]; out = [info('map2', 'n', 4, 3, 3)]
    if kind == 'map': nodes.append(h.make_node('Relu', ['map'], ['map2']))
    else:
        nodes += [
            h.make_node('GlobalAveragePool', ['map'], ['pooled']),
            h.make_node('Flatten', ['pooled'], ['embedding' if kind == 'named' else 'flat']),
            h.make_node('Gemm', ['embedding' if kind == 'named' else 'flat', 'v'], ['logits']),
        ]
        inits.append(at('v', np.ones((4, 2), np.float32)))
        out = [info('logits', 'n', 2)] + ([info('embedding', 'n', 4)] if kind == 'named' else [])
    g = h.make_graph(nodes, 'g', [h.make_tensor_value_info('images', 2, ['n', 3, 7, 7])], out, inits)
    onnx.save(h.make_model(g, opset_imports=[h.make_opsetid('', 20)], ir_version=10), tmp_path / 'm.onnx')
    import onnxruntime as ort

    graph, name = embedding_graph(tmp_path / 'm.onnx')
    x = np.random.default_rng(1).integers(0, 255, (2, 3, 7, 7), np.uint8)
    s = ort.InferenceSession(graph)
    got = dict(zip([o.name for o in s.get_outputs()], s.run(None, {'images': x})))[name]
    conv = ort.InferenceSession(graph).run(['map' if kind == 'map' else name], {'images': x})[0]
    assert (
        name == dict(linear='flat', map='map', named='embedding')[kind]
        and got.shape[:2] == (2, 4)
        and np.array_equal(got, conv)
    )
    s = ort.InferenceSession(with_embedding(tmp_path / 'm.onnx'))
    names = [o.name for o in s.get_outputs()]
    assert names == [out[0].name, 'embedding']
    place = dict(zip(names, s.run(None, {'images': x})))['embedding']
    np.testing.assert_allclose(place, got.reshape(2, 4, -1).mean(2), rtol=1e-6)


def test_what_is_held_out_is_not_asked_for(tmp_path):
    rows = images(
        tmp_path / 'a',
        6,
        split=lambda i: [None, 'train', 'test', None, None, 'val'][i],
        annotations=lambda i: [Annotation('x')] if i in (1, 2, 5) else [],
        group=lambda i: 'film' if i in (2, 3) else f'{i}',
    )
    d = Dataset(make_table(rows), 'd', tmp_path / 'a', ['x'])
    free, left = free_items(d, make_table([*rows, dict(rows[0], id='again')]))
    assert free['id'].to_pylist() == ['a-0', 'a-4'] and left == {
        'held out, or a copy of such an item': 2,
        'of a group that is held out': 1,
        'labelled already': 1,
        'a copy in the pool': 1,
    }
    assert not len(
        free_items(
            Dataset(make_table([r | dict(tags=dict(batch='b')) for r in rows]), 'd', tmp_path / 'a'), make_table(rows)
        )[0]
    )


# ---- predictions in Label Studio

MODEL = 'digits-1a2b@0123abcd'
EVERY = [
    Annotation('cat', score=0.9, annotator=MODEL),
    Annotation('cat', [2, 3, 18, 15], score=0.25, annotator=MODEL),
    Annotation('dog', polygon=[[1, 1, 9, 2, 5, 12]], bbox=[1, 1, 9, 12], score=0.5, annotator=MODEL),
    Annotation(
        'cat',
        mask=rle_encode(np.pad(np.ones((5, 6), bool), ((3, 12), (4, 20)))),
        bbox=[4, 3, 10, 8],
        score=0.75,
        annotator=MODEL,
    ),
    Annotation(text='Grün 10', score=0.6, annotator=MODEL),
    Annotation(text='EXIT', label='cat', bbox=[3, 3, 12, 9], score=0.4, annotator='other model'),
]


def test_predictions_stay_predictions(tmp_path):
    "Both kinds in one export: what people said comes back as it was, what models said comes back apart, with scores and names."
    rows = images(
        tmp_path / 'a',
        3,
        split='train',
        annotations=lambda i: [
            [Annotation('dog', annotator='Ada')],
            [Annotation('cat', [1, 2, 9, 9], annotator='Ada')],
            [],
        ][i],
    )
    d = Dataset(make_table(rows), 'd', tmp_path / 'a', ['cat', 'dog'])
    said = make_table([dict(id='a-0', annotations=EVERY), dict(id='a-2', annotations=EVERY[:1])], PREDICTIONS)
    export_dataset(d, 'labelstudio', tmp_path / 'ls', predictions=said)
    r = import_dataset(tmp_path / 'ls', 'labelstudio', tmp_path / 'back', splits='keep')
    plain = lambda t: {
        x['id'].rsplit(' ', 1)[-1].removesuffix('.png').rsplit('-', 1)[-1]: sorted(
            json.dumps({k: v for k, v in a.items() if v is not None}, sort_keys=True) for a in x['annotations']
        )
        for x in t.to_pylist()
    }
    assert (
        plain(r.dataset.table) == plain(d.table)
        and plain(r.predictions) == plain(said)
        and r.dataset.version == d.version
    )
    export_dataset(r.dataset, 'labelstudio', tmp_path / 'again', predictions=r.predictions)
    r2 = import_dataset(tmp_path / 'again', 'labelstudio', tmp_path / 'back2', splits='keep')  # and once more
    assert plain(r2.predictions) == plain(said) and r2.dataset.version == d.version


def test_a_submitted_prediction_is_a_persons_word(tmp_path):
    "The tool copies the model's region into the annotation, its score with it; a plain export has only numbers for predictions."
    rows = images(tmp_path / 'a', 2)
    d = Dataset(make_table(rows), 'd', tmp_path / 'a', ['cat'])
    said = make_table([dict(id=r['id'], annotations=EVERY[1:2]) for r in rows], PREDICTIONS)
    export_dataset(d, 'labelstudio', tmp_path / 'ls', predictions=said)
    tasks = json.loads((tmp_path / 'ls/tasks.json').read_text())
    tasks[0] |= dict(annotations=[dict(completed_by=7, result=tasks[0]['predictions'][0]['result'])], predictions=[12])
    (tmp_path / 'ls/tasks.json').write_text(json.dumps(tasks))
    r = import_dataset(tmp_path / 'ls', 'labelstudio', tmp_path / 'back', splits='keep')
    first, second = r.dataset.table['annotations'].to_pylist()
    assert (
        len(first) == 1
        and first[0]['score'] is None
        and first[0]['annotator'] == '7'
        and second == []
        and r.tally['predictions'] == 1
    )
    r = import_dataset(tmp_path / 'ls', 'labelstudio', tmp_path / 'done', splits='keep', undone='drop')
    assert len(r.dataset) == 1 and r.tally['left_out'] == {'nobody has done it yet': 1}


# ---- out and back

@pytest.fixture
def farm(tmp_path):
    "A dataset with a golden set, and a pool of new images."
    rows = images(
        tmp_path / 'farm/images',
        12,
        split=lambda i: 'test' if i < 4 else 'val' if i < 6 else 'train',
        annotations=lambda i: [Annotation(['cat', 'dog'][i % 2])],
        license='CC0',
    )
    d = save_dataset(Dataset(make_table(rows), 'farm', tmp_path / 'farm/images', ['cat', 'dog']), tmp_path / 'farm')
    freeze_golden(tmp_path / 'farm', 1)
    return d, Dataset(
        make_table(images(tmp_path / 'new', 4, license='CC-BY-4.0', tags=dict(light='night'))), 'new', tmp_path / 'new'
    )


def batch(folder, pool, format, labels=('cat', 'cat', 'dog', 'dog')):
    said = make_table(
        [
            dict(id=i, annotations=[Annotation(v, score=0.6, annotator=MODEL)])
            for i, v in zip(pool.table['id'].to_pylist(), labels)
        ],
        PREDICTIONS,
    )
    unsure = dict(entropy=[0.5] * len(pool), margin=[0.5] * len(pool))
    return write_batch(
        Mined(
            pool.table, said, dict(strategy='margin', run='r', pool='new', classes=['cat', 'dog'], unsure=unsure), {}
        ),
        pool,
        folder,
        format,
    )


def test_a_label_studio_batch_becomes_the_next_version(tmp_path, farm):
    d, pool = farm
    batch(tmp_path / 'b', pool, 'labelstudio')
    tasks = json.loads((tmp_path / 'b/labelstudio/tasks.json').read_text())
    assert 'value="dog"' in (tmp_path/'b/labelstudio/config.xml').read_text() and (tmp_path/'b/mined.csv').exists()
    with pytest.raises(BadInput, match='nobody'):
        import_into(tmp_path / 'b/labelstudio/tasks.json', tmp_path / 'farm', batch=tmp_path / 'b')
    (tmp_path/'notes.txt').write_text('nothing of use') # not a folder per class, though the images lie in one
    with pytest.raises(BadInput, match='no format'):
        import_into(tmp_path/'notes.txt', tmp_path/'farm', batch=tmp_path/'b')
    choice = lambda *v: [dict(type='choices', from_name='class', to_name='image', value=dict(choices=[c])) for c in v]
    for t, v in zip(tasks, [('dog',), ('horse',), ()]):
        t['annotations'] = [dict(completed_by=dict(email='ada'), result=choice(*v))]
    for t in tasks:
        t['data']['image'] = '/data/upload/3/12345678-' + t['data']['image'].rsplit('/', 1)[1].replace(
            '%20', '_'
        )  # as the server renames uploads
    (tmp_path / 'project.json').write_text(json.dumps(tasks))
    out, line = import_into(tmp_path / 'project.json', tmp_path / 'farm', batch=tmp_path / 'b', by='ada')
    now = load_dataset(tmp_path/'farm'); new = {r['id']: r for r in now.table.to_pylist() if r['id'].startswith('new')}
    assert (
        line['parent'] == d.version
        and line['added'] == 3
        and line['by'] == 'ada'
        and versions(tmp_path / 'farm')[-1]['version'] == now.version
        and out.undone == 1
    )
    assert [[(a['label'], a['annotator'], a['score']) for a in r['annotations']] for r in new.values()] == [
        [('dog', 'ada', None)],
        [('horse', 'ada', None)],
        [],
    ]  # the people's, not the model's; an empty answer is one
    assert all(
        r['split'] == 'train'
        and r['license'] == 'CC-BY-4.0'
        and dict(r['tags'])['light'] == 'night'
        and 'batch' in dict(r['tags'])
        and r['group']
        for r in new.values()
    )
    assert (
        now.classes == ['cat', 'dog', 'horse']
        and all(digest(now.read(r['uri'])) == r['sha256'] for r in now.table.to_pylist())
        and now.about['batches'][0]['run'] == 'r'
    )
    assert not len(free_items(now, pool.table.slice(0, 3))[0]) and golden_changes(tmp_path/'farm', now) == []


def test_a_cvat_batch_becomes_the_next_version(tmp_path, farm):
    d, pool = farm
    batch(tmp_path / 'b', pool, 'cvat')
    xml = (tmp_path / 'b/cvat/annotations.xml').read_text()
    assert xml.count('source="auto"') == 4
    one, rest = xml.split('<image id="1"', 1)
    xml = (
        one.replace('label="cat"', 'label="dog"').replace('source="auto"', 'source="manual"')
        + '<image id="1"'
        + rest.rsplit('<tag', 1)[0]
        + rest.rsplit('<tag', 1)[1].split('/>', 1)[1]
    )
    with zipfile.ZipFile(tmp_path/'job.zip', 'w') as z: z.writestr('annotations.xml', xml)
    out, line = import_into(tmp_path / 'job.zip', tmp_path / 'farm', batch=tmp_path / 'b')
    said = {r['id']: r['annotations'] for r in out.dataset.table.to_pylist()}
    assert (
        line['added'] == 3
        and out.undone == 1
        and out.untouched == 2
        and said['new-0'][0]['label'] == 'dog'
        and said['new-0'][0]['attributes'] is None
        and 'new-3' not in said
    )
    out, line = import_into(tmp_path / 'job.zip', tmp_path / 'farm', batch=tmp_path / 'b', empty=True)
    assert line['added'] == 1 and len(out.same) == 3 and out.undone == 0


def test_test_and_golden_items_stay_as_they_are(tmp_path, farm):
    d, _ = farm
    t = d.table.to_pylist()
    back = make_table(
        [dict(r, tags={}, split=None, annotations=[Annotation('horse')]) for r in t[:8]]
        + [dict(t[9], id='x', sha256='1' * 64, group=t[0]['group'], tags={}, annotations=[Annotation('cat')])]
    )
    out = absorb(d, back, 'b', held=[t[7]['sha256']]); now = {r['id']: r for r in out.dataset.table.to_pylist()}
    assert (
        out.relabelled == [r['id'] for r in t[4:7]]
        and len(out.left_out) == 6
        and out.left_out['x'] == 'its group is in test'
        and 'x' not in now
    )
    assert all(now[r['id']] == r for r in [*t[:4], *t[7:]]) and [now[r['id']]['split'] for r in t[4:7]] == [
        'val',
        'val',
        'train',
    ]


def test_images_outside_of_the_dataset(tmp_path, farm):
    d, pool = farm
    there = save_dataset(Dataset(d.table, 'far', d.root, d.classes), tmp_path / 'far')
    batch(tmp_path / 'b', pool, 'labelstudio')
    tasks = json.loads((tmp_path / 'b/labelstudio/tasks.json').read_text())
    for t in tasks: t['annotations'] = [dict(result=t['predictions'][0]['result'])]
    (tmp_path/'p.json').write_text(json.dumps(tasks))
    with pytest.raises(BadInput, match='outside'): import_into(tmp_path/'p.json', tmp_path/'far', batch=tmp_path/'b')
    assert load_dataset(tmp_path/'far').version == there.version
    import_into(tmp_path / 'p.json', tmp_path / 'far', batch=tmp_path / 'b', copy=True)
    now = load_dataset(tmp_path / 'far')
    assert (
        len(now) == 16
        and now.root == (tmp_path / 'far/images').resolve()
        and all(now.read(u) for u in now.table['uri'].to_pylist())
    )
