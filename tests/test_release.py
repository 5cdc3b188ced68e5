"""The gate, the bundle and the registry: what passes, what is refused, and what is left after a kill at any moment.

The run folders here are made by hand: real JSON and Parquet, a few bytes for the network, which nothing in `release` loads.
"""
from pathlib import Path

import pyarrow as pa, pyarrow.parquet as pq, pytest

from cv_lab.core import BadInput, Damaged, NotAccepted, NotFound, file_digest, read_json, write_json
from cv_lab.release import (Log, Registry, judge_rules, make_bundle, opponents, say_verdict, verdict_table, write_gate)
from cv_lab.spec import parse_problem

RULES = '''
  - {metric: accuracy, at_least: 0.9, judge: point}
  - {metric: accuracy, slice: each, at_least: 0.8, judge: point}
  - {metric: accuracy, against: production, lose_at_most: 0.02}
  - {metric: latency_ms_p95, at_most: 50}
'''
TEXT = '''
name: shapes
task: classification
classes: [circle, square]
owner: o
intended_use: i
slices: {night: light == 'night', fog: light == 'fog'}
acceptance:
''' + RULES
PROBLEM = parse_problem(TEXT)


def figure(v, support=300): return dict(value=v, low=v - .02, high=v + .02, support=support)


def make_run(root, name='a', accuracy=.95, night=.9, fog_items=5, **performance):
    "A run folder with what `release` reads."
    run, ev = Path(root)/name, Path(root)/name/'evaluation'; ev.mkdir(parents=True); (run/'export').mkdir()
    pq.write_table(pa.table(dict(id=['1', '2'])), ev / 'truth.parquet')
    pq.write_table(pa.table(dict(id=['1', name])), ev / 'predictions.parquet')
    for f in ('model', 'preprocess', 'thresholds'): write_json(run/f'export/{f}.json', dict(made_for=f))
    for f in ('onnx', 'safetensors'): (run/f'export/model.{f}').write_bytes(f'{name} {f}'.encode())
    (run / 'config.yaml').write_text('epochs: 1\n')
    write_json(run / 'lineage.json', dict(dataset='shapes@1'))
    (run / 'golden.parquet').write_bytes(b'golden')
    put_metrics(run, accuracy, night, fog_items)
    write_json(
        ev / 'performance.json',
        dict(
            latency_ms_p95=10.0,
            model_size_mb=1.0,
            model=file_digest(run / 'export/model.onnx'),
            parity=dict(ok=True, items=2, max_abs_diff=1e-6, differ=[], artifact=model_files(run)),
        )
        | performance,
    )
    return run


def model_files(run): return {p.name: file_digest(p) for p in (run/'export').iterdir()}


def put_metrics(run, accuracy=.95, night=.9, fog_items=5):
    ev = run / 'evaluation'
    one = lambda v, n: dict(where=f"light == '{v[1]}'", support=n, metrics=dict(accuracy=figure(v[0], n)))
    write_json(
        ev / 'metrics.json',
        dict(
            problem='shapes',
            confidence=0.95,
            metrics=dict(accuracy=figure(accuracy)),
            classes={},
            slices=dict(night=one((night, 'night'), 90), fog=one((0.1, 'fog'), fog_items)),
            inputs={f'{t}.parquet': file_digest(ev / f'{t}.parquet') for t in ('truth', 'predictions')},
        ),
    )


def compare(run, tag, theirs, value=.01, against='production', **kw):
    ev = run/'evaluation'; f = figure(value) | dict(higher_is_better=True)
    write_json(
        ev / 'comparison.json',
        dict(
            against=against,
            tag=tag,
            metrics=dict(accuracy=f),
            slices=dict(night=dict(accuracy=f)),
            inputs=dict(
                ours=file_digest(ev / 'predictions.parquet'), theirs=file_digest(theirs / 'predictions.parquet')
            ),
        )
        | kw,
    )


def release(run, registry, problem=PROBLEM, text=TEXT):
    "What `cvlab release` does, up to the promotion."
    for alias, (tag, folder) in opponents(run, problem, registry).items(): compare(run, tag, folder, against=alias)
    write_gate(run, problem, registry)
    return registry.add(make_bundle(run, problem, text, {'MODEL_CARD.md': '# card\n'}))


