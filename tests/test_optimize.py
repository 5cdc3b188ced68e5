"""Forms of a model: parity that names the stage, a gate that takes no other artifact, eight bits within a budget, and what an answer costs.

The network here is tiny and was never trained: what is asked is whether the same numbers come out, not whether they are good.
"""
import io, shutil
from pathlib import Path

import numpy as np, onnx, pytest, yaml
from onnx import numpy_helper as nh
from PIL import Image

from cv_lab.bench import cost_per_1000, pareto, percentiles, race, read_prices
from cv_lab.core import BadInput, NotAccepted, NotFound, file_digest, read_json, write_json
from cv_lab.parity import parity, within
from cv_lab.predict import Predictor, predict_table
from cv_lab.release import Registry, judge_rules, make_bundle, opponents, write_gate
from cv_lab.spec import Problem, Serving, parse_problem
from cv_lab.tasks import classification

TEXT = '''
name: stripes
task: classification
classes: [lying, standing, slanted]
owner: o
intended_use: i
slices: {noisy: noise == 'high'}
metrics: {resamples: 100}
acceptance: [{metric: accuracy, at_least: 0.0, min_support: 1}]
optimize: {lose_at_most: 0.5, slice_lose_at_most: 0.9}
'''
PROBLEM = parse_problem(TEXT)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A run folder with a random network, exported; its data."
    import torch
    from safetensors.torch import save_file
    from cv_lab.image import Preprocess
    from cv_lab.optimize import export_run
    from cv_lab.runs import Run

    home = tmp_path_factory.mktemp('optimize')
    data = classification.example(home / 'stripes')
    path = home / 'runs/stripes-1'
    (path / 'export').mkdir(parents=True)
    cfg = classification.Config(
        network='resnet10t', network_args={'channels': [8, 8, 16, 16]}, image=Preprocess(24, 24)
    )
    torch.manual_seed(0)
    net = classification.network(cfg, PROBLEM.classes)
    weights = {k: v.contiguous() * (60 if k.endswith('fc.weight') else 1) for k, v in net.state_dict().items()}
    save_file(weights, path / 'export/model.safetensors')
    config = dict(
        problem='stripes',
        task='classification',
        classes=PROBLEM.classes,
        fit=dict(task=cfg.model_dump(mode='json'), epochs=1),
    )
    (path / 'config.yaml').write_text(yaml.safe_dump(config))
    write_json(path / 'lineage.json', dict(dataset='stripes@1', seed=0))
    (path / 'evaluation').mkdir()
    write_json(path/'done.json', dict(weights=file_digest(path/'export/model.safetensors'), epochs=1, best_epoch=1))
    run = Run(path); export_run(run, PROBLEM)
    return run, data


def spoilt(run, to, change):
    shutil.copytree(run.path/'export', to); change(to); return Predictor(to, 'cpu', 1)


def edit(name, **new): return lambda at: write_json(at/name, read_json(at/name) | new)


def scaled(wanted, by):
    def change(at):
        m = onnx.load(at/'model.onnx'); i = next(i for i in m.graph.initializer if wanted(list(i.dims)))
        i.CopyFrom(nh.from_array(nh.to_array(i)*np.float32(by), i.name)); onnx.save(m, at/'model.onnx')
    return change


PLANTED = {
    'resize': edit('preprocess.json', interpolation='nearest'),
    'normalise': scaled(lambda d: d == [1, 3, 1, 1], 1.03),
    'network': scaled(lambda d: len(d) == 4 and d[0] > 1, 0.8),
    'post-processing': edit('model.json', classes=['standing', 'lying', 'slanted']),
}


# ---- parity

def test_the_export_is_the_checkpoint(made):
    run, data = made; p = parity(run, Predictor(run.path/'export', 'cpu', 1), data.table, data.read, PROBLEM)
    assert (
        p['ok']
        and p['stage'] is None
        and p['items'] == 60
        and set(p['stages']) == {'decode', 'resize', 'normalise', 'network', 'post-processing'}
    )
    assert (
        p['slices']['all']['loses'] == 0
        and p['slices']['noisy']['support'] == 30
        and set(p['artifact'])
        == {'model.onnx', 'model.safetensors', 'model.json', 'preprocess.json', 'thresholds.json'}
    )


