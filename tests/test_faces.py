"Faces: found where they are, hidden for good, nothing else touched."
import numpy as np, pyarrow.parquet as pq, pytest
from PIL import Image
from skimage import data as skdata
from typer.testing import CliRunner

from cv_lab.core import BadInput
from cv_lab.data.files import look
from cv_lab.data.manifest import Dataset, load_dataset, make_table, save_dataset
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
    from cv_lab.data.formats import import_dataset

    (tmp_path / 'problems').mkdir()
    (tmp_path / 'settings.ini').touch()
    monkeypatch.setenv('CVLAB_HOME', str(tmp_path))
    run = lambda *a: CliRunner().invoke(app, ['faces', str(tmp_path / 'd'), *map(str, a)], catch_exceptions=False)
    assert (
        '1 boxes in 1 of 2 pictures' in run('--box', tmp_path / 'batch').stdout
        and len(pq.read_table(tmp_path / 'd/faces.parquet')) == 2
    )
    import_dataset(tmp_path / 'batch', 'labelstudio', tmp_path / 'checked', workers=1)
    checked = load_dataset(tmp_path / 'checked')
    t = (
        checked.table
        if any(checked.table['annotations'].to_pylist())
        else pq.read_table(tmp_path / 'checked/predictions.parquet')
    )
    pq.write_table(t, tmp_path / 'boxes.parquet')
    assert (
        load_dataset(tmp_path / 'd').version == people.version
        and 'hidden, version' in run('--boxes', tmp_path / 'd/faces.parquet', '--hide').stdout
        and load_dataset(tmp_path / 'd').version != people.version
    )
