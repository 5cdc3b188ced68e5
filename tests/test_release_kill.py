"""SIGKILL at any moment, and two writers at once.

A child process is killed at its first file operation, then (in a fresh copy) at its second, and so on until it lives to the
end. Python's audit events are the moments: before every open for writing, rename, mkdir, remove and copy, and both sides
of every fsync. (SIGKILL leaves what was written in the kernel's hands, so the fsync itself is left out, for speed.)
"""
import os, shutil, signal, subprocess, sys, textwrap
from pathlib import Path

import pytest

from cv_lab.core import Refusal
from cv_lab.release import Registry, bundle_digest, make_bundle, verdict_faults
from tests.test_release import PROBLEM, TEXT, make_run, release

ROOT = Path(__file__).resolve().parent.parent
WRITES = {
    'open',
    'os.rename',
    'os.mkdir',
    'os.remove',
    'os.rmdir',
    'os.chmod',
    'os.truncate',
    'shutil.copyfile',
    'shutil.rmtree',
    'shutil.copytree',
}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch): monkeypatch.setattr(os, 'fsync', lambda fd: None)


def lives(moment, within, action) -> bool:
    "Do `action` in a child that is killed at its `moment`-th file operation `within` a folder; did it live to the end?"
    pid = os.fork()
    if pid: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    try:
        seen, within = 0, str(within)
        def tick(times=1):
            nonlocal seen
            for _ in range(times):
                seen += 1
                if seen == moment: os.kill(os.getpid(), signal.SIGKILL)
        def hook(event, args):
            if (
                event in WRITES
                and any(within in str(a) for a in args)
                and (event != 'open' or args[2] & (os.O_WRONLY | os.O_RDWR))
            ):
                tick()

        os.fsync = lambda fd: tick(2); sys.addaudithook(hook); action(); os._exit(0)
    except BaseException:
        import traceback; traceback.print_exc(); os._exit(9)


def moments(tmp_path, template, action, check, at_least):
    "Kill `action(folder)` at every moment, on a fresh copy of `template` each time, and `check(folder, finished)`."
    for n in range(1, 2000):
        folder = tmp_path / f'{n}'
        shutil.copytree(template, folder)
        done = lives(n, folder, lambda at=folder: action(at))
        check(folder, done)
        if done: assert n > at_least, f'only {n} moments were tried'; return
        shutil.rmtree(folder)


def whole(registry):
    "Nothing half is visible: not to us, and not to BentoML."
    import bentoml; from bentoml._internal.models import ModelStore
    v = registry.verify(); assert v['ok'], v['rows']
    seen = (
        [str(m.tag) for m in bentoml.models.list(_model_store=ModelStore(registry.shelf))]
        if registry.shelf.is_dir()
        else []
    )
    assert seen == registry.tags() and sorted(m['tag'] for m in registry.models()) == seen


def test_kill_while_a_bundle_is_made(tmp_path):
    run = make_run(tmp_path / 'template')
    Registry(tmp_path / 'none')
    release(run, Registry(tmp_path / 'other'))
    first = bundle_digest(run / 'bundle')
    make = lambda folder: make_bundle(folder/'a', PROBLEM, TEXT, {'RUNBOOK.md': 'new'})
    def check(folder, done):
        bundle = folder/'a/bundle'
        if bundle.exists():
            assert (
                not verdict_faults(bundle, PROBLEM)
                and (bundle_digest(bundle) == first) != (bundle / 'RUNBOOK.md').exists()
            )
        make(folder)
        assert (bundle / 'RUNBOOK.md').read_text() == 'new' and not list(bundle.parent.glob('.bundle.part*'))

    moments(tmp_path, tmp_path/'template', make, check, 40)


def test_kill_while_a_bundle_is_stored(tmp_path):
    template = tmp_path / 'template'
    registry = Registry(template)
    old = release(make_run(tmp_path), registry)
    registry.promote(old, reason='r', by='Ada')
    new = make_run(tmp_path, 'b'); other = Registry(tmp_path/'other'); tag = release(new, other)
    def check(folder, done):
        registry = Registry(folder)
        whole(registry)
        assert old in registry.tags() and registry.resolve('shapes') == old
        if not (done or tag in registry.tags() or int(folder.name) % 5 == 0): return
        assert registry.add(new / 'bundle') == tag
        whole(registry)
        assert (
            registry.tags() == sorted([old, tag])
            and [e['event'] for e in registry.log() if e.get('bundle') == tag][0] == 'add'
        )
        registry.gc(keep=9); assert not list((folder/'staging').iterdir())
    moments(tmp_path, template, lambda folder: Registry(folder).add(new/'bundle'), check, 80)


