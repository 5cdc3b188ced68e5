"The contract, over every task that is found: a new task is tested by being there."
import numpy as np, pyarrow as pa, pytest, torch
from torch.utils.data import default_collate

from cv_lab.image import Preprocess, decode
from cv_lab.spec import Problem
from cv_lab.task import CONTRACT, Prediction, faults, predictions_table, tasks
from cv_lab.core import Annotation
from cv_lab.loading import Images

TASKS = tasks()


@pytest.fixture(params=list(TASKS))
def task(request): return TASKS[request.param]


@pytest.fixture
def data(task, tmp_path): return task.example(tmp_path)


def problem(task, data):
    return Problem(
        name='p',
        task=task.__name__.rsplit('.', 1)[1],
        classes=data.classes,
        owner='o',
        intended_use='i',
        acceptance=[{'metric': next(iter(task.METRICS)), 'at_least': 0.5}],
        metrics=dict(primary=next(iter(task.METRICS))),
    )


def test_it_keeps_the_contract(task): assert faults(task) == [] and set(CONTRACT) <= set(dir(task))


def small(task):  # the task's settings, for a small input
    cfg = task.Config()
    return (
        cfg if max(cfg.image.height, cfg.image.width) <= 128 else cfg.model_copy(update=dict(image=Preprocess(96, 128)))
    )


def spoiled(a, swap):  # an annotation that says something else
    return a | {
        k: v
        for k, v in dict(label=swap.get(a['label']), text=a['text'] and a['text'][::-1] + '?').items()
        if a[k] is not None
    }


def told(task, data, change=lambda a: a, score=1.):  # a table in which everything is said, perhaps changed
    def said(anns):
        return [Annotation(**{k: v for k, v in change(a).items() if v is not None} | {'score': score}) for a in anns]

    def probs(anns):
        return (
            np.array([score if any(a.label == c for a in said(anns)) else (1 - score) / 2 for c in data.classes])
            if not hasattr(task, 'GEOMETRY')
            else None
        )

    return predictions_table(
        data.table['id'].to_pylist(),
        [Prediction(said(anns), probs(anns)) for anns in data.table['annotations'].to_pylist()],
    )


def test_the_network_learns(task, data):
    cfg = small(task); torch.manual_seed(0); net = task.network(cfg, data.classes)
    images = Images(data, data.split('train').slice(0, 16), problem(task, data), cfg)
    batch = [images[i] for i in range(len(images))]
    x, y = torch.stack([b[0] for b in batch]), getattr(task, 'collate', default_collate)([b[1] for b in batch])
    opt = torch.optim.Adam(net.parameters(), 1e-3); losses = []
    for _ in range(8):
        loss = task.loss(net(x), y, cfg)
        assert loss.ndim == 0
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < .7*losses[0]


def test_images_are_independent(task, data):
    cfg = small(task); net = task.network(cfg, data.classes).eval()
    x = torch.randint(0, 256, (3, 3, cfg.image.height, cfg.image.width), dtype=torch.uint8)
    with torch.inference_mode(): alone, among = net(x[:1]), net(x)
    for k in alone: torch.testing.assert_close(alone[k], among[k][:1], atol=1e-5, rtol=1e-5)


def test_decode_gives_one_prediction_per_image(task, data):
    cfg = small(task); net = task.network(cfg, data.classes).eval()
    with torch.inference_mode():
        out = {
            k: v.numpy()
            for k, v in net(torch.zeros((2, 3, cfg.image.height, cfg.image.width), dtype=torch.uint8)).items()
        }
    found = task.decode(out, cfg, data.classes, {})
    assert (
        len(found) == 2
        and all(isinstance(p, Prediction) for p in found)
        and isinstance(found[0].said(data.classes), dict)
    )


def test_the_truth_is_perfect(task, data):
    "Said as true, everything is right, nothing is a mistake, the first metric is at its best, and none is better when what is said is wrong."
    spec, w = problem(task, data), np.ones((1, len(data)))
    swap = dict(zip(data.classes, data.classes[1:] + data.classes[:1]))
    said, wrong = told(task, data), told(task, data, lambda a: spoiled(a, swap), .95)
    got, worse = task.score(data.table, said, spec)(w), task.score(data.table, wrong, spec)(w)
    best = spec.metrics.primary; assert got[best][0] == pytest.approx(float(task.METRICS[best]), abs=1e-9)
    assert len(set(got) & set(task.METRICS)) > 1 and {k for k, v in got.items() if v.ndim == 1} <= set(task.METRICS)
    for name, higher in task.METRICS.items():
        if name in got and np.isfinite(got[name][0]):
            assert not (worse[name][0] > got[name][0] if higher else worse[name][0] < got[name][0]), name
    assert len(task.mistakes(data.table, said, spec)) == 0


def test_a_slice_is_its_items(task, data):
    "Weights of ones and zeros give the figures of the table without the others."
    spec = problem(task, data)
    swap = dict(zip(data.classes, data.classes[1:] + data.classes[:1]))
    rng = np.random.default_rng(0)
    which = rng.random(len(data)) < 0.5
    said = told(task, data, lambda a: spoiled(a, swap) if rng.random() < .3 else a, .9); part = pa.array(which)
    whole, alone = (
        task.score(data.table, said, spec)(which[None].astype(float)),
        task.score(data.table.filter(part), said.filter(part), spec)(np.ones((1, which.sum()))),
    )
    for name in alone: np.testing.assert_allclose(alone[name], whole[name], atol=1e-9, err_msg=name)


def test_every_mistake_is_of_a_known_kind(task, data):
    swap = dict(zip(data.classes, data.classes[1:] + data.classes[:1]))
    found = task.mistakes(data.table, told(task, data, lambda a: spoiled(a, swap), .95), problem(task, data))
    assert (
        len(found) >= sum(map(bool, data.table['annotations'].to_pylist()))
        and set(found['kind']) <= set(task.TAXONOMY)
        and {'id', 'kind', 'what', 'severity'} <= set(found.columns)
    )


def test_draw_gives_a_picture(task, data):
    row = next(r for r in data.table.to_pylist() if r['annotations'])
    out = task.draw(decode(data.read(row['uri'])), row['annotations'])
    assert out.ndim == 3 and out.shape[2] == 3 and out.dtype == np.uint8 and out.std() > 0


def test_the_example_is_deterministic(task, tmp_path):
    a, b = task.example(tmp_path / 'a'), task.example(tmp_path / 'b')
    assert a.version == b.version and set(a.table['split'].to_pylist()) == {'train', 'val', 'test'}