@pytest.mark.parametrize('stage', PLANTED)
def test_the_first_stage_that_differs_is_named(made, tmp_path, stage):
    run, data = made; p = parity(run, spoilt(run, tmp_path/'x', PLANTED[stage]), data.table.slice(0, 12), data.read)
    assert (
        not p['ok']
        and p['stage'] == stage
        and p['said'].startswith(stage)
        and p['stages'][stage]['item'] in data.table['id'].to_pylist()
    ), p['said']


def test_a_decoder_that_ignores_the_turn_is_named(made):
    run, data = made
    def turned(uri):
        im = Image.open(io.BytesIO(data.read(uri)))
        exif = im.getexif()
        exif[0x0112] = 6
        b = io.BytesIO()
        im.save(b, 'PNG', exif=exif)
        return b.getvalue()

    class Flat(Predictor):
        def decode(self, file, *args): return np.asarray(Image.open(io.BytesIO(file)).convert('RGB'))
    rows = data.table.slice(0, 6); p = parity(run, Flat(run.path/'export', 'cpu', 1), rows, turned)
    assert p['stage'] == 'decode' and 'grey levels' in p['said']
    assert parity(run, Predictor(run.path / 'export', 'cpu', 1), rows, turned)['ok']


def test_thresholds_that_were_changed_after_the_evaluation_are_seen(made, tmp_path):
    run, data = made
    rows = data.table.slice(0, 12)
    said = predict_table(Predictor(run.path / 'export', 'cpu', 1), rows, data.read)
    p = parity(run, spoilt(run, tmp_path/'x', edit('thresholds.json', temperature=3.)), rows, data.read, judged=said)
    assert p['stage'] == 'post-processing' and 'judged' in p['said']


def test_a_network_that_says_nan_does_not_pass(made):
    run, data = made
    model = Predictor(run.path / 'export', 'cpu', 1)
    whole = model.infer
    model.infer = lambda x: {k: v * np.nan for k, v in whole(x).items()}
    with np.errstate(invalid='ignore'), pytest.raises(BadInput): parity(run, model, data.table.slice(0, 4), data.read)


def test_a_neighbour_that_changes_an_answer_is_seen(made):
    run, data = made
    model = Predictor(run.path / 'export', 'cpu', 1)
    whole = model.infer
    model.infer = lambda x: {k: v * (1 + 0.001 * (len(x) > 1)) for k, v in whole(x).items()}
    model.runtime = dict(precision='int8'); p = parity(run, model, data.table.slice(0, 8), data.read, PROBLEM)
    assert p['stage'] == 'network' and 'neighbours' in p['said']


def test_an_embedding_for_the_service_is_an_output_and_changes_nothing(made, tmp_path):
    from cv_lab.optimize import export_run
    from cv_lab.runs import Run

    run, data = made
    shutil.copytree(run.path, tmp_path / 'run')
    again = Run(tmp_path / 'run')
    export_run(again, PROBLEM.model_copy(update=dict(serving=Serving(keep_embeddings=0.1))))
    model, rows = Predictor(again.path / 'export', 'cpu', 1), data.split('test')
    said = predict_table(model, rows, data.read)
    assert {len(e) for e in said['embedding'].to_pylist()} == {16}
    without = predict_table(Predictor(run.path / 'export', 'cpu', 1), rows, data.read)
    assert parity(run, model, rows, data.read, PROBLEM, judged=without)['ok']
    export_run(again, PROBLEM)
    assert predict_table(Predictor(again.path / 'export', 'cpu', 1), rows, data.read)['embedding'].null_count == len(rows)


def test_the_budget_is_the_problem_files(made):
    tight = Problem(
        **PROBLEM.model_dump() | dict(optimize=dict(lose_at_most=0.01, slice_lose_at_most=0.03, min_support=30))
    )
    f = lambda loses, n=200: dict(artifact=.9, checkpoint=.9 + loses, loses=loses, support=n)
    see = lambda **slices: within(dict(metric='accuracy', slices=slices), tight)
    assert not see(all=f(0.01), dark=f(0.03))
    assert len(see(all=f(0.011))) == 1 and 'dark' in see(all=f(0), dark=f(0.04))[0]
    assert not see(all=f(0), dark=f(.5, 29)); assert see(all=f(0) | dict(loses=None))


