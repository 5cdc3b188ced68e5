"Somebody else's archive, a verdict written by hand, a bundle put together again: each is refused, and leaves nothing behind."

import io, os, pickle, shutil, sys, tarfile, types, zipfile

import pytest, yaml

from cv_lab.core import BadInput, Damaged, NotAccepted, NotFound, digest, file_digest, read_json, write_json
from cv_lab.release import Registry, export, load, make_bundle, mirror, objections, write_gate
from cv_lab.spec import parse_problem
from tests.test_release import PROBLEM, TEXT, compare, make_run, put_metrics, release


@pytest.fixture
def registry(tmp_path): return Registry(tmp_path/'registry')


def again(bundle):
    "Make the checksums of a bundle fit what is in it, as an attacker would."
    names = sorted(
        p.relative_to(bundle).as_posix()
        for p in bundle.rglob('*')
        if p.is_file() and p.name not in ('checksums.json', 'model.yaml')
    )
    write_json(bundle/'checksums.json', {n: file_digest(bundle/n) for n in names}); return bundle


@pytest.fixture
def bundle(tmp_path, registry):
    "A bundle that did not pass, to be improved by hand."
    run = make_run(tmp_path, 'bad', accuracy=0.85)
    write_gate(run, PROBLEM, registry)
    return make_bundle(run, PROBLEM, TEXT)


def refused(registry, bundle, match, problem=None):
    tag = registry.add(bundle)
    with pytest.raises(NotAccepted, match=match): registry.promote(tag, reason='r', by='Eve', problem=problem)
    assert registry.standing('shapes') == {}


def test_a_verdict_written_by_hand(registry, bundle):
    v = read_json(bundle/'gate.json'); v['verdict'] = 'pass'
    for r in v['rules']: r['verdict'] = 'pass'
    write_json(bundle/'gate.json', v); refused(registry, again(bundle), 'judged again')
    v['rules'] = [r for r in v['rules'] if not r['rule'].startswith('accuracy')]
    write_json(bundle/'gate.json', v); refused(registry, again(bundle), 'judged again')


@pytest.mark.parametrize('junk', [[], {}, 'pass', dict(verdict='pass', rules=[]), dict(verdict='maybe')])
def test_a_verdict_that_is_none(registry, bundle, junk):
    write_json(bundle/'gate.json', junk); tag = registry.add(again(bundle))
    with pytest.raises(Damaged, match='no verdict'): registry.promote(tag, reason='r', by='Eve', override='o')


def test_the_network_exchanged_after_the_verdict(tmp_path, registry):
    run = make_run(tmp_path, 'good')
    release(run, registry)
    b = run / 'bundle'
    whole = read_json(b / 'evaluation/performance.json')
    for name, match in (
        ('thresholds.json', 'another thresholds.json'),
        ('model.safetensors', 'another model.safetensors'),
    ):
        was = (b / name).read_bytes()
        (b / name).write_bytes(b'{}')
        refused(registry, again(b), match)
        (b / name).write_bytes(was)
    (b / 'model.onnx').write_bytes(b'another')
    write_json(b / 'evaluation/performance.json', whole | dict(model=file_digest(b / 'model.onnx')))
    refused(registry, again(b), 'another evaluation/performance.json')
    (b / 'gate.json').unlink()
    refused(registry, again(b), 'no verdict')


def test_rules_made_easier_in_the_bundle(tmp_path, registry):
    run = make_run(tmp_path, 'bad', accuracy=.85); text = TEXT.replace('0.9,', '0.5,'); easy = parse_problem(text)
    write_gate(run, easy, registry); refused(registry, make_bundle(run, easy, text), 'other rules', problem=PROBLEM)


def test_a_bundle_under_another_name(tmp_path, registry):
    tag = release(make_run(tmp_path), registry)
    other = registry.shelf / 'forms'
    shutil.copytree(registry.shelf / 'shapes', other)
    moved = f'forms:{tag.split(":")[1]}'
    for ask in (lambda: registry.path(moved), lambda: registry.promote(moved, reason='r', by='Eve', override='o')):
        with pytest.raises(Damaged, match='holds shapes'): ask()
    assert not registry.verify()['ok']
    assert 'for the problem shapes' in ' '.join(objections(registry.path(tag), moved, {}))


@pytest.mark.parametrize(
    'plant', ['link to a file', 'link to a folder', 'not listed', 'listed outside', 'not a mapping']
)
def test_what_is_no_bundle(tmp_path, registry, bundle, plant):
    (tmp_path/'secret').mkdir(); (tmp_path/'secret/x').write_text('secret')
    if plant == 'link to a file': (bundle/'MODEL_CARD.md').symlink_to(tmp_path/'secret/x'); again(bundle)
    if plant == 'link to a folder': (bundle/'more').symlink_to(tmp_path/'secret')
    if plant == 'not listed': (bundle/'.env').write_text('PASSWORD=x')
    if plant == 'listed outside':
        write_json(
            bundle / 'checksums.json',
            read_json(bundle / 'checksums.json') | {'../../secret/x': file_digest(tmp_path / 'secret/x')},
        )
    if plant == 'not a mapping': write_json(bundle/'checksums.json', [])
    with pytest.raises(Damaged): registry.add(bundle)
    assert registry.tags() == []


