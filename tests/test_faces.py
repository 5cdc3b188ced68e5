"Faces: found where they are, hidden for good, nothing else touched."
import json

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from PIL import Image
from skimage import data as skdata
from typer.testing import CliRunner

from cv_lab.audit import Sealed
from cv_lab.core import Annotation, BadInput
from cv_lab.data.files import look
from cv_lab.data.dataset import Dataset, load_dataset, save_dataset
from cv_lab.data.manifest import make_table
from cv_lab.data.privacy import boxes_of, cover, find_faces, find_people, hide, hide_dataset
from cv_lab.image import decode


@pytest.fixture
def people(tmp_path):
    rows = []; (tmp_path/'d/images').mkdir(parents=True)
    for name, px in dict(astronaut=skdata.astronaut()[:300], coffee=skdata.coffee()[:200, :300]).items():
        p = tmp_path / f'd/images/{name}.jpg'
        Image.fromarray(px).save(p, quality=95)
        s = look(p.read_bytes())
        rows.append(dict(id=name, uri=p.name, sha256=s.sha256, width=s.width, height=s.height))
    return save_dataset(Dataset(make_table(rows), 'd', tmp_path/'d/images'), tmp_path/'d')


def test_a_face_is_found_and_a_cup_is_none(people):
    found = boxes_of(find_people(people)); assert len(found['astronaut']) == 1 and not found['coffee']
    label, (x1, y1, x2, y2) = found['astronaut'][0]
    assert label == 'face' and 160 < x1 < 200 and 50 < y1 < 90 and 250 < x2 < 290 and 150 < y2 < 200


@pytest.mark.parametrize('how', ['pixelate', 'fill'])
def test_little_stays_inside_and_all_outside(how):
    rng = np.random.default_rng(0)
    px = rng.integers(0, 255, (120, 160, 3), np.uint8)
    box = [40, 30, 100, 90]
    out = hide(px, [box], how)
    x1, y1, x2, y2 = cover(box, 160, 120)
    inside = np.zeros((120, 160), bool)
    inside[y1:y2, x1:x2] = True
    assert (out[~inside] == px[~inside]).all() and (x1, y1, x2, y2) == (28, 18, 112, 102)
    other = px.copy()
    other[inside] = px[inside][::-1]  # the same colours in another order: nothing fine may stay of it
    left = np.abs(np.fft.fft2(out[y1:y2, x1:x2].astype(float).mean(2)))[8:-8, 8:-8].max()
    was = np.abs(np.fft.fft2(px[y1:y2, x1:x2].astype(float).mean(2)))[8:-8, 8:-8].max()
    assert left < 0.02 * was
    if how == 'fill':
        assert len(np.unique(out[inside], axis=0)) == 1 and (hide(other, [box], how)[inside] == out[inside]).all()
    assert hide(px, [[-50, -50, 500, 500]], how).shape == px.shape and (hide(px, [], how) == px).all()


def test_a_dataset_is_hidden_as_a_version(people, tmp_path):
    before = {r['id']: decode(people.read(r['uri'])) for r in people.table.to_pylist()}
    boxes = {'astronaut': [('face', [180, 60, 270, 180]), ('plate', [10, 250, 60, 270])]}
    line = hide_dataset(tmp_path / 'd', boxes, by='Ada')
    d = load_dataset(tmp_path / 'd')
    uri = dict(zip(d.table['id'].to_pylist(), d.table['uri'].to_pylist()))
    assert line['version'] == d.version != people.version
    assert uri == dict(astronaut='astronaut.png', coffee='coffee.jpg') and sorted(
        p.name for p in (tmp_path / 'd/images').iterdir()
    ) == ['astronaut.png', 'coffee.jpg']
    now = decode(d.read('astronaut.png')); mask = np.zeros(now.shape[:2], bool)
    for _, b in boxes['astronaut']: x1, y1, x2, y2 = cover(b, 512, 300); mask[y1:y2, x1:x2] = True
    assert (
        (now[~mask] == before['astronaut'][~mask]).all()
        and not find_faces(now)
        and len(np.unique(now[250:270, 10:60].reshape(-1, 3), axis=0)) == 1
    )
    with pytest.raises(BadInput, match='not in the dataset'):
        hide_dataset(tmp_path / 'd', dict(nobody=[('face', [1, 2, 3, 4])]))


