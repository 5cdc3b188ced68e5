"`cvlab registry`: what scripts rely on (JSON, exit codes) and what people read."
import json, os, subprocess, sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cv_lab.cli.registry import app
from cv_lab.core import BadInput, Damaged, NotAccepted, NotFound
from cv_lab.release import Registry
from tests.test_release import TEXT, make_run, release

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A workspace with a, promoted; b and a bad one, stored."
    for k in ('BENTOML_HOME', 'CVLAB_WANDB_REGISTRY'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('CVLAB_HOME', str(tmp_path))
    (tmp_path / 'settings.ini').touch()
    (tmp_path / 'problems').mkdir()
    (tmp_path / 'problems/shapes.yaml').write_text(TEXT)
    r = Registry(tmp_path / 'registry')
    tags = [release(make_run(tmp_path / 'runs'), r)]
    r.promote(tags[0], reason='first', by='Ada')
    tags += [release(make_run(tmp_path/'runs', 'b'), r), release(make_run(tmp_path/'runs', 'bad', accuracy=.85), r)]
    return r, tags


def cvlab(*args, fails=None):
    r = CliRunner().invoke(app, [str(a) for a in args])
    if fails: assert isinstance(r.exception, fails), (r.exception, r.output); return r.exception
    assert r.exit_code == 0, (r.output, r.exception)
    return json.loads(r.output) if '--json' in args else r.output


def test_look(home):
    r, (a, b, bad) = home
    rows = cvlab('list', '--json')
    assert {m['tag']: m['aliases'] for m in rows} == {a: ['production'], b: [], bad: []}
    assert {m['verdict'] for m in rows} == {'pass', 'fail'} and all(t.split(':')[1] in cvlab('list') for t in home[1])
    shown = cvlab('show', 'shapes', '--json')
    assert (
        shown['tag'] == a
        and shown['verdict']['verdict'] == 'pass'
        and 'model.onnx' in shown['files']
        and Path(shown['folder']).is_dir()
    )
    assert 'shapes: FAIL' in cvlab('show', bad) and 'accuracy >= 0.9' in cvlab('show', bad)
    assert (
        {'what': 'figure: accuracy', 'a': '0.9500', 'b': '0.8500'} in cvlab('diff', a, bad, '--json')
        and 'model.onnx' in cvlab('diff', a, b, '--files')
        and 'model.onnx' not in cvlab('diff', a, b)
    )
    assert cvlab('diff', a, a).strip() == 'nothing' and [e['event'] for e in cvlab('log', '--json')] == [
        'add',
        'promote',
        'add',
        'add',
    ]
    assert len(cvlab('log', '-n', 2, '--json')) == 2 and cvlab('log', 'other', '--json') == []
    for args in (('show', 'shapes:nobody'), ('show', 'other'), ('diff', a, 'shapes:ffffffff')):
        assert cvlab(*args, fails=NotFound).exit_code == 3


def test_move(home, monkeypatch):
    r, (a, b, bad) = home
    said = cvlab('promote', b, '--reason', 'better', '--by', 'Bob', '--json')
    assert said['tag'] == b and said['before'] == [a]
    e = cvlab('promote', bad, '--reason', 'newer', fails=NotAccepted)
    assert e.exit_code == 4 and 'accuracy >= 0.9: 0.85' in str(e)
    assert 'a name and a reason' in str(
        cvlab('promote', bad, '--override', 'o', fails=BadInput)
    ) and 'a name and a reason' in str(cvlab('promote', b, '--alias', 'x', fails=BadInput))
    monkeypatch.setenv('LOGNAME', 'somebody')
    assert cvlab('promote', b, '--alias', 'challenger', '--reason', 'r', '--json')['by'] == 'somebody'
    assert cvlab('promote', bad, '--override', 'the fair', '--by', 'Eve', '--json')['tag'] == bad
    assert 'again' in cvlab('rollback', 'shapes', '--reason', 'r') and r.resolve('shapes') == b
    assert CliRunner().invoke(app, ['rollback', 'shapes']).exit_code == 2        # a rollback wants a reason


def test_the_rules_of_today_count(home):
    r, (a, b, bad) = home
    file = Path(os.environ['CVLAB_HOME']) / 'problems/shapes.yaml'
    file.write_text(TEXT.replace('0.9,', '0.93,'))
    assert 'other rules' in str(cvlab('promote', b, '--reason', 'r', fails=NotAccepted))
    file.unlink()
    cvlab('promote', b, '--reason', 'r')


def test_keep(home, tmp_path):
    r, (a, b, bad) = home
    assert (
        cvlab('verify', '--json')['ok']
        and cvlab('gc', '--keep', 0, '--json') == sorted([b, bad])
        and 'nothing' in cvlab('gc')
    )
    file = cvlab('export', 'shapes', tmp_path, '--json')['file']
    f = r.path('shapes') / 'model.onnx'
    f.chmod(0o644)
    f.write_bytes(b'!')
    assert cvlab('verify', fails=Damaged).exit_code == 6; cvlab('show', 'shapes', fails=Damaged)
    import shutil

    shutil.rmtree(f.parent)
    assert cvlab('import', file, '--json') == dict(tag=a) and cvlab('verify', '--json')['ok']
    (r.home / 'aliases/shapes.json').write_text('{}')
    cvlab('restore', 'shapes'); cvlab('restore', 'nope', fails=NotFound); assert 'nope' not in r.problems()
    assert cvlab('verify', '--json')['ok'] and r.resolve('shapes') == a


def test_the_mirror_is_asked_for(home, monkeypatch):
    from cv_lab import release as module
    seen = []; monkeypatch.setattr(module, 'mirror', lambda *a: seen.append(a[1:]) or 'mirrored'); r, (a, b, bad) = home
    cvlab('promote', b, '--reason', 'r')
    assert seen == []
    cvlab('rollback', 'shapes', '--reason', 'r', '--wandb', 'model')
    assert seen == [('shapes', 'production', 'model')]


def test_rollback_is_quick_to_start(home, tmp_path):
    "The command imports nothing slow: no torch, no BentoML, no pandas, no pyarrow."
    r, (a, b, bad) = home; r.promote(b, reason='r', by='Ada')
    code = 'import sys\nfor m in ("torch", "bentoml", "pandas", "pyarrow", "sklearn", "onnxruntime"): sys.modules[m] = None\nfrom cv_lab.cli.registry import app\napp()'
    p = subprocess.run(
        [sys.executable, '-c', code, 'rollback', 'shapes', '--reason', 'r', '--json'],
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
    )
    assert p.returncode == 0 and json.loads(p.stdout)['tag'] == a, p.stderr[-1500:]


def test_help_teaches():
    said = CliRunner().invoke(app, ['--help'], env=dict(COLUMNS='140')).output
    assert all(
        c in said
        for c in ('list', 'show', 'diff', 'promote', 'rollback', 'verify', 'gc', 'export', 'import', 'compare', 'log')
    )
    assert '--override' in CliRunner().invoke(app, ['promote', '--help'], env=dict(COLUMNS='140')).output


def test_a_full_disk_is_said_in_words(monkeypatch, capsys):
    import errno
    from cv_lab.cli import main as cli
    def full(**kw): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(cli, 'app', full)
    with pytest.raises(SystemExit) as e: cli.main(['registry', 'list'])
    said = capsys.readouterr().err
    assert e.value.code == 3 and os.strerror(errno.ENOSPC) in said and 'its disk' in said
    def other(**kw): raise OSError(errno.EBADF, 'a fault of ours')
    monkeypatch.setattr(cli, 'app', other)
    with pytest.raises(OSError, match='ours'): cli.main([])