# ---- the gate

def judged(run, data, artifact=None):
    from cv_lab.evaluate import write_evidence
    from cv_lab.optimize import performance

    model = Predictor(artifact or run.path / 'export', 'cpu', 1)
    rows = data.split('test')
    said = predict_table(model, rows, data.read)
    write_evidence(run.path / 'evaluation', rows, said, PROBLEM)
    write_json(run.path/'evaluation/performance.json', performance(run, model, rows, data.read, PROBLEM, said))
    return judge_rules(PROBLEM, run.path/'evaluation')


def row(verdict): return next(r for r in verdict['rules'] if r['rule'] == 'parity with the checkpoint')


@pytest.fixture
def copied(made, tmp_path):
    from cv_lab.runs import Run
    run, data = made; shutil.copytree(run.path, tmp_path/'runs/stripes-1'); return Run(tmp_path/'runs/stripes-1'), data


def test_the_gate_names_the_stage_and_takes_no_other_artifact(copied):
    run, data = copied; good = judged(run, data); assert good['verdict'] == 'pass' and row(good)['verdict'] == 'pass'
    for name in (
        'preprocess.json',
        'model.json',
        'thresholds.json',
    ):  # after it was measured: a resize, a class order, a threshold
        whole = (run.path / 'export' / name).read_bytes()
        edit(name, **{'x': 1})(run.path / 'export')
        r = row(judge_rules(PROBLEM, run.path / 'evaluation'))
        assert r['verdict'] == 'fail' and name in r['said']; (run.path/'export'/name).write_bytes(whole)
    assert row(judge_rules(PROBLEM, run.path/'evaluation'))['verdict'] == 'pass'
    PLANTED['normalise'](run.path / 'export')
    bad = judged(run, data)
    assert bad['verdict'] == 'fail' and 'normalise is the first stage' in row(bad)['said']


def test_no_parity_no_promotion(copied, tmp_path):
    run, data = copied
    judged(run, data)
    p = run.path / 'evaluation/performance.json'
    registry = Registry(tmp_path / 'registry')
    for lacks in ('parity', 'artifact'):
        said = read_json(p)
        said['parity'] = None if lacks == 'parity' else dict(ok=True, items=1)
        write_json(p, said)
        write_gate(run.path, PROBLEM, registry)
        tag = registry.add(make_bundle(run.path, PROBLEM, TEXT))
        with pytest.raises(NotAccepted, match='parity with the checkpoint'): registry.promote(tag, reason='r', by='b')


# ---- forms

def test_a_variant_goes_through_the_same_gate(copied, tmp_path):
    from cv_lab.optimize import Workshop, compare_again, make_variant, variant_folder

    run, data = copied
    judged(run, data)
    shop = Workshop(run, PROBLEM, data, 1)
    registry = Registry(tmp_path / 'registry')
    others = lambda at: opponents(at, PROBLEM, registry)
    with pytest.raises(NotFound, match='no variant'): variant_folder(run.path, 'int8')
    out = make_variant(shop, 'int8', others)
    assert variant_folder(run.path, 'int8') == out and not (out / 'export/model.safetensors').exists()
    cost = read_json(out / 'evaluation/performance.json')
    assert (
        cost['precision'] == 'int8'
        and cost['peak_memory_mb'] > 0
        and cost['model'] == file_digest(out / 'export/model.onnx')
    )
    assert (
        'QuantizeLinear' in {n.op_type for n in onnx.load(out / 'export/model.onnx').graph.node}
        and cost['model_size_mb'] < 0.7 * (run.path / 'export/model.onnx').stat().st_size / 1e6
    )
    compare_again(out, PROBLEM, others)
    verdict = write_gate(out, PROBLEM, registry)
    tag = registry.add(make_bundle(out, PROBLEM, TEXT))
    assert verdict['verdict'] == 'pass', verdict
    registry.promote(tag, reason='faster', by='b'); assert registry.models()[0]['run'] == 'stripes-1/int8'
    stamp = (out / 'variant.json').stat().st_mtime_ns
    make_variant(shop, 'int8', others)
    assert (out / 'variant.json').stat().st_mtime_ns == stamp