@pytest.mark.parametrize('what', ['promote', 'rollback'])
def test_kill_while_an_alias_moves(tmp_path, what):
    template = tmp_path/'template'; registry = Registry(template)
    a = release(make_run(tmp_path), registry)
    registry.promote(a, reason='r', by='Ada')
    b = release(make_run(tmp_path, 'b'), registry)
    if what == 'rollback': registry.promote(b, reason='r', by='Ada')
    old, new = (a, b) if what == 'promote' else (b, a)
    move = lambda folder: (
        Registry(folder).promote(b, reason='now', by='Bob')
        if what == 'promote'
        else Registry(folder).rollback('shapes', by='Bob', reason='now')
    )
    seen = set()
    def check(folder, done):
        registry = Registry(folder)
        whole(registry)
        at = registry.resolve('shapes')
        assert at == new if done else at in (old, new)
        log = registry.log()
        told = log[-1]['event'] == what and log[-1].get('by') == 'Bob'
        assert told or at == old  # never moved without a line
        seen.add((told, at == new))
        if at == old:
            move(folder); whole(registry); assert registry.resolve('shapes') == new
            if told: assert [e['event'] for e in registry.log()][-2:] == ['abandoned', what]
    moments(tmp_path, template, move, check, 10)
    assert seen == {(False, False), (True, False), (True, True)}


def test_kill_while_gc_removes(tmp_path):
    template = tmp_path/'template'; registry = Registry(template); tags = []
    for n in 'abc':
        tags.append(release(make_run(tmp_path, n), registry))
        registry.promote(tags[-1], reason='r', by='Ada')

    def check(folder, done):
        registry = Registry(folder); whole(registry); assert {tags[1], tags[2]} <= set(registry.tags())
        registry.gc(keep=0)
        assert set(registry.tags()) == {tags[1], tags[2]} and not list((folder / 'staging').iterdir())
        whole(registry)

    moments(tmp_path, template, lambda folder: Registry(folder).gc(keep=0), check, 15)


SCRIPT = '''
import os, sys, time
from pathlib import Path
from cv_lab import release
from cv_lab.core import NotAccepted
home, tag, name, barrier = sys.argv[1:]
begun = release.Aliases.check
def check(self, tag):                # after the promotion has looked where the alias is, and before it takes the lock
    Path(barrier, name).touch(); end = time.time() + 20
    while len(os.listdir(barrier)) < 2 and time.time() < end: time.sleep(.005)
    return begun(self, tag)
release.Aliases.check = check
try: release.Registry(home).promote(tag, reason=f'{name} wants it', by=name); print('won')
except NotAccepted as e: print('told:', e.what)
'''


def test_two_promotions_at_once(tmp_path):
    text = TEXT.replace(
        '  - {metric: accuracy, against: production, lose_at_most: 0.02}\n', ''
    )  # so that no comparison decides it
    from cv_lab.spec import parse_problem

    registry, problem = Registry(tmp_path / 'registry'), parse_problem(text)
    a, b = (release(make_run(tmp_path, n), registry, problem, text) for n in 'ab')
    (tmp_path/'barrier').mkdir(); env = os.environ | dict(PYTHONPATH=str(ROOT))
    start = lambda tag, name: subprocess.Popen(
        [sys.executable, '-c', SCRIPT, registry.home, tag, name, tmp_path / 'barrier'],
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    said = [p.communicate(timeout=60)[0].strip() for p in [start(a, 'Ada'), start(b, 'Bob')]]
    assert sorted(s.split(':')[0] for s in said) == ['told', 'won']
    winner, tag = ('Ada', a) if said[0] == 'won' else ('Bob', b)
    assert (
        registry.resolve('shapes') == tag
        and winner in ' '.join(said)
        and len([e for e in registry.log() if e['event'] == 'promote']) == 1
        and registry.verify()['ok']
    )


def test_writers_wait_and_then_are_told(tmp_path, monkeypatch):
    from filelock import FileLock
    from cv_lab import release as module
    registry = Registry(tmp_path/'registry'); tag = release(make_run(tmp_path), registry)
    monkeypatch.setattr(Registry, '_lock', lambda self: module._held(self.home/'.lock', .2))
    with FileLock(registry.home / '.lock'), pytest.raises(Refusal, match='another process'):
        registry.promote(tag, reason='r', by='Ada')
    registry.promote(tag, reason='r', by='Ada')


def test_rollback_needs_nothing_but_the_store(tmp_path):
    "No torch, no BentoML, no pandas, no workspace; well under a second, also with the start of Python."
    registry = Registry(tmp_path / 'registry')
    a = release(make_run(tmp_path), registry)
    registry.promote(a, reason='r', by='Ada')
    registry.promote(release(make_run(tmp_path, 'b'), registry), reason='r', by='Ada')
    code = textwrap.dedent('''
        import sys, time
        for m in ('torch', 'bentoml', 'pandas', 'onnxruntime', 'pyarrow'): sys.modules[m] = None
        from cv_lab.release import Registry
        print(Registry(sys.argv[1]).rollback('shapes', by='Bob', reason='r')['tag'])''')
    r = subprocess.run(
        [sys.executable, '-c', code, registry.home],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
    )
    assert r.stdout.strip() == a, r.stderr


def test_a_running_writer_keeps_its_staging_folder(tmp_path):
    from cv_lab.release import _staging
    with _staging(tmp_path) as a:
        (a/'x').write_text('1')
        with _staging(tmp_path) as b: assert a.is_dir() and b.is_dir() and (a/'x').exists()
    assert not list(tmp_path.iterdir())
    (tmp_path/'dead').mkdir(); (tmp_path/'dead.lock').touch()
    with _staging(tmp_path): assert not (tmp_path/'dead').exists()
