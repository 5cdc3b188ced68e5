"""Splits that part nothing, versions that remember, a golden set that cannot be touched unnoticed."""
import json
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from cv_lab.core import Annotation, BadInput, Damaged, NotFound, digest, read_json, write_json
from cv_lab.data import versions as v
from cv_lab.data.datasheet import QUESTIONS, answers_template, datasheet, guideline, load_answers
from cv_lab.data.dataset import Dataset, load_dataset, save_dataset
from cv_lab.data.groups import units_of
from cv_lab.data.manifest import make_table
from cv_lab.data.splits import prove_split, split_dataset


def item(i, label='a', **kw):
    return dict(dict(id=f'i{i:04}', uri=f'{i}', sha256=digest(str(i)), annotations=[Annotation(label)]), **kw)


def dataset(rows, folder='.'): return Dataset(make_table(rows), 'd', folder, ['a', 'b'])
def column(d, name): return d.table[name].to_pylist()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 12),
            st.integers(0, 40),
            st.integers(0, 9),
            st.sampled_from('ab'),
            st.sampled_from([None, 'train', 'val', 'test']),
        ),
        min_size=1,
        max_size=60,
    ),
    st.sampled_from(['class', 'time', 'site']),
    st.booleans(),
    st.integers(0, 3),
)
def test_no_unit_is_parted(rows, by, redo, seed):
    d = dataset(
        [
            item(
                i,
                label,
                group=f'g{g}' if g else None,
                sha256=digest(f's{s}'),
                split=split,
                captured_at=f'2025-01-{1 + s % 28:02}',
                tags=dict(site=f'p{c}'),
            )
            for i, (g, s, c, label, split) in enumerate(rows)
        ]
    )
    clusters = [c for _, _, c, _, _ in rows]; held = [digest(f's{rows[0][1]}')]
    done, proof = split_dataset(d, by=by, clusters=clusters, held=held, redo=redo, seed=seed)
    for keys in (column(d, 'group'), column(d, 'sha256'), clusters):
        for k in set(keys) - {None}: assert len({s for s, x in zip(column(done, 'split'), keys) if x == k}) == 1
    assert (
        None not in column(done, 'split')
        and column(done, 'group') == column(d, 'group')
        and column(done, 'id') == column(d, 'id')
    )
    assert proof['shared_groups'] == proof['shared_contents'] == proof['shared_clusters'] == 0 and sum(
        proof['items'].values()
    ) == len(rows)
    assert all(s == 'test' for s, x in zip(column(done, 'split'), column(d, 'sha256')) if x in held)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=30))
def test_units_against_a_walk(pairs):
    rows = [item(i, group=f'g{a}', sha256=digest(f's{b}')) for i, (a, b) in enumerate(pairs)]
    got = units_of(make_table([*rows, item(99)])).of
    todo, want = set(range(len(pairs))), []
    while todo:
        reach, edge = set(), [todo.pop()]
        while edge:
            k = edge.pop()
            reach.add(k)
            new = {j for j in todo if pairs[j][0] == pairs[k][0] or pairs[j][1] == pairs[k][1]}
            todo -= new
            edge += new
        want.append(reach)
    assert {frozenset(np.flatnonzero(got[:-1] == u).tolist()) for u in set(got[:-1])} == {frozenset(w) for w in want}


def test_shares_are_kept_within_a_unit():
    d = dataset(
        [
            item(
                i,
                'ab'[i % 2],
                group=f'g{i // 4}',
                captured_at=f'2025-01-01T{i // 60:02}:{i % 60:02}',
                tags=dict(site=f's{i // 4 % 50}'),
            )
            for i in range(1000)
        ]
    )
    for by in ('class', 'time', 'site'):
        got = split_dataset(d, by=by)[1]['items']
        assert got['train'] == pytest.approx(650, abs=21) and got['test'] == pytest.approx(200, abs=21)


def test_time_splits_train_on_the_past():
    d = dataset([item(i, captured_at=f'2025-{1 + (i * 7) % 12:02}-{1 + i % 28:02}') for i in range(300)])
    done, _ = split_dataset(d, by='time')
    x = pd.DataFrame(dict(s=column(done, 'split'), t=column(done, 'captured_at'))).groupby('s')['t'].agg(['min', 'max'])
    assert x.loc['train', 'max'] <= x.loc['val', 'min'] and x.loc['val', 'max'] <= x.loc['test', 'min']