def test_a_comparison_with_invented_answers(tmp_path, registry):
    tag = release(make_run(tmp_path), registry)
    registry.promote(tag, reason='r', by='Ada')
    b = make_run(tmp_path, 'b')
    compare(b, tag, make_run(tmp_path, 'weak') / 'evaluation', value=0.3)  # against answers that production never gave
    with pytest.raises(Damaged, match=f'predictions of {tag}'): write_gate(b, PROBLEM, registry)


def test_an_alias_moved_by_hand(tmp_path, registry):
    a = release(make_run(tmp_path), registry)
    registry.promote(a, reason='r', by='Ada')
    b = release(make_run(tmp_path, 'b'), registry)
    file = registry.home / 'aliases/shapes.json'
    entries = read_json(file)
    entries['production'] |= dict(tag=b)
    write_json(file, entries)
    v = registry.verify(); assert not v['ok'] and 'not where the log left it' in str(v['rows'])
    with pytest.raises(Damaged, match='not where the log left it'): registry.promote(a, reason='r', by='Ada')
    with pytest.raises(Damaged): registry.path('shapes')                        # its digest is not the one in the alias
    for junk in ('{', '[]', '{"production": {"tag": "x"}}', '{"production": 1}'):
        file.write_text(junk); assert not registry.verify()['ok'] or junk == '[]'
        with pytest.raises((Damaged, NotFound)): registry.resolve('shapes')
    assert registry.restore('shapes') == dict(production=a) and registry.verify()['ok']


def test_restore_is_what_the_moves_left(tmp_path, registry):
    tags = []
    for n in 'abcd':
        tags.append(release(make_run(tmp_path, n), registry))
        registry.promote(tags[-1], reason='r', by='Ada')
    registry.rollback('shapes', by='Ada', reason='r')
    registry.promote(tags[0], 'challenger', 'r', 'Ada', override='o')
    registry.rollback('shapes', by='Ada', reason='r')
    registry.promote(tags[3], reason='r', by='Ada', override='o')
    file = registry.home / 'aliases/shapes.json'
    whole = read_json(file)
    file.unlink()
    assert not registry.verify()['ok']
    registry.restore('shapes')
    assert read_json(file) == whole and registry.verify()['ok']


# ---- archives

def archive(path, members, form='xz'):
    "An exported model with `members` (name -> bytes, or a TarInfo) put in."
    about = dict(
        name='shapes',
        version='0123456789abcdef',
        module='',
        labels={},
        options={},
        metadata={},
        signatures={},
        api_version='v1',
        creation_time='2026-01-01T00:00:00+00:00',
        context=dict(framework_name='', framework_versions={}, bentoml_version='1.4', python_version='3.11'),
    )
    members = {'model.yaml': yaml.safe_dump(about).encode()} | members
    if form == 'zip':
        with zipfile.ZipFile(path, 'w') as z: [z.writestr(n, b) for n, b in members.items()]
        return path
    with tarfile.open(path, f'w:{form}') as t:
        for n, b in members.items():
            if isinstance(b, tarfile.TarInfo): t.addfile(b); continue
            i = tarfile.TarInfo(n); i.size = len(b); t.addfile(i, io.BytesIO(b))
    return path


def link(name, to, kind=tarfile.SYMTYPE):
    i = tarfile.TarInfo(name); i.type, i.linkname = kind, to; return i


class Bomb:
    def __reduce__(self): return (os.mkdir, (os.environ['CVLAB_TEST_BOMB'],))


YAML = lambda **kw: yaml.safe_dump(
    dict(
        name='shapes',
        version='0123456789abcdef',
        module='',
        labels={},
        options={},
        metadata={},
        signatures={},
        api_version='v1',
        creation_time='2026-01-01T00:00:00+00:00',
        context=dict(framework_name='', framework_versions={}),
    )
    | kw
).encode()
HOSTILE = {
    'up': dict(members={'../escaped': b'x'}),
    'far up': dict(members={'a/../../../escaped': b'x'}),
    'absolute': dict(members={'/tmp/cvlab-escaped': b'x'}),
    'zip up': dict(members={'../escaped': b'x'}, form='zip'),
    'link': dict(members={'l': link('l', '/etc/passwd')}),
    'link up': dict(members={'l': link('l', '../../escaped')}),
    'through a link': dict(members={'l': link('l', '..'), 'l/escaped': b'x'}),
    'hard link': dict(members={'l': link('l', '/etc/passwd', tarfile.LNKTYPE)}),
    'device': dict(members={'d': link('d', '', tarfile.CHRTYPE)}),
    'no bundle': dict(members={}),
    'name up': dict(members={'model.yaml': YAML(name='../escaped')}),
    'version up': dict(members={'model.yaml': YAML(version='../../escaped')}),
    'yaml object': dict(members={'model.yaml': b'!!python/object/apply:os.mkdir [escaped]'}),
}


