"Feedback: the truth about a prediction, kept beside the log, joined by the monitor; and the images that may be kept."

import asyncio, io, json, os, time

import httpx, numpy as np, pytest
from PIL import Image
from typer.testing import CliRunner

from cv_lab.client import AsyncClient, ServiceFault
from cv_lab.cli.monitor import app
from cv_lab.core import Annotation, digest
from cv_lab.data.dataset import Dataset, load_dataset, save_dataset
from cv_lab.data.manifest import make_table
from cv_lab.data.seen import forget, kept_embeddings, kept_images, seen_dataset
from cv_lab.geometry import rle_encode
from cv_lab.spec import Problem, Serving
from cv_lab.data.withdraw import withdraw
from cv_lab.monitor import read_log, read_truths, told, told_in_full
from cv_lab.service.app import Service
from cv_lab.service.models import folders, toy_model
from cv_lab.service.samples import Samples, clean_copy
from cv_lab.service.telemetry import PredictionLog


def grey(level):
    b = io.BytesIO()
    Image.new('L', (20, 20), level).save(b, 'PNG')
    return b.getvalue()


def session(folder, model, do):
    async def go():
        service = Service(folders(model), kept=PredictionLog(folder) if folder else None, poll=0)
        await service.start()
        try:
            async with AsyncClient('http://service', transport=httpx.ASGITransport(service)) as client:
                return await do(client)
        finally: await service.stop()

    return asyncio.run(go())


async def fault(asked):
    with pytest.raises(ServiceFault) as e: await asked
    return e.value.status, e.value.code


def test_truths_are_checked_kept_and_joined(tmp_path):
    model = toy_model(tmp_path / 'toy')
    log = tmp_path / 'log'

    async def first(client):
        ids = [(await client.predict(grey(level))).id for level in (10, 20, 220, 230)]
        kept = [await client.feedback(i, said) for i, said in zip(ids, ('dark', 'bright', 'dark'))]
        assert [k.prediction for k in kept] == ids[:3] and kept[0].problem == 'brightness'
        await client.feedback(ids[2], 'bright')  # corrected: the last counts
        await client.feedback(ids[2], 'bright')  # and again, after a broken line
        assert await fault(client.feedback('0' * 24, 'dark')) == (404, 'not_found')
        assert await fault(client.feedback(ids[0], 'grey')) == (422, 'bad_input')
        assert await fault(client.feedback(ids[0])) == (422, 'bad_input')
        assert await fault(client.feedback('../../x', 'dark')) == (422, 'bad_input')
        strange = [dict(bbox=b) for b in ([1, 1, 1, 5], [1, 2, 3], [0, 0, 'x', 1])]
        strange += [dict(mask=m) for m in ({}, dict(size='x'), dict(size=[10**9] * 2, counts='1'), dict(size=[4, 4], counts='zz'))]
        strange += [dict(polygon=p) for p in ([[]], [[1, 2, 3]], [[1, 2, 3, 4, 5, 6, 7]])]
        for bad in strange:
            wrong = client.feedback(ids[0], annotations=[dict(label='dark') | bad])
            assert await fault(wrong) == (422, 'bad_input')
        return ids

    ids = session(log, model, first)
    # another process: the prediction is found in the files
    session(log, model, lambda client: client.feedback(ids[3], annotations=[dict(label='bright')]))
    truths = read_truths(log)
    assert truths == {ids[0]: 'dark', ids[1]: 'bright', ids[2]: 'bright', ids[3]: ['bright']}
    lines = [json.loads(l) for f in log.glob('feedback-*') for l in f.read_text().splitlines()]
    assert len(lines) == 6 and all(l['digest'] == read_log(log)['digest'][0] for l in lines)
    seen = told(read_log(log), truths)
    assert (seen['n'].item(), seen['right'].item()) == (4, 0.75)


def test_without_a_log_nothing_can_be_told(tmp_path):
    model = toy_model(tmp_path / 'toy')
    assert session(None, model, lambda client: fault(client.feedback('0' * 24, 'dark'))) == (404, 'not_found')


# ---- images and embeddings

PROBLEM = """\
name: brightness
task: classification
classes: [dark, bright]
owner: a test
intended_use: a test
acceptance: [{metric: accuracy, at_least: 0.5}]
serving: {%s}
"""


