"Properties of the manifest, on tables that nobody would choose: versions, splits, what is read out of a table, and the way to disk and back."

import hashlib, json, random, struct
from collections import Counter, defaultdict

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from hypothesis import given, settings, strategies as st

from cv_lab.core import BadInput, Damaged, digest
from cv_lab.data.content_hash import row_digests, version_of
from cv_lab.data.dataset import Dataset, load_dataset, save_dataset, write_manifest
from cv_lab.data.diff import count_changes, diff_versions
from cv_lab.data.groups import shared_groups, units_of
from cv_lab.data.manifest import ANNOTATION, SCHEMA, SPLITS, first_labels, make_table, tags_of
from cv_lab.data.splits import assign_splits
from cv_lab.data.streaming import batches
from cv_lab.data.validation import check_rows

settings.register_profile('short', max_examples=60, deadline=None); settings.load_profile('short')

TEXT = st.one_of(
    st.none(), st.sampled_from(['', 'a', 'b', 'ä', '=', 'label=', '\0', '🜂', 'a' * 300]), st.text(max_size=4)
)
NUMBER = st.sampled_from([0., -0., 1., 1.5, 1e300, -7.])
ANNOTATIONS = st.lists(
    st.fixed_dictionaries(
        {},
        optional=dict(
            label=TEXT,
            text=TEXT,
            track_id=TEXT,
            caption=TEXT,
            score=st.sampled_from([0.0, 0.5, 1.0]),
            polygon=st.lists(st.lists(NUMBER, max_size=4), max_size=2),
            bbox=st.just([0.0, 0.0, 1.0, 2.0]),
            mask=st.fixed_dictionaries(dict(size=st.just([2, 3]), counts=TEXT)),
        ),
    ),
    max_size=3,
)
ROW = st.fixed_dictionaries(
    dict(
        sha256=st.sampled_from([digest(str(i)) for i in range(12)]),
        group=st.sampled_from([None, 'g', 'h', 'ä', '']),
        split=st.sampled_from([None, None, *SPLITS]),
        width=st.sampled_from([None, 1, 256]),
        source=TEXT,
        tags=st.dictionaries(st.sampled_from(['a', 'b', 'ü']), st.sampled_from(['', '1', '2']), max_size=3),
        annotations=ANNOTATIONS,
    )
)
ROWS = st.lists(ROW, max_size=14)


def table(rows, chunks=1):
    "A manifest, perhaps in several chunks; the first chunk is a slice of something longer."
    t = make_table([dict(r, id=f'{i}', uri=f'{i}.png') for i, r in enumerate([*rows, *rows[:1]])])
    cuts = [0, *sorted(random.Random(len(rows)).sample(range(len(rows) + 1), min(chunks - 1, len(rows)))), len(rows)]
    return pa.concat_tables([t.slice(a, b - a) for a, b in zip(cuts, cuts[1:])])


def said(x):
    "What a value says, in Python: nothing for null and for what is empty, numbers as numbers, the rest as it is."
    if isinstance(x, dict): return {k: v for k in sorted(x) if (v := said(x[k])) is not None} or None
    if isinstance(x, list): return [said(v) for v in x] or None
    if isinstance(x, tuple): return list(x)
    return x + 0. if isinstance(x, int | float) and not isinstance(x, bool) else x


def normal(t):  # one text per row
    return [
        json.dumps(said({k: (sorted(v) if k == 'tags' and v else v) for k, v in r.items() if k not in ('id', 'uri')}))
        for r in t.to_pylist()
    ]


def encoded(x):
    "What is hashed, as the page says it, value by value: None where nothing is said."
    framed = lambda b: b'\xff'*8 if b is None else struct.pack('<q', len(b)) + b
    if isinstance(x, dict):
        return b''.join(k.encode() + b'=' + framed(b) for k in sorted(x) if (b := encoded(x[k])) is not None) or None
    if isinstance(x, list):
        return (
            b''.join(framed(encoded(v)) for v in (map(_pair, sorted(x)) if x and isinstance(x[0], tuple) else x))
            or None
        )
    if isinstance(x, str): return x.encode()
    return None if x is None else struct.pack('<d', x + 0.) if isinstance(x, float) else struct.pack('<q', x)


def _pair(kv): return dict(key=kv[0], value=kv[1])


def slow_version(t):
    rows = [
        hashlib.sha256(encoded({k: v for k, v in r.items() if k not in ('id', 'uri')}) or b'').digest()
        for r in t.to_pylist()
    ]
    return hashlib.sha256(b''.join(sorted(rows))).hexdigest()[:16]


