"What all imports share: files, faults, archives, splits, speed-neutral looks, the command line."
import io, json, os, shutil, tarfile, zipfile
import numpy as np, pandas as pd, pytest
from PIL import Image, ImageOps
from typer.testing import CliRunner

from cv_lab.cli.data import app
from cv_lab.core import BadInput, file_digest
from cv_lab.data.files import Source, look, look_all, unpack
from cv_lab.data.exports import export_dataset
from cv_lab.data.imports import Quarantined, import_dataset
from cv_lab.data.dataset import load_dataset
from cv_lab.data.groups import shared_groups
from cv_lab.image import decode

rng = np.random.default_rng(0)


def put(path, arr=None, seed=None, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    r = np.random.default_rng(seed if seed is not None else abs(hash(str(path))) % 2**32)
    Image.fromarray(r.integers(0, 255, (20, 30, 3), np.uint8) if arr is None else arr).save(path, **kw)
    return path


def every_kind(root):
    "All file formats and pixel modes that are promised."
    exif = Image.Exif(); exif[0x0112] = 6
    rgb = Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8))
    grey, root = rgb.convert('L'), root/'a'
    root.mkdir(parents=True)
    for name, im, kw in [
        ('rgb.JPG', rgb, {}),
        ('rgb.Jpeg', rgb, dict(exif=exif)),
        ('rgb.png', rgb, dict(exif=exif)),
        ('rgb.WebP', rgb, dict(exif=exif)),
        ('rgb.bmp', rgb, {}),
        ('pal.gif', rgb.convert('P'), {}),
        ('grey.png', grey, {}),
        ('grey.jpg', grey, {}),
        ('rgba.png', rgb.convert('RGBA'), {}),
        ('pal.png', rgb.convert('P'), {}),
        ('one.png', grey.convert('1'), {}),
        ('cmyk.jpg', rgb.convert('CMYK'), {}),
        ('la.png', rgb.convert('LA'), {}),
        ('sixteen.png', Image.fromarray(rng.integers(0, 65535, (20, 30), np.uint16)), {}),
        ('Größe 犬.png', rgb, {}),
    ]:
        im.save(root/name, **kw)
    return root.parent


def test_every_kind_of_file_has_the_upright_size_that_decode_sees(tmp_path):
    r = import_dataset(every_kind(tmp_path/'src'), 'imagefolder', tmp_path/'out')
    rows = r.dataset.table.to_pylist()
    assert len(rows) == 15 and not len(r.quarantine)
    for row in rows:
        assert decode(r.dataset.read(row['uri'])).shape[:2] == (row['height'], row['width']), row['uri']
        assert row['sha256'] == file_digest(tmp_path/'src'/row['uri'])
    assert {r['uri']: r['width'] for r in rows}['a/rgb.Jpeg'] == 20


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('fmt', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
def test_orientation(fmt, orientation):
    e = Image.Exif(); e[0x0112] = orientation; f = io.BytesIO()
    im = Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)); im.save(f, fmt, exif=e)
    l = look(f.getvalue())
    assert (l.width, l.height) == ImageOps.exif_transpose(Image.open(f)).size and not l.fault


@pytest.mark.parametrize('cut', [.02, .3, .6, .95])
def test_what_is_cut_short_is_found_whatever_its_format(cut):
    im = Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8))
    for fmt in ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF'):
        f = io.BytesIO(); im.save(f, fmt); data = f.getvalue()
        assert not look(data).fault and look(data[:int(len(data)*cut)]).fault, fmt


@pytest.mark.parametrize(
    'top', [('train', 'val', 'test'), ('Training', 'valid', 'Testing'), ('TRAIN', 'validation', 'test')]
)
def test_split_folders(tmp_path, top):
    for s in top:
        for c in ('cat', 'dog'): put(tmp_path/'src'/s/c/f'{s}.png')
    put(tmp_path/'src/other/cat/x.png')
    r = import_dataset(tmp_path/'src', 'imagefolder', tmp_path/'out')
    assert r.tally['splits'] == dict(train=2, val=2, test=2) and r.dataset.classes == ['cat', 'dog']
    assert r.tally['left_out'] == {'lies beside the split folders': 1}