def rows(verdict): return {r['rule']: r['verdict'] for r in verdict['rules']}


@pytest.fixture
def registry(tmp_path): return Registry(tmp_path/'registry')


# ---- the verdict

def test_every_rule_has_its_row(tmp_path):
    v = judge_rules(PROBLEM, make_run(tmp_path)/'evaluation')
    assert rows(v) == {
        'accuracy >= 0.9': 'pass',
        'accuracy on night >= 0.8': 'pass',
        'accuracy on fog >= 0.8': 'not judged',
        'accuracy loses <= 0.02 against production': 'not judged',
        'latency_ms_p95 <= 50': 'pass',
        'parity with the checkpoint': 'pass',
        'data: checked': 'not judged',
    }
    assert v['verdict'] == 'pass' and v['problem_digest'] == PROBLEM.digest and v['against'] == {'production': None}
    assert list(verdict_table(v)['rule']) == list(rows(v)) and 'shapes: PASS' in say_verdict(v)
    assert set(v['inputs']) == {
        f'evaluation/{n}' for n in ('metrics.json', 'performance.json', 'truth.parquet', 'predictions.parquet')
    }
    assert v['model']['model.onnx'] == file_digest(tmp_path/'a/export/model.onnx')


@pytest.mark.parametrize(
    'change, rule',
    [
        (dict(accuracy=0.85), 'accuracy >= 0.9'),
        (dict(night=0.7), 'accuracy on night >= 0.8'),
        (dict(fog_items=40), 'accuracy on fog >= 0.8'),
        (dict(latency_ms_p95=51), 'latency_ms_p95 <= 50'),
        (dict(latency_ms_p95=None), 'latency_ms_p95 <= 50'),
        (dict(latency_ms_p95='fast'), 'latency_ms_p95 <= 50'),
        (dict(parity=None), 'parity with the checkpoint'),
        (dict(parity=dict(ok=False, items=9, max_abs_diff=0.2, differ=['x'])), 'parity with the checkpoint'),
        (dict(parity=dict(ok='yes', max_abs_diff='small')), 'parity with the checkpoint'),
    ],
)
def test_what_fails_is_named(tmp_path, change, rule):
    v = judge_rules(PROBLEM, make_run(tmp_path, **change)/'evaluation')
    assert v['verdict'] == 'fail' and [r for r, x in rows(v).items() if x == 'fail'] == [rule]


def test_against_an_alias(tmp_path):
    run, other = make_run(tmp_path), make_run(tmp_path, 'b') / 'evaluation'
    rule = 'accuracy loses <= 0.02 against production'
    judged = lambda tag='shapes:0123456789abcdef', **kw: rows(judge_rules(PROBLEM, run/'evaluation', tag, **kw))[rule]
    assert judged() == 'fail'  # there is a production model, and no comparison
    compare(run, 'shapes:0123456789abcdef', other, value=.01); assert judged() == 'pass'
    assert judged('shapes:ffffffffffffffff') == 'fail'                       # the comparison is with another one
    assert judged('shapes:ffffffffffffffff', same=('shapes:ffffffffffffffff',)) == 'not judged'
    compare(run, 'shapes:0123456789abcdef', other, value=-0.01)
    assert judged() == 'fail'  # the interval reaches below -0.02
    compare(run, 'shapes:0123456789abcdef', other, against='challenger'); assert judged() == 'fail'


def test_data_rules_count(tmp_path):
    run = make_run(tmp_path)
    write_json(
        run / 'evaluation/data.json',
        dict(ok=False, rules=[dict(rule='min_per_class', verdict='fail', said='3 of square')]),
    )
    v = judge_rules(PROBLEM, run / 'evaluation')
    assert v['verdict'] == 'fail' and rows(v)['data: min_per_class'] == 'fail'
    write_json(
        run / 'evaluation/data.json', dict(ok=True, rules=[dict(rule='min_per_class', verdict='pass', said='all')])
    )
    assert judge_rules(PROBLEM, run/'evaluation')['verdict'] == 'pass'
    write_json(run / 'evaluation/data.json', dict(ok=False, rules=[]))
    assert judge_rules(PROBLEM, run / 'evaluation')['verdict'] == 'fail'


