"The way a user goes, from the command line, in a workspace of its own: train, gate, release, predict, compare; and every wrong turn."

import json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest

from cv_lab.cli.main import main
from cv_lab.core import workspace
from cv_lab.data.dataset import save_dataset
from cv_lab.tasks import classification

ROOT = Path(__file__).resolve().parent.parent
PROBLEM = '''
name: stripes
task: classification
dataset: data/stripes
owner: the tests
intended_use: Telling stripes apart.
classes: [lying, slanted, standing]
slices: {noisy: "noise == 'high'"}
metrics: {primary: accuracy, report: [accuracy, macro_f1, ece], resamples: 200}
acceptance:
  - {metric: accuracy, at_least: 0.9, judge: point, min_support: 10, why: easy enough}
  - {metric: accuracy, against: production, lose_at_most: 0.2, judge: point, min_support: 10}
  - {metric: model_size_mb, at_most: 30}
train: {epochs: 8, batch_size: 12, lr: 0.005, image: {height: 16, width: 16}}
'''


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A workspace with the repository's notebooks and one small dataset."
    root = tmp_path_factory.mktemp('home'); (root/'problems').mkdir(); (root/'nbs').mkdir()
    shutil.copy(ROOT / 'settings.ini', root)
    shutil.copytree(ROOT / 'nbs/experiments', root / 'nbs/experiments')
    (root / 'problems/stripes.yaml').write_text(PROBLEM)
    save_dataset(classification.example(root/'data/stripes'), root/'data/stripes')
    before, keep = Path.cwd(), dict(os.environ)
    os.environ |= {'CVLAB_HOME': str(root), 'PYTHONPATH': str(ROOT), 'WANDB_MODE': 'disabled', 'OMP_NUM_THREADS': '1'}
    for k in workspace().environment(): os.environ.pop(k, None)
    os.environ['WANDB_MODE'] = 'disabled'; os.chdir(root); workspace()
    yield root
    os.chdir(before); os.environ.clear(); os.environ.update(keep)


def call(capsys, *args) -> tuple[int, str, str]:
    "What the program answers: exit code, standard output, standard error."
    capsys.readouterr()
    try: main(list(map(str, args))); code = 0
    except SystemExit as e: code = e.code or 0
    return code, *capsys.readouterr()


@pytest.fixture(scope='module')
def trained(home, request):
    capsys = request.getfixturevalue('capsys_module')
    code, out, err = call(capsys, 'run', 'train', '--problem', 'problems/stripes.yaml', '--json')
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope='module')
def capsys_module():
    import io
    from contextlib import ExitStack, redirect_stderr, redirect_stdout
    class Both:
        def __init__(self): self.out, self.err = io.StringIO(), io.StringIO()
        def readouterr(self):
            said = self.out.getvalue(), self.err.getvalue()
            self.out.truncate(0)
            self.out.seek(0)
            self.err.truncate(0)
            self.err.seek(0)
            return said

    both = Both()
    with ExitStack() as s:
        s.enter_context(redirect_stdout(both.out))
        s.enter_context(redirect_stderr(both.err))
        yield both


def test_training_leaves_a_judged_run_and_a_report(home, trained):
    run = home/'runs'/trained['metrics']['run']; text = Path(trained['report']).read_text()
    assert trained['verdict']['verdict'] == 'pass' and {r['rule'] for r in trained['verdict']['rules']} >= {
        'accuracy >= 0.9',
        'model_size_mb <= 30',
    }
    for name in (
        'config.yaml',
        'lineage.json',
        'export/model.onnx',
        'export/model.safetensors',
        'evaluation/metrics.json',
        'evaluation/performance.json',
        'evaluation/data.json',
        'gate.json',
        'golden.parquet',
    ):
        assert (run/name).is_file(), name
    assert (
        text.count('<details class="code">') > 5
        and 'accepted' in text
        and '<script' not in text
        and not re.search(r'(src|href)="https?:', text)
    )
    assert (Path(trained['folder']) / 'figures/history.csv').is_file() and 'train' in (
        home / 'reports/index.html'
    ).read_text()


def test_again_is_the_same_report_and_trains_nothing(home, trained, capsys):
    done = home/'runs'/trained['metrics']['run']/'done.json'; when = done.stat().st_mtime_ns
    code, out, _ = call(capsys, 'run', 'train', '--problem', 'problems/stripes.yaml', '--json')
    assert code == 0 and json.loads(out)['folder'] == trained['folder'] and done.stat().st_mtime_ns == when


def test_error_analysis_runs_on_it(home, trained, capsys):
    code, out, err = call(
        capsys,
        'run',
        'error_analysis',
        '--problem',
        'problems/stripes.yaml',
        '-p',
        'run',
        trained['metrics']['run'],
        '--json',
    )
    assert code == 0, err
    assert (Path(json.loads(out)['folder'])/'figures/confusion.csv').is_file()


