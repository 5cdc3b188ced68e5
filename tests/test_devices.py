"Several devices are one training: the same curve as one device with the whole batch, and each can go on where the other stopped."

import os

import numpy as np, pytest, torch

from cv_lab.core import BadInput, RunFailed
from cv_lab.devices import rank, together
from cv_lab.tasks import classification
from cv_lab.train import Shuffled, fit, make_loaders, run_config, run_name, settings
from tests.test_train import problem

# no batch norm, whose statistics are of each process's own items; nothing random in the images
HOW = dict(
    epochs=3,
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


def test_two_processes_walk_the_curve_of_one_and_take_over_from_it(stripes, tmp_path, capsys):
    from lightning.pytorch.callbacks import Callback
    class Stop(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1: raise RuntimeError('out of power')
    one = fit(problem(), stripes, tmp_path/'one', batch_size=12, **HOW)
    two = fit(problem(), stripes, tmp_path / 'two', batch_size=6, devices=2, **HOW)
    assert '2 devices' in (said := capsys.readouterr().out) and said.count('epoch   3/3') == 2
    with pytest.raises(RuntimeError, match='power'):
        fit(problem(), stripes, tmp_path / 'moved', callbacks=[Stop()], batch_size=6, accumulate=2, **HOW)
    moved = fit(problem(), stripes, tmp_path / 'moved', batch_size=6, devices=2, **HOW)
    assert 'resumed from the last finished epoch' in capsys.readouterr().out
    for other in (two, moved):
        assert other.history['epoch'].tolist() == [1, 2, 3] and other.done['steps'] == one.done['steps'] == 9
        for name in ('train_loss', 'val_loss'):
            np.testing.assert_allclose(other.history[name], one.history[name], rtol=2e-3)
    assert one.history['train_loss'].iloc[-1] < .98*one.history['train_loss'].iloc[0]     # a curve, not a line
    assert two.name == moved.name != one.name  # each device's batch is part of what is asked
    fit(problem(), stripes, tmp_path / 'two', batch_size=6, accumulate=2, **HOW)
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


def test_a_run_is_named_by_its_step_not_by_the_devices_that_share_it(stripes):
    name = lambda **kw: run_name(run_config(problem(), stripes, settings(problem(), **HOW | kw)[0]))
    assert (
        name(devices=4)
        == name(devices=2, accumulate=2)
        == name(devices=2, nodes=2)
        == name(accumulate=4, strategy='auto')
        != name()
    )


def test_what_cannot_be_is_refused(stripes, tmp_path):
    for change, said in (
        (dict(strategy='fsdp'), 'CPU'),
        (dict(sync_batchnorm=True, devices=2), 'CPU'),
        (dict(nodes=2), 'torchrun'),
        (dict(strategy='ddp_spawn'), 'strategy'),
        (dict(finetune='lora'), 'knows nothing'),
        (dict(teacher='nobody'), 'nobody'),
    ):
        with pytest.raises(BadInput, match=said):
            fit(problem(), stripes, tmp_path / 'r', accelerator='cpu', **HOW | change)


def _shout(i, folder):
    print(f'{i} began', flush=True)
    if i == 0: raise BadInput('no such thing', 'a thing', 'look again')
    import time; time.sleep(3600)


def test_when_one_process_fails_the_others_are_stopped_and_its_words_are_said(tmp_path, capsys):
    with pytest.raises(BadInput, match='process 0 of 2: no such thing'): together(_shout, 2, (str(tmp_path),))
    assert '0 began' in capsys.readouterr().out          # and number 1, which sleeps for an hour, is not waited for
    with pytest.raises(RunFailed, match='was ended: 7'): together(_gone, 1)


def _gone(i): os._exit(7)


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