def test_silence_is_no_consent(tmp_path):
    run = make_run(tmp_path)
    p = parse_problem(TEXT.replace(RULES, '\n  - {metric: accuracy, slice: fog, at_least: 0.8}\n'))
    v = judge_rules(p, run/'evaluation'); assert v['verdict'] == 'fail' and rows(v)['something was judged'] == 'fail'


@pytest.mark.parametrize('what', ['truth.parquet', 'predictions.parquet'])
def test_tampered_tables_are_not_judged(tmp_path, what):
    run = make_run(tmp_path); (run/'evaluation'/what).write_bytes(b'better answers')
    with pytest.raises(Damaged, match=what): judge_rules(PROBLEM, run/'evaluation')


def test_figures_of_another_network_or_problem_are_not_judged(tmp_path):
    run = make_run(tmp_path); (run/'export/model.onnx').write_bytes(b'another')
    with pytest.raises(Damaged, match='model.onnx'): judge_rules(PROBLEM, run/'evaluation')
    with pytest.raises(BadInput, match='slices'):
        judge_rules(parse_problem(TEXT.replace("'fog'", "'mist'")), make_run(tmp_path, 'b') / 'evaluation')
    c = make_run(tmp_path, 'c'); compare(c, 'shapes:0123456789abcdef', run/'evaluation', inputs=dict(ours='0'*64))
    with pytest.raises(Damaged, match='comparison'): judge_rules(PROBLEM, c/'evaluation')


# ---- the bundle

def test_the_model_is_the_files_that_predict_reads():
    from cv_lab import predict, release as module
    assert module._MODEL == predict.MODEL_FILES


def test_the_same_run_gives_the_same_bundle(tmp_path, registry):
    run = make_run(tmp_path)
    write_gate(run, PROBLEM, registry)
    a = make_bundle(run, PROBLEM, TEXT)
    first = (a / 'checksums.json').read_bytes()
    stamp = a.stat().st_ino; make_bundle(run, PROBLEM, TEXT); assert a.stat().st_ino == stamp  # nothing was made again
    b = make_bundle(run, PROBLEM, TEXT, out=tmp_path / 'elsewhere/bundle')
    assert (b / 'checksums.json').read_bytes() == first
    make_bundle(run, PROBLEM, TEXT, {'RUNBOOK.md': 'x'}); assert (a/'checksums.json').read_bytes() != first


def test_only_what_is_asked_for_goes_in(tmp_path, registry):
    run = make_run(tmp_path); write_gate(run, PROBLEM, registry)
    for f in ('.env', 'export/.env', 'evaluation/.env', 'export/secrets.txt', 'evaluation/notes.txt'):
        (run / f).write_text('PASSWORD=x')
    names = [p.name for p in make_bundle(run, PROBLEM, TEXT).rglob('*')]
    assert '.env' not in names and 'secrets.txt' not in names and 'notes.txt' not in names


@pytest.mark.parametrize(
    'name', ['../x.md', '/tmp/x.md', 'a/b.md', 'checksums.json', 'gate.json', 'model.json', '.env', 'x.py', '']
)
def test_documents_cannot_be_anything(tmp_path, registry, name):
    run = make_run(tmp_path); write_gate(run, PROBLEM, registry)
    with pytest.raises(BadInput): make_bundle(run, PROBLEM, TEXT, {name: 'x'})


def test_a_stale_verdict_is_not_bundled(tmp_path, registry):
    run = make_run(tmp_path); write_gate(run, PROBLEM, registry); put_metrics(run, accuracy=.99)
    with pytest.raises(NotAccepted, match='metrics.json'): make_bundle(run, PROBLEM, TEXT)
    write_gate(run, PROBLEM, registry); (run/'export/thresholds.json').write_text('{}')
    with pytest.raises(NotAccepted, match='thresholds.json'): make_bundle(run, PROBLEM, TEXT)


# ---- the registry