def allowed(folder, serving, embedding=False):
    "A toy model whose problem file says what may be kept; with an output `embedding` if wanted."
    model = toy_model(folder)
    (model / 'problem.yaml').write_text(PROBLEM % serving)
    if embedding:
        import onnx
        graph = onnx.load(model / 'model.onnx')
        graph.graph.node.append(onnx.helper.make_node('Identity', ['m'], ['embedding']))
        graph.graph.output.append(onnx.helper.make_tensor_value_info('embedding', onnx.TensorProto.FLOAT, ['n']))
        onnx.save(graph, model / 'model.onnx')
    return model


async def ask_some(client, n=12):
    said = [await client.predict(grey(10 + 20 * i)) for i in range(n)]
    many = await client.predict_many([grey(5), grey(250)])
    assert not any('embedding' in a.model_dump_json() for a in [*said, many])
    return [a.id for a in [*said, *many.predictions]]


@pytest.mark.parametrize('serving', [None, '', 'keep_days: 5', 'keep_images: 0, keep_embeddings: 0'])
def test_nothing_is_written_where_the_problem_file_does_not_allow_it(tmp_path, serving):
    model = toy_model(tmp_path / 'toy') if serving is None else allowed(tmp_path / 'toy', serving, True)
    session(tmp_path / 'log', model, ask_some)
    assert [p.name.split('-')[0] for p in (tmp_path / 'log').rglob('*')] == ['predictions']
    assert 'sha256' not in next((tmp_path / 'log').glob('*')).read_text()


def test_what_the_problem_file_allows_is_kept_for_its_owner_alone(tmp_path):
    model = allowed(tmp_path / 'toy', 'keep_images: 1, keep_embeddings: 1', embedding=True)
    log = tmp_path / 'log'
    ids = session(log, model, ask_some)
    images, places = kept_images(log), kept_embeddings(log)
    assert sorted(images) == sorted(places) == sorted(ids)
    assert {oct(p.stat().st_mode & 0o777) for p in log.rglob('*') if p.is_file()} == {'0o600'}
    assert {oct(p.stat().st_mode & 0o777) for p in [log, *log.rglob('*')] if p.is_dir()} == {'0o700'}
    assert places[ids[3]] == [70] and Image.open(images[ids[3]]).getpixel((0, 0)) == (70, 70, 70)
    lines = {r['id']: r for f in log.glob('predictions-*') for r in map(json.loads, f.read_text().splitlines())}
    assert lines[ids[3]]['sha256'] == digest(grey(70)) and 'embedding' not in lines[ids[3]]


def test_a_graph_without_an_embedding_stores_none(tmp_path):
    ids = session(tmp_path / 'log', allowed(tmp_path / 'toy', 'keep_images: 1, keep_embeddings: 1'), ask_some)
    assert sorted(kept_images(tmp_path / 'log')) == sorted(ids) and not kept_embeddings(tmp_path / 'log')


def test_no_metadata_is_kept():
    exif, b = Image.Exif(), io.BytesIO()
    exif[0x010F], exif[0x8825] = 'somebody', {1: 'N', 2: (52.0, 31.0, 12.0)}
    Image.effect_noise((40, 30), 50).convert('RGB').save(
        b, 'JPEG', exif=exif, comment=b'secret', icc_profile=b'profile' * 30
    )
    for data in (b.getvalue() + b'behind the end', grey(3)):
        copy, suffix = clean_copy(data, 10_000)
        again = Image.open(io.BytesIO(copy))
        assert not again.getexif() and not {'exif', 'comment', 'icc_profile'} & again.info.keys()
        assert not any(w in copy for w in (b'somebody', b'secret', b'behind', b'profile'))