def test_what_a_split_needs():
    d = dataset([item(i) for i in range(5)])
    for kw in (
        dict(by='time'),
        dict(by='site'),
        dict(by='colour'),
        dict(shares=dict(train=0.5, test=0.2)),
        dict(shares=dict(train=0.5, holdout=0.5)),
    ):
        with pytest.raises(BadInput): split_dataset(d, **kw)


def test_the_proof_is_counted():
    t = make_table(
        [
            item(0, group='g', split='train'),
            item(1, group='g', split='test'),
            item(2, sha256=digest('x'), split='val'),
            item(3, sha256=digest('x'), split='train'),
        ]
    )
    p = prove_split(t, [0, 1, 2, 2])
    assert (p['shared_groups'], p['shared_contents'], p['shared_clusters']) == (1, 1, 1)


@pytest.fixture
def home(tmp_path):
    d = split_dataset(dataset([item(i, 'ab'[i % 2]) for i in range(100)], tmp_path))[0]
    save_dataset(d, tmp_path)
    return tmp_path


def changed(home, change, n=100): # every row through `change`
    return dataset([dict(change(r), tags={}) for r in load_dataset(home).table.to_pylist()[:n]], home)


def test_versions_remember(home):
    first = load_dataset(home).version
    d = changed(home, lambda r: r | dict(annotations=[Annotation('b')]) if r['id'] == 'i0000' else r)
    line = v.commit(home, d, 'a mistake', 'me')
    assert (
        line['parent'] == first and line['relabelled'] == 1 and line['added'] == line['removed'] == line['moved'] == 0
    )
    assert v.commit(home, d, 'again') == line and len(v.versions(home)) == 2
    v.commit(home, changed(home, lambda r: r, 90), 'fewer')
    assert [x['why'] for x in v.versions(home)] == ['as it was first saved', 'a mistake', 'fewer'] and v.version_log(
        home
    )['items'].tolist() == [90, 100, 100]
    assert (
        v.open_version(home, first[:6]).version == first
        and len(v.diff(home, first)['removed']) == 10
        and v.diff(home, first, line['version'])['relabelled'] == ['i0000']
    )
    with pytest.raises(NotFound): v.open_version(home, 'fff0')


def test_once_held_out_always_held_out(home):
    was = {r['sha256'] for r in load_dataset(home).table.to_pylist() if r['split'] == 'test'}
    v.commit(home, changed(home, lambda r: r | dict(split=None)), 'splits forgotten')
    again, _ = split_dataset(load_dataset(home), held=v.ever_held(home), redo=True, seed=7)
    assert was <= {r['sha256'] for r in again.table.to_pylist() if r['split'] == 'test'}


def test_splitting_again_and_again_does_not_eat_the_training_data(tmp_path):
    save_dataset(dataset([item(i, 'ab'[i % 2], sha256=digest(str(i))) for i in range(200)]), tmp_path)
    for seed in range(3):
        d, proof = split_dataset(load_dataset(tmp_path), held=v.ever_held(tmp_path), redo=True, seed=seed)
        v.commit(tmp_path, d, 'again')
        assert abs(proof['items']['test'] - 40) <= 8 and abs(proof['items']['val'] - 30) <= 8


def test_golden_cannot_be_touched_unnoticed(home):
    items = v.freeze_golden(home, each=3); assert len(items) == 6 and v.golden_changes(home, load_dataset(home)) == []
    golden = lambda r: r['sha256'] in items
    for change in (
        lambda r: r | dict(annotations=[Annotation('a', [0, 0, 1, 1])]) if golden(r) else r,
        lambda r: r | dict(split='train'),
        lambda r: r | dict(sha256=digest(r['id'])) if golden(r) else r,
    ):
        d = changed(home, change); assert len(v.golden_changes(home, d)) == 6
        with pytest.raises(BadInput, match='golden'): v.commit(home, d, 'oops')
    v.commit(
        home, changed(home, lambda r: r if golden(r) else r | dict(annotations=[Annotation('b')])), 'others may change'
    )
    line = v.commit(home, changed(home, lambda r: r | dict(split='train')), 'on purpose', golden='new protocol')
    assert len(line['golden_changed']) == 6
    assert v.golden_changes(home, load_dataset(home)) == []


