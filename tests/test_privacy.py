"Privacy and governance: planted metadata, terms and faces; tampered logs; kills in the middle."
import io, json, os, subprocess, sys
from datetime import date, timedelta
from pathlib import Path

import numpy as np, pyarrow.parquet as pq, pytest
from PIL import Image

from cv_lab.audit import Sealed, log_of, record
from cv_lab.core import Annotation, BadInput, digest, read_json, write_atomic
from cv_lab.data.files import look
from cv_lab.data.dataset import Dataset, load_dataset, save_dataset
from cv_lab.data.manifest import SCHEMA, make_table
from cv_lab.data.metadata import strip, told
from cv_lab.data.rewrite import strip_dataset
from cv_lab.data.terms import expired, refuse_terms, set_terms
from cv_lab.data.versions import freeze_golden, golden_changes, open_version
from cv_lab.image import decode, open_image
from cv_lab.spec import DataRules

PLANTED = [b'Lovelace', b'SN-4711', b'garden', b'Canon-Maker']
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF exif:GPSLatitude="52,31N" dc:creator="Lovelace"/></x:xmpmeta>'


def picture(seed=0, h=40, w=56):
    return Image.fromarray(
        np.kron(
            np.random.default_rng(seed).integers(0, 255, (h // 8, w // 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8)
        )
    )


def exif(turn):
    e = Image.Exif(); e[0x0112] = turn; e[0x013B] = 'Ada Lovelace'; e[0x010E] = 'in the garden'
    e.get_ifd(0x8825).update({1: 'N', 2: (52.0, 31.0, 12.0)})
    e.get_ifd(0x8769).update({0xA431: 'SN-4711', 0x927C: b'Canon-Maker'})
    return e


def planted(kind, turn, seed=0):
    out = io.BytesIO(); im = picture(seed); more = dict(exif=exif(turn))
    if kind == 'GIF':
        im.quantize().save(
            out, 'GIF', comment=b'Lovelace in the garden', save_all=True, append_images=[picture(9).quantize()], loop=0
        )
        return out.getvalue()
    if kind == 'MPO':
        im.save(out, 'MPO', save_all=True, append_images=[picture(9)], exif=exif(turn))
        return out.getvalue() + b'a film of the garden'
    if kind == 'JPEG': more |= dict(quality=85, progressive=turn % 2 == 0, comment=b'the garden', xmp=XMP)
    if kind == 'WEBP': more |= dict(xmp=XMP, quality=70)
    if kind == 'PNG':
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text('Author', 'Lovelace', zip=False)
        info.add_itxt('XML:com.adobe.xmp', XMP.decode())
        more |= dict(pnginfo=info)
    im.save(out, kind, **more); data = out.getvalue()
    if kind == 'JPEG':
        data = (
            data[:2]
            + b'\xff\xed\0\x2a'
            + b'Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\x0eLovelace......'[:40].ljust(40, b'.')
            + data[2:]
            + b'\xff\xd8 the garden again'
        )
    return data


@pytest.mark.parametrize('kind', ['JPEG', 'MPO', 'PNG', 'WEBP', 'GIF'])
@pytest.mark.parametrize('turn', [1, 3, 6])
def test_nothing_is_left_and_no_pixel_changes(kind, turn):
    data = planted(kind, turn); assert told(open_image(data)) and any(p in data for p in PLANTED)
    new = strip(data)
    assert not [p for p in PLANTED if p in new] and not told(open_image(new))
    assert np.array_equal(decode(new), decode(data)) and strip(new) == new
    e = Image.open(io.BytesIO(new)).getexif()
    assert (
        dict(e) == ({} if turn == 1 or kind == 'GIF' else {0x0112: turn})
        and not e.get_ifd(0x8825)
        and not e.get_ifd(0x8769)
    )
    if kind == 'GIF': assert Image.open(io.BytesIO(new)).n_frames == 2


@pytest.mark.parametrize('how', [dict(), dict(byteorder='>'), dict(tile=(16, 32)), dict(compression='zlib', predictor=True)])
@pytest.mark.parametrize('shape, kind', [((50, 70), 'uint16'), ((50, 70, 3), 'uint8'), ((50, 70, 3), 'uint16')])
def test_a_tiff_keeps_its_pixels_as_they_are_packed_and_tells_nothing(how, shape, kind):
    tifffile, out = pytest.importorskip('tifffile'), io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(kind)*(257 if kind == 'uint16' else 1)
    place = (33922, 'd', 6, (0., 0., 0., 8.53, 47.37, 0.), True)  # GeoTIFF's tie point
    more = [place, (315, 's', 0, 'Ada Lovelace', True), (274, 'H', 1, 6, True)]
    tifffile.imwrite(out, pixels, photometric='rgb' if len(shape) == 3 else 'minisblack', description='Lovelace, at home',
                     extratags=more, metadata=None, **how)
    data = out.getvalue()
    assert told(open_image(data)) == {'gps', 'owner', 'note'}
    new = strip(data)
    assert b'Lovelace' not in new and not told(open_image(new)) and strip(new) == new
    assert np.array_equal(decode(new), decode(data)) and np.array_equal(tifffile.imread(io.BytesIO(new)), pixels)
    with pytest.raises(BadInput): strip(data[:len(data)//2])


def test_a_profile_stays_and_a_cut_file_is_refused():
    from PIL import ImageCms

    out = io.BytesIO()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    picture().save(out, 'JPEG', icc_profile=profile, exif=exif(6))
    assert Image.open(io.BytesIO(strip(out.getvalue()))).info['icc_profile'] == profile
    for kind in ('JPEG', 'PNG', 'WEBP'):
        data = planted(kind, 6)
        cut = data[: int(len(data) * 0.6)] if kind != 'JPEG' else data[: data.index(b'\xff\xd9') - 3]
        with pytest.raises(BadInput): strip(cut)


# ---- a dataset

def photographs(folder, n=6, kind='JPEG', root=None, **terms):
    rows = []; root = Path(root or folder/'images')
    for i in range(n):
        out = io.BytesIO()
        picture(i).save(out, kind, **(dict(exif=exif(6)) if i % 2 else {}))
        write_atomic(root / f'{i}.{kind.lower()}', out.getvalue(), sync=False)
        s = look(out.getvalue())
        rows.append(
            dict(
                id=f'p{i}',
                uri=f'{i}.{kind.lower()}',
                sha256=s.sha256,
                width=s.width,
                height=s.height,
                split='test' if i < 3 else 'train',
                annotations=[Annotation('tree')],
                **{k: v[i] if isinstance(v, list) else v for k, v in terms.items()},
            )
        )
    return save_dataset(Dataset(make_table(rows), folder.name, root, ['tree']), folder)


def test_a_dataset_is_stripped_as_a_version_and_the_golden_set_goes_along(tmp_path):
    before = photographs(tmp_path / 'd')
    freeze_golden(tmp_path / 'd')
    px = {r['id']: decode(before.read(r['uri'])) for r in before.table.to_pylist()}
    r = strip_dataset(tmp_path/'d', 'Ada'); after = load_dataset(tmp_path/'d')
    assert r['items'] == 3 and r['told']['gps'] == 3 and r['version'] == after.version != before.version
    for row in after.table.to_pylist():
        assert digest(after.read(row['uri'])) == row['sha256'] and np.array_equal(
            decode(after.read(row['uri'])), px[row['id']]
        )
    assert not golden_changes(tmp_path/'d', after) and len(read_json(tmp_path/'d/golden.json')['items']) == 3
    assert open_version(tmp_path / 'd', before.version).version == before.version and after.about['rewritten'] == [
        dict(how='strip', version=before.version, items=3)
    ]
    assert [e['event'] for e in log_of(tmp_path / 'd').read()] == ['strip'] and strip_dataset(tmp_path / 'd')[
        'version'
    ] is None


def test_a_folder_that_was_imported_from_is_left_alone(tmp_path):
    photographs(tmp_path / 'd', root=tmp_path / 'theirs')
    was = {p.name: p.read_bytes() for p in (tmp_path / 'theirs').iterdir()}
    strip_dataset(tmp_path/'d'); d = load_dataset(tmp_path/'d')
    assert {p.name: p.read_bytes() for p in (tmp_path/'theirs').iterdir()} == was and d.root == tmp_path/'d/images'
    assert all(
        not told(open_image(d.read(u))) and digest(d.read(u)) == s
        for u, s in zip(d.table['uri'].to_pylist(), d.table['sha256'].to_pylist())
    )


@pytest.mark.parametrize('at', range(1, 9))
def test_a_strip_that_is_killed_is_finished_by_the_next(tmp_path, at, monkeypatch):
    photographs(tmp_path / 'whole')
    want = strip_dataset(tmp_path / 'whole')['version']
    photographs(tmp_path / 'd')
    real, n = os.replace, [0]

    def dies(a, b):
        n[0] += 1
        if n[0] == at*2: raise KeyboardInterrupt
        return real(a, b)
    monkeypatch.setattr(os, 'replace', dies)
    try: strip_dataset(tmp_path/'d')
    except KeyboardInterrupt: pass
    monkeypatch.setattr(os, 'replace', real); strip_dataset(tmp_path/'d'); d = load_dataset(tmp_path/'d')
    assert (
        d.version == want
        and not (tmp_path / 'd/.rewrite').exists()
        and len([e for e in log_of(tmp_path / 'd').read() if e['event'] == 'strip']) == 1
    )
    assert all(digest(d.read(u)) == s for u, s in zip(d.table['uri'].to_pylist(), d.table['sha256'].to_pylist()))


# ---- terms

def test_an_old_manifest_keeps_its_version(tmp_path):
    d = photographs(tmp_path / 'd')
    path = tmp_path / f'd/manifest-{d.version}.parquet'
    pq.write_table(pq.read_table(path).drop_columns(['expires']), path)
    again = load_dataset(tmp_path/'d'); assert again.version == d.version and again.table.schema.equals(SCHEMA)
    assert set_terms(again, expires='2031-01-01').version != d.version


def test_terms_are_judged_and_items_named():
    day = date(2026, 7, 1); e = [None, '2026-07-01', '2026-06-30', '2026-02-30', 'never', '2030-01-01']
    t = make_table(
        [
            dict(id=f'i{i}', uri='x', sha256=digest(f'{i}'), expires=v, license='CC0' if i else '')
            for i, v in enumerate(e)
        ]
    )
    assert expired(t, day).tolist() == [False, False, True, True, True, False]
    with pytest.raises(BadInput, match='past its retention date: 3 are: i2, i3, i4'): refuse_terms(DataRules(), t, day)
    with pytest.raises(BadInput, match='licence for every item: 1 without: i0'):
        refuse_terms(DataRules(no_expired=False, require_license=True), t, day)
    refuse_terms(DataRules(no_expired=False), t, day)
    with pytest.raises(BadInput, match='days such as'):
        raise_expected(
            lambda: (
                set_terms(Dataset(t, 'd', '.'), where="id_ == 'x'")
                if False
                else set_terms(Dataset(t, 'd', '.'), expires='1.7.2026')
            )
        )


def raise_expected(f):
    try: f()
    except BadInput as e: raise BadInput(str(e)) from None


def test_an_expired_item_and_a_place_stop_the_check_and_the_training(tmp_path):
    from cv_lab.data.quality import check

    past = (date.today() - timedelta(1)).isoformat()
    d = photographs(tmp_path / 'd', expires=[None, None, None, None, past, past])
    report = check(d, workers=1)
    said = {r['rule']: r for r in report.rules}
    assert (
        not report.ok
        and said['nothing past its retention date']['verdict'] == 'fail'
        and 'p4, p5' in said['nothing past its retention date']['said']
    )
    kinds = report.findings.groupby('kind')['id'].agg(list).to_dict()
    assert (
        kinds['expired'] == ['p4', 'p5']
        and kinds['gps'] == kinds['personal'] == ['p1', 'p3', 'p5']
        and 'no file says where it was taken' not in said  # nobody asked: a finding, not a rule
    )
    from cv_lab.spec import parse_problem
    from cv_lab.train import fit

    text = 'name: trees\ntask: classification\nclasses: [tree]\nowner: A\nintended_use: B\nacceptance: [{metric: accuracy, at_least: 0.5}]\ndata: {no_gps: true, no_expired: true}\n'
    problem = parse_problem(text)
    strict = {r['rule']: r for r in check(d, problem, 1).rules}
    assert (
        strict['no file says where it was taken']['verdict'] == 'fail'
        and '3 do: p1, p3, p5' in strict['no file says where it was taken']['said']
    )
    with pytest.raises(BadInput, match='retention date: 2 are: p4, p5'): fit(problem, d, tmp_path/'runs')
    assert not (tmp_path/'runs').exists() or not any((tmp_path/'runs').iterdir())


# ---- the log

@pytest.mark.parametrize(
    'fault',
    ['change 1', 'change 3', 'change last', 'drop 2', 'drop last', 'swap', 'insert', 'empty', 'no seal', 'torn'],
)
def test_every_change_of_the_log_shows(tmp_path, fault):
    log = Sealed(tmp_path/'log.jsonl')
    for i in range(5): record(log, 'export', 'Ada', to=f'place-{i}')
    assert not log.faults()
    lines = log.path.read_bytes().splitlines(keepends=True)
    what, _, n = fault.partition(' ')
    i = 4 if n == 'last' else int(n) - 1 if n.isdigit() else 0
    if what == 'change': lines[i] = lines[i].replace(b'place', b'plaza')
    if what == 'drop': del lines[i]
    if what == 'swap': lines[1], lines[2] = lines[2], lines[1]
    if what == 'insert': lines.insert(2, lines[2])
    if what == 'empty': lines = []
    if what == 'torn': lines.append(b'{"n":6')
    if fault == 'no seal': log.seal.unlink()
    log.path.write_bytes(b''.join(lines)); found = log.faults()
    named = {
        'change 1': 'line 2',
        'change 3': 'line 4',
        'change last': 'line 5',
        'drop 2': 'line 2',
        'drop last': 'lines 5 to 5',
        'swap': 'line 2',
        'insert': 'line 4',
        'empty': 'lines 1 to 5',
        'no seal': 'log.seal',
        'torn': 'line 6',
    }[fault]
    assert any(named in f for f in found), found


def test_the_log_takes_many_writers(tmp_path):
    code = f"from cv_lab.audit import *\nfor i in range(20): record(Sealed({str(tmp_path / 'log.jsonl')!r}), 'export', 'me', i=i)"
    ps = [subprocess.Popen([sys.executable, '-c', code], env=os.environ) for _ in range(3)]
    assert all(p.wait() == 0 for p in ps)
    log = Sealed(tmp_path/'log.jsonl'); assert len(log.read()) == 60 and not log.faults()


def test_an_export_is_logged_with_the_whole_version(tmp_path, monkeypatch):
    from typer.testing import CliRunner
    from cv_lab.cli.data import app

    (tmp_path / 'problems').mkdir()
    (tmp_path / 'settings.ini').touch()
    monkeypatch.setenv('CVLAB_HOME', str(tmp_path))
    d = photographs(tmp_path / 'data/d')
    run = CliRunner()
    assert (
        run.invoke(
            app,
            [
                'export',
                str(tmp_path / 'data/d'),
                '--format',
                'imagefolder',
                '--split',
                'train',
                '--out',
                str(tmp_path / 'out'),
                '--who',
                'Ada',
            ],
        ).exit_code
        == 0
    )
    e = Sealed(tmp_path / 'audit/log.jsonl').read()[-1]
    assert (e['event'], e['by'], e['version'], e['items'], e['split']) == ('export', 'Ada', d.version, 3, 'train')
    r = run.invoke(app, ['audit', '--verify', '--json'])
    assert r.exit_code == 0 and json.loads(r.stdout)['faults'] == []
    p = tmp_path / 'audit/log.jsonl'
    p.write_bytes(p.read_bytes().replace(b'"Ada"', b'"Eve"'))
    r = run.invoke(app, ['audit', '--verify'])
    assert r.exception is not None and 'line 1' in str(r.exception)