def test_samples_rotate_by_age_and_size_and_survive_a_disk_that_fails(tmp_path):
    ids = [digest(str(i))[:24] for i in range(60)]
    noise = io.BytesIO()
    Image.effect_noise((64, 64), 60).save(noise, 'PNG')
    s = Samples(tmp_path)
    for i in ids: s.add(i, 'p', Serving(keep_images=1, keep_mb=0.1), noise.getvalue(), 10_000)
    s.close(60)
    left = kept_images(tmp_path)
    assert 0 < sum(p.stat().st_size for p in left.values()) <= 1e5 and ids[-1] in left and ids[0] not in left
    old = next(iter(left.values()))
    os.utime(old, (0, time.time() - 3 * 86400))
    s = Samples(tmp_path)  # nothing more may be kept, and what is there goes by its age all the same
    s.follow('p', Serving(keep_days=2))
    s.close(60)
    assert not old.exists() and len(kept_images(tmp_path)) == len(left) - 1
    (tmp_path / 'samples/full').write_text('no folder can be made here')
    s = Samples(tmp_path)
    s.add(ids[0], 'full', Serving(keep_images=1), noise.getvalue(), 10_000)
    s.add(ids[1], 'p', Serving(keep_images=1), noise.getvalue(), 10_000)
    s.close(60)
    assert s.count.labels('image', 'failed')._value.get() == 1 and ids[1] in kept_images(tmp_path) and s.held == 0
    s = Samples(tmp_path, max_waiting=10)
    assert not s.add(ids[2], 'p', Serving(keep_images=1), noise.getvalue(), 10_000)
    assert s.count.labels('image', 'dropped')._value.get() == 1


def test_forgetting_takes_the_image_and_every_line(tmp_path):
    model, log = allowed(tmp_path / 'toy', 'keep_images: 1, keep_embeddings: 1', embedding=True), tmp_path / 'log'

    async def first(client):
        ids = await ask_some(client)
        await client.feedback(ids[0], 'dark')
        return ids

    ids = session(log, model, first)
    sizes = {p: p.stat().st_size for p in log.rglob('*.jsonl')}
    assert forget(log, [ids[0], 'f' * 24]) == dict(images=1, lines=3)
    assert not any(ids[0].encode() in p.read_bytes() or ids[0] in p.name for p in log.rglob('*') if p.is_file())
    assert sizes == {p: p.stat().st_size for p in log.rglob('*.jsonl')}
    assert len(kept_images(log)) == len(ids) - 1 == len(read_log(log))


def test_stored_images_become_a_dataset_without_those_that_are_known(tmp_path):
    log = tmp_path / 'log'
    ids = session(log, allowed(tmp_path / 'toy', 'keep_images: 1'), ask_some)
    session(log, allowed(tmp_path / 'toy', 'keep_images: 1'), lambda client: client.feedback(ids[2], 'bright'))
    d = seen_dataset(log, tmp_path / 'seen', known=frozenset([digest(grey(10)), digest(grey(30))]))
    assert d.table['id'].to_pylist() == sorted(set(ids) - set(ids[:2]))
    rows = {r['id']: r for r in d.table.to_pylist()}
    assert [(a['label'], a['annotator']) for a in rows[ids[2]]['annotations']] == [('bright', 'feedback')]
    assert all(digest(d.read(r['uri'])) == r['sha256'] for r in rows.values())


def test_from_the_service_to_the_next_version_and_out_again(tmp_path, monkeypatch):
    root = tmp_path / 'ws'
    (root / 'problems').mkdir(parents=True)
    (root / 'settings.ini').touch()
    monkeypatch.setenv('CVLAB_HOME', str(root))
    (root / 'data/greys/images').mkdir(parents=True)
    rows = []
    for split, level in (('train', 0), ('val', 40), ('test', 50)):
        (root / f'data/greys/images/{split}.png').write_bytes(grey(level))
        about = dict(split=split, sha256=digest(grey(level)), annotations=[Annotation('dark')], width=20, height=20)
        rows.append(dict(id=split, uri=f'{split}.png', **about))
    save_dataset(Dataset(make_table(rows), 'greys', root / 'data/greys/images', ['dark', 'bright']), root / 'data/greys')
    log, model = root / 'log', allowed(tmp_path / 'toy', 'keep_images: 1, keep_embeddings: 1', embedding=True)
    ids = session(log, model, ask_some)
    session(log, model, lambda client: client.feedback(ids[2], 'dark'))  # grey 50: an item of the test split
    session(log, model, lambda client: client.feedback(ids[9], 'bright'))
    run = CliRunner().invoke(app, ['seen', str(log), '--out', str(root / 'seen'), '--into', str(root / 'data/greys')])
    assert run.exit_code == 0, run.output
    now = load_dataset(root / 'data/greys').table.to_pylist()
    assert [r['id'] for r in now] == ['train', 'val', 'test', ids[9]] and now[3]['split'] == 'train'
    assert now[3]['annotations'][0]['label'] == 'bright' and ids[2] not in load_dataset(root / 'seen').table['id'].to_pylist()
    # the person in it takes back their consent: the log loses it too, also what was asked about a picture of the dataset
    withdraw(root, [ids[9], 'test'], datasets=[root / 'data/greys'], reason='asked', by='ada')
    left = [p for p in root.rglob('*') if p.is_file() and 'audit' not in p.parts]
    for gone in (ids[9], ids[2]): assert not any(gone in p.name or gone.encode() in p.read_bytes() for p in left)
    assert ids[5] in kept_images(log) and len(read_log(log)) == len(ids) - 2