def test_the_command_finds_shows_and_hides(people, tmp_path, monkeypatch):
    from cv_lab.cli.data import app

    (tmp_path / 'problems').mkdir()
    (tmp_path / 'settings.ini').touch()
    monkeypatch.setenv('CVLAB_HOME', str(tmp_path))
    run = lambda *a: CliRunner().invoke(app, ['faces', str(tmp_path / 'd'), *map(str, a)], catch_exceptions=False)
    assert (
        '1 boxes in 1 of 2 pictures' in run('--box', tmp_path / 'batch').stdout
        and len(pq.read_table(tmp_path / 'd/faces.parquet')) == 2
    )
    assert (
        load_dataset(tmp_path / 'd').version == people.version
        and 'hidden, version' in run('--boxes', tmp_path / 'd/faces.parquet', '--hide').stdout
        and load_dataset(tmp_path / 'd').version != people.version
    )


@pytest.fixture
def faces(tmp_path, people, monkeypatch):
    "`cvlab data faces` on a dataset that says other things too, and has one picture twice."
    from cv_lab.cli.data import app

    (tmp_path / 'problems').mkdir()
    (tmp_path / 'settings.ini').touch()
    monkeypatch.setenv('CVLAB_HOME', str(tmp_path))
    rows = people.table.to_pylist()
    (tmp_path / 'd/images/again.jpg').write_bytes(people.read('astronaut.jpg'))
    rows.append(dict(rows[0], id='again', uri='again.jpg'))
    for r in rows: r['annotations'] = [Annotation('whole', [0, 0, r['width'], r['height']])]
    save_dataset(Dataset(make_table(rows), 'd', people.root, ['whole']), tmp_path / 'd')
    return lambda *a: CliRunner().invoke(app, ['faces', str(tmp_path / 'd'), *map(str, a)], catch_exceptions=False)


def one_colour(folder, uri, box): # how many colours stay in it
    x1, y1, x2, y2 = box
    return len(np.unique(decode(load_dataset(folder).read(uri))[y1:y2, x1:x2].reshape(-1, 3), axis=0))


@pytest.mark.parametrize('kind', ['csv', 'coco', 'voc'])
def test_plates_are_hidden_by_anybodys_boxes(faces, tmp_path, kind):
    box, other = [10, 250, 60, 270], [100, 20, 140, 60]
    said = tmp_path / kind
    said.mkdir()
    if kind == 'csv':
        said /= 'plates.csv'
        said.write_text(
            'image,label,xmin,ymin,xmax,ymax,score\n'
            + ''.join(f'astronaut.jpg,{n},{",".join(map(str, b))},.8\n' for n, b in (('EU plate', box), ('dog', other)))
        )
    elif kind == 'coco':
        said /= 'plates.json'
        xywh = lambda b: [b[0], b[1], b[2] - b[0], b[3] - b[1]]
        anns = [dict(id=k, image_id=1, category_id=k, bbox=xywh(b)) for k, b in ((1, box), (2, other))]
        cats = [dict(id=1, name='EU plate'), dict(id=2, name='dog')]
        images = [dict(id=1, file_name='astronaut.jpg', width=512, height=300)]
        said.write_text(json.dumps(dict(images=images, categories=cats, annotations=anns)))
    else:
        part = '<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>'
        (said / 'Annotations').mkdir()
        (said / 'Annotations/astronaut.xml').write_text(
            '<annotation><filename>astronaut.jpg</filename><size><width>512</width><height>300</height></size>'
            + part.format('EU plate', 11, 251, 60, 270)
            + part.format('dog', 101, 21, 140, 60)
            + '</annotation>'
        )
    r = faces('--boxes', said, '--label', 'EU plate', '--hide', '--who', 'Ada', '--json')
    done = json.loads(r.stdout)
    assert done['boxes'] == 2 and done['items'] == 2 and done['version'] == load_dataset(tmp_path / 'd').version
    for uri in ('astronaut.png', 'again.png'):  # the copy too, though only one of them was named
        assert one_colour(tmp_path / 'd', uri, box) == 1 and one_colour(tmp_path / 'd', uri, other) > 50
    line = [e for e in Sealed(tmp_path / 'audit/log.jsonl').read() if e['event'] == 'hide'][-1]
    assert line['by'] == 'Ada' and line['taken_from'] == str(said) and line['labels'] == ['EU plate']