def test_an_edited_or_lost_golden_list_is_noticed(home):
    v.freeze_golden(home, each=2); g = read_json(home/'golden.json'); k = next(iter(g['items']))
    write_json(home/'golden.json', g | dict(items={i: x for i, x in g['items'].items() if i != k}))
    with pytest.raises(Damaged): v.golden_changes(home, load_dataset(home))
    (home/'golden.json').unlink()
    with pytest.raises(Damaged): v.commit(home, changed(home, lambda r: r, 50), 'x')


def test_a_damaged_log_or_manifest_is_named(home):
    v.commit(home, changed(home, lambda r: r, 50), 'x'); first = v.versions(home)[0]['version']
    (home/f'manifest-{first}.parquet').write_bytes((home/f'manifest-{load_dataset(home).version}.parquet').read_bytes())
    with pytest.raises(Damaged): v.open_version(home, first)
    (home/'versions.jsonl').write_text('{')
    with pytest.raises(Damaged): v.versions(home)


def test_datasheet(tmp_path):
    d = dataset([item(i, license='MIT' if i else None, tags=dict(light='day')) for i in range(9)])
    text = datasheet(d, dict(purpose='To try.'))
    assert (
        'MIT: 8, not said: 1' in text
        and 'To try.' in text
        and text.count('*Not answered.*') == len(QUESTIONS) - 1
        and d.version in text
        and 'day: 9' in text
    )
    (tmp_path/'a.yaml').write_text(answers_template()); assert load_answers(tmp_path/'a.yaml') == {}
    (tmp_path/'a.yaml').write_text('purpos: x')
    with pytest.raises(BadInput): load_answers(tmp_path/'a.yaml')
    assert '| a | | | |' in guideline('detection', ['a']) and datasheet(dataset([]))


def test_command_line(home):
    from typer.testing import CliRunner
    from cv_lab.cli.data import app
    def cvlab(*a): r = CliRunner().invoke(app, [str(x) for x in a]); return r.exit_code, r.stdout

    code, out = cvlab('split', home, '--no-near', '--redo', '--seed', 3, '--json')
    assert code == 0 and json.loads(out)['proof']['shared_groups'] == 0
    assert load_dataset(home).about['split']['seed'] == 3
    said = cvlab('split', home, '--no-near', '--seed', 4)[1]  # nothing is left to split: that is said, and how to split anew
    assert 'every item had a split' in said and '--redo' in said
    first = json.loads(cvlab('log', home, '--json')[1])[-1]['version']
    assert not (home/'GUIDELINE.md').exists() and isinstance(
        CliRunner().invoke(app, ['datasheet', str(home), '--task', 'nope']).exception, BadInput)
    (home/'junk.parquet').write_text('x')
    assert isinstance(
        CliRunner().invoke(app, ['check', str(home), '--predictions', str(home/'junk.parquet')]).exception, BadInput)
    assert cvlab('version', home)[1].strip() == load_dataset(home).version
    assert (
        json.loads(cvlab('diff', home, first, '--json')[1])['moved']
        and cvlab('golden', home)[0] == cvlab('golden', home)[0] == 0
    )
    there = json.loads(cvlab('golden', home, '--json')[1]); frozen = (home / 'golden.json').read_bytes()
    assert there == dict(frozen=0, changed=[], items=len(json.loads(frozen)['items']), since=v.versions(home)[-1]['at'])
    asked = cvlab('golden', home, '--each', 7)[1]
    assert f'{there["items"]} golden items, frozen since {there["since"]}; --each 7 changes nothing' in asked
    assert f'remove {home / "golden.json"}' in asked and (home / 'golden.json').read_bytes() == frozen
    assert '--each' not in cvlab('golden', home)[1]
    (home / 'golden.json').unlink()                    # as it says
    assert json.loads(cvlab('golden', home, '--each', 1, '--json')[1])['frozen'] < there['items']
    assert (
        cvlab('datasheet', home, '--task', 'detection')[0] == 0
        and (home / 'DATASHEET.md').exists()
        and (home / 'GUIDELINE.md').exists()
        and (home / 'datasheet.yaml').exists()
    )
    code, out = cvlab('check', home, '--json')
    assert code == 4 and json.loads(out)['ok'] is False  # the files are not there