def test_items_without_a_split_get_one_and_copies_stay_together(tmp_path):
    for i in range(40):
        p = put(tmp_path/'src'/f'c{i % 4}'/f'{i}.png', seed=i)
        if i % 3 == 0: shutil.copy(p, p.with_name(f'copy{i}.png'))
    r = import_dataset(tmp_path/'src', 'imagefolder', tmp_path/'out')
    assert set(r.tally['splits']) == {'train', 'val', 'test'} and not shared_groups(r.dataset.table)
    assert import_dataset(tmp_path / 'src', 'imagefolder', tmp_path / 'o2', splits='keep').tally['splits'] == {
        'unsplit': 54
    }


@pytest.mark.parametrize('name', ['a.tif', 'A.TIFF', 'deep/page.tif', 'lies.png'])
def test_a_tiff_of_one_page_comes_in_and_one_of_two_is_named(tmp_path, name):
    src = tmp_path / 'src'; good, grey = src / f'cat/{name}', Image.new('I;16', (30, 20), 900)
    good.parent.mkdir(parents=True)
    grey.save(good, 'TIFF', compression='tiff_lzw')
    grey.save(src / 'cat/two.tif', 'TIFF', save_all=True, append_images=[grey])
    r = import_dataset(src, 'imagefolder', tmp_path / 'out', copy=True)
    assert r.dataset.table['id'].to_pylist() == [f'cat/{name}'] and (decode(r.dataset.read(r.dataset.table['uri'][0].as_py())) == 4).all()
    (row,) = r.quarantine.to_dict('records')
    assert row['item'] == 'cat/two.tif' and row['reason'] == 'an image format that is not read'
    assert row['detail'].startswith('TIFF, it has several pages: save it as PNG')
    (src / 'labels.csv').write_text(f'image,label\ncat/{name},cat\ncat/two.tif,cat\n')  # from a file of labels too
    r = import_dataset(src / 'labels.csv', 'csv', tmp_path / 'out2')
    assert len(r.dataset) == 1 and 'it has several pages' in r.quarantine['detail'].str.cat()


def test_faults_are_set_aside_with_a_reason(tmp_path):
    src = tmp_path/'src'; good = put(src/'cat/good.png')
    (src / 'cat/empty.jpg').write_bytes(b'')
    (src / 'cat/text.png').write_text('no image')
    (src / 'cat/cut.png').write_bytes(good.read_bytes()[:-50])
    (src/'cat/photo.heic').write_bytes(b'x'); (tmp_path/'secret.png').write_bytes(good.read_bytes())
    (src / 'cat/out.png').symlink_to(tmp_path / 'secret.png')
    (src / 'cat/in.png').symlink_to(good)
    (src / 'cat/gone.png').symlink_to(src / 'nowhere.png')
    (src/'loop').symlink_to(src); (src/'.hidden.png').write_bytes(b'x'); (src/'readme.txt').write_text('x')
    r = import_dataset(src, 'imagefolder', tmp_path/'out')
    assert sorted(r.dataset.table['id'].to_pylist()) == ['cat/good.png', 'cat/in.png']
    why = dict(zip(r.quarantine['item'], r.quarantine['reason']))
    assert why == {
        'cat/empty.jpg': 'empty file',
        'cat/text.png': 'not an image that is read',
        'cat/cut.png': 'cannot be decoded',
        'cat/photo.heic': 'an image format that is not read',
        'cat/out.png': 'link leads out of the folder',
        'cat/gone.png': 'link leads nowhere',
    }
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/'out/quarantine.csv', keep_default_na=False), r.quarantine)
    with pytest.raises(Quarantined) as e: import_dataset(src, 'imagefolder', tmp_path/'strict', strict=True)
    assert (
        e.value.exit_code == 3
        and not (tmp_path / 'strict/dataset.json').exists()
        and (tmp_path / 'strict/quarantine.csv').exists()
    )


