"""`check` against planted faults and independent computations."""
import json
import numpy as np, pandas as pd, pytest
from PIL import Image, ImageDraw, ImageFilter
import io
from cv_lab.core import Annotation, BadInput, canonical_json, digest
from cv_lab.data import coverage, duplicates, measures, quality as q
from cv_lab.data.orientation import turned
from cv_lab.data.dataset import Dataset
from cv_lab.data.manifest import first_labels, make_table
from cv_lab.data.splits import assign_splits
from cv_lab.spec import Problem
from cv_lab.tasks import classification


def encoded(im, format='JPEG', **kw):
    f = io.BytesIO(); im.save(f, format, **kw); return f.getvalue()


def picture(i, size=(160, 120)):
    rng = np.random.default_rng(i)
    w, h = size
    im = Image.new('RGB', (2 * w, 2 * h), tuple(int(v) for v in rng.integers(90, 170, 3)))
    pen = ImageDraw.Draw(im)
    for x, y, r in zip(rng.uniform(0, 2*w, 60), rng.uniform(0, 2*h, 60), rng.uniform(4, 30, 60)):
        pen.ellipse([x - r, y - r*.7, x + r, y + r*.7], tuple(int(v) for v in rng.integers(20, 240, 3)))
    px = np.asarray(im.reduce(2), float) + rng.normal(0, 3, (h, w, 3))
    return Image.fromarray(px.clip(0, 255).astype(np.uint8))


def dataset(folder, files, labels=None, **columns):
    rows = []
    for k, (name, data) in enumerate(files.items()):
        (folder/name).write_bytes(data)
        rows.append(
            dict(
                id=name,
                uri=name,
                sha256=digest(data),
                annotations=[Annotation((labels or {}).get(name, 'ab'[k % 2]))],
                **{c: v[name] for c, v in columns.items()},
            )
        )
    return Dataset(make_table(rows), 'test', folder, ['a', 'b'])


