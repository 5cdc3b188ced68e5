"Withdrawal: gone everywhere, nothing else touched, whole after a kill at any moment."
import hashlib, io, json, os
from pathlib import Path

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from PIL import Image
from typer.testing import CliRunner

from cv_lab.audit import Sealed
from cv_lab.core import Annotation, BadInput, NotFound, read_json, write_atomic, write_json
from cv_lab.data.files import look
from cv_lab.data.batches import import_into
from cv_lab.data.exports import export_dataset
from cv_lab.data.imports import import_dataset
from cv_lab.data.dataset import Dataset, load_dataset, save_dataset
from cv_lab.data.manifest import make_table
from cv_lab.data.splits import split_dataset
from cv_lab.data.versions import commit, freeze_golden, golden_changes, open_version, versions
from cv_lab.data.withdraw import known_datasets, pending, plan_withdrawal, withdraw


def png(seed):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)).save(out, 'PNG')
    return out.getvalue()


def put(folder, seeds, prefix='', root=None, **columns):
    rows = []
    for i, seed in enumerate(seeds):
        name = f'{prefix}{i:04}.png'
        write_atomic(Path(root or folder / 'images') / name, png(seed), sync=False)
        s = look(png(seed))
        rows.append(
            dict(
                id=name,
                uri=name,
                sha256=s.sha256,
                width=16,
                height=16,
                split='test' if i % 3 == 2 else 'train',
                consent='ada' if seed in (1, 2) else 'bob',
                annotations=[Annotation('person')],
                **columns,
            )
        )
    return Dataset(make_table(rows), folder.name, Path(root or folder/'images'), ['person'])


@pytest.fixture
def ws(tmp_path, monkeypatch):
    root = tmp_path / 'ws'
    (root / 'problems').mkdir(parents=True)
    (root / 'settings.ini').touch()
    monkeypatch.setenv('CVLAB_HOME', str(root))
    street = root / 'data/street'
    commit(street, put(street, range(6)), 'first')
    freeze_golden(street, 9)
    first = load_dataset(street).version
    d, _ = split_dataset(put(street, range(9)))
    commit(street, d, 'more', golden='split anew')
    write_json(street / 'predictions.json', [dict(id=f'{i:04}.png', score=0.5) for i in range(9)])
    save_dataset(put(root / 'data/other', range(20, 26)), root / 'data/other')
    write_json(root / 'data/other/notes.json', ['0001.png', '0002.png'])  # the same names, other pictures
    save_dataset(put(root / 'data/copies', [30, 1], 'c'), root / 'data/copies')
    pq.write_table(pa.table(dict(id=['c0000.png', 'c0001.png'], score=[0.1, 0.2])), root / 'data/copies/faces.parquet')
    run = root / 'runs/street-1'
    write_json(run / 'lineage.json', dict(dataset=first))
    t = open_version(street, first).split('test')
    (run / 'evaluation').mkdir()
    for name in ('truth', 'predictions'): pq.write_table(t, run/f'evaluation/{name}.parquet')
    write_json(root / 'runs/other-1/lineage.json', dict(dataset=load_dataset(root / 'data/other').version))
    write_json(root / 'runs/other-1/worst.json', ['0001.png', '0002.png'])
    report = root / 'reports/train/2026-01-01-a'
    write_json(report / 'metrics.json', dict(dataset=first))
    picture = '<img src="data:image/jpeg;base64,QUJD/+=="> 0002.png: person'
    write_atomic(report / 'report.html', picture)
    write_json(
        report / 'notebook.ipynb',
        dict(cells=[dict(outputs=[dict(data={'text/html': [picture], 'image/png': 'QUJD'})])]),
    )
    write_atomic(report / 'figures/a.png', b'x')
    (root / 'reports/train/2026-01-02-b').mkdir()
    write_atomic(root / 'reports/train/2026-01-02-b/report.html', picture.replace('0002', '0005'))
    write_json(root / 'reports/train/2026-01-02-b/metrics.json', dict(dataset='elsewhere'))
    for f in ('coco', 'voc', 'yolo', 'cvat', 'csv', 'labelstudio', 'huggingface'):
        export_dataset(street, f, root / f'batches/{f}')
    (root/'scratch').mkdir(); (root/'scratch/look.png').write_bytes(png(2)); return root


def everything(root):
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob('*'))
        if p.is_file() and p.suffix != '.lock'
    }