# versions -------------------------------------------------------------------------------------------------------------

@given(ROWS, st.randoms(use_true_random=False), st.integers(1, 4))
def test_order_names_and_chunks_do_not_change_a_version(rows, rng, chunks):
    shuffled = rng.sample(rows, len(rows)); other = table(shuffled, chunks)
    renamed = other.set_column(0, 'id', pa.array([f'x{i}' for i in range(len(other))], pa.string())).set_column(
        1, 'uri', pa.array(['?'] * len(other), pa.string())
    )
    assert version_of(table(rows)) == version_of(other) == version_of(renamed)


@given(ROWS, st.integers(1, 4))
def test_the_version_is_what_the_page_says_it_is(rows, chunks):
    t = table(rows, chunks)
    assert version_of(t) == slow_version(t)


@given(ROWS, ROWS, st.integers(1, 3))
def test_versions_are_equal_when_what_is_said_is_equal(a, b, chunks):
    x, y = table(a), table(b, chunks)
    assert (version_of(x) == version_of(y)) == (sorted(normal(x)) == sorted(normal(y)))
    rows = normal(x) + normal(y); hashes = [*row_digests(x), *row_digests(y)]
    assert len(set(zip(rows, hashes))) == len(set(rows)) == len(set(hashes))


@given(st.lists(ROW, min_size=1, max_size=14), st.data())
def test_one_change_is_another_version(rows, data):
    i = data.draw(st.integers(0, len(rows) - 1))
    part = data.draw(
        st.sampled_from(['label', 'caption', 'split', 'group', 'source', 'tags', 'width', 'sha256', 'more', 'none'])
    )
    r = dict(rows[i])
    if part in ('label', 'caption'):
        r['annotations'] = [dict(a, **{part: (a.get(part) or '') + '!'}) for a in r['annotations'] or [{}]]
    elif part == 'more': r['annotations'] = [*r['annotations'], dict(label='new')]
    elif part == 'none': r['annotations'] = [] if r['annotations'] else [{}]
    elif part == 'tags': r['tags'] = {**r['tags'], 'a': r['tags'].get('a', '') + '!'}
    elif part == 'split': r['split'] = 'test' if r['split'] != 'test' else None
    elif part == 'sha256': r['sha256'] = digest('another')
    elif part == 'width': r['width'] = (r['width'] or 0) + 1
    else: r[part] = (r[part] or '') + '!'
    assert version_of(table(rows)) != version_of(table([*rows[:i], r, *rows[i+1:]]))


def test_a_version_outlives_columns_widths_and_the_order_of_tags():
    t = table(
        [dict(sha256=digest('1'), width=3, tags=dict(a='1', b='2'), annotations=[dict(label='x', bbox=[0, 0, 1, 1])])]
    )
    v = version_of(t)
    wide = t.set_column(3, 'width', t['width'].cast(pa.int64()))
    back = t.set_column(
        t.schema.get_field_index('tags'), 'tags', pa.array([[('b', '2'), ('a', '1')]], SCHEMA.field('tags').type)
    )
    short = pa.struct([f for f in ANNOTATION if f.name in ('label', 'bbox')])
    few = t.set_column(
        t.schema.get_field_index('annotations'),
        'annotations',
        pa.array([[dict(label='x', bbox=[0, 0, 1, 1])]], pa.list_(short)),
    )
    assert (
        v
        == version_of(wide)
        == version_of(back)
        == version_of(few)
        == version_of(t.drop_columns(['consent', 'captured_at']))
    )


def test_the_same_rows_twice_are_another_version():
    r = dict(sha256=digest('1'))
    assert version_of(table([r])) != version_of(table([r, r]))


# splits ---------------------------------------------------------------------------------------------------------------

def clusters(t):
    "Rows that must stay together, found the slow way."
    home = list(range(len(t))); rows = t.select(['group', 'sha256']).to_pylist()
    def find(i):
        while home[i] != i: i = home[i]
        return i
    for key in ('group', 'sha256'):
        first = {}
        for i, r in enumerate(rows):
            if r[key] is not None: home[find(i)] = find(first.setdefault(r[key], i))
    out = defaultdict(list)
    for i in range(len(t)): out[find(i)].append(i)
    return list(out.values())