@pytest.mark.parametrize('what', HOSTILE)
def test_archives_cannot_escape(tmp_path, registry, what):
    form = HOSTILE[what].get('form', 'xz'); place = tmp_path/'place'; place.mkdir(); before = set(os.listdir('/tmp'))
    file = archive(place/f'm.{"zip" if form == "zip" else "bentomodel"}', HOSTILE[what]['members'], form)
    with pytest.raises((BadInput, Damaged)): load(registry, file)
    assert registry.tags() == [] and os.listdir(place) == [file.name] and not list(tmp_path.rglob('*escaped*'))
    assert not [f for f in set(os.listdir('/tmp')) - before if 'escaped' in f] and not list(
        (registry.home / 'staging').iterdir()
    )


def test_no_pickle_is_opened(tmp_path, registry, monkeypatch):
    monkeypatch.setenv('CVLAB_TEST_BOMB', str(tmp_path / 'boom'))
    tag = release(make_run(tmp_path), registry)
    folder = registry.path(tag)
    files = {n: (folder/n).read_bytes() for n in [*read_json(folder/'checksums.json'), 'checksums.json', 'model.yaml']}
    file = archive(tmp_path / 'm.bentomodel', files | {'custom_objects.pkl': pickle.dumps(Bomb())})
    other = Registry(tmp_path / 'other')
    with pytest.raises(Damaged, match='custom_objects.pkl is not listed'): load(other, file)
    assert not (tmp_path/'boom').exists() and other.tags() == []


@pytest.mark.parametrize('name', ['http://127.0.0.1:9/m.zip', 's3://bucket/m.bentomodel', 'nothing.zip'])
def test_nothing_is_fetched(registry, name):
    with pytest.raises(NotFound): load(registry, name)


@pytest.mark.parametrize('data', [b'', b'no archive', b'PK\3\4' + b'\0'*40])
def test_what_is_no_archive(tmp_path, registry, data):
    for ending in ('zip', 'bentomodel', 'tar.gz'):
        (tmp_path/f'm.{ending}').write_bytes(data)
        with pytest.raises(BadInput, match='no exported model'): load(registry, tmp_path/f'm.{ending}')


@pytest.mark.parametrize('ending', ['bentomodel', 'tar.gz', 'zip'])
def test_there_and_back(tmp_path, registry, ending):
    tag = release(make_run(tmp_path), registry)
    registry.promote(tag, reason='r', by='Ada')
    file = export(registry, 'shapes', tmp_path / f'm.{ending}')
    other = Registry(tmp_path / 'other')
    assert (
        load(other, file) == tag == load(other, file)
        and other.verify()['ok']
        and other.standing('shapes') == {}
        and [p.name for p in tmp_path.glob('.*')] == []
    )
    other.promote(tag, reason='r', by='Ada')
    assert digest(read_json(other.path('shapes') / 'checksums.json')).startswith(tag.split(':')[1])
    with pytest.raises(BadInput): export(registry, 'shapes', tmp_path/'m.exe')


# ---- the mirror

def fake_wandb(monkeypatch, offline):
    calls = []
    class Artifact:
        def __init__(self, name, type, metadata): calls.append(('artifact', name, type, metadata['verdict']))
        def add_dir(self, path): calls.append(('files', sorted(os.listdir(path))))
    class Run:
        def __enter__(self): return self
        def __exit__(self, *a): calls.append(('finish',))
        def log_artifact(self, a, aliases): calls.append(('log', aliases)); return a
        def link_artifact(self, a, target, aliases): calls.append(('link', target, aliases))
    Run.offline = offline
    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=lambda **kw: Run(), Artifact=Artifact))
    return calls


@pytest.mark.parametrize('offline', [True, False])
def test_mirror(tmp_path, registry, monkeypatch, offline):
    calls = fake_wandb(monkeypatch, offline)
    tag = release(make_run(tmp_path), registry)
    registry.promote(tag, reason='r', by='Ada')
    assert calls == []                                                          # off unless asked for
    said = mirror(registry, 'shapes', 'production', 'model'); version = tag.split(':')[1]; assert tag in said
    assert (
        ('log', ['production', version]) in calls
        and ('artifact', 'shapes', 'model', 'pass') in calls
        and calls[-1] == ('finish',)
    )
    assert [c for c in calls if c[0] == 'link'] == (
        [] if offline else [('link', 'wandb-registry-model/shapes', ['production', version])]
    )


def test_figures_changed_with_their_hashes_are_out_of_scope_but_named(tmp_path, registry):
    "Whoever can write metrics.json before the gate looks decides what it says; the gate holds that the tables are the ones named there."
    run = make_run(tmp_path, 'bad', accuracy=0.85)
    put_metrics(run, accuracy=0.99)
    assert write_gate(run, PROBLEM, registry)['verdict'] == 'pass'
