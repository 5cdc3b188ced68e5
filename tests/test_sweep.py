"A sweep tries what it may, stops what is behind, goes on after a kill, and keeps the best."
import os
from types import SimpleNamespace as Bag

import numpy as np, pandas as pd, pytest

from cv_lab import sweep as room
from cv_lab.core import BadInput, RunFailed
from cv_lab.sweep import as_it_stands, changed, importance, plot_parallel, plot_sweep, search_space, sweep
from cv_lab.tasks import classification
from tests.test_train import problem as plain

SPACE = dict(lr=dict(low=1e-4, high=1., log=True), weight_decay=dict(low=0., high=.2), batch_size=[8, 12])


def problem(**kw):
    return plain(
        **dict(
            train=dict(
                epochs=6,
                batch_size=12,
                lr=5e-3,
                image=dict(height=16, width=16),
                network_args=dict(channels=[8, 8, 16, 16]),
            ),
            sweep=dict(space=SPACE, startup=4),
        )
        | kw
    )


@pytest.fixture(autouse=True)
def offline(monkeypatch): monkeypatch.setenv('WANDB_MODE', 'disabled')


@pytest.fixture
def stripes(tmp_path): return classification.example(tmp_path/'stripes')


@pytest.fixture
def pretend(monkeypatch):
    "A training whose figure is known: best at a learning rate of 0.01, whatever else. Dies where `die` says."
    state = Bag(die=None, calls=[])
    def fit(problem, dataset, runs, callbacks=(), **how):
        state.calls.append(how); good = 1 - .2*abs(np.log10(how['lr']) + 2)
        if how['lr'] > .5: raise RuntimeError('out of memory')
        for epoch in range(6):
            if state.die == (len(state.calls), epoch): raise KeyboardInterrupt
            for c in callbacks:
                c.on_validation_end(
                    Bag(
                        callback_metrics={'val_accuracy': good * (epoch + 1) / 6},
                        current_epoch=epoch,
                        default_root_dir=runs / 'none',
                    ),
                    None,
                )
        return Bag(
            name=f'run-{how["lr"]:.6f}',
            done=dict(best_epoch=6, seconds=1.0),
            history=pd.DataFrame(dict(epoch=[6], val_accuracy=[good])),
        )

    monkeypatch.setattr(room, 'fit', fit); return state


def test_the_space_is_checked_before_anything_is_trained(stripes, tmp_path, pretend):
    assert set(search_space(problem(sweep={}))) == {'lr', 'weight_decay', 'warmup'}
    for space, said in (
        (dict(learning_rate=[0.1, 0.2]), 'learning_rate'),
        (dict(lr=dict(low=-1.0, high=0.1)), 'lr'),
        ({'image.depth': [1, 2]}, 'depth'),
        ({'lr.x': [1, 2]}, 'no settings'),
    ):
        with pytest.raises(BadInput, match=said):
            sweep(problem(sweep=dict(space=space)), stripes, tmp_path / 'r', trials=2)
    with pytest.raises(BadInput, match='jobs'): sweep(problem(train=dict(devices=2)), stripes, tmp_path/'r', trials=2)
    assert not pretend.calls


def test_dots_lead_into_nested_settings():
    how = changed(problem(), {'lr': .1, 'image.height': 32, 'network_args.drop_rate': .1}, epochs=3)
    assert (
        how['lr'] == 0.1
        and how['epochs'] == 3
        and (how['image']['height'], how['image']['width']) == (32, 16)
        and how['network_args'] == dict(channels=[8, 8, 16, 16], drop_rate=0.1)
    )
    assert as_it_stands(problem(), {k: v for k, v in search_space(problem()).items()}) == dict(
        lr=5e-3, weight_decay=0.05, batch_size=12
    )