def test_add_is_once(tmp_path, registry):
    run = make_run(tmp_path)
    tag = release(run, registry)
    assert registry.add(run / 'bundle') == tag and registry.tags() == [tag]
    assert (
        registry.resolve('shapes', tag.split(':')[1][:4]) == tag
        and registry.models()[0]['run'] == 'a'
        and registry.verify()['ok']
    )
    import bentoml; from bentoml._internal.models import ModelStore
    assert [str(m.tag) for m in bentoml.models.list(_model_store=ModelStore(registry.shelf))] == [tag]
    assert bentoml.models.get('shapes:latest', _model_store=ModelStore(registry.shelf)).info.labels == dict(
        problem='shapes', run='a', dataset='shapes@1', verdict='pass'
    )


def test_promotion_and_rollback(tmp_path, registry):
    a = release(make_run(tmp_path), registry)
    registry.promote(a, reason='first', by='Ada')
    assert registry.path('shapes') == registry.path(a)
    b = release(make_run(tmp_path, 'b'), registry); registry.promote(b, reason='second', by='Ada')
    c = release(make_run(tmp_path, 'c'), registry)
    registry.promote(c, reason='third', by='Ada')
    assert registry.resolve('shapes') == c
    registry.rollback('shapes', by='Bob', reason='bad'); assert registry.resolve('shapes') == b
    registry.rollback('shapes', by='Bob', reason='worse'); assert registry.resolve('shapes') == a
    with pytest.raises(NotFound, match='nothing to go back to'): registry.rollback('shapes', by='Bob', reason='more')
    assert [e['event'] for e in registry.log()] == ['add', 'promote']*3 + ['rollback']*2 and registry.verify()['ok']


def test_a_second_release_of_the_same_run_changes_nothing(tmp_path, registry):
    a = make_run(tmp_path)
    tag = release(a, registry)
    registry.promote(tag, reason='first', by='Ada')
    n = len(registry.log())
    assert release(a, registry) == tag; registry.promote(tag, reason='again', by='Ada'); assert len(registry.log()) == n
    b = make_run(tmp_path, 'b')
    tag = release(b, registry)
    registry.promote(tag, reason='second', by='Ada')
    assert release(b, registry) == tag


def test_aliases_are_per_problem(tmp_path, registry):
    a = release(make_run(tmp_path), registry); registry.promote(a, reason='r', by='Ada')
    text = TEXT.replace('name: shapes', 'name: forms'); other = parse_problem(text); run = make_run(tmp_path, 'b')
    write_json(run/'evaluation/metrics.json', read_json(run/'evaluation/metrics.json') | dict(problem='forms'))
    b = release(run, registry, other, text); registry.promote(b, reason='r', by='Ada')
    assert (
        registry.resolve('shapes') == a
        and registry.resolve('forms') == b
        and registry.problems() == ['forms', 'shapes']
        and registry.verify()['ok']
    )


def test_refusals_name_rule_and_figure(tmp_path, registry):
    bad = release(make_run(tmp_path, accuracy=.85), registry)
    with pytest.raises(NotAccepted, match=r'accuracy >= 0.9: 0.85'): registry.promote(bad, reason='r', by='Ada')
    no_gate = registry.add(make_bundle(make_run(tmp_path, 'n'), PROBLEM, TEXT))
    with pytest.raises(NotAccepted, match='no verdict'): registry.promote(no_gate, reason='r', by='Ada')
    good = release(make_run(tmp_path, 'g'), registry)
    with pytest.raises(NotAccepted, match='other rules'):
        registry.promote(good, reason='r', by='Ada', problem=parse_problem(TEXT.replace('0.9,', '0.93,')))
    assert registry.standing('shapes') == {}


@pytest.mark.parametrize(
    'kw',
    [
        dict(reason='r'),
        dict(by='Ada'),
        dict(override='o'),
        dict(by=' ', reason='r'),
        dict(by='Ada', reason=' '),
        dict(by='Ada', reason='r', alias='../x'),
        dict(by='Ada', reason='r', alias='latest'),
        dict(by='Ada', reason='r', alias='deadbeef'),
    ],
)
def test_a_move_needs_a_name_a_reason_and_an_alias(tmp_path, registry, kw):
    with pytest.raises(BadInput): registry.promote(release(make_run(tmp_path), registry), **kw)


def test_override_is_logged(tmp_path, registry):
    bad = release(make_run(tmp_path, accuracy=0.85), registry)
    registry.promote(bad, by='Ada', override='the fair is tomorrow')
    e = registry.log()[-1]
    assert e['by'] == 'Ada' and e['reason'] == 'the fair is tomorrow' and e['overridden'] == ['accuracy >= 0.9: 0.85']