SHARES = st.sampled_from(
    [
        dict(train=0.65, val=0.15, test=0.2),
        dict(test=0.5, train=0.5),
        dict(val=1.0),
        dict(train=0.34, val=0.33, test=0.33),
        dict(train=1.0, test=0.0),
    ]
)
MANY = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 90), st.sampled_from(['cat', 'dog', 'ä', None])), max_size=120
).map(
    lambda xs: [
        dict(sha256=digest(str(s)), group=None if g > 50 else f'g{g}', annotations=[dict(label=l)] if l else [])
        for g, s, l in xs
    ]
)


@given(MANY, SHARES, st.integers(0, 3))
def test_no_group_and_no_image_crosses_and_the_shares_hold_within_one_group(rows, shares, seed):
    t = table(rows, 3); got = assign_splits(t, shares, seed); split = got['split'].to_pylist(); groups = clusters(t)
    assert (
        shared_groups(got) == [] and all(len({split[i] for i in g}) == 1 for g in groups) and set(split) <= set(shares)
    )
    labels = first_labels(t); by = defaultdict(list)
    for g in groups: by[next((labels[i] for i in g if labels[i] is not None), None)].append(g)
    for of_class in by.values():
        n, largest = sum(map(len, of_class)), max(map(len, of_class))
        have = Counter(split[i] for g in of_class for i in g)
        for s, share in shares.items(): assert abs(have[s] - share*n) <= largest + 1e-9


@given(MANY, st.randoms(use_true_random=False))
def test_a_split_depends_on_names_not_on_the_order_of_rows(rows, rng):
    rows = [dict(r, annotations=[]) for r in rows]; order = rng.sample(range(len(rows)), len(rows))
    a, b = (
        assign_splits(table(rows))['split'].to_pylist(),
        assign_splits(table([rows[i] for i in order], 2))['split'].to_pylist(),
    )
    assert [a[i] for i in order] == b


@given(ROWS)
def test_what_has_a_split_keeps_it_and_what_was_held_out_stays_out(rows):
    t = table(rows, 2); got = assign_splits(t)['split'].to_pylist(); had = t['split'].to_pylist()
    for g in clusters(t):
        before = [SPLITS.index(had[i]) for i in g if had[i]]
        assert not before or {got[i] for i in g} == {SPLITS[max(before)]}
    assert None not in got and assign_splits(assign_splits(t))['split'].to_pylist() == got


@pytest.mark.parametrize('shares', [dict(train=.5), dict(train=.5, dev=.5), dict(train=1.2, test=-.2), {}])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(BadInput): assign_splits(table([dict(sha256=digest('1'))]), shares)


@given(ROWS)
def test_leaks_are_found(rows):
    t = table(rows, 2); expect = set()
    for key in ('group', 'sha256'):
        in_ = defaultdict(set)
        for k, s in zip(t[key].to_pylist(), t['split'].to_pylist()): in_[k].add(s) if k is not None and s else None
        expect |= {k for k, s in in_.items() if len(s) > 1}
    assert shared_groups(t) == sorted(expect)


# reading a table ------------------------------------------------------------------------------------------------------

@given(ROWS, st.integers(1, 4))
def test_labels_and_tags_are_those_of_the_rows(rows, chunks):
    t = table(rows, chunks)
    assert first_labels(t) == [
        next((a['label'] for a in r['annotations'] if a['label'] is not None), None) for r in t.to_pylist()
    ]
    tags = tags_of(t); names = {k for r in rows for k in r['tags']}
    assert all(tags[k] == [r['tags'].get(k) for r in rows] for k in names) and set(tags) == names | {
        'split',
        'source',
        'license',
        'device',
        'captured_at',
    }


@given(ROWS, ROWS)
def test_the_difference_of_two_versions(a, b):
    once = lambda rows: list(
        {r['sha256']: r for r in rows}.values()
    )  # where an image stands twice, there is no telling which became which
    a, b = once(a), once(b); x, y = table(a), table(b, 2); d = diff_versions(x, y)
    old, new = (
        {
            s: (i, r['split'], said(r['annotations']))
            for i, (s, r) in zip(t['id'].to_pylist(), zip(t['sha256'].to_pylist(), t.to_pylist()))
        }
        for t in (x, y)
    )
    assert d == dict(
        added=[i for s, (i, *_) in new.items() if s not in old],
        removed=[i for s, (i, *_) in old.items() if s not in new],
        relabelled=[i for s, (i, _, l) in new.items() if s in old and old[s][2] != l],
        moved=[i for s, (i, p, _) in new.items() if s in old and old[s][1] != p],
    )


