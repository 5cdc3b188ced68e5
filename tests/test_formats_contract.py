"Every format, found by being there: it keeps what it says it keeps, whatever the data; and it is recognised."
import numpy as np, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from cv_lab.data.exports import export_dataset, losses
from cv_lab.data.formats import COLUMNS, CONTRACT, FIELDS, KINDS, formats, get_format
from cv_lab.data.imports import import_dataset
from cv_lab.data.roundtrip import content, little_dataset
from cv_lab.data.dataset import Dataset
from cv_lab.data.manifest import make_table
from cv_lab.core import file_digest
from cv_lab.geometry import mask_box, rle_encode

FORMATS = formats()
# What a format's LOSES says beyond KEEPS: what the drawn data must not hold for a round trip to be exact
LIMITS = dict(
    cvat=dict(rings=1, own_box=True, without=('track_id',)), # tracks are video: tests/test_formats_each.py
    labelstudio=dict(rings=1, own_box=True, read=dict(predictions='keep')),
    imagefolder=dict(one_label=True, safe_labels=True),
    masks=dict(safe_labels=True, own_box=True),
    mot=dict(groups=True, own_box=True, safe_labels=True),
    icdar=dict(rings=1, points=4, own_box=True, label='text', no_hash=True),
    textlines=dict(most=1),
    cityscapes=dict(rings=1, own_box=True, label='car'),
    kitti=dict(no_blanks=True),
    fiftyone=dict(own_box=True),
    yolo=dict(rings=1, alone=True, own_box=True, one_label=True, safe_labels=True))

W, H = 48, 40
words = st.text(st.characters(codec='utf-8', exclude_categories=('C', 'Z')), min_size=1, max_size=8).filter(
    lambda s: s == s.strip() and s.casefold() not in ('unknown', 'unsplit', 'none')
)
labels = st.one_of(
    st.sampled_from(['cat', 'red dog', 'Fuß', '犬', 'a,b', "l'été \"x\" <&>", '10', '007', 'NA', 'null', 'true']), words
)
safe = st.sampled_from(['cat', 'red dog', 'Fuß', '犬', '10', '007', 'NA'])
grid = lambda lo, hi: st.integers(lo*8, hi*8).map(lambda v: v/8)
texts = st.text(st.characters(codec='utf-8', exclude_categories=('C', 'Zl', 'Zp', 'Zs')), min_size=1, max_size=12)


@st.composite
def boxes(draw):
    x, y = draw(grid(0, W - 2)), draw(grid(0, H - 2))
    return [x, y, draw(grid(int(x) + 1, W).filter(lambda v: v > x)), draw(grid(int(y) + 1, H).filter(lambda v: v > y))]


@st.composite
def rings(draw, points):
    "A quadrilateral (or more) that is no upright rectangle, around a centre, so that it has an area."
    n = points or draw(st.integers(3, 7))
    cx, cy, r = draw(st.integers(14, W - 14)), draw(st.integers(14, H - 14)), draw(st.integers(3, 13))
    t = 2*np.pi*(np.arange(n) + .3)/n
    return np.round(np.stack([cx + r*np.cos(t), cy + r*np.sin(t)], 1)*8).ravel().__truediv__(8).tolist()


@st.composite
def annotations(draw, module, keeps, limit, cells):
    kinds = [k for k in KINDS if k in keeps]
    if limit.get('alone'): kinds = [limit['alone']]
    out = []
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=limit.get('most', 5))):
        a = dict(label=limit.get('label') or draw(safe if limit.get('safe_labels') else labels))
        if limit.get('no_blanks'): a['label'] = '_'.join(a['label'].split())
        if kind == 'box': a['bbox'] = draw(boxes())
        if kind == 'polygon':
            a['polygon'] = [
                draw(rings(limit.get('points'))) for _ in range(draw(st.integers(1, limit.get('rings', 2))))
            ]
            a['bbox'] = outline(a['polygon'])
        if kind == 'mask':
            if not cells: continue
            m = np.zeros((H, W), bool)
            y, x = cells.pop()
            m[y : y + 10, x : x + 12] = np.array(draw(st.lists(st.booleans(), min_size=120, max_size=120))).reshape(
                10, 12
            )
            m[y, x] = True
            a['mask'] = rle_encode(m); a['bbox'] = mask_box(m)
        if kind == 'line': a = dict(text=draw(texts))
        if kind == 'caption': a = dict(caption=draw(texts))
        if kind in ('box', 'polygon', 'mask'):
            if 'text' in keeps and draw(st.booleans()): a['text'] = draw(texts)
            if 'track_id' in keeps and draw(st.booleans()): a['track_id'] = str(draw(st.integers(1, 99)))
            if 'score' in keeps and draw(st.booleans()): a['score'] = draw(st.integers(0, 100))/100
            if 'annotator' in keeps and draw(st.booleans()):
                a['annotator'] = draw(st.sampled_from(['Ada', 'b@c.org', '7']))
            if 'attributes' in keeps and draw(st.booleans()):
                a['attributes'] = {
                    draw(st.sampled_from(['occluded', 'farbe', 'of day'])): draw(
                        st.sampled_from(['1', 'rot', 'true', '12.5', 'ä b'])
                    )
                }
            if (some := getattr(module, 'ATTRIBUTES', None)) and draw(st.booleans()):
                k = draw(st.sampled_from(sorted(some))); a['attributes'] = {k: some[k]}
                if k == 'ignore': a.pop('text', None)
        if limit.get('whole') and kind == 'box':
            a['bbox'] = [float(round(v)) for v in a['bbox'][:2]] + [float(round(v) + 1) for v in a['bbox'][2:]]
            a['bbox'] = np.minimum(a['bbox'], [W - 1, H - 1, W, H]).tolist()
        out.append(a)
    if limit.get('one_label') and (c := [a for a in out if set(a) == {'label'}]):
        out = [a for a in out if set(a) > {'label'}] + c[:1]
    return out