def names_left(root):
    shas = {look(png(s)).sha256 for s in (1, 2)}; out = []
    for p in sorted(root.rglob('*')):
        if not p.is_file() or 'audit' in p.parts: continue
        data = p.read_bytes(); rel = p.relative_to(root).as_posix()
        if hashlib.sha256(data).hexdigest() in shas: out.append(f'{rel} is the picture')
        if p.suffix == '.parquet':
            t = pq.read_table(p); own = 'other' not in rel and 'copies' not in rel
            if any(
                set(t[c].to_pylist())
                & (shas | ({'0001.png', '0002.png'} if own else {'c0001.png'} if 'copies' in rel else set()))
                for c in t.schema.names
                if t.schema.field(c).type == pa.string()
            ):
                out.append(f'{rel} has a row')
            if 'image' in t.schema.names and any(
                hashlib.sha256(v['bytes']).hexdigest() in shas for v in t['image'].to_pylist() if isinstance(v, dict)
            ):
                out.append(f'{rel} has the bytes')
        elif (
            rel.startswith(('batches', 'reports', 'runs/street', 'data/street'))
            and ('0001' in p.name or '0002' in p.name or b'0001.png' in data or b'0002.png' in data)
            and 'versions.jsonl' not in rel
        ):
            out.append(f'{rel} names it')
    return out


def test_it_is_gone_everywhere_and_nothing_else_is(ws):
    was = everything(ws); first = versions(ws/'data/street')[0]['version']; assert len(names_left(ws)) > 20
    (plan,) = withdraw(ws, consent='ada', reason='letter', by='Grace'); assert names_left(ws) == []
    now = everything(ws)
    keep = [
        'data/other/',
        'runs/other-1/',
        'reports/train/2026-01-02-b/',
        'data/copies/images/c0000.png',
        *(f'data/street/images/{i:04}.png' for i in (0, 3, 8)),
    ]
    assert {k: v for k, v in was.items() if k.startswith(tuple(keep))} == {
        k: v for k, v in now.items() if k.startswith(tuple(keep))
    }
    street = load_dataset(ws / 'data/street')
    assert len(street) == 7 and len(load_dataset(ws / 'data/copies')) == 1 and street.about['split']['withdrawn'] == 2
    with pytest.raises(NotFound, match='no more'): open_version(ws/'data/street', first)
    assert not golden_changes(ws / 'data/street', street) and all(
        '1' != v for v in read_json(ws / 'data/street/golden.json')['items']
    )
    assert (
        [r['run'] for r in plan.runs] == ['street-1']
        and plan.runs[0]['items'] == {'train': 1, 'test': 1}
        and len([d for d in plan.datasets if d['golden']]) == len([d for d in plan.datasets if 'street' in d['folder']])
    )
    log = Sealed(ws / 'audit/log.jsonl')
    assert (
        [e['event'] for e in log.read()][-2:] == ['withdrawal', 'withdrawal done']
        and not log.faults()
        and b'0002.png' not in log.path.read_bytes()
        and not pending(ws)
    )
    assert (
        len(pq.read_table(ws / 'runs/street-1/evaluation/truth.parquet')) == 1
        and 'base64'
        not in (ws / 'reports/train/2026-01-01-a/report.html').read_text()
        + (ws / 'reports/train/2026-01-01-a/notebook.ipynb').read_text()
    )


def test_one_item_takes_its_copies_along_and_names_must_be_clear(ws):
    with pytest.raises(BadInput, match='different pictures'): plan_withdrawal(ws, ['0001.png'])
    with pytest.raises(NotFound): plan_withdrawal(ws, ['nobody.png'])
    plan = plan_withdrawal(ws, ['0001.png'], datasets=[ws / 'data/street'])
    assert {Path(f).name for f in plan.files} >= {'0001.png', 'c0001.png'} and len(plan.shas) == 1
    assert (
        plan_withdrawal(ws, [plan.shas[0][:16]]).files == plan.files
        and plan_withdrawal(ws, ['c0001.png']).files == plan.files
    )


def test_a_dry_run_says_the_same_and_changes_nothing(ws):
    from cv_lab.cli.data import app
    was = everything(ws); run = lambda *a: CliRunner().invoke(app, ['withdraw', '--consent-id', 'ada', *a])
    dry = run('--dry-run')
    said = run('--dry-run', '--json')
    assert dry.exit_code == said.exit_code == 0 and everything(ws) == was
    assert 'GOLDEN SET LOSES' in dry.stdout and 'run street-1 trained on it (1 train, 1 test)' in dry.stdout
    r = run(); assert isinstance(r.exception, BadInput) and everything(ws) == was  # nobody said yes
    done = run('--yes')
    assert done.exit_code == 0 and done.stdout.startswith(dry.stdout.strip()) and names_left(ws) == []
    assert json.loads(said.stdout)['runs'][0]['run'] == 'street-1' and isinstance(run('--yes').exception, NotFound)


