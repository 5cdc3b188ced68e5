"The contract, over every task that is found: a new task is tested by being there."
import numpy as np, pytest, torch

from cv_lab.image import decode, preprocess
from cv_lab.spec import Problem
from cv_lab.task import CONTRACT, Prediction, faults, predictions_table, tasks
from cv_lab.core import Annotation

TASKS = tasks()


@pytest.fixture(params=list(TASKS))
def task(request): return TASKS[request.param]


@pytest.fixture
def data(task, tmp_path): return task.example(tmp_path)


def problem(task, data):
    return Problem(name='p', task=task.__name__.rsplit('.', 1)[1], classes=data.classes, owner='o', intended_use='i',
                   acceptance=[{'metric': next(iter(task.METRICS)), 'at_least': .5}], metrics=dict(primary=next(iter(task.METRICS))))


def test_it_keeps_the_contract(task): assert faults(task) == [] and set(CONTRACT) <= set(dir(task))


def test_the_network_learns(task, data):
    cfg = task.Config(); torch.manual_seed(0); net = task.network(cfg, data.classes); rows = data.split('train').slice(0, 16).to_pylist()
    x = torch.from_numpy(np.stack([preprocess(decode(data.read(r['uri'])), cfg.image) for r in rows]))
    y = torch.as_tensor(np.stack([task.targets(r['annotations'], cfg, data.classes) for r in rows]))
    opt = torch.optim.Adam(net.parameters(), 1e-3); losses = []
    for _ in range(8):
        loss = task.loss(net(x), y, cfg); assert loss.ndim == 0; opt.zero_grad(); loss.backward(); opt.step(); losses.append(loss.item())
    assert losses[-1] < .7*losses[0]


def test_images_are_independent(task, data):
    cfg = task.Config(); net = task.network(cfg, data.classes).eval()
    x = torch.randint(0, 256, (3, 3, cfg.image.height, cfg.image.width), dtype=torch.uint8)
    with torch.inference_mode(): alone, among = net(x[:1]), net(x)
    for k in alone: torch.testing.assert_close(alone[k], among[k][:1], atol=1e-5, rtol=1e-5)


def test_decode_gives_one_prediction_per_image(task, data):
    cfg = task.Config(); net = task.network(cfg, data.classes).eval()
    with torch.inference_mode(): out = {k: v.numpy() for k, v in net(torch.zeros((2, 3, cfg.image.height, cfg.image.width), dtype=torch.uint8)).items()}
    found = task.decode(out, cfg, data.classes, {})
    assert len(found) == 2 and all(isinstance(p, Prediction) for p in found) and isinstance(found[0].said(data.classes), dict)


def test_the_truth_is_perfect(task, data):
    "Said as true, everything is right, nothing is a mistake, and every metric is at its best."
    spec, truth = problem(task, data), data.table
    said = predictions_table(truth['id'].to_pylist(), [Prediction([Annotation(**{k: v for k, v in a.items() if v is not None} | {'score': 1.}) for a in anns],
                             np.array([float(any(a['label'] == c for a in anns)) for c in data.classes])) for anns in truth['annotations'].to_pylist()])
    got = task.score(truth, said, spec)(np.ones((1, len(truth))))
    for name, higher in task.METRICS.items():
        if name in got: assert got[name][0] == pytest.approx(1. if higher else 0., abs=1e-9), name
    assert len(task.mistakes(truth, said, spec)) == 0


def test_every_mistake_is_of_a_known_kind(task, data):
    spec, truth = problem(task, data), data.table; wrong = data.classes[1:] + data.classes[:1]
    swap = dict(zip(data.classes, wrong))
    said = predictions_table(truth['id'].to_pylist(), [Prediction([Annotation(**{k: v for k, v in a.items() if v is not None} | {'label': swap[a['label']], 'score': .95}) for a in anns],
                             np.array([.95 if any(swap[a['label']] == c for a in anns) else .02 for c in data.classes])) for anns in truth['annotations'].to_pylist()])
    found = task.mistakes(truth, said, spec)
    assert len(found) >= len(truth) and set(found['kind']) <= set(task.TAXONOMY) and {'id', 'kind', 'what', 'severity'} <= set(found.columns)


def test_draw_gives_a_picture(task, data):
    row = data.table.slice(0, 1).to_pylist()[0]; out = task.draw(decode(data.read(row['uri'])), row['annotations'])
    assert out.ndim == 3 and out.shape[2] == 3 and out.dtype == np.uint8 and out.std() > 0


def test_the_example_is_deterministic(task, tmp_path):
    a, b = task.example(tmp_path/'a'), task.example(tmp_path/'b'); assert a.version == b.version and set(a.table['split'].to_pylist()) == {'train', 'val', 'test'}