def cut(data, i): return data[:int(len(data)*(.2 + .6*(i % 7)/7))]
def zeroed(data, i): return data[:len(data)//2] + bytes(len(data) - len(data)//2)

FAULTS = dict(
    unreadable=lambda im, i: [
        cut(encoded(im), i),
        zeroed(encoded(im), i),
        cut(encoded(im, 'PNG'), i),
        b'',
        b'no image',
        cut(encoded(im, 'WEBP'), i),
    ][i % 6],
    blank=lambda im, i: encoded(
        Image.fromarray(
            (np.full((120, 160), 40 + i * 6.0) + np.random.default_rng(i).normal(0, i % 3, (120, 160)))
            .clip(0, 255)
            .astype(np.uint8)
        )
    ),
    dark=lambda im, i: encoded(im.point(lambda v: int(v * (0.05 + 0.12 * (i % 10) / 10)))),
    blown_out=lambda im, i: encoded(im.point(lambda v: int(min(255, v * 2.2 + 110 + 5 * (i % 10))))),
    blurred=lambda im, i: encoded(im.filter(ImageFilter.GaussianBlur(2.5 + (i % 5)))),
    odd_size=lambda im, i: encoded(im.resize((im.width // (3 + i % 3), im.height // (3 + i % 3)))),
    odd_aspect=lambda im, i: encoded(im.rotate(90, expand=True)),
)


@pytest.fixture(scope='module')
def planted(tmp_path_factory):
    files = {f'{i:04}': encoded(picture(i), ['JPEG', 'PNG', 'WEBP'][i % 3]) for i in range(480)}
    truth = {}
    for k, (kind, spoil) in enumerate(FAULTS.items()):
        for i in range(20):
            name = f'{(k*20 + i)*3:04}'; files[name] = spoil(picture((k*20 + i)*3), i); truth[name] = kind
    for i in range(20): files[f'{430 + i:04}'] = files[f'{460 + i:04}']; truth[f'{430 + i:04}'] = 'duplicate'
    d = dataset(tmp_path_factory.mktemp('planted'), files)
    return d, truth, q.check(d, workers=1)


@pytest.mark.parametrize('kind', [*FAULTS, 'duplicate'])
def test_finds_what_was_planted(planted, kind):
    _, truth, report = planted
    want = {n for n, k in truth.items() if k == kind}
    got = set(report.findings.loc[report.findings['kind'] == kind, 'id'])
    if kind == 'duplicate':
        got = {f'{int(g) - 30:04}' if int(g) >= 460 else g for g in got}  # either of the two may be named
    assert len(want & got)/len(want) >= .9 and len(want & got)/len(got) >= .9, (sorted(want - got), sorted(got - want))


def test_processes_measure_the_same(planted):
    d, _, report = planted; some = Dataset(d.table.slice(0, 130), 'some', d.root, d.classes)
    (seen, thumbs), (_, here) = (q.measure_files(some, workers=n) for n in (2, 1))
    pd.testing.assert_frame_equal(seen, report.seen.drop(columns='cluster')[:130]); assert (thumbs == here).all()


def test_a_clean_tiny_dataset_has_no_findings(tmp_path):
    d = classification.example(tmp_path); r = q.check(d)
    assert r.ok and r.findings.empty and r.score > .95


def test_leaks_are_errors_and_the_test_item_stays(tmp_path):
    files = {f'{i}.png': encoded(picture(i), 'PNG') for i in range(8)}; files['7.png'] = files['0.png']
    split = {n: 'test' if n in ('0.png', '1.png') else 'train' for n in files}
    group = {n: 'g1' if n in ('1.png', '5.png') else n for n in files}
    r = q.check(dataset(tmp_path, files, {'7.png': 'b', '0.png': 'a'}, split=split, group=group))
    kinds = r.findings.groupby('kind')['id'].agg(list)
    assert (
        kinds['leaked_content'] == ['7.png'] and kinds['leaked_group'] == ['5.png'] and kinds['conflict'] == ['7.png']
    )
    assert not r.ok and {x['rule']: x['verdict'] for x in r.rules}['nothing shared between splits'] == 'fail'


def test_broken_rules_are_refused_each_with_its_own_way_out(tmp_path):
    d = dataset(tmp_path, {f'{i}.png': encoded(picture(i), 'PNG') for i in range(4)})
    ask = dict(name='p', task='classification', dataset='x', classes=d.classes, owner='t', intended_use='t')
    ask |= dict(acceptance=[dict(metric='accuracy', at_least=0.5)])
    fine, few = (q.check(d, Problem(**ask, data=dict(min_per_class=n))) for n in (0, 9))
    assert q.refuse_data(fine) is None and 'to_do' not in fine.verdicts() and 'what to do' not in fine._repr_markdown_()
    with pytest.raises(BadInput) as e: q.refuse_data(few)
    assert 'min_per_class' in e.value.mend and 'split' not in e.value.mend and 'at least 9' in e.value.expected
    bad = few.verdicts().set_index('rule')['to_do']
    assert bad['training items of each class'] and not bad.drop('training items of each class').any()
    assert 'min_per_class' in few._repr_markdown_()


def test_same_pixels_in_another_file(tmp_path):
    im = picture(1)
    r = q.check(
        dataset(
            tmp_path,
            {'a': encoded(im, 'PNG'), 'b': encoded(im, 'PNG', compress_level=1), 'c': encoded(picture(2), 'PNG')},
        )
    )
    assert r.findings.loc[r.findings['kind'] == 'duplicate', 'id'].tolist() == ['b']


def test_changed_missing_and_escaping_files(tmp_path):
    d = dataset(tmp_path, {f'{i}': encoded(picture(i)) for i in range(6)})
    (tmp_path/'1').write_bytes(encoded(picture(99))); (tmp_path/'2').unlink()
    rows = d.table.to_pylist(); rows[3]['uri'] = '../../etc/passwd'
    r = q.check(Dataset(make_table([dict(x, tags=dict(x['tags'] or [])) for x in rows]), 'd', tmp_path, d.classes))
    by = r.findings.groupby('kind')['id'].agg(list)
    assert by['changed'] == ['1'] and by['unreadable'] == ['2', '3']


def test_rules_of_the_problem(tmp_path):
    d = dataset(
        tmp_path,
        {f'{i}': encoded(picture(i)) for i in range(6)} | {'bad': b'x'},
        split={**{str(i): 'train' for i in range(6)}, 'bad': 'train'},
    )

    def verdicts(**data):
        p = Problem(
            name='p',
            task='classification',
            classes=['a', 'b'],
            owner='o',
            intended_use='t',
            acceptance=[dict(metric='accuracy', at_least=0.5)],
            data=data,
        )
        return {r['rule']: r['verdict'] for r in q.check(d, p).rules}

    assert (
        verdicts()['items that can be read'] == 'fail' and verdicts(max_broken=0.2)['items that can be read'] == 'pass'
    )
    assert (
        verdicts(min_per_class=3)['training items of each class'] == 'pass'
        and verdicts(min_per_class=4)['training items of each class'] == 'fail'
    )
    assert (
        verdicts(require_license=True)['a licence for every item'] == 'fail'
        and verdicts(no_gps=True)['no file says where it was taken'] == 'pass'
    )
    usual = verdicts(no_expired=False)  # what nobody asked for is no rule, and passes nothing
    assert list(usual) == [
        'items that can be read',
        'files as imported',
        'nothing shared between splits',
        'labels are classes',
        'training items of each class',
    ]
    every = verdicts(require_license=True, require_consent=True, require_source=True, no_gps=True)
    assert len(every) == len(usual) + 5 and every.items() >= usual.items()


def test_report_is_json(planted):
    _, _, report = planted; said = json.loads(canonical_json(report.to_json()))
    assert said['ok'] is False and said['version'] == report.dataset.version and 0 < said['score'] < 1
    assert {r['verdict'] for r in said['rules']} <= {'pass', 'fail', 'not judged'}
    assert {f['kind']: f['items'] for f in said['findings']}['duplicate'] == 20
    assert '| rule | verdict |' in report._repr_markdown_()


def test_pictures(planted):
    import matplotlib; matplotlib.use('Agg')
    _, _, report = planted
    assert q.plot_balance(report) and q.plot_findings(report, each=2)


def test_blur_effect_is_the_formula_of_the_paper():
    px = np.asarray(picture(3).convert('L'), float)[:60, :70]
    def naive(a, floor):  # along the rows; Crete et al. 2007, with loops
        pad = np.pad(a, ((0, 0), (5, 5)), 'symmetric')
        b = np.array([[pad[y, x : x + 11].mean() for x in range(a.shape[1])] for y in range(a.shape[0])])
        d = [[max(abs(a[y, x + 1] - a[y, x]) - floor, 0) for x in range(a.shape[1] - 1)] for y in range(a.shape[0])]
        e = [[abs(b[y, x + 1] - b[y, x]) for x in range(a.shape[1] - 1)] for y in range(a.shape[0])]
        return 1 - sum(max(0, p - r) for u, v in zip(d, e) for p, r in zip(u, v))/sum(map(sum, d))

    for floor in (0, 2):
        assert measures.blur_effect(px.astype(np.uint8), floor=floor) == pytest.approx(
            max(naive(px, floor), naive(px.T, floor)), abs=1e-4
        )


def test_same_boxes_against_all_pairs():
    rng = np.random.default_rng(0)
    n = 300
    a = rng.uniform(0, 60, (n, 2))
    b = np.hstack([a, a + rng.uniform(5, 40, (n, 2))])
    b[200:] = b[:100] + rng.normal(0, 0.8, (100, 4))
    item, label = np.arange(n) % 100 // 20, np.array(['u', 'v'])[np.arange(n) % 100 % 2]

    def iou(p, r):
        w, h = min(p[2], r[2]) - max(p[0], r[0]), min(p[3], r[3]) - max(p[1], r[1]); x = max(w, 0)*max(h, 0)
        return x/((p[2] - p[0])*(p[3] - p[1]) + (r[2] - r[0])*(r[3] - r[1]) - x)

    want = {
        (i, j)
        for i in range(n)
        for j in range(i + 1, n)
        if item[i] == item[j] and label[i] == label[j] and iou(b[i], b[j]) >= 0.8
    }
    assert {tuple(sorted(p)) for p in zip(*q.same_boxes(b, item, label, .8))} == want and len(want) > 20


def test_class_counts_against_a_loop(tmp_path):
    t = assign_splits(
        make_table(
            [
                dict(id=str(i), sha256=digest(str(i)), annotations=[Annotation(c) for c in 'abc'[: i % 4]])
                for i in range(50)
            ]
        )
    )
    got = q.class_counts(t, ['a', 'b', 'c', 'd'])
    for s in ('train', 'val', 'test'):
        for c in 'abcd':
            assert got.loc[c, s] == sum(
                r['split'] == s and c in {a['label'] for a in r['annotations']} for r in t.to_pylist()
            )
    assert first_labels(t)[1] == 'a'


def test_boxes_and_labels_of_the_table(tmp_path):
    d = dataset(tmp_path, {str(i): encoded(picture(i)) for i in range(4)})
    rows = [dict(r, tags={}) for r in d.table.to_pylist()]
    rows[0]['annotations'] = [Annotation('a', [10, 10, 170, 50])]  # out of 160
    rows[1]['annotations'] = [
        Annotation('a', [10, 10, 50, 50]),
        Annotation('a', [10, 10, 50, 51]),
        Annotation('b', [10, 10, 50, 50]),
    ]
    rows[2]['annotations'] = [Annotation('z', [10, 10, 50, 50])]; rows[3]['annotations'] = []
    f = q.check(Dataset(make_table(rows), 'd', tmp_path, ['a', 'b'])).findings.groupby('kind')['id'].agg(list)
    assert (
        f['box_outside'] == ['0']
        and f['box_twice'] == ['1']
        and f['unknown_label'] == ['2']
        and f['unlabelled'] == ['3']
    )


def test_forgotten_classes_and_slips_of_the_mouse(tmp_path):
    d = dataset(tmp_path, {str(i): encoded(picture(i)) for i in range(30)})
    both = [Annotation('a', [10, 10, 50, 60]), Annotation('b', [70, 20, 120, 90])]
    rows = [
        dict(
            r,
            tags={},
            annotations=both[:1] if i == 7 else both + [Annotation('a', [90, 90, 91, 91])] if i == 9 else both,
        )
        for i, r in enumerate(d.table.to_pylist())
    ]
    f = q.check(Dataset(make_table(rows), 'd', tmp_path, ['a', 'b'])).findings.groupby('kind')['id'].agg(list)
    assert f['absent'] == ['7'] and f['box_tiny'] == ['9']


def test_held_out_predictions_name_labels(tmp_path):
    from cv_lab.data.manifest import PREDICTIONS
    d = dataset(tmp_path, {f'{i}': encoded(picture(i)) for i in range(30)}); labels = first_labels(d.table)
    said = make_table(
        [dict(id=f'{i}', probs=[0.03, 0.97] if (labels[i] == 'b') != (i == 4) else [0.97, 0.03]) for i in range(30)],
        PREDICTIONS,
    )
    f = q.check(d, predictions=said).findings; assert f.loc[f['kind'] == 'label_error', 'id'].tolist() == ['4']


def test_drift_is_named_where_it_is_and_nowhere_else():
    rng = np.random.default_rng(0)
    part = lambda n, light, size: make_table(
        [
            dict(
                id=str(i),
                sha256=digest(str(i)),
                width=100,
                height=100,
                tags=dict(light=str(rng.choice(['day', 'night'], p=[light, 1 - light]))),
                annotations=[Annotation('a', [0, 0, (w := float(rng.normal(size, 4))), w])],
            )
            for i in range(n)
        ]
    )
    a, same, other = part(400, 0.8, 40), part(400, 0.8, 40), part(400, 0.3, 30)
    named = lambda x, y: set(
        (t := coverage.drift(coverage.described(x), coverage.described(y))).loc[t['drifted'], 'what']
    )
    assert named(a, same) == set() and named(a, other) == {'tag light', 'object size'}


def test_cooccurrence_against_a_loop():
    rng = np.random.default_rng(1); sets = [set(rng.choice(list('abc'), rng.integers(0, 4))) for _ in range(80)]
    t = make_table(
        [
            dict(id=str(i), sha256=digest(str(i)), annotations=[Annotation(c) for c in sorted(s)])
            for i, s in enumerate(sets)
        ]
    )
    both, lift = coverage.cooccurrence(t, list('abc'))
    for x in 'abc':
        for y in 'abc':
            n = sum(x in s and y in s for s in sets)
            assert both.loc[x, y] == n and lift.loc[x, y] == pytest.approx(
                n * 80 / (sum(x in s for s in sets) * sum(y in s for s in sets))
            )


def test_found_table_counts():
    from cv_lab.data.planted import found_table

    planted = pd.DataFrame(
        [('a', 'blank', None), ('b', 'blank', None), ('n', 'near_crop', 'o'), ('m', 'near_jpeg', 'p')],
        columns=['id', 'kind', 'of'],
    )
    findings = pd.DataFrame(
        [('a', 'blank', None), ('x', 'blank', None), ('o', 'near_duplicate', 'n'), ('y', 'leaked_near', 'z')],
        columns=['id', 'kind', 'other'],
    )
    t = found_table(findings, planted)
    assert (
        t['found'].to_dict() == dict(blank=1, near_crop=1, near_jpeg=0)
        and t.loc['blank', 'precision'] == 0.5
        and t.loc['near_crop', 'precision'] == 0.5
    )


def test_what_the_dataset_had_already_is_no_false_alarm():
    from types import SimpleNamespace
    from cv_lab.data.planted import found_table
    planted = pd.DataFrame([('a', 'blank', None), ('n', 'near_crop', 'o')], columns=['id', 'kind', 'of'])
    findings = pd.DataFrame(
        [
            ('a', 'blank', None),
            ('old', 'blank', None),
            ('wrong', 'blank', None),
            ('n', 'near_duplicate', 'o'),
            ('f2', 'near_duplicate', 'f1'),
            ('x', 'near_duplicate', 'y'),
        ],
        columns=['id', 'kind', 'other'],
    )
    table = make_table(
        [
            dict(id=i, sha256=digest(i), group='film' if i[0] == 'f' else i)
            for i in ('a', 'old', 'wrong', 'o', 'f1', 'f2', 'x', 'y')
        ]
    )
    t = found_table(
        findings, planted, SimpleNamespace(findings=findings.iloc[1:2], dataset=SimpleNamespace(table=table))
    )
    assert t['own'].tolist() == [1, 1] and t['precision'].tolist() == [.5, .5] and t['recall'].tolist() == [1, 1]



def test_an_empty_dataset(tmp_path):
    assert q.check(Dataset(make_table([]), 'none', tmp_path, ['a'])).to_json()['items'] == 0


def gained(im, g): return im.point(lambda v: int(min(255, v*g)))


NEAR = dict(
    crop=lambda im, r: im.crop(
        (
            x := int(r.integers(0, 12)),
            y := int(r.integers(0, 9)),
            x + int(160 * r.uniform(0.8, 0.92)),
            y + int(120 * r.uniform(0.8, 0.92)),
        )
    ),
    resize=lambda im, r: im.resize((int(160 * r.uniform(0.4, 0.9)), int(120 * r.uniform(0.4, 0.9)))),
    jpeg=lambda im, r: Image.open(io.BytesIO(encoded(im, quality=int(r.integers(10, 50))))),
    brightness=lambda im, r: gained(im, r.choice([r.uniform(0.5, 0.8), r.uniform(1.2, 1.5)])),
    together=lambda im, r: NEAR['brightness'](NEAR['jpeg'](NEAR['resize'](NEAR['crop'](im, r), r), r), r),
)


@pytest.fixture(scope='module')
def near():
    rng, ims, truth = np.random.default_rng(5), [picture(i) for i in range(250)], {}
    for k, (kind, change) in enumerate(NEAR.items()):
        for i in range(20): truth[(k*20 + i, len(ims))] = kind; ims.append(change(ims[k*20 + i], rng))
    thumbs = np.stack([measures.measure(encoded(im))['thumb'] for im in ims])
    return truth, {tuple(sorted(p)) for p in zip(*duplicates.near_duplicates(thumbs)[['a', 'b']].to_numpy().T.tolist())}


@pytest.mark.parametrize('kind', NEAR)
def test_near_duplicates_are_found(near, kind):
    truth, found = near; want = {p for p, k in truth.items() if k == kind}
    assert len(want & found) >= .9*len(want)


def test_near_duplicates_are_not_invented(near):
    truth, found = near
    assert len(found & set(truth)) >= .9*len(found)


def test_near_duplicates_through_the_index_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (2500, 8, 8)).astype(np.uint8)  # enough for several cells
    thumbs = np.stack([np.asarray(Image.fromarray(b).resize((64, 64), Image.Resampling.BICUBIC)) for b in base])
    thumbs = np.concatenate([thumbs, (thumbs[:2000] * 0.8).astype(np.uint8)])
    assert len(thumbs) > 4096
    got = duplicates.near_duplicates(thumbs)
    pairs = {tuple(sorted(p)) for p in zip(got['a'].tolist(), got['b'].tolist())}
    want = {(i, 2500 + i) for i in range(2000)}
    assert len(pairs & want) >= .99*len(want) and len(pairs - want) <= .01*len(want)


def test_likeness_is_no_copy():
    from sklearn.datasets import load_digits

    scans = np.stack(
        [
            np.asarray(Image.fromarray((px * 15).astype(np.uint8)).resize((64, 64), Image.Resampling.BILINEAR))
            for px in load_digits().images[:600]
        ]
    )
    assert len(duplicates.near_duplicates(scans)) <= 2


def test_near_leak_names_the_item_outside_test(tmp_path):
    files = {f'{i}': encoded(picture(i)) for i in range(30)}
    files['3'] = encoded(picture(7).resize((120, 90)), quality=60)
    split = {n: 'test' if n in ('7', '8') else 'train' for n in files}
    r = q.check(dataset(tmp_path, files, split=split)); f = r.findings[r.findings['kind'] == 'leaked_near']
    assert f[['id', 'other']].to_numpy().tolist() == [['3', '7']] and not r.ok
    assert r.seen.set_index('id')['cluster'].pipe(lambda c: c['3'] == c['7'] and c['3'] != c['8'])


def test_turned_pictures_and_none_where_there_is_no_top():
    rng = np.random.default_rng(1); y = np.linspace(1, 0, 64)[:, None]
    ims = np.stack(
        [
            (60 + 120 * y + 30 * np.sin(np.arange(64) / rng.uniform(2, 9)) * (y < 0.4) + rng.normal(0, 12, (64, 64)))
            .clip(0, 255)
            .astype(np.uint8)
            for _ in range(240)
        ]
    )
    bad = rng.choice(240, 12, replace=False); k = 1 + np.arange(12) % 3
    for i, n in zip(bad, k): ims[i] = np.rot90(ims[i], n)
    found = turned(ims).set_index('item')['quarters']
    assert set(found.index) == set(bad) and all((found[i] + n) % 4 == 0 for i, n in zip(bad, k))
    assert turned(rng.integers(0, 255, (200, 64, 64)).astype(np.uint8)).empty


def test_clusters():
    assert len(set(duplicates.clusters(6, pd.DataFrame(dict(a=[0, 1, 4], b=[1, 2, 5]))))) == 3


# ---- the table alone

def muddle(seed, n=240):
    "Rows with every fault that a table can show, and as many without."
    rng, rows = np.random.default_rng(seed), []
    pick = lambda *v: v[rng.integers(len(v))]
    for i in range(n):
        w, h = int(rng.integers(80, 120)), int(rng.integers(60, 90))
        anns = []
        for _ in range(pick(0, 1, 1, 2, 3)):
            x, y, s = rng.uniform(0, 50), rng.uniform(0, 40), pick(1.3, 20, 25, 30)
            b = [x, y, x + s * pick(1, 1, 1, 1, 4), y + s]
            anns += [Annotation(pick('cat', 'cat', 'dog', None if seed else 'cat'), b)] * pick(1, 1, 1, 1, 2)
        if pick(*[True] * 14, False): anns.append(Annotation('usual' if i % 40 else 'strange'))
        rows.append(
            dict(
                id=f'{i:04}',
                uri=f'{i}.png',
                sha256=digest(f'{rng.integers(n)}'),
                group=pick(None, f'g{rng.integers(n // 3)}'),
                split=pick('train', 'train', 'val', 'test', None),
                width=w if i % 17 else None,
                height=h if i % 17 else None,
                annotations=anns,
                expires=pick(None, None, '2020-01-01', '2099-01-01', 'soon'),
            )
        )
    return make_table(rows)


@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize('size', [37, 50_000])
def test_the_table_alone_says_what_the_whole_check_says(tmp_path, monkeypatch, seed, size):
    import cv_lab.data.tablecheck as alone
    from cv_lab.data.dataset import open_manifest, save_dataset
    from cv_lab.data.streaming import batches

    t, classes = muddle(seed), ['cat', 'dog', 'usual']
    monkeypatch.setattr(alone, 'batches', lambda rows, columns: batches(rows, columns, size))
    save_dataset(Dataset(t, 'muddle', tmp_path, classes), tmp_path)
    seen = pd.DataFrame(
        {c: t[c].to_pylist() for c in ('id', 'sha256', 'width', 'height')}
        | dict(pixels=t['sha256'].to_pylist(), broken=None, tells='')
    ).astype(dict(width=float, height=float))
    whole = pd.concat([q.between_findings(t, seen), q.table_findings(t, seen, classes)])
    want = {k: set(v) for k, v in whole.groupby('kind')['id']}
    kinds = 'leaked_group leaked_content duplicate conflict unknown_label unlabelled expired box_outside box_tiny box_twice'
    assert want.keys() >= set(kinds.split())
    for d in (Dataset(t, 'muddle', tmp_path, classes), open_manifest(tmp_path)):
        r = alone.check_table_only(d)
        assert {k: {f'{i:04}' for i in v} for k, v in r.findings.groupby('kind', observed=True)['id']} == want
        assert r.counts.equals(q.class_counts(t, classes)) and not r.ok
        tally = {x['kind']: x for x in r.to_json()['findings']}
        assert {k: x['items'] for k, x in tally.items() if k != 'no_class'} == {k: len(v) for k, v in want.items()}
        assert all(set(x['first']) <= want[k] and x['first'] for k, x in tally.items() if k != 'no_class')


def test_the_command_needs_no_picture_for_the_table(tmp_path):
    from typer.testing import CliRunner
    from cv_lab.cli.data import app
    from cv_lab.data.dataset import save_dataset

    rows = [dict(id=f'{i}', uri=f'{i}.png', sha256=digest(f'{i}'), annotations=[Annotation('a')]) for i in range(6)]
    for r, s in zip(rows, ('train', 'train', 'train', 'val', 'test', 'test')): r |= dict(split=s, group=f'g{r["id"]}')
    save_dataset(Dataset(make_table(rows), 'd', tmp_path / 'no pictures', ['a']), tmp_path / 'd')
    run = lambda *a: CliRunner().invoke(app, ['check', str(tmp_path / 'd'), '--no-pixels', *a])
    said = json.loads(run('--json').stdout)
    assert said['ok'] and said['items'] == 6 and not said['findings'] and set(said['parts']) == {
        'separate', 'unique', 'labelled', 'balanced'
    }
    assert {r['rule'] for r in said['rules'] if r['verdict'] == 'not judged'} == {
        'items that can be read', 'files as imported'
    }
    rows[5]['group'] = 'g0'
    save_dataset(Dataset(make_table(rows), 'd', tmp_path / 'no pictures', ['a']), tmp_path / 'd')
    r = run()
    assert r.exit_code == 4 and 'leaked_group' in r.stdout and 'not judged' in r.stdout
    assert isinstance(run('--report').exception, BadInput)


def test_a_group_that_has_no_split_yet_leaks_nowhere():
    rows = [dict(id=i, uri=i, sha256=digest(i), group='g', split=s) for i, s in zip('abc', (None, None, 'train'))]
    for some in (rows, rows[:2]):
        seen = pd.DataFrame(dict(pixels=list('abc')[:len(some)]))
        assert not len(q.between_findings(make_table(some), seen))


def test_examples_have_captions_that_break_and_figures_of_their_width(planted):
    import base64, io, re
    from cv_lab.report import gallery_html

    _, _, report = planted
    shown = q.examples(report, ['duplicate', 'blank'], each=2)
    assert list(shown) == ['duplicate', 'blank'] and all(len(v) == 2 for v in shown.values())
    both, one = shown['duplicate'][0][0], shown['blank'][0][0]
    assert both.shape[1] > 1.9 * one.shape[1]  # the other item stands beside it
    page = gallery_html([(both, 'a_long/name_of/a_file<b>.jpg')], 120)
    width = int(re.search(r'<figure style="width:(\d+)px">', page)[1])
    jpeg = base64.b64decode(re.search(r'base64,([^"]+)', page)[1])
    assert Image.open(io.BytesIO(jpeg)).size == (width, 120)
    assert '<figcaption>a_<wbr>long/<wbr>name_<wbr>of/<wbr>a_<wbr>file&lt;b&gt;.jpg</figcaption>' in page
    assert 'alt="a_long/name_of/a_file&lt;b&gt;.jpg"' in page