def test_twice_is_once(tmp_path):
    for i in range(6): put(tmp_path/f'src/c{i % 2}/{i}.png')
    one = import_dataset(tmp_path / 'src', 'imagefolder', tmp_path / 'out')
    was = {p: p.read_bytes() for p in (tmp_path / 'out').rglob('*')}
    two = import_dataset(tmp_path/'src', 'imagefolder', tmp_path/'out')
    assert one.dataset.version == two.dataset.version and was == {
        p: p.read_bytes() for p in (tmp_path / 'out').rglob('*')
    }


def test_copied_images_outlive_the_source(tmp_path):
    put(tmp_path/'src/a/1.png'); put(tmp_path/'src/b/2.png')
    stays = import_dataset(tmp_path/'src', 'imagefolder', tmp_path/'out'); assert stays.dataset.root == tmp_path/'src'
    import_dataset(tmp_path/'src', 'imagefolder', tmp_path/'out', copy=True); shutil.rmtree(tmp_path/'src')
    shutil.move(tmp_path/'out', tmp_path/'moved'); d = load_dataset(tmp_path/'moved')
    assert all(d.read(u) for u in d.table['uri'].to_pylist())


@pytest.mark.parametrize('kind', ['zip', 'tar', 'tar.gz'])
def test_archives(tmp_path, kind):
    put(tmp_path/'src/pets/a/1.png'); put(tmp_path/'src/pets/b/2.png')
    archive = shutil.make_archive(str(tmp_path/'pets'), {'tar.gz': 'gztar'}.get(kind, kind), tmp_path/'src')
    for _ in range(2): r = import_dataset(archive, 'imagefolder', tmp_path/'out')
    assert r.dataset.classes == ['a', 'b'] and r.dataset.root.is_relative_to(tmp_path/'out')


def test_archives_that_would_escape_are_refused_whole(tmp_path, monkeypatch):
    monkeypatch.setattr('cv_lab.data.files.UNPACKED', 1 << 20)
    def tar(name, **kw):
        with tarfile.open(tmp_path/'x.tar', 'w') as t:
            i = tarfile.TarInfo(name)
            for k, v in kw.items(): setattr(i, k, v)
            t.addfile(i)
        return tmp_path/'x.tar'
    with zipfile.ZipFile(tmp_path/'x.zip', 'w') as z: z.writestr('a/ok.png', b'x'); z.writestr('../out.png', b'x')
    bomb = tmp_path/'bomb.zip'
    with zipfile.ZipFile(bomb, 'w', zipfile.ZIP_DEFLATED) as z:
        with z.open('zeros', 'w') as f:
            for _ in range(4): f.write(bytes(1 << 20))
    (tmp_path/'torn.zip').write_bytes(bomb.read_bytes()[:300])
    for bad in (
        tmp_path / 'x.zip',
        bomb,
        tmp_path / 'torn.zip',
        tar('../../x'),
        tar('/etc/x'),
        tar('l', type=tarfile.SYMTYPE, linkname='/etc'),
        tar('d', type=tarfile.CHRTYPE),
    ):
        with pytest.raises(BadInput): unpack(bad, tmp_path/'into')
    assert not (tmp_path / 'out.png').exists() and not list(
        (tmp_path / 'into').glob('*/*') if (tmp_path / 'into').exists() else []
    )


def test_many_files_are_looked_at_in_order_by_all_cores(tmp_path):
    paths = [put(tmp_path/f'{i}.png', np.full((4, 4 + i % 50, 3), i % 256, np.uint8)) for i in range(1100)]
    many = list(look_all(paths, 2))
    assert many == list(look_all(paths, 1)) and [l.width for l in many] == [4 + i % 50 for i in range(1100)]