def test_a_pruned_variant_is_held_against_its_own_checkpoint_and_the_budget(copied, tmp_path):
    from cv_lab.optimize import Workshop, compare_again, make_variant

    run, data = copied
    judged(run, data)
    shop = Workshop(run, PROBLEM, data, 1)
    registry = Registry(tmp_path / 'registry')
    others = lambda at: opponents(at, PROBLEM, registry)
    out = make_variant(shop, 'pruned', others)
    notes, cost = read_json(out / 'variant.json')['notes'], read_json(out / 'evaluation/performance.json')
    assert notes['ok'] and notes['share'] >= 0.3 and any(after < before for before, after in notes['channels'].values())
    assert cost['model_size_mb'] < 0.8 * (run.path / 'export/model.onnx').stat().st_size / 1e6
    assert cost['parity']['ok'] and cost['parity']['max_abs_diff'] < 1e-4 and 'of the run' in cost['parity']['said']
    again = read_json(make_variant(shop, 'pruned-int8') / 'evaluation/performance.json')
    assert again['precision'] == 'int8' and again['model_size_mb'] < cost['model_size_mb']
    compare_again(out, PROBLEM, others)
    assert write_gate(out, PROBLEM, registry)['verdict'] == 'pass'
    tag = registry.add(make_bundle(out, PROBLEM, TEXT))
    registry.promote(tag, reason='smaller', by='b')
    # another checkpoint's graph is not this one's
    shutil.copyfile(run.path / 'export/model.onnx', out / 'export/model.onnx')
    assert not parity(out, Predictor(out / 'export', 'cpu', 1), data.split('test'), data.read, PROBLEM)['ok']
    # and what loses more than the budget is refused, whatever the numbers say
    from cv_lab.optimize import _with_budget
    figures = dict(metric='accuracy', metrics={}, slices={'all': dict(checkpoint=0.9, artifact=0.3, loses=0.6, support=9)})
    refused = _with_budget(dict(ok=True, stages=dict(network={})), figures, PROBLEM)
    assert not refused['ok'] and refused['stage'] == 'network' and 'loses 0.6 of at most 0.5' in refused['said']


def small_network():
    "Everything that channels meet: a residual block with depthwise, squeeze and excitation, and a classifier."
    import torch
    from torch import nn
    from cv_lab.backbone import FromUint8, Named

    def layer(i, o, k=1, groups=1, act=nn.Hardswish):
        return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, groups=groups, bias=False), nn.BatchNorm2d(o), act())

    class Block(nn.Module):
        def __init__(self, c, wide):
            super().__init__()
            self.widen, self.deep = layer(c, wide), layer(wide, wide, 3, wide)
            self.squeeze, self.excite = nn.Conv2d(wide, 8, 1), nn.Conv2d(8, wide, 1)
            self.narrow = layer(wide, c, act=nn.Identity)

        def forward(self, x):
            y = self.deep(self.widen(x))
            gate = self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True))))
            return x + self.narrow(y * torch.nn.functional.hardsigmoid(gate))

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3))
    body = nn.Sequential(layer(3, 16, 3), Block(16, 32), layer(16, 24, act=nn.ReLU), head)
    return Named(FromUint8((0.5,) * 3, (0.25,) * 3), body, 'logits')


def test_taking_silent_channels_out_changes_no_answer(tmp_path):
    import torch
    from cv_lab.compress import outputs
    from cv_lab.optimize import export_onnx
    from cv_lab.prune import Channels, quiet_channels, silence, speak, without_silent

    torch.manual_seed(1)
    net = small_network().eval()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            for v, mean in ((m.weight, 1), (m.bias, 0), (m.running_mean, 0)): torch.nn.init.normal_(v, mean, 0.3)
    export_onnx(net, 32, 32, tmp_path / 'm.onnx')
    x = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)
    before = outputs(tmp_path / 'm.onnx', x)['logits']
    assert not any(a < b for b, a in without_silent(tmp_path / 'm.onnx', tmp_path / 'same.onnx').values())
    assert np.array_equal(outputs(tmp_path / 'same.onnx', x)['logits'], before)
    speak(silence(net, quiet_channels(tmp_path / 'm.onnx', 0.5, at_once=4), torch.from_numpy(x)))
    assert not any('_orig' in k or '_mask' in k for k in net.state_dict())
    export_onnx(net, 32, 32, tmp_path / 'silent.onnx')
    gone = without_silent(tmp_path / 'silent.onnx', tmp_path / 'small.onnx')
    a, b = (outputs(tmp_path / f'{n}.onnx', x)['logits'] for n in ('silent', 'small'))
    assert np.abs(a - b).max() < 1e-5 * np.abs(a).max() and np.abs(a - before).max() > 1e-3 * np.abs(a).max()
    size = lambda n: sum(w.size for w in Channels(onnx.load(tmp_path / f'{n}.onnx')).weights.values())
    assert size('small') < 0.5 * size('m') and all(after >= 4 for _, after in gone.values())