def outline(polygon):
    xy = np.concatenate([np.reshape(r, (-1, 2)) for r in polygon]); return [*xy.min(0).tolist(), *xy.max(0).tolist()]


@st.composite
def datasets(draw, module, limit, folder, files):
    keeps = [k for k in module.KEEPS if k not in limit.get('without', ())]; rows = []
    names = draw(st.lists(st.sampled_from([n for n, _ in files]), min_size=1, max_size=4, unique=True))
    if limit.get('alone'): limit = dict(limit, alone=draw(st.sampled_from([k for k in KINDS if k in keeps])))
    for name in names:
        cells = [(y, x) for y in range(0, H - 10, 10) for x in range(0, W - 12, 12)]
        anns = draw(annotations(module, keeps, limit, cells))
        columns = {c: draw(st.one_of(st.none(), words)) for c in COLUMNS if c in keeps and c not in ('split', 'tags')}
        if 'split' in keeps:
            columns['split'] = draw(st.sampled_from(limit.get('splits', ['train', 'val', 'test', None])))
        if 'tags' in keeps:
            columns['tags'] = draw(st.dictionaries(st.sampled_from(['light', 'site no', 'größe']), words, max_size=2))
        columns['group'] = columns.get('group') or (
            draw(st.sampled_from(['film 1', 'Fuß'])) if limit.get('groups') else dict(files)[name]
        )
        rows.append(dict(id=name, uri=name, sha256=dict(files)[name], width=W, height=H, annotations=anns, **columns))
    t = make_table(rows)
    return Dataset(t, 'drawn', folder, sorted({a['label'] for r in rows for a in r['annotations'] if a.get('label')}))


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp('pictures'); out = []
    for i, n in enumerate(['a.png', 'sub/b 1.PNG', 'sub/a.png', 'Größe_犬.jpg', 'x.y.png']):
        (root / n).parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (H, W, 3), np.uint8)).save(root / n)
        out.append((n, file_digest(root / n)))
    return root, out


@pytest.mark.parametrize('name', list(FORMATS))
def test_it_keeps_the_contract(name):
    m = get_format(name)
    assert set(CONTRACT) <= set(dir(m)) and set(m.KEEPS) <= {*KINDS, *FIELDS, *COLUMNS} and m.LOSES.endswith('.')


@pytest.mark.parametrize('name', list(FORMATS))
def test_it_is_recognised_and_says_why(name, tmp_path):
    m = FORMATS[name]; d = little_dataset(tmp_path/'little', m)
    export_dataset(d, name, tmp_path/'out'); r = import_dataset(tmp_path/'out', 'auto', tmp_path/'back')
    assert (
        r.dataset.about['format'] == name
        and len(r.dataset.about['why']) > 10
        and len(r.dataset) == 3
        and not len(r.quarantine)
    )


@pytest.mark.parametrize('name', list(FORMATS))
def test_round_trip(name, pictures, tmp_path_factory):
    "Out and in again: nothing that the format keeps has changed."
    m, limit, (folder, files) = FORMATS[name], LIMITS.get(name, {}), pictures

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
    @given(datasets(m, limit, folder, files))
    def check(d):
        root = tmp_path_factory.mktemp(name); out = export_dataset(d, name, root/'out')
        back = import_dataset(root/'out', name, root/'back', splits='keep', **limit.get('read', {}))
        assert content(back.dataset.table, m) == content(d.table, m)
        assert not len(back.quarantine) and not {k: v for k, v in out.lost.items() if k not in limit.get('lost', ())}
    check()


@pytest.mark.parametrize('name', list(FORMATS))
def test_what_it_cannot_keep_is_counted(name, tmp_path):
    "A dataset that says everything, exported: what does not come back was announced."
    full = FORMATS['csv']; d = little_dataset(tmp_path/'little', full); m = FORMATS[name]
    lost = losses(d.table, m)
    assert set(lost) == ({*KINDS, *FIELDS, *COLUMNS} - set(m.KEEPS)) - (
        {'attributes'} if 'occluded' in getattr(m, 'ATTRIBUTES', ()) else set()
    )
    out = export_dataset(d, name, tmp_path / 'out')
    back = import_dataset(tmp_path / 'out', name, tmp_path / 'back', splits='keep')
    assert len(back.dataset) == len(d) and set(lost) <= set(out.lost)


def test_they_are_told_apart(tmp_path):
    "No format claims another's export more strongly than that one does."
    for name, m in FORMATS.items():
        export_dataset(little_dataset(tmp_path/name/'little', m), name, tmp_path/name/'out')
    from cv_lab.data.files import Source
    from cv_lab.data.formats import recognise
    assert {n: recognise(Source(tmp_path/n/'out'))[0] for n in FORMATS} == {n: n for n in FORMATS}
