"Several devices are one training: the same curve as one device with the whole batch, and each can go on where the other stopped."

import os

import numpy as np, pytest, torch
from lightning.pytorch.callbacks import Callback

from cv_lab.core import BadInput, RunFailed
from cv_lab.devices import rank, together
from cv_lab.tasks import classification
from cv_lab.loading import Shuffled, make_loaders
from cv_lab.runs import run_config, run_name, settings
from cv_lab.train import fit
from tests.shout import shout
from tests.test_train import problem

# no batch norm, whose statistics are of each process's own items; nothing random in the images
HOW = dict(
    epochs=4,
    lr=3e-3,
    augment=[],
    network_args=dict(channels=[8, 8, 16, 16], norm_layer='groupnorm1'),
    image=dict(height=16, width=16),
)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'disabled')
    monkeypatch.setenv('PYTHONPATH', os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture
def stripes(tmp_path): return classification.example(tmp_path/'stripes')


class Stop(Callback):
    "The power goes out when an epoch begins."
    def __init__(self, epoch): self.epoch = epoch
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == self.epoch: raise RuntimeError('out of power')


def test_two_processes_walk_the_curve_of_one_with_twice_the_batch_and_one_goes_on_where_they_stopped(
    stripes, tmp_path, capsys
):
    one = fit(problem(), stripes, tmp_path / 'one', batch_size=12, **HOW)
    with pytest.raises(RunFailed, match='of 2: RuntimeError: out of power'):
        fit(problem(), stripes, tmp_path / 'two', callbacks=[Stop(3)], batch_size=6, devices=2, **HOW)
    assert (
        '2 devices' in (said := capsys.readouterr().out) and said.count('epoch   3/4') == 2 and '4/4' not in said[-99:]
    )
    two = fit(problem(), stripes, tmp_path / 'two', batch_size=6, accumulate=2, **HOW)
    assert 'resumed from the last finished epoch' in capsys.readouterr().out and two.name != one.name
    assert two.history['epoch'].tolist() == [1, 2, 3, 4] and two.done['steps'] == one.done['steps'] == 12
    curve = one.history[['train_loss', 'val_loss']].to_numpy()
    np.testing.assert_allclose(two.history[['train_loss', 'val_loss']], curve, rtol=1e-4)
    assert (abs(np.diff(curve, axis=0)) > 1e-3 * curve[1:]).all()  # a curve that no other would keep to by chance
    fit(problem(), stripes, tmp_path / 'two', batch_size=6, devices=2, **HOW)
    assert 'nothing has changed' in capsys.readouterr().out


def test_the_items_of_a_step_do_not_depend_on_how_many_share_it(monkeypatch):
    whole = list(Shuffled(50, 0, share=12)); assert len(whole) == 48
    for world, share in ((2, 6), (3, 4), (4, 3)):
        parts = []
        for me in range(world):
            monkeypatch.setattr(Shuffled, 'rank', lambda self, at=(me, world): at)
            parts.append(list(Shuffled(50, 0, share=share)))
        for step in range(4):
            assert {i for p in parts for i in p[step * share : (step + 1) * share]} == set(
                whole[12 * step : 12 * step + 12]
            )


def test_a_step_is_made_of_whole_batches_only(stripes):
    how, cfg = settings(problem(), batch_size=5, accumulate=3, **HOW)
    train, _ = make_loaders(problem(), stripes, how, cfg)
    assert len(train) == 6 and len(train.dataset) == 36                                     # two steps of three
    with pytest.raises(BadInput, match='36 items for 40'):
        make_loaders(problem(), stripes, settings(problem(), accumulate=40, **HOW)[0], cfg)


def test_a_run_is_named_by_its_step_not_by_the_devices_that_share_it(stripes):
    name = lambda **kw: run_name(run_config(problem(), stripes, settings(problem(), **HOW | kw)[0]))
    assert (
        name(devices=4)
        == name(devices=2, accumulate=2)
        == name(devices=2, nodes=2)
        == name(accumulate=4, strategy='auto')
        != name()
    )


def test_the_machine_decides_who_shares_a_step(stripes, monkeypatch):
    how = lambda **kw: settings(problem(), devices=0, accelerator='cpu', **HOW | kw)[0]
    for cores, batches, devices in ((1, 2, 1), (2, 2, 2), (3, 4, 2), (8, 6, 6), (2, 3, 1)):
        monkeypatch.setattr(os, 'cpu_count', lambda n=cores: n)
        got = how(accumulate=batches)
        assert (got.devices, got.devices * got.accumulate) == (devices, batches)
        alone = settings(problem(), accumulate=batches, accelerator='cpu', **HOW)[0]
        assert run_config(problem(), stripes, got) == run_config(problem(), stripes, alone)


def test_what_cannot_be_is_refused(stripes, tmp_path):
    for change, said in (
        (dict(strategy='fsdp'), 'CPU'),
        (dict(sync_batchnorm=True, devices=2), 'CPU'),
        (dict(nodes=2), 'torchrun'),
        (dict(strategy='ddp_spawn'), 'strategy'),
        (dict(devices=-1), 'devices'),
        (dict(finetune='lora'), 'knows nothing'),
        (dict(teacher='nobody'), 'nobody'),
    ):
        with pytest.raises(BadInput, match=said):
            fit(problem(), stripes, tmp_path / 'r', accelerator='cpu', **HOW | change)


def test_when_one_process_fails_the_others_are_stopped_and_its_words_are_said(capsys):
    with pytest.raises(BadInput, match='process 0 of 2: no such thing'): together(shout, 2)
    assert '0 began' in capsys.readouterr().out          # and number 1, which sleeps for an hour, is not waited for
    with pytest.raises(RunFailed, match='process 1 was ended: 1'): together(os._exit, 2)


def test_rank(monkeypatch):
    for k in ('RANK', 'WORLD_SIZE', 'SLURM_PROCID', 'SLURM_NTASKS'): monkeypatch.delenv(k, raising=False)
    assert rank() is None
    monkeypatch.setenv('SLURM_PROCID', '0')
    monkeypatch.setenv('SLURM_NTASKS', '1')
    assert rank() is None  # a shell on a cluster
    monkeypatch.setenv('RANK', '1'); monkeypatch.setenv('WORLD_SIZE', '2'); assert rank() == 1


def test_compile_and_the_share_of_waiting(stripes, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, *a, **k: compiled.append(type(self).__name__))
    run = fit(problem(), stripes, tmp_path/'r', batch_size=12, compile=True, precision='bf16-mixed', **HOW)
    assert compiled == ['Named'] and 0 <= run.done['waited'] < 1 and run.done['step_ms'] > 0