def test_ranges_from_each_batch_are_refused(copied):
    from cv_lab.optimize import Workshop, make_variant

    run, data = copied
    cost = read_json(make_variant(Workshop(run, PROBLEM, data, 1), 'int8-dynamic') / 'evaluation/performance.json')
    assert not cost['parity']['ok'] and 'neighbours' in cost['parity']['said']


def test_a_runtime_that_is_not_here_is_said(made, tmp_path):
    from cv_lab.optimize import forms_for
    run, _ = made; claim = edit('model.json', runtime=dict(precision='fp32', provider='TensorrtExecutionProvider'))
    with pytest.raises(NotFound, match='TensorrtExecutionProvider is not installed'): spoilt(run, tmp_path/'x', claim)
    with pytest.raises(BadInput, match='unknown target'): forms_for('abacus')
    with pytest.raises(BadInput, match='unknown forms'): forms_for('cpu', ['int3'])


# ---- what an answer costs

def test_the_front_is_what_no_other_beats():
    rng = np.random.default_rng(0); rows = [dict(c=c, g=g) for c, g in rng.integers(0, 6, (40, 2)).tolist()]
    beaten = lambda r: any(o['c'] <= r['c'] and o['g'] >= r['g'] and (o['c'] < r['c'] or o['g'] > r['g']) for o in rows)
    assert pareto(rows, 'c', 'g') == [not beaten(r) for r in rows]


def test_money():
    p = read_prices()
    assert p['example'] and np.isclose(cost_per_1000(100, p, 'cuda'), 2.5 / 3600 * 10 / 0.5)
    assert cost_per_1000(100, p, 'abacus') is None
    assert np.isclose(
        cost_per_1000(100, p, joules=36) - cost_per_1000(100, p), 0.01 * p['per_kwh']
    )  # 36 kJ are a hundredth of a kWh


@pytest.mark.parametrize(
    'text',
    [
        'machines: 3',
        'machines: {cpu: {per_hour: 0}}',
        'machines: {cpu: {per_hour: 1, utilization: 2}}',
        'machines: {cpu: {per_hour: .nan}}',
        '[',
        '',
    ],
)
def test_a_price_file_that_is_none(tmp_path, text):
    (tmp_path/'p.yaml').write_text(text)
    with pytest.raises(BadInput): read_prices(tmp_path/'p.yaml')


def test_turns_are_counted_right():
    calls = dict(a=[], b=[])
    rates = race(
        {n: (lambda x, n=n: calls[n].append(len(x))) for n in calls}, np.zeros((3, 1), np.uint8), (1, 5), 0.001, 3
    )
    assert set(calls['a']) == {1, 5} == set(calls['b']) and all(r[5] > 0 for r in rates.values())
    assert percentiles([0.001, 0.002, 0.003])['latency_ms_p50'] == 2.0


def test_bench_needs_no_torch(made):
    import os, subprocess, sys
    run, _ = made; root = Path(__file__).parents[1]
    code = 'import sys\nfor m in ("torch", "lightning", "onnx"): sys.modules[m] = None\nfrom cv_lab.bench import latency, sample_files\nfrom cv_lab.predict import Predictor\np = Predictor(sys.argv[1], "cpu", 1); print(latency(p, sample_files(sys.argv[1]), 5, 1)["repeats"])'
    done = subprocess.run(
        [sys.executable, '-c', code, str(run.path / 'export')],
        env=os.environ | dict(PYTHONPATH=str(root)),
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == '5', done.stderr[-800:]