# ---- boxes, masks and texts, by the task's own score

def logged(folder, said, true, problem='p', size=(60, 40)):
    about = [dict(id=f'{i:024x}', problem=problem, digest='d' * 64) for i in range(len(said))]
    lines = [a | dict(width=size[0], height=size[1], annotations=s) for a, s in zip(about, said)]
    folder.mkdir()
    (folder / 'predictions-1.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    (folder / 'feedback-1.jsonl').write_text('\n'.join(json.dumps(a | dict(annotations=t)) for a, t in zip(about, true)))
    return folder


def asked(task, primary, classes=('a', 'b')):
    return Problem(
        name='p', task=task, classes=list(classes), owner='o', intended_use='i', slices={'night': "light == 'night'"},
        metrics=dict(primary=primary, resamples=100), acceptance=[dict(metric=primary, at_least=0.5)],
    )


def test_boxes_are_matched_at_half_an_overlap(tmp_path):
    box = lambda x, label='a', **more: dict(label=label, bbox=[x, 0, x + 20, 20], **more)
    said = [[box(0, score=0.9)], [box(9, score=0.9)], [box(0, 'b', score=0.9)], [box(0, score=0.9), box(30, score=0.8)]]
    true = [[box(2)], [box(0)], [box(0)], [box(0)]]  # an overlap of .82; of .38; of another class; one that is not there
    seen = told_in_full(logged(tmp_path / 'log', said, true), asked('detection', 'precision')).iloc[0]
    assert (seen.n, seen.metric, seen.value) == (4, 'precision', 2 / 5) and seen.low <= 0.4 <= seen.high


def test_masks_and_texts_are_scored_by_their_task(tmp_path):
    page = np.zeros((40, 60), bool)
    page[:20] = True
    half = page.copy()
    half[10:20] = False
    mask = lambda m, **more: dict(label='a', mask=rle_encode(m), **more)
    log = logged(tmp_path / 'masks', [[mask(page, score=0.9)], [mask(half, score=0.9)]], [[mask(page)], [mask(page)]])
    seen = told_in_full(log, asked('segmentation', 'mean_iou', ['a'])).iloc[0]
    assert seen.n == 2 and seen.value == pytest.approx(0.75, abs=0.01)
    line = lambda text, **more: dict(text=text, bbox=[0, 0, 50, 20], **more)
    log = logged(tmp_path / 'texts', [[line('1234', score=0.9)], [line('1239', score=0.9)]], [[line('1234')], [line('1234')]])
    assert told_in_full(log, asked('reading', 'cer', list('0123456789'))).iloc[0].value == pytest.approx(1 / 8)


def test_answers_are_kept_in_full_only_where_that_is_allowed(tmp_path):
    line = lambda folder: json.loads(next(folder.glob('predictions-*')).read_text().splitlines()[0])
    for name, serving in (('yes', 'keep_answers: true'), ('no', '')):
        session(tmp_path / name, allowed(tmp_path / f'toy {name}', serving), ask_some)
    assert line(tmp_path / 'yes')['annotations'][0]['label'] == 'dark' and line(tmp_path / 'yes')['width'] == 20
    assert 'annotations' not in line(tmp_path / 'no') and 'width' not in line(tmp_path / 'no')