# the way to disk ------------------------------------------------------------------------------------------------------

@settings(max_examples=15)
@given(ROWS)
def test_saved_and_loaded_it_is_the_same(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp('d')
    d = save_dataset(Dataset(table(rows, 2), 'x', folder, ['a']), folder)
    back = load_dataset(folder)
    assert back.table.equals(d.table) and back.version == d.version and not list(folder.glob('.*'))


def test_a_manifest_that_was_changed_by_hand_is_refused(tmp_path):
    import pyarrow.parquet as pq

    d = save_dataset(
        Dataset(
            table([dict(sha256=digest(str(i)), annotations=[dict(label='a')]) for i in range(5)]), 'x', tmp_path, ['a']
        ),
        tmp_path,
    )
    rows = d.table.to_pylist()
    rows[2]['annotations'][0]['label'] = 'b'
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / f'manifest-{d.version}.parquet')
    with pytest.raises(Damaged): load_dataset(tmp_path)


def test_a_write_that_fails_leaves_the_old_dataset(tmp_path, monkeypatch):
    import pyarrow.parquet as pq
    old = save_dataset(Dataset(table([dict(sha256=digest('1'))]), 'x', tmp_path), tmp_path)
    def half(t, f, **kw): f.write(b'PAR1'); raise OSError('no space left')
    monkeypatch.setattr(pq, 'write_table', half)
    with pytest.raises(OSError): save_dataset(Dataset(table([dict(sha256=digest('2'))]), 'x', tmp_path), tmp_path)
    assert load_dataset(tmp_path).version == old.version and not list(tmp_path.glob('.*'))


def test_many_rows_hash_as_their_parts_do():
    "Batches and chunks do not show."
    n = 120_000
    part = table([dict(sha256=digest(str(i)), group=f'g{i % 9}', annotations=[dict(label='a')]) for i in range(4000)])
    t = pa.concat_tables([part]*(n//4000)); a = row_digests(t)
    assert (
        len(a) == n
        and (a.reshape(-1, 4000) == row_digests(part)).all()
        and version_of(t) == version_of(t.combine_chunks())
    )
    assert np.unique(a).size == 4000


@settings(max_examples=15, deadline=None)
@given(ROWS, ROWS)
def test_a_file_is_read_as_a_table_is(tmp_path_factory, a, b):
    """Seven rows to a row group, three at a time: checks, versions, differences and splits are those of the table."""
    folder = tmp_path_factory.mktemp('file')
    once = lambda rows: list({r['sha256']: r for r in rows}.values())
    x, y = table(once(a)), table(once(b), 2)
    for name, t in (('x', x), ('y', y)): pq.write_table(t, folder / f'{name}.parquet', row_group_size=7)
    fx, fy = folder / 'x.parquet', folder / 'y.parquet'
    assert pa.Table.from_batches(batches(fx, size=3), x.schema).equals(x)
    assert version_of(fx) == version_of(x) and diff_versions(fx, fy) == diff_versions(x, y)
    assert {k: len(v) for k, v in diff_versions(x, y).items()} == count_changes(fx, fy)[0]
    u, v = units_of(x), units_of(fx)
    assert (u.of == v.of).all() and (u.order == v.order).all()
    d = Dataset(x, 'd', folder, ['a'])
    made = write_manifest(batches(fx, size=3), d, folder)
    assert made.version == d.version and pq.read_table(made.rows).equals(x)


def test_a_file_that_nobody_can_rely_on_is_refused(tmp_path):
    good = table([dict(sha256=digest(str(i))) for i in range(5)])
    for column, values, why in (
        ('id', ['a', 'b', 'c', 'b', 'b'], 'twice: b\n'),
        ('sha256', ['x'] * 5, 'content hash'),
        ('split', ['holdout'] * 5, 'unknown split'),
    ):
        bad = good.set_column(good.schema.get_field_index(column), column, pa.array(values))
        pq.write_table(bad, tmp_path / 'bad.parquet', row_group_size=2)
        with pytest.raises(BadInput, match=why): check_rows(tmp_path / 'bad.parquet')
    (tmp_path / 'bad.parquet').write_bytes(b'PAR1 no')
    with pytest.raises(Damaged): check_rows(tmp_path / 'bad.parquet')
    pq.write_table(good.drop_columns(['tags']), tmp_path / 'bad.parquet')
    with pytest.raises(BadInput, match='lacks the columns tags'): version_of(tmp_path / 'bad.parquet')