def test_a_kill_at_any_moment_is_finished_by_the_next_call(ws, monkeypatch):
    import shutil
    copy, whole = ws, ws.parent/'whole'; shutil.copytree(ws, whole); moments = [0]
    def counting(real, at):
        def f(*a, **k):
            moments[0] += 1
            if moments[0] == at: raise KeyboardInterrupt
            return real(*a, **k)
        return f
    for at in (1, 3, 8, 20, 35, 50, 70):
        shutil.rmtree(copy); shutil.copytree(whole, copy); moments[0] = 0
        with monkeypatch.context() as m:
            m.setattr(os, 'replace', counting(os.replace, at)); m.setattr(Path, 'unlink', counting(Path.unlink, at))
            try: withdraw(copy, consent='ada')
            except KeyboardInterrupt: pass
            else: assert at > 40; break
        if pending(copy): withdraw(copy)
        else: withdraw(copy, consent='ada')
        assert names_left(copy) == [] and len(load_dataset(copy/'data/street')) == 7 and not pending(copy), at
        log = Sealed(copy / 'audit/log.jsonl')
        done = [e for e in log.read() if e['event'] == 'withdrawal done']
        assert len(done) == 1, at
        assert (
            len(
                [
                    v
                    for v in versions(copy / 'data/street')
                    if 'mark' in v and v['why'].startswith('withdrawn') and 'golden' not in v
                ]
            )
            == 1
        )


def test_a_source_outside_is_only_listed(ws, tmp_path):
    d = put(ws/'data/far', [1, 50], 'f', root=tmp_path/'theirs'); save_dataset(d, ws/'data/far')
    plan = plan_withdrawal(ws, consent='ada')
    assert plan.outside == [str(tmp_path / 'theirs/f0000.png')]
    withdraw(ws, consent='ada')
    assert (tmp_path / 'theirs/f0000.png').exists() and len(load_dataset(ws / 'data/far')) == 1
    assert str(ws/'data/far') in map(str, known_datasets(ws))


def test_what_was_withdrawn_does_not_come_back(ws, tmp_path):
    import zipfile
    theirs = tmp_path / 'letter'
    for split, seeds in (('train', (1, 40, 41)), ('test', (2, 42))):
        (theirs / split / 'person').mkdir(parents=True)
        for s in seeds: (theirs / split / f'person/{s}.png').write_bytes(png(s))
    with zipfile.ZipFile(tmp_path / 'letter.zip', 'w') as z:
        for p in theirs.rglob('*.png'): z.write(p, p.relative_to(theirs))
    street, batch = ws / 'data/street', tmp_path / 'batch'
    export_dataset(street, 'labelstudio', batch)  # went out before the letter came
    before = import_dataset(theirs, 'imagefolder', ws / 'data/before')
    assert len(before.dataset) == 5 and not len(before.quarantine)
    withdraw(ws, consent='ada', outside=True)
    for s, split in ((1, 'train'), (2, 'test')): (theirs / split / f'person/{s}.png').write_bytes(png(s))
    for src, out, copy in ((theirs, 'a', False), (theirs, 'b', True), (tmp_path / 'letter.zip', 'c', False)):
        r = import_dataset(src, 'imagefolder', ws / 'data' / out, copy=copy)
        assert r.tally['left_out'] == {'withdrawn earlier': 2} and len(r.dataset) == 3, out
        assert sorted(r.quarantine['item']) == ['test/person/2.png', 'train/person/1.png'] and names_left(ws) == []
    assert (theirs / 'test/person/2.png').exists()  # a source of somebody else's is only read
    assert 'withdrawn' in (ws / 'data/a/quarantine.csv').read_text()
    done, _ = import_into(batch, street, 'labelstudio')
    assert sorted(done.left_out.values()).count('withdrawn earlier') == 2 and not done.added
    assert done.tally()['left_out']['withdrawn earlier'] == 2
    far = import_dataset(theirs, 'imagefolder', tmp_path / 'far')  # outside, but from within the workspace
    assert far.tally['left_out'] == {'withdrawn earlier': 2}
    with pytest.MonkeyPatch.context() as m:
        m.delenv('CVLAB_HOME')
        m.chdir(tmp_path)
        assert len(import_dataset(theirs, 'imagefolder', tmp_path / 'away').dataset) == 5  # another's business