def test_a_late_promotion_is_told(tmp_path, registry):
    a, b = (release(make_run(tmp_path, n), registry) for n in 'ab')      # both judged when nobody was in production
    registry.promote(a, reason='r', by='Ada')
    with pytest.raises(NotAccepted, match='verdict is against nobody'): registry.promote(b, reason='r', by='Bob')
    assert registry.resolve('shapes') == a


def test_a_bundle_that_changed_is_not_given_out(tmp_path, registry):
    tag = release(make_run(tmp_path), registry)
    registry.promote(tag, reason='r', by='Ada')
    f = registry.path('shapes') / 'model.onnx'
    whole = f.read_bytes(); f.chmod(0o644); f.write_bytes(whole[:-1] + b'!')
    for ask in (
        lambda: registry.path('shapes'),
        lambda: registry.promote(tag, 'challenger', 'r', 'Ada'),
        lambda: registry.add(tmp_path / 'a/bundle'),
    ):
        with pytest.raises(Damaged, match='model.onnx'): ask()
    assert not registry.verify()['ok']; f.write_bytes(whole); assert registry.verify()['ok']
    (f.parent/'.env').write_text('x')
    with pytest.raises(Damaged, match='not listed'): registry.path('shapes')


def test_log_shows_every_change(tmp_path, registry):
    for n in 'ab': registry.promote(release(make_run(tmp_path, n), registry), reason='r', by='Ada')
    log = registry.home/'log.jsonl'; lines = log.read_text().splitlines(keepends=True)
    for bad in (
        lines[1:],
        lines[:1] + lines[2:],
        [lines[0], lines[1].replace('Ada', 'Eve'), *lines[2:]],
        lines[:2] + lines[3:1:-1],
        lines[:-1],
        [*lines[:-1], lines[-1].replace('Ada', 'Eve')],
    ):
        log.write_text(''.join(bad)); assert not registry.verify()['ok'], bad
        with pytest.raises(Damaged): registry.promote(registry.tags()[0], 'challenger', 'r', 'Ada', override='o')
    log.write_text(''.join(lines)); assert registry.verify()['ok']


def test_a_torn_line_is_replaced_by_a_note(tmp_path):
    log = Log(tmp_path / 'log.jsonl')
    log.append(event='one')
    whole = log.path.read_bytes()
    log.append(event='two')
    last = log.path.read_bytes()[len(whole) :]
    for cut in range(1, len(last)):
        log.path.write_bytes(whole + last[:cut])
        assert [e['event'] for e in log.read()] == ['one'] and not log.faults()
        log.append(event='three')
        assert [e['event'] for e in log.read()] == ['one', 'torn line removed', 'three'] and not log.faults()


def test_gc_keeps_what_runs_and_what_it_would_go_back_to(tmp_path, registry):
    tags = []
    for n in 'abcde':
        tags.append(release(make_run(tmp_path, n), registry))
        registry.promote(tags[-1], reason='r', by='Ada')
    registry.rollback('shapes', by='Ada', reason='r')  # production d, then c
    assert (
        set(registry.gc(keep=0)) == {tags[0], tags[1], tags[4]}
        and set(registry.tags()) == {tags[2], tags[3]}
        and registry.verify()['ok']
    )
    registry.rollback('shapes', by='Ada', reason='r'); assert registry.resolve('shapes') == tags[2]
    with pytest.raises(NotFound): registry.rollback('shapes', by='Ada', reason='r')


@pytest.mark.parametrize(
    'name',
    [
        '../../etc',
        '/etc/passwd',
        'shapes:../../x',
        '..:abcdef12',
        'shapes/x:abcdef12',
        'Shapes:abcdef12',
        '',
        ':',
        'shapes:',
        'a\0b',
    ],
)
def test_names_cannot_leave_the_registry(tmp_path, registry, name):
    release(make_run(tmp_path), registry)
    for ask in (
        registry.resolve,
        registry.path,
        lambda n: registry.promote(n, reason='r', by='Ada'),
        lambda n: registry.rollback(n, by='Ada', reason='r'),
    ):
        with pytest.raises(BadInput): ask(name)