def test_a_name_is_found_however_it_is_written(tmp_path):
    for n in ('a/x.JPG', 'b/x.JPG', 'b/y.png', 'c/d/é.png'): put(tmp_path/n, format='PNG')
    s = Source(tmp_path)
    assert (
        s.locate('A\\X.jpg') == 'a/x.JPG' and s.locate('x.jpg') is None and s.locate('x.jpg', near=['b']) == 'b/x.JPG'
    )
    assert s.locate('D:\\data\\b\\x.jpg') == 'b/x.JPG' and s.locate('y', suffix=False) == 'b/y.png'
    assert (
        s.locate('e\u0301.png') == 'c/d/é.png'
        and s.locate('../../../etc/passwd') is None
        and s.locate('/etc/y.png') == 'b/y.png'
    )


def test_nothing_there_is_said(tmp_path):
    (tmp_path/'empty').mkdir()
    for bad in (tmp_path/'nowhere', tmp_path/'empty'):
        with pytest.raises(BadInput): import_dataset(bad, 'imagefolder', tmp_path/'out')
    with pytest.raises(BadInput, match='no format'): import_dataset(tmp_path/'empty', 'nonsense', tmp_path/'out')
    put(tmp_path/'src/a/1.png')
    with pytest.raises(BadInput, match='no option wrong'):
        import_dataset(tmp_path / 'src', 'imagefolder', tmp_path / 'out', wrong=1)


def test_an_export_is_whole_or_not_there(tmp_path):
    put(tmp_path / 'src/a/1.png')
    put(tmp_path / 'src/b/2.png')
    d = import_dataset(tmp_path / 'src', 'imagefolder', tmp_path / 'out').dataset
    os.remove(tmp_path/'src/b/2.png')
    with pytest.raises(BadInput): export_dataset(d, 'imagefolder', tmp_path/'dst')
    assert not (tmp_path/'dst').exists() and not list(tmp_path.glob('.dst*'))
    (tmp_path/'full').mkdir(); (tmp_path/'full/x').write_text('mine')
    with pytest.raises(BadInput, match='not empty'): export_dataset(d, 'imagefolder', tmp_path/'full')
    with pytest.raises(BadInput, match='nothing to export'):
        export_dataset(tmp_path / 'out', 'imagefolder', tmp_path / 'dst', split='golden')


def test_the_command_line(tmp_path):
    for i in range(4): put(tmp_path/f'src/c{i % 2}/{i}.png')
    run = lambda *a: CliRunner().invoke(app, [str(v) for v in a])
    r = run('import', tmp_path/'src', '--format', 'imagefolder', '--out', tmp_path/'out', '--json')
    assert r.exit_code == 0 and json.loads(r.stdout)['items'] == 4 and json.loads(r.stdout)['classes'] == ['c0', 'c1']
    assert 'images in 2 folders' in run('import', tmp_path/'src', '--out', tmp_path/'out').stdout
    assert (
        run('export', tmp_path / 'out', '-f', 'imagefolder', '--out', tmp_path / 'dst').exit_code == 0
        and len(list((tmp_path / 'dst').rglob('*.png'))) == 4
    )
    (tmp_path/'src/c0/bad.jpg').write_text('x')
    assert isinstance(run('import', tmp_path/'src', '--out', tmp_path/'out', '--strict').exception, Quarantined)
    with pytest.raises(BadInput, match='is a dataset of this workspace already') as said:
        import_dataset(tmp_path / 'out', out=tmp_path / 'again')
    assert f'cvlab data check {tmp_path / "out"}' in said.value.mend and not (tmp_path / 'again/dataset.json').exists()
    (tmp_path / 'other').mkdir(); (tmp_path / 'other/dataset.json').write_text('[]')
    with pytest.raises(BadInput, match='in no format that is known'):
        import_dataset(tmp_path / 'other', out=tmp_path / 'again')
    assert run('import', '--help').exit_code == 0 and 'imagefolder' in run('formats').stdout