def test_it_finds_what_is_better_gives_up_what_is_not_and_notes_what_fails(stripes, tmp_path, pretend):
    found = sweep(problem(), stripes, tmp_path/'r', trials=30, seed=1); t = found.table
    assert (
        t.loc[0, 'lr'] == 5e-3
        and len(t) == 30
        and found.best.value >= t.loc[0, 'accuracy']
        and abs(np.log10(found.best.params['lr']) + 2) < 0.2
    )
    lost = t[t['state'] == 'given up']
    assert len(lost) and (lost['epochs'] < 6).all() and (lost['epochs'] >= 2).all()  # not before a third
    failed = t[t['state'] == 'failed']
    assert (failed['lr'] > 0.5).all() and failed['error'].str.contains('out of memory').all()
    done = t[t['state'] == 'done']
    figure = plot_parallel(found)
    assert len(figure.axes[0].lines) == len(done) + 4  # one each, and the axes
    best = plot_sweep(found).axes[0].lines[1].get_ydata()
    assert best[-1] == found.best.value and (np.diff(best) >= 0).all()


def test_importance_tells_what_matters(stripes, tmp_path, pretend):
    found = sweep(
        problem(sweep=dict(space=SPACE | dict(lr=dict(low=1e-4, high=0.4, log=True)), prune=False, startup=40)),
        stripes,
        tmp_path / 'r',
        trials=40,
    )
    said = importance(found).set_index('setting')['importance']
    assert set(said.index) == set(SPACE) and said['lr'] > 0.5 and abs(said.sum() - 1) < 1e-6
    assert not len(importance(sweep(problem(), stripes, tmp_path/'s', trials=3)))        # nothing is said of three


def test_killed_it_goes_on_with_the_trial_it_was_in(stripes, tmp_path, pretend):
    whole = sweep(problem(), stripes, tmp_path/'a', trials=9).table; n = len(pretend.calls)
    pretend.die = (n + 5, 3)
    with pytest.raises(KeyboardInterrupt): sweep(problem(), stripes, tmp_path/'b', trials=9)
    log = next((tmp_path/'b').glob('sweeps/*/trials.log'))
    with open(log, 'a') as f: f.write('{"op_code": 4, "worker_')        # the power went out in the middle of a line
    again = sweep(problem(), stripes, tmp_path/'b', trials=9).table
    pd.testing.assert_frame_equal(again, whole)
    assert len(pretend.calls) == n + 5 + 5  # five begun, then the fifth again and four more
    assert len(sweep(problem(), stripes, tmp_path/'b', trials=9).table) == 9 and len(pretend.calls) == n + 10
    assert len(sweep(problem(), stripes, tmp_path/'b', trials=10).table) == 10             # more trials: it goes on


def test_two_sweeps_do_not_share_a_folder_and_one_without_a_result_says_why(stripes, tmp_path, pretend):
    from filelock import FileLock
    found = sweep(problem(), stripes, tmp_path/'r', trials=1)
    with FileLock(found.plan.folder / '.lock'), pytest.raises(RunFailed, match='another process'):
        sweep(problem(), stripes, tmp_path / 'r', trials=2)
    with pytest.raises(RunFailed, match='out of memory'):
        sweep(problem(train=dict(lr=0.9), sweep=dict(space=dict(lr=[0.9, 0.8]))), stripes, tmp_path / 'r', trials=2)


def test_two_processes_share_the_trials_and_the_best_is_a_run_like_any_other(stripes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('PYTHONPATH', os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    p = problem(sweep=dict(space=dict(lr=dict(low=1e-3, high=0.02, log=True)), prune=False))
    found = sweep(p, stripes, tmp_path / 'r', trials=3, jobs=2, epochs=2)
    assert (
        found.table['state'].tolist() == ['done'] * 3
        and found.table['trial'].tolist() == [1, 2, 3]
        and capsys.readouterr().out.count('trial ') == 3
    )
    assert len({t.user_attrs['run'] for t in found.trials}) == 3
    run = found.keep(tmp_path / 'r')
    assert (
        run.path == (tmp_path / 'r' / found.best.user_attrs['run']).resolve()
        and (run.path / 'export/model.safetensors').is_file()
    )
    from cv_lab.train import fit
    capsys.readouterr()
    fit(p, stripes, tmp_path / 'r', epochs=2, lr=found.best.params['lr'])
    assert 'nothing has changed' in capsys.readouterr().out  # it is that run