def test_boxes_that_cannot_be_placed_are_refused(faces, tmp_path):
    from cv_lab.data.privacy import read_boxes

    d, said = load_dataset(tmp_path / 'd'), tmp_path / 'plates.csv'
    head, good = 'image,label,xmin,ymin,xmax,ymax\n', 'astronaut.jpg,plate,10,250,60,270\n'
    for row, why in (('nobody.jpg,plate,1,2,30,40\n', 'image is missing 1'), ('coffee.jpg,plate,a,2,30,40\n', '1')):
        said.write_text(head + good + row)
        with pytest.raises(BadInput, match=why): read_boxes(said, d)
        with pytest.raises(BadInput): faces('--boxes', said, '--hide')
    for path, why in ((tmp_path / 'none.csv', 'not there'), (tmp_path / 'x.parquet', 'columns a')):
        if path.suffix == '.parquet': pq.write_table(pa.table(dict(a=[1])), path)
        with pytest.raises(BadInput, match=why): read_boxes(path, d)
    assert load_dataset(tmp_path / 'd').version == d.version
    said.write_text(head + good + 'coffee.jpg,plate,900,2,990,40\n')  # outside of the picture: there is nothing to hide
    assert read_boxes(said, d)[1] == 0


def test_a_corrected_batch_comes_back_for_hiding(faces, tmp_path):
    assert '2 boxes in 2 of 3 pictures; for correction' in faces('--box', tmp_path / 'batch').stdout
    tasks = {t['data']['image'].rsplit('/')[-1]: t for t in json.loads((tmp_path / 'batch/tasks.json').read_text())}
    assert not any(t['annotations'] for t in tasks.values())  # what else the dataset says is not to be hidden
    assert '<RectangleLabels' in (tmp_path / 'batch/config.xml').read_text() and 'face' in (
        tmp_path / 'batch/config.xml'
    ).read_text()
    drawn = dict(x=10, y=50, width=20, height=25, rectanglelabels=['face'])  # a cup that a person takes for a face
    entry = dict(id='n', type='rectanglelabels', from_name='box', to_name='image', original_width=300, original_height=200)
    tasks['coffee.jpg']['annotations'] = [dict(completed_by=1, result=[entry | dict(value=drawn)])]
    tasks['astronaut.jpg']['annotations'] = [dict(completed_by=1, result=[])]  # no face, says the person
    (tmp_path / 'project-7.json').write_text(json.dumps([tasks['coffee.jpg'], tasks['astronaut.jpg'], tasks['again.jpg']]))
    r = faces('--boxes', tmp_path / 'project-7.json', '--hide', '--how', 'fill').stdout
    assert '1 boxes in 1 of 3 pictures; hidden' in r and 'NOT LOOKED AT by anybody yet: 1 pictures' in r
    d = load_dataset(tmp_path / 'd')
    assert d.table['uri'].to_pylist() == ['astronaut.jpg', 'coffee.png', 'again.jpg']
    assert one_colour(tmp_path / 'd', 'coffee.png', [30, 100, 90, 150]) == 1
    assert {a['label'] for v in d.table['annotations'].to_pylist() for a in v} == {'whole'}


def test_a_corrected_cvat_batch_comes_back_too(faces, tmp_path):
    assert 'for correction' in faces('--box', tmp_path / 'batch', '--format', 'cvat').stdout
    (xml,) = (tmp_path / 'batch').rglob('*.xml')
    text = xml.read_text()
    assert text.count('<box ') == 2 and 'whole' not in text
    (tmp_path / 'annotations.xml').write_text(text)
    r = faces('--boxes', tmp_path / 'annotations.xml', '--hide')
    assert '2 boxes in 2 of 3 pictures; hidden' in r.stdout
    with pytest.raises(BadInput, match='labelstudio or cvat'): faces('--box', tmp_path / 'b2', '--format', 'coco')
