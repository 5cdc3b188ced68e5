"A run is what decided it: the same twice, the same after a kill, refused when it cannot be."
import os, signal, subprocess, sys, textwrap

import numpy as np, pandas as pd, pytest, torch

from cv_lab.augment import augmentation
from cv_lab.core import BadInput, RunFailed
from cv_lab.loading import Shuffled
from cv_lab.runs import settings
from cv_lab.spec import Problem
from cv_lab.tasks import classification
from cv_lab.train import fit

SMALL = dict(epochs=6, batch_size=12, lr=5e-3, task=dict(image=dict(height=16, width=16)))
SCRIPT = '''
import sys
from cv_lab.tasks import classification
from cv_lab.train import fit
from tests.test_train import SMALL, problem
run = fit(problem(), classification.example(sys.argv[1]), sys.argv[2], **SMALL)
print('weights', run.done['weights'])
'''


def problem(**kw):
    return Problem(
        **dict(
            name='stripes',
            task='classification',
            classes=['lying', 'standing', 'slanted'],
            owner='o',
            intended_use='i',
            acceptance=[{'metric': 'accuracy', 'at_least': 0.5}],
        )
        | kw
    )


@pytest.fixture(autouse=True)
def offline(monkeypatch): monkeypatch.setenv('WANDB_MODE', 'disabled')