def test_release_predict_runs(home, trained, capsys):
    run = trained['metrics']['run']
    code, out, err = call(capsys, 'release', run, '--by', 'tester', '--json')
    assert code == 0, err
    tag = json.loads(out)['tag']; assert tag.startswith('stripes:')
    images = sorted((home / 'data/stripes').glob('*.png'))[:3]
    code, out, err = call(capsys, 'predict', *images, '--json')
    assert code == 0, err
    assert [a['label'] for a in json.loads(out)] == [p.name.split('-')[0] for p in images]
    code, out, _ = call(capsys, 'runs', '--json'); assert code == 0 and run in {r['run'] for r in json.loads(out)}
    code, again, err = call(capsys, 'release', run, '--by', 'tester', '--json')
    assert code == 0 and json.loads(again)['tag'] == tag, err


def test_shuffled_labels_are_refused_with_rule_and_figure(home, trained, capsys):
    code, out, err = call(
        capsys,
        'run',
        'train',
        '--problem',
        'problems/stripes.yaml',
        '-p',
        'shuffle_labels=true',
        '-p',
        'epochs=2',
        '--json',
    )
    assert code == 4 and 'accuracy >= 0.9: 0.' in err, err
    bad = json.loads(out)['metrics']['run']; assert bad != trained['metrics']['run']
    code, _, err = call(capsys, 'release', bad); assert code == 4 and 'accuracy >= 0.9' in err
    code, out, _ = call(capsys, 'compare', trained['metrics']['run'], bad, '--json'); found = json.loads(out)
    assert code == 0 and found['metrics']['accuracy']['value'] > 0 and found['flips']['better']


@pytest.mark.parametrize(
    'args,code,said',
    [
        (['run', 'trian'], 3, 'train'),
        (['run', 'train', '-p', 'epoch=3'], 3, 'epochs (int)'),
        (['run', 'train', '-p', 'epochs=many'], 3, 'epochs=many'),
        (['run', 'train', '-p', 'epochs'], 3, 'name=value'),
        (['run', '../train'], 3, 'no experiment'),
        (['predict', 'nowhere.png'], 3, 'nowhere.png'),
        (['release', 'nothing-here'], 3, 'no finished run'),
        (['compare', 'a', 'b'], 3, 'no finished run'),
        (['run', 'train', '--problem', 'problems/none.yaml'], 3, 'no problem file'),
        (['run', 'train', '-p', 'problem=problems/stripes.yaml', '-p', 'dataset=nowhere'], 3, 'says where'), # in the notebook
        (['bench', '--device', 'tpu', '--no-report'], 3, 'cpu or cuda'),
        (['data', 'export', 'data/stripes', '-f', 'csv', '--out', '/proc/nowhere/x'], 3, '/proc'),
        (['frobnicate'], 2, 'No such command'),
        (['init', 'nowhere'], 3, 'no dataset'),
    ],
)
def test_wrong_turns(home, trained, capsys, args, code, said):
    got, out, err = call(capsys, *args)
    assert got == code and said in err + out and 'Traceback' not in err


def test_a_text_file_is_no_image(home, trained, capsys):
    (home / 'note.png').write_text('hello')
    code, _, err = call(capsys, 'predict', 'note.png', '--model', trained['metrics']['run'])
    assert code == 3 and 'note.png' in err and 'JPEG' in err


def test_a_broken_notebook_is_left_for_reading(home, capsys):
    import nbformat

    nb = nbformat.read(home / 'nbs/experiments/train.ipynb', as_version=4)
    nb.cells.insert(3, nbformat.v4.new_code_cell('1/0'))
    nbformat.write(nb, home/'nbs/experiments/broken.ipynb'); code, _, err = call(capsys, 'run', 'broken', '--json')
    assert code == 5 and 'ZeroDivisionError' in err
    folder = next((home / 'reports/broken').iterdir())
    assert (
        'ZeroDivisionError' in (folder / 'notebook.ipynb').read_text()
        and json.loads((folder / 'status.json').read_text())['state'] == 'failed'
    )
    assert not (folder/'report.html').exists()


def test_init_writes_a_file_that_is_accepted(home, capsys):
    from cv_lab.spec import load_problem
    code, out, err = call(capsys, 'init', 'data/stripes', '--name', 'mine'); assert code == 0, err
    assert load_problem(home/'problems/mine.yaml').classes == ['lying', 'standing', 'slanted']
    code, _, err = call(capsys, 'init', 'data/stripes', '--name', 'mine'); assert code == 3 and 'there already' in err


def test_nothing_is_written_outside_the_workspace(home, trained, tmp_path):
    for name in ('BENTOML_HOME', 'WANDB_DIR', 'MPLCONFIGDIR', 'IPYTHONDIR', 'JUPYTER_RUNTIME_DIR', 'TORCH_HOME'):
        assert Path(os.environ[name]).is_relative_to(home)
    image = next((home / 'data/stripes').glob('*.png'))
    code = (
        f"from cv_lab.cli.main import main; main(['predict', {str(image)!r}, '--model', {trained['metrics']['run']!r}])"
    )
    keep = {k: v for k, v in os.environ.items() if k not in workspace().environment()}
    done = subprocess.run(
        [sys.executable, '-c', code],
        env=keep | {'HOME': str(tmp_path), 'XDG_CACHE_HOME': '', 'CI': ''},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []          # ONNX Runtime, for one, keeps a device id there unless told not to
