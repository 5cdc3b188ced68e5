"A task is one notebook: in a copy of the repository a page is added, and everything else finds it, with no other edit."
import hashlib, json, os, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = '26_tasks.keypoints.ipynb'
PROBLEM = '''
name: arrows
task: keypoints
dataset: data/arrows
owner: the tests
intended_use: Where the head and the tail of an arrow are.
classes: [head, tail]
metrics: {primary: within, report: [within, error], resamples: 200}
acceptance: [{metric: within, at_least: 0.3, judge: point, min_support: 5, why: found now and then}]
decision: {threshold: 0.05}
train: {epochs: 30, batch_size: 14, lr: 0.02, val_every: 10}
'''


def tracked():
    "The files of the repository, as they are now."
    try:
        names = subprocess.run(
            ['git', '-C', str(ROOT), 'ls-files', '-z'], capture_output=True, text=True, check=True
        ).stdout.split('\0')
    except (OSError, subprocess.CalledProcessError):
        names = [
            p.relative_to(ROOT).as_posix()
            for part in ('cv_lab', 'nbs', 'problems', 'tests', 'settings.ini', 'pyproject.toml')
            for p in [ROOT / part, *(ROOT / part).rglob('*')]
        ]
    return [n for n in names if n and (ROOT/n).is_file() and '__pycache__' not in n]


def contents(root, names): return {n: hashlib.sha256((root/n).read_bytes()).hexdigest() for n in names}


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the repository with one page more, exported. Nothing but the index that nbdev keeps has changed."
    root = tmp_path_factory.mktemp('copy').resolve(); names = tracked()
    for n in names: (root/n).parent.mkdir(parents=True, exist_ok=True); shutil.copy(ROOT/n, root/n)
    before = contents(root, names); shutil.copy(ROOT/'tests/data'/PAGE, root/'nbs'/PAGE)
    env = {k: v for k, v in os.environ.items() if k not in ('MPLCONFIGDIR', 'BENTOML_HOME')} | dict(
        PYTHONPATH=str(root), CVLAB_HOME=str(root), WANDB_MODE='disabled', OMP_NUM_THREADS='1'
    )
    run = lambda *args: subprocess.run([sys.executable, *args], cwd=root, env=env, capture_output=True, text=True)
    done = run('-c', f"from nbdev.export import nb_export; nb_export('nbs/{PAGE}', 'cv_lab')")
    assert done.returncode == 0, done.stderr[-2000:]
    assert {n for n, h in contents(root, names).items() if h != before[n]} <= {'cv_lab/_modidx.py'} and (
        root / 'cv_lab/tasks/keypoints.py'
    ).is_file()
    return root, run


def test_the_contract_tests_find_it(copy):
    root, run = copy
    done = run('-m', 'pytest', '-q', '-rA', '-p', 'no:cacheprovider', 'tests/test_tasks.py', '-k', 'keypoints')
    assert done.returncode == 0, done.stdout[-3000:]
    assert 'PASSED tests/test_tasks.py::test_the_network_learns[keypoints]' in done.stdout


def test_training_report_gate_release_and_service_find_it(copy):
    root, run = copy; (root/'problems/arrows.yaml').write_text(PROBLEM)
    made = run(
        '-c',
        "from cv_lab.data.dataset import save_dataset; from cv_lab.tasks.keypoints import example; save_dataset(example('data/arrows'), 'data/arrows')",
    )
    assert made.returncode == 0, made.stderr[-2000:]
    done = run('-c', "from cv_lab.cli.main import main; main(['walk', '--problem', 'problems/arrows.yaml'])")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert (
        'is production' in done.stdout
        and '/v1/models/arrows/predict' in done.stdout
        and '"label": "head"' in done.stdout
    )
    for kind in ('train', 'error_analysis'):
        (report,) = (root / 'reports' / kind).glob('*/report.html')
        assert 'arrows' in report.read_text()
    (run_folder,) = (root / 'runs').glob('arrows-*')
    found = json.loads((run_folder / 'evaluation/performance.json').read_text())['parity']
    assert found['ok'] and found['box_iou'] >= 0.999