def start(tmp_path, runs):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return subprocess.Popen(
        [sys.executable, '-u', '-c', textwrap.dedent(SCRIPT), str(tmp_path / 'stripes'), str(tmp_path / runs)],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {'WANDB_MODE': 'disabled', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': root},
    )


def test_killed_and_resumed_ends_with_the_same_weights(tmp_path):
    whole = start(tmp_path, 'whole').communicate(timeout=180)[0]
    victim, seen = start(tmp_path, 'killed'), []
    for line in victim.stdout:
        seen.append(line)
        if line.startswith('epoch   4/6'): victim.send_signal(signal.SIGKILL); break
    victim.wait(30); victim.stdout.close()
    assert victim.returncode == -signal.SIGKILL and not any(l.startswith('weights') for l in seen)
    again = start(tmp_path, 'killed').communicate(timeout=180)[0]
    assert 'resumed from the last finished epoch' in again and 'epoch   1/6' not in again
    last = lambda text: text.strip().splitlines()[-1]
    assert last(whole).startswith('weights ') and last(again) == last(whole)
    history = pd.read_csv(next((tmp_path/'killed').glob('*/history.csv')))
    assert history['epoch'].tolist() == [1, 2, 3, 4, 5, 6]


def test_same_seed_same_weights_and_metrics(tmp_path):
    data = classification.example(tmp_path/'stripes'); a, b = (fit(problem(), data, tmp_path/r, **SMALL) for r in 'ab')
    assert a.done['weights'] == b.done['weights'] and a.history.equals(b.history)
    assert fit(problem(), data, tmp_path/'c', **SMALL, seed=1).done['weights'] != a.done['weights']


def test_nothing_is_trained_twice(tmp_path, capsys):
    data = classification.example(tmp_path / 'stripes')
    a = fit(problem(), data, tmp_path / 'r', **SMALL)
    when = (a.path / 'done.json').stat().st_mtime_ns
    again = fit(problem(owner='somebody else'), data, tmp_path/'r', **SMALL)  # not what decides the weights
    assert (
        'nothing has changed' in capsys.readouterr().out
        and again.path == a.path
        and (a.path / 'done.json').stat().st_mtime_ns == when
    )
    fit(problem(), data, tmp_path/'r', force=True, **SMALL); assert (a.path/'done.json').stat().st_mtime_ns > when


def test_the_name_of_a_run_covers_the_code_behind_it(tmp_path, monkeypatch):
    import shutil, cv_lab
    from pathlib import Path
    from cv_lab.runs import code_digest

    shutil.copytree(Path(cv_lab.__file__).parent, tmp_path/'cv_lab', ignore=shutil.ignore_patterns('__pycache__'))
    here = code_digest('classification'); monkeypatch.setattr(cv_lab, '__file__', str(tmp_path/'cv_lab/__init__.py'))
    assert code_digest('classification') == here
    for room, decides in dict(train=True, runs=True, loading=True, augment=True, cards=False, sweep=False).items():
        file = tmp_path/f'cv_lab/{room}.py'; text = file.read_text(); file.write_text(text + '# another\n')
        assert (code_digest('classification') != here) == decides, room
        file.write_text(text)


def test_two_processes_do_not_train_one_run(tmp_path):
    from filelock import FileLock
    data = classification.example(tmp_path/'stripes'); run = fit(problem(), data, tmp_path/'r', **SMALL)
    with FileLock(run.path / '.lock'), pytest.raises(RunFailed, match='another process'):
        fit(problem(), data, tmp_path / 'r', **SMALL)


def test_a_training_shorter_than_its_validation_interval_ends_with_one(tmp_path):
    data = classification.example(tmp_path / 'stripes')
    run = fit(problem(), data, tmp_path / 'r', **SMALL | dict(epochs=2, val_every=5))
    assert run.done['best_epoch'] == 2 and run.history['epoch'].tolist() == [2]


def test_multi_label_trains(tmp_path):
    data = classification.example(tmp_path / 'stripes')
    run = fit(problem(multilabel=True), data, tmp_path / 'r', **SMALL | {'epochs': 2})
    assert run.config['fit']['task']['multilabel'] and run.done['epochs'] == 2


@pytest.mark.parametrize(
    'change,said',
    [
        (dict(learning_rate=1), 'learning_rate'),
        (dict(epochs=0), 'epochs'),
        (dict(precision='int4'), 'precision'),
        (dict(task=dict(netwrk='x')), 'netwrk'),
    ],
)
def test_settings_are_checked(change, said):
    with pytest.raises(BadInput, match=said): settings(problem(), **change)


def test_gradients_are_clipped_in_mixed_precision(tmp_path):
    data = classification.example(tmp_path/'stripes'); how = SMALL | dict(epochs=2, precision='bf16-mixed')
    assert (
        fit(problem(), data, tmp_path / 'r', **how, clip=0.01).done['weights']
        != fit(problem(), data, tmp_path / 'r', **how).done['weights']
    )


def test_half_precision_gives_the_same_weights(tmp_path):
    import ctypes
    fill = getattr(ctypes.CDLL(None), 'mallopt', lambda *a: 0)    # what the allocator hands out is filled with a byte
    data, weights = classification.example(tmp_path/'stripes'), []
    try:
        for i, byte in enumerate((255, 127)):                     # at 16 pixels the last stage has a map of one
            fill(-6, byte)
            weights.append(fit(problem(), data, tmp_path/str(i), **SMALL | dict(epochs=1, precision='bf16-mixed')).done['weights'])
    finally: fill(-6, 0)
    assert weights[0] == weights[1]


def test_targets_and_loss_are_made_for_a_crop(tmp_path):
    import torch
    from cv_lab.tasks import segmentation
    from cv_lab.loading import Images, of_shape
    data = segmentation.example(tmp_path/'scenes'); p = Problem(
        name='crops', task='segmentation', classes=sorted({a['label'] for s in data.table['annotations'].to_pylist() for a in s}),
        owner='us', intended_use='tests', metrics=dict(primary='mean_iou'), acceptance=[dict(metric='mean_iou', at_least=.1)])
    cfg = segmentation.Config(image=dict(height=64, width=64))
    torch.manual_seed(0); images = Images(data, data.split('train'), p, cfg, [{'CropAround': dict(size=[32, 48])}])
    x, y = torch.utils.data.default_collate([images[i] for i in range(4)])
    assert x.shape == (4, 3, 32, 48) and y['classes'].shape == (4, 32, 48)
    out = segmentation.network(cfg, p.classes)(x)
    assert torch.isfinite(segmentation.loss(out, y, of_shape(cfg, 32, 48)))
    plain = Images(data, data.split('train'), p, cfg)
    for i in range(8):  # what is cut says of every pixel what the whole said
        whole, page = plain[i][0], plain[i][1]['classes']; px, t = images[i]
        at = [(y0, x0) for y0 in range(33) for x0 in range(17) if torch.equal(whole[:, y0:y0+32, x0:x0+48], px)]
        assert any(torch.equal(page[y0:y0+32, x0:x0+48], t['classes']) for y0, x0 in at)


def test_images_grow_while_the_training_goes_on(tmp_path, monkeypatch):
    from cv_lab.tasks import segmentation
    seen = {}
    for name, task in dict(classification=classification, segmentation=segmentation).items():
        data, net = task.example(tmp_path/name), task.network
        labels = sorted({a['label'] for s in data.table['annotations'].to_pylist() for a in s})
        p = Problem(name=name, task=name, classes=labels, owner='us', intended_use='tests',
                    metrics=dict(primary=next(iter(task.METRICS))), acceptance=[dict(metric=next(iter(task.METRICS)), at_least=.1)])
        sizes = seen[name] = []
        def watched(cfg, classes, net=net, sizes=sizes):
            made = net(cfg, classes); made.register_forward_pre_hook(lambda m, x: sizes.append(tuple(x[0].shape[2:])) if m.training else None)
            return made
        monkeypatch.setattr(task, 'network', watched)
        fit(p, data, tmp_path/'runs', epochs=4, batch_size=8, workers=1, image=dict(height=64, width=96),
            augment=[{'ProgressiveResize': dict(scales=[.5, 1.], until=[.5])}])
        small = seen[name][:len(seen[name])//2]
        assert set(small) == {(32, 48)} and set(seen[name][len(small):]) == {(64, 96)}, seen[name]


def test_a_leaking_dataset_is_refused(tmp_path):
    from dataclasses import replace
    import pyarrow as pa
    data = classification.example(tmp_path/'stripes'); at = data.table.schema.get_field_index('group')
    leaky = replace(data, table=data.table.set_column(at, 'group', pa.array(['one group']*len(data))), version='')
    with pytest.raises(BadInput, match='more than one split: one group'): fit(problem(), leaky, tmp_path/'r', **SMALL)


def test_order_depends_on_seed_and_epoch_only():
    a, b = Shuffled(50, 0), Shuffled(50, 0); a.set_epoch(3); list(b); b.set_epoch(3)
    assert list(a) == list(b) != list(Shuffled(50, 1)) and sorted(a) == list(range(50))
    b.set_epoch(4); assert list(a) != list(b)


def test_items_to_look_at_are_of_different_groups_and_classes():
    from cv_lab.core import digest
    from cv_lab.data.manifest import make_table
    from cv_lab.loading import varied

    clip = lambda name, label, n: [
        dict(id=f'{name}{i}', sha256=digest(f'{name}{i}'), group=name, annotations=[dict(label=label)]) for i in range(n)
    ]
    rows = make_table(clip('a', 'car', 30) + clip('b', 'car', 9) + clip('c', 'van', 9) + clip('d', 'bus', 1))
    labels = lambda t: [a[0]['label'] for a in t['annotations'].to_pylist()]
    some = varied(rows, 4)
    assert sorted(some['group'].to_pylist()) == list('abcd') and some.equals(varied(rows, 4))
    assert set(labels(varied(rows, 3))) == {'car', 'van', 'bus'} and labels(varied(rows, 6)).count('van') == 2
    assert len(varied(rows, 99)) == 49 and len(varied(rows.slice(0, 0), 3)) == 0
    large = make_table(clip('a', 'car', 3000) + clip('b', 'van', 3))
    assert set(varied(large, 2)['group'].to_pylist()) == {'a', 'b'}


def test_rare_classes_come_more_often():
    from cv_lab.loading import repeat_factors, systematic

    often = repeat_factors([[dict(label='a')]] * 90 + [[dict(label='a'), dict(label='b')]] * 10, 0.4)
    order = Shuffled(100, 0, often)
    assert np.allclose(often[:90], 1) and np.allclose(often[90:], 2)
    turns = np.zeros(100)
    for epoch in range(200):
        order.set_epoch(epoch)
        picked = list(order)
        assert len(picked) == 100
        turns += np.bincount(picked, minlength=100)
    np.testing.assert_allclose(turns/200, often/often.mean(), atol=.12)
    assert np.bincount(systematic(np.ones(7), .3)).tolist() == [1]*7


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_mean_and_optimizer_are_resumed_bit_for_bit(tmp_path, optimizer):
    from lightning.pytorch.callbacks import Callback
    class Stop(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 3: raise RuntimeError('out of power')
    data = classification.example(tmp_path/'stripes')
    how = SMALL | dict(ema=.9, clip=1., warmup=.2, monitor='metric', optimizer=optimizer)
    whole = fit(problem(), data, tmp_path/'a', **how)
    with pytest.raises(RuntimeError, match='power'): fit(problem(), data, tmp_path/'b', callbacks=[Stop()], **how)
    assert (
        fit(problem(), data, tmp_path / 'b', **how).done['weights']
        == whole.done['weights']
        != fit(problem(), data, tmp_path / 'c', **how | dict(ema=0)).done['weights']
    )


def test_muon_makes_all_directions_of_a_step_alike(monkeypatch):
    from cv_lab import optimizers
    from cv_lab.runs import Fit
    net = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.BatchNorm2d(16))
    rng = torch.Generator().manual_seed(0); grads = [torch.randn(p.shape, generator=rng) for p in net.parameters()]
    grads[0] += 3*torch.ones(16, 8, 3, 3)  # one loud direction
    def spread(name):
        there = [p.detach().clone() for p in net.parameters()]
        opt, _ = optimizers.one_cycle(net, Fit(optimizer=name, weight_decay=0), 10)
        for p, g in zip(net.parameters(), grads): p.grad = g.clone()
        opt.step(); moved = [p.detach() - t for p, t in zip(net.parameters(), there)]
        for p, t in zip(net.parameters(), there): p.data.copy_(t)
        s = torch.linalg.svdvals(moved[0].flatten(1)); return float(s[-1]/s[0]), moved
    half, moved = spread('muon'); assert half > .6 > .3 > spread('adamw')[0]
    assert torch.allclose(moved[1], -moved[1].abs()*grads[1].sign())  # a bias: AdamW's own step
    monkeypatch.setattr(optimizers, 'fast_bf16', lambda: False); exact, again = spread('muon')
    assert exact > .6 and not torch.equal(again[0], moved[0]) and torch.allclose(again[0], moved[0], atol=2e-5)


def test_a_processor_without_bfloat16_trains_in_single_precision(monkeypatch):
    from cv_lab import runs
    asked = runs.Fit(precision='bf16-mixed', accelerator='cpu')
    for has, done in ((True, 'bf16-mixed'), (False, '32-true')):
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda has=has: dict(avx2=True, avx512_bf16=has))
        assert runs._machine(asked)['precision'] == done


@pytest.mark.parametrize('warmup, steps', [(.1, 10), (.5, 2), (.3, 1), (.25, 4), (.3, 100)])
def test_a_cycle_of_any_length(warmup, steps):
    from cv_lab.optimizers import one_cycle
    from cv_lab.runs import Fit
    opt, cycle = one_cycle(torch.nn.Linear(2, 2), Fit(warmup=warmup), steps)
    for _ in range(steps - 1): opt.step(); cycle.step()
    assert 0 < cycle.get_last_lr()[0] < 1e-4


def test_augmentation_is_data_and_only_transforms():
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    out = augmentation([{'RandomHorizontalFlip': {'p': 1.0}}])(image)
    assert torch.equal(out, image.flip(-1))
    with pytest.raises(BadInput, match='no transform'): augmentation([{'functional': {}}])


def test_pretrained_weights_of_a_local_file(tmp_path):
    import timm
    from safetensors.torch import save_file
    from cv_lab.backbone import image_network

    kw = dict(channels=(8, 8, 16, 16))
    donor = timm.create_model('resnet10t', num_classes=7, **kw)
    save_file(donor.state_dict(), tmp_path / 'w.safetensors')
    net = image_network('resnet10t', 3, pretrained=str(tmp_path/'w.safetensors'), **kw)
    assert torch.equal(net.body.conv1[0].weight, donor.conv1[0].weight) and net.body.get_classifier().out_features == 3


def test_loader_processes_begin_each_epoch_anew(tmp_path):
    "What a loader's processes make of an epoch depends on the seed and the epoch, not on how many epochs they have seen."
    from cv_lab.loading import make_loaders

    data = classification.example(tmp_path / 'stripes')
    how, cfg = settings(
        problem(),
        epochs=3,
        batch_size=12,
        workers=2,
        memory_gb=0,
        image=dict(height=16, width=16),
        augment=[{'RandomAffine': dict(degrees=30)}],
    )

    def epochs(*which):
        loader, _ = make_loaders(problem(), data, how, cfg); out = []
        for e in which: loader.sampler.set_epoch(e); out.append(torch.cat([images for images, _ in loader]))
        return out

    first, second = epochs(0, 1)
    (again,) = epochs(1)
    assert torch.equal(second, again) and not torch.equal(first, second)
    every = [p.sort(0).values for p in (first, second)]
    assert not torch.equal(*every)  # not only in another order
