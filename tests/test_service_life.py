"The service over time: load, swaps, trials, keys, jobs, and what it does when it is too much."
import ast, asyncio, contextlib, json, logging, os, re, socket, struct, sys, threading, time
from pathlib import Path

import httpx, numpy as np, pytest, uvicorn

from cv_lab.client import AsyncClient, Client, ServiceFault
from cv_lab.image import TooLarge, open_image
from cv_lab.predict import Predictor
from cv_lab.serve import PACKAGES, at_our_door, free_port
from cv_lab.service.app import Service
from cv_lab.service.jobs import Job
from cv_lab.service.keys import Guard, new_key
from cv_lab.service.models import folders, toy_model
from cv_lab.service.openapi import (
    Answer,
    InferAnswer,
    JobInfo,
    Live,
    ModelReady,
    ModelTensors,
    Ready,
    ServerInfo,
    Trying,
)
from cv_lab.service.rollout import Plan, chosen
from cv_lab.service.telemetry import PredictionLog
from tests.test_serve import grey, png, run, serving

logging.getLogger('cv_lab.service').setLevel(100)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def toy(tmp_path_factory): return toy_model(tmp_path_factory.mktemp('models')/'toy')


def slow(service, seconds):
    "Make the model take its time, and count what it sees."
    model = service.models.pick(None); inner, seen = model.predictor.infer, []
    def infer(x): seen.append(len(x)); time.sleep(seconds); return inner(x)
    model.predictor.infer = infer; model.batcher.per_item = 0.
    return seen


def scope(path='/v1/predict', **headers):
    return dict(
        type='http',
        method='POST',
        path=path,
        raw_path=path.encode(),
        root_path='',
        query_string=b'',
        headers=[(k.replace('_', '-').encode(), v.encode()) for k, v in headers.items()],
    )


def test_abandoned_and_expired_work_never_reaches_the_model(toy):
    async def go():
        async with serving(toy, max_batch=1) as (service, http):
            seen = slow(service, 0.15)
            first = asyncio.create_task(http.post('/v1/predict', content=grey(1)))
            await asyncio.sleep(0.05)
            body = iter([dict(type='http.request', body=grey(2), more_body=False)]); sent = []
            async def receive():
                if (m := next(body, None)): return m
                await asyncio.sleep(.03); return dict(type='http.disconnect')
            async def send(m): sent.append(m)
            left = asyncio.create_task(service(scope(), receive, send))
            late = asyncio.create_task(http.post('/v1/predict', content=grey(3), headers={'x-deadline-ms': '40'}))
            answers = await first, await late; await left; await asyncio.sleep(.2)
            last = await http.post('/v1/predict', content=grey(4))
            return answers, last, sent, seen, service.models.pick(None).batcher.counts

    (first, late), last, sent, seen, counts = run(go())
    assert (
        first.status_code == last.status_code == 200
        and late.status_code == 504
        and late.json()['error']['code'] == 'deadline'
    )
    assert (
        sent == [] and sum(seen) == 2 and counts.ran == 2 and counts.abandoned == 2
    )  # the 504 was answered at its deadline: its image was taken out as well


def test_too_much_is_refused_at_once_and_what_is_accepted_is_answered(toy):
    async def go():
        async with serving(toy, max_batch=2, max_queue=4, max_inflight=12) as (service, http):
            slow(service, .05); took = {}
            async def one(i):
                start = time.monotonic()
                r = await http.post('/v1/predict', content=grey(i))
                took.setdefault(r.status_code, []).append(time.monotonic() - start)
                return r

            return await asyncio.gather(*(one(i) for i in range(60))), took
    answers, took = run(go()); refused = [r for r in answers if r.status_code != 200]
    assert {r.status_code for r in answers} == {200, 503} and len(refused) >= 40
    assert all(int(r.headers['retry-after']) >= 1 and r.json()['error']['code'] == 'overloaded' for r in refused)
    assert max(took[503]) < min(took[200])*5 # refused without waiting for the model


def test_a_hundred_swaps_under_load_without_a_failed_request(tmp_path):
    a, b = toy_model(tmp_path / 'a'), toy_model(tmp_path / 'b', gain=-0.05)
    bad = toy_model(tmp_path / 'bad')
    (bad / 'model.onnx').write_bytes(b'no graph')

    def point_at(to):
        (tmp_path / 'next').unlink(missing_ok=True)
        (tmp_path / 'next').symlink_to(to)
        os.replace(tmp_path / 'next', tmp_path / 'production')

    point_at(a); labels = {}
    async def go():
        async with serving(tmp_path/'production', poll=0) as (service, http):
            done, answers = asyncio.Event(), []
            async def client():
                while not done.is_set(): answers.append(await http.post('/v1/predict', content=grey(200)))
            clients = [asyncio.create_task(client()) for _ in range(4)]
            for i in range(100):
                point_at((b, a)[i % 2]); assert await service.models.refresh() == ['brightness']
                labels[service.models.pick(None).digest] = ('dark', 'bright')[i % 2]
            point_at(bad); assert await service.models.refresh() == [] == await service.models.refresh()
            listed = (await http.get('/v1/models')).json()
            done.set()
            await asyncio.gather(*clients)
            return answers, listed

    answers, listed = run(go())
    assert all(r.status_code == 200 for r in answers) and len(labels) == 2
    said = {(r.json()['model']['digest'], r.json()['label']) for r in answers}
    assert said <= set(labels.items()) and len(said) == 2  # each digest said what only it says
    assert (
        listed['models'][0]['version'] == 'a'
        and listed['refused'][0]['version'] == 'bad'
        and 'cannot be loaded' in listed['refused'][0]['reason']
    )


def test_keys(toy, tmp_path):
    web, ops = (
        new_key(tmp_path / 'keys.json', 'web', per_minute=30),
        new_key(tmp_path / 'keys.json', 'ops', scopes=['predict', 'admin']),
    )

    async def go():
        async with serving(toy, guard=Guard(tmp_path/'keys.json'), challengers=folders()) as (_, http):
            ask = lambda key=None, path='/v1/predict', method='POST': http.request(
                method, path, content=grey(1), headers={'authorization': f'Bearer {key}'} if key else {}
            )
            codes = [
                (await ask()).status_code,
                (await ask('x' * 43)).status_code,
                (await ask(web)).status_code,
                (await ask(web, '/v1/admin/rollout/brightness', 'GET')).status_code,
                (await ask(ops, '/v1/admin/rollout/brightness', 'GET')).status_code,
                (await http.get('/readyz')).status_code,
                (await http.get('/metrics')).status_code,
            ]
            many = [await ask(web) for _ in range(8)]; (tmp_path/'keys.json').write_text('{"keys": []}')
            return codes, many, (await ask(ops)).status_code
    codes, many, withdrawn = run(go())
    assert codes == [401, 401, 200, 403, 200, 200, 401] and withdrawn == 401
    assert {r.status_code for r in many} == {200, 429} and int(many[-1].headers['retry-after']) >= 1
    assert web not in str(list(tmp_path.iterdir())) and all(
        k not in (tmp_path / 'keys.json').read_text() for k in (web, ops)
    )


@contextlib.contextmanager
def listening(*paths, **settings):
    "A service behind a real socket."
    service = Service(folders(*paths), **settings)
    server = uvicorn.Server(uvicorn.Config(service, port=(port := free_port()), log_level='error', access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started: time.sleep(0.02)
    try: yield service, port
    finally:
        server.should_exit = True
        thread.join(10)


def test_whoever_sends_too_much_gets_to_read_why(toy):
    "Closing on a client that still writes resets the connection, and the answer is lost on its way."
    def ask(port, head, piece, n):
        with socket.create_connection(('127.0.0.1', port), 10) as s:
            s.sendall(b'POST /v1/predict HTTP/1.1\r\nHost: x\r\n' + head + b'\r\n\r\n')
            for _ in range(n): s.sendall(piece)
            time.sleep(0.05)
            said = b''
            while more := s.recv(65536): said += more
        return said
    large, chunk = bytes(1 << 20), b'100000\r\n' + bytes(1 << 20) + b'\r\n'
    with listening(toy) as (_, port):
        whole = [ask(port, b'Content-Length: 16777216', large, 16) for _ in range(3)]
        chunked = [ask(port, b'Transfer-Encoding: chunked', chunk, 15) for _ in range(3)]
        fits, of_too_many_pixels = grey(1), png(30_000, 30_000)
        with httpx.Client(base_url=f'http://127.0.0.1:{port}') as http:
            ends = [http.post('/v1/predict', content=c).headers.get('connection') for c in (fits, of_too_many_pixels)]
    for said in whole + chunked:
        head, _, body = said.partition(b'\r\n\r\n')
        assert head.startswith(b'HTTP/1.1 413 ') and b'connection: close' in head.lower()
        assert json.loads(body)['error']['code'] == 'too_large'
    assert ends == [None, None]  # what was read to its end keeps its connection


def test_the_client_sends_once_more_what_a_reset_has_cut_off(toy):
    "Somebody in between closes a connection that was idle, while the next request is on its way."
    with listening(toy) as (_, port), socket.create_server(('127.0.0.1', 0)) as door:
        seen = []
        def between():
            for last in (False, True):
                theirs = door.accept()[0]
                with theirs, socket.create_connection(('127.0.0.1', port)) as ours:
                    for n in range(1 if last else 2):
                        asked = b''
                        while not asked.endswith(grey(1)): asked += theirs.recv(65536)
                        seen.append((last, n))
                        if n:
                            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
                            break
                        ours.sendall(asked)
                        time.sleep(0.3)
                        theirs.sendall(ours.recv(65536))
        thread = threading.Thread(target=between, daemon=True)
        thread.start()
        with Client(f'http://127.0.0.1:{door.getsockname()[1]}') as client:
            said = [client.predict(grey(1)).label for _ in range(2)]
        thread.join(5)
    assert said == ['dark', 'dark'] and seen == [(False, 0), (False, 1), (True, 0)]


def test_a_service_that_goes_down_lets_its_clients_go_too(toy):
    "With the answer, not by a reset: they come again elsewhere."
    with listening(toy) as (service, port), httpx.Client(base_url=f'http://127.0.0.1:{port}') as http:
        before = http.post('/v1/predict', content=grey(1))
        service.drain()
        after = http.post('/v1/predict', content=grey(1))
    assert before.status_code == after.status_code == 200
    assert (before.headers.get('connection'), after.headers.get('connection')) == (None, 'close')


def test_from_elsewhere_a_key_is_needed_unless_said_otherwise(toy):
    async def go(guard, address):
        service = Service(folders(toy), guard=guard); await service.start(); sent = []
        async def receive(): return dict(type='http.request', body=grey(1), more_body=False)
        async def send(m): sent.append(m)

        await service(scope() | dict(server=(address, 3000)), receive, send)
        await service.stop()
        return sent[0]['status']

    assert [run(go(Guard(), a)) for a in ('127.0.0.1', '::1', '10.1.2.3', '192.168.0.7')] == [
        200,
        200,
        401,
        401,
    ] and run(go(Guard(open_to_all=True), '10.1.2.3')) == 200


def test_a_device_that_hangs_fails_the_probe_of_liveness_until_it_comes_back(toy):
    async def go():
        async with serving(toy, hung=0.1) as (service, http):
            model, back = service.models.pick(None), threading.Event(); inner = model.predictor.infer
            def infer(x): back.wait(5); return inner(x)
            async def probes():
                return [(await http.get(p)).status_code for p in ('/livez', '/healthz', '/v2/health/live', '/readyz')]
            model.predictor.infer = infer
            cut = await http.post('/v1/predict', content=grey(1), headers={'x-deadline-ms': '50'})
            early = await probes(); await asyncio.sleep(.1); late, said = await probes(), await http.get('/livez')
            back.set(); await model.batcher.close()
            return cut, early, late, said.json()['error'], await probes()

    cut, early, late, said, after = run(go())
    assert cut.status_code == 504 and early == after == [200] * 4 and late == [503] * 4
    assert said['code'] == 'hung' and 'restart' in said['todo']


def test_bentomls_own_endpoint_stands_behind_the_same_door(toy, tmp_path, monkeypatch):
    "Whoever comes without a key, or with too much, never reaches it."
    key, reached = new_key(tmp_path / 'keys.json', 'web'), []

    async def theirs(scope, receive, send):
        reached.append((await receive())['body']); await send(dict(type='http.response.start', status=200, headers=[]))

    async def go():
        async with serving(toy, guard=Guard(tmp_path / 'keys.json')) as (service, _):
            monkeypatch.setattr('cv_lab.serve.service', service)
            async def ask(body=b'image', **headers):
                sent = []
                async def receive(): return dict(type='http.request', body=body, more_body=False)
                async def send(m): sent.append(m)
                await at_our_door(theirs, scope('/predict', **headers), receive, send)
                return sent[0]['status']
            mine = dict(authorization=f'Bearer {key}')
            codes = [await ask(), await ask(**mine), await ask(bytes(11_000_000), **mine)]
            codes += [await ask(x_problem='other', **mine), await ask(x_problem='brightness', **mine)]
            service.draining = True; service.ready = False
            return codes + [await ask(**mine)]

    assert run(go()) == [401, 200, 413, 404, 200, 503] and reached == [b'image'] * 2


def test_a_clients_fault_leaves_no_traceback_in_the_log():
    import logging
    from http import HTTPStatus
    from bentoml.exceptions import BentoMLException
    from cv_lab.serve import only_our_faults

    def record(e): return logging.LogRecord('bentoml.serve', 40, 'app.py', 1, 'Exception on /predict', (), (type(e), e, None))

    theirs = [BentoMLException('no image', error_code=HTTPStatus(c)) for c in (400, 404, 413, 415, 422, 429)]
    ours = [BentoMLException('it failed', error_code=HTTPStatus.INTERNAL_SERVER_ERROR), ValueError('a bug')]
    assert not any(only_our_faults(record(e)) for e in theirs) and all(only_our_faults(record(e)) for e in ours)
    assert only_our_faults(logging.LogRecord('bentoml.serve', 20, 'app.py', 1, 'Service started', (), None))


def test_jobs_that_are_off_say_what_switches_them_on(toy, tmp_path):
    async def go(jobs, path='/v1/jobs'):
        async with serving(toy, jobs=jobs) as (_, http): return (await http.post(path)), (await http.get(f'{path}/x'))

    off = run(go(None)) + run(go(None, '/v1/models/brightness/jobs'))
    assert all(r.status_code == 404 and r.json()['error']['code'] == 'not_found' for r in off)
    assert all('CVLAB_JOBS' in r.json()['error']['todo'] for r in off)
    on = run(go(tmp_path)) + run(go(None, '/v1/job'))
    assert not any('CVLAB_JOBS' in r.text for r in on)


def test_a_job_that_cannot_be_read_holds_up_no_other(toy, tmp_path):
    for name, text in (('a'*32, '{"stat'), ('.' + 'b'*32, json.dumps(dict(status='waiting', created=1.)))):
        (tmp_path/name).mkdir(); (tmp_path/name/'job.json').write_text(text)
    async def go():
        async with serving(toy, jobs=tmp_path) as (service, http):
            kind = f'multipart/form-data; boundary={"X"*300}'  # a longer one than the parser takes
            long = await http.post('/v1/jobs', content=b'--X--', headers={'content-type': kind})
            id = (await http.post('/v1/jobs', files=[('images', grey(9))])).json()['id']
            for _ in range(500):
                if (status := (await http.get(f'/v1/jobs/{id}')).json()['status']) == 'done': break
                await asyncio.sleep(.01)
            return long, status
    long, status = run(go())
    assert (long.status_code, long.json()['error']['code'], status) == (400, 'malformed', 'done')


def test_jobs_over_http(toy, tmp_path):
    async def wait(http, id):
        for _ in range(500):
            if (r := await http.get(f'/v1/jobs/{id}')).json()['status'] == 'done': return r
            await asyncio.sleep(.01)
    async def go():
        async with serving(toy, jobs=tmp_path) as (_, http):
            r = await http.post(
                '/v1/jobs',
                files=[('images', grey(v)) for v in range(0, 250, 10)] + [('images', b'broken')],
                data={'top_k': '1'},
            )
            id = r.json()['id']
            done = await wait(http, id); result = await http.get(f'/v1/jobs/{id}/result')
            return (
                r,
                done,
                result,
                await http.delete(f'/v1/jobs/{id}'),
                await http.get('/v1/jobs/' + '0' * 32),
                await http.get('/v1/jobs/..%2f' + id),
            )

    want = [a['label'] for a in Predictor(toy, 'cpu').predict([grey(v) for v in range(0, 250, 10)])]
    r, done, result, late, unknown, outside = run(go()); lines = [json.loads(l) for l in result.text.splitlines()]
    assert (
        r.status_code == 202
        and JobInfo.model_validate(r.json())
        and done.json()['done'] == 26
        and late.status_code == 409
        and unknown.status_code == outside.status_code == 404
    )
    assert (
        [l['index'] for l in lines] == list(range(26))
        and [l['label'] for l in lines[:25]] == want
        and lines[25]['error']['code'] == 'unsupported_format'
    )
    assert all(len(l['probabilities']) == 1 for l in lines[:25]) and not list(tmp_path.glob('*/images'))


def test_a_job_survives_a_restart_and_a_cancelled_one_ends(toy, tmp_path):
    async def go():
        async with serving(toy, jobs=tmp_path, max_batch=2) as (service, http):
            slow(service, 0.02)
            r = await http.post('/v1/jobs', files=[('images', grey(v)) for v in range(0, 200, 2)])
            id = r.json()['id']
            early = await http.get(f'/v1/jobs/{id}/result')
            while (await http.get(f'/v1/jobs/{id}')).json()['done'] < 10: await asyncio.sleep(.01)
            other = (await http.post('/v1/jobs', files=[('images', grey(1))] * 3)).json()['id']
            cancelled = await http.delete(f'/v1/jobs/{other}')
        before = Job(tmp_path/id).said()
        async with serving(toy, jobs=tmp_path) as (service, http):
            while (after := (await http.get(f'/v1/jobs/{id}')).json())['status'] != 'done': await asyncio.sleep(.01)
            return (
                early,
                cancelled.json(),
                before,
                after,
                (await http.get(f'/v1/jobs/{id}/result')).text.splitlines(),
                (await http.get(f'/v1/jobs/{other}')).json(),
            )

    early, cancelled, before, after, lines, other = run(go())
    assert early.status_code == 409 and cancelled['status'] == other['status'] == 'cancelled'
    assert (
        before['status'] == 'running'
        and 10 <= before['done'] < 100
        and after['done'] == 100
        and [json.loads(l)['index'] for l in lines] == list(range(100))
    )


def test_canary_and_its_withdrawal(tmp_path):
    good, twin, bad = (
        toy_model(tmp_path / 'good'),
        toy_model(tmp_path / 'twin', gain=0.06),
        toy_model(tmp_path / 'bad', gain=-0.05),
    )

    async def go(challenger, **plan):
        kept = PredictionLog(tmp_path/f'log-{challenger.name}')
        async with serving(good, challengers=folders(challenger), plan=Plan(**plan), kept=kept) as (service, http):
            said = {}
            for i in range(120):
                said[f'user {i}'] = (
                    await http.post('/v1/predict', content=grey(200), headers={'x-request-key': f'user {i}'})
                ).json()
                await asyncio.sleep(0.001)
            for _ in range(
                2000 if plan['mode'] == 'shadow' else 0
            ):  # copies are worked on by a thread that waits for everybody else
                if (await http.get('/v1/admin/rollout/brightness')).json()['withdrawn']: break
                await http.post('/v1/predict', content=grey(200)); await asyncio.sleep(.01)
            again = (await http.post('/v1/predict', content=grey(200), headers={'x-request-key': 'user 7'})).json()
            about = await http.get('/v1/admin/rollout/brightness')
            changed = await http.put('/v1/admin/rollout/brightness', json=dict(mode='canary', share=1.0))
            wrong = await http.put('/v1/admin/rollout/brightness', json=dict(share=2))
            after = (await http.post('/v1/predict', content=grey(200))).json()
            return said, again, about.json(), changed, wrong, after, service.models.pick(None).digest

    said, again, about, changed, wrong, after, champion = run(go(twin, mode='canary', share=0.3, max_slowdown=1000))
    Trying.model_validate(about)  # its time is not the point, and the machine may be busy
    who = {k: v['model']['digest'] != champion for k, v in said.items()}
    assert (
        who == {k: chosen(k, 0.3) for k in said}
        and (again['model']['digest'] != champion) == who['user 7']
        and about['withdrawn'] is None
    )
    assert changed.status_code == 200 and wrong.status_code == 422 and after['model']['digest'] != champion
    said, _, about, _, _, _, champion = run(go(bad, mode='shadow'))
    assert (
        {v['model']['digest'] for v in said.values()} == {champion}
        and {v['label'] for v in said.values()} == {'bright'}
        and 'disagrees' in about['withdrawn']
    )
    assert '"kind": "disagreement"' in ''.join(p.read_text() for p in (tmp_path/'log-bad').iterdir())


def test_the_prediction_log_has_every_answer_and_no_image(toy, tmp_path):
    async def go():
        async with serving(toy, kept=PredictionLog(tmp_path)) as (_, http):
            return [(await http.post('/v1/predict', content=grey(v))).json() for v in range(50)]

    answers = run(go())
    text = ''.join(p.read_text() for p in tmp_path.iterdir())
    rows = [json.loads(l) for l in text.splitlines()]
    assert {r['id'] for r in rows} == {a['id'] for a in answers} and {r['digest'] for r in rows} == {
        answers[0]['model']['digest']
    }
    assert max(len(l) for l in text.splitlines()) < 600 and all(
        set(r)
        == {
            'id',
            'time',
            'problem',
            'digest',
            'accepted',
            'bytes',
            'labels',
            'scores',
            'entropy',
            'brightness',
            'contrast',
            'sharpness',
            'warmth',
            'request_id',
        }
        for r in rows
    )


def test_the_v2_protocol(toy):
    image = grey(200); raw = struct.pack('<I', len(image)) + image
    head = lambda **kw: json.dumps(
        dict(inputs=[dict(name='image', shape=[1], datatype='BYTES', parameters=dict(binary_data_size=len(raw)))], **kw)
    ).encode()

    async def go():
        async with serving(toy) as (_, http):
            import base64

            js = await http.post(
                '/v2/models/brightness/infer',
                json=dict(
                    id='mine',
                    inputs=[
                        dict(name='image', shape=[2], datatype='BYTES', data=[base64.b64encode(image).decode()] * 2)
                    ],
                ),
            )
            h = head(parameters=dict(binary_data_output=True))
            binary = await http.post(
                '/v2/models/brightness/infer', content=h + raw, headers={'inference-header-content-length': str(len(h))}
            )
            bad = [
                await http.post('/v2/models/brightness/infer', json=b)
                for b in (
                    {},
                    {'inputs': []},
                    {'inputs': [{}]},
                    {'inputs': [dict(name='image', shape=[1], datatype='FP32', data=[1])]},
                    {'inputs': [dict(name='image', shape=[3], datatype='BYTES', data=['AAAA'])]},
                    {'inputs': [dict(name='image', shape=[1], datatype='BYTES', data=['AAAA'])]},
                    {'inputs': [dict(name='image', shape=[1], datatype='BYTES', parameters=3, data=['AAAA'])]},
                )
            ]
            whole = json.loads(head()) | dict(inputs=[good := dict(name='image', shape=[1], datatype='BYTES', data=[])])
            good['data'] = [base64.b64encode(image).decode()]
            twice = [dict(name='label', parameters=dict(binary_data=True))] * 2
            bad += [
                await http.post('/v2/models/brightness/infer', json=whole | dict(outputs=o))
                for o in (twice, *([dict(name=n)] for n in ([], {}, ['label'])))
            ] + [
                await http.post(
                    '/v2/models/brightness/infer', json=whole, headers={'inference-header-content-length': n * 5000}
                )
                for n in '09'
            ]
            half = await http.post('/v2/models/brightness/infer', content=json.dumps(whole | dict(id='a\ud800')))
            assert half.status_code == 200 and half.json()['id'] == 'a?'
            gets = [
                await http.get(p)
                for p in (
                    '/v2',
                    '/v2/health/live',
                    '/v2/health/ready',
                    '/v2/models/brightness',
                    '/v2/models/brightness/ready',
                    '/v2/models/nobody',
                    '/v2/models/brightness/versions/7',
                )
            ]
            return js, binary, bad, gets, (await http.post('/v1/predict', content=image)).json()
    js, binary, bad, gets, want = run(go()); out = {o['name']: o for o in js.json()['outputs']}
    assert (
        js.json()['id'] == 'mine'
        and out['label']['data'] == ['bright'] * 2
        and out['probabilities']['shape'] == [2, 2]
        and json.loads(out['answer']['data'][0])['confidence'] == want['confidence']
    )
    assert [r.headers['content-type'] for r in (js, binary)] == ['application/json', 'application/octet-stream']
    n = int(binary.headers['inference-header-content-length']); parts, at = {}, n
    for o in json.loads(binary.content[:n])['outputs']:
        size = o['parameters']['binary_data_size']
        parts[o['name']] = binary.content[at : at + size]
        at += size
    assert (
        at == len(binary.content)
        and parts['label'] == struct.pack('<I', 6) + b'bright'
        and np.frombuffer(parts['confidence'], '<f4')[0] == pytest.approx(want['confidence'])
    )
    assert all(400 <= r.status_code < 500 for r in bad) and [r.status_code for r in gets] == [200]*5 + [404, 404]
    for kind, r in zip((ServerInfo, Live, Ready, ModelTensors, ModelReady), gets): kind.model_validate(r.json())
    for said in (js.json(), json.loads(binary.content[:n])): InferAnswer.model_validate(said)


def test_the_client(toy):
    async def go():
        service = Service(folders(toy)); await service.start()
        import httpx
        async with AsyncClient('http://service', transport=httpx.ASGITransport(service)) as client:
            one = await client.predict(grey(200)); many = await client.predict_many([grey(1), b'broken'])
            with pytest.raises(ServiceFault) as e: await client.predict(b'broken')
            await service.stop(); return one, many, e.value
    one, many, fault = run(go())
    assert (
        isinstance(one, Answer)
        and one.label == 'bright'
        and many.failed == 1
        and many.predictions[1].error.code == 'unsupported_format'
    )
    assert fault.status == 415 and fault.request_id and 'PNG' in fault.expected


def test_a_bomb_is_refused_from_its_header():
    bomb = png(30_000, 30_000, bytes(2_000_000)); start = time.perf_counter()
    with pytest.raises(TooLarge): open_image(bomb)
    assert time.perf_counter() - start < .05 # promised; a decode would take seconds


def test_the_series_do_not_grow_with_what_clients_send(toy):
    async def go():
        async with serving(toy) as (service, http):
            async def size(): return len((await http.get('/metrics')).text.splitlines())
            for p in ('/x', '/v1/models/x/predict'): await http.post(p, content=grey(1)); await http.request('BREW', p)
            await size(); before = await size()
            for i in range(10_000):
                await service(scope(f'/{i}/{"x" * (i % 50)}') | dict(method=f'M{i}'), None, lambda m: asyncio.sleep(0))
            for i in range(200): await http.post(f'/v1/models/name{i}/predict', content=grey(1))
            return before, await size()
    before, after = run(go())
    assert after == before


def imports(path):
    "What a module imports when it is imported: absolute names."
    package = '.'.join(path.relative_to(ROOT).parts[:-1])
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):
            base = '.'.join(package.split('.')[:len(package.split('.')) - node.level + 1]) if node.level else ''
            name = '.'.join(filter(None, [base, node.module])); yield name
            yield from (f'{name}.{a.name}' for a in node.names if name.startswith('cv_lab'))


def test_nothing_is_imported_that_a_bento_does_not_carry():
    "What the service's modules import belongs to the packages of the Bento, or to what these need."
    from importlib.metadata import packages_distributions, requires
    norm = lambda n: re.sub(r'[-_.]+', '-', n).lower(); have, todo = set(), [norm(p) for p in PACKAGES]
    while todo:
        if (p := todo.pop()) in have: continue
        have.add(p)
        try: todo += [norm(re.match(r'[A-Za-z0-9._-]+', r).group()) for r in requires(p) or [] if 'extra ==' not in r]
        except Exception: pass  # not for this machine
    seen, todo, theirs = (
        set(),
        ['cv_lab.serve', *(f'cv_lab.tasks.{p.stem}' for p in (ROOT / 'cv_lab/tasks').glob('[a-z]*.py'))],
        set(),
    )
    while todo:
        if (m := todo.pop()) in seen: continue
        seen.add(m); path = ROOT/(m.replace('.', '/') + '.py')
        if path.is_file():
            todo += imports(path)
        elif not m.startswith('cv_lab') and m.partition('.')[0] not in sys.stdlib_module_names:
            theirs.add(m.partition('.')[0])
    owners = packages_distributions()
    assert {'numpy', 'onnxruntime', 'bentoml', 'PIL'} <= theirs and {
        m for m in theirs if not have & {norm(d) for d in owners[m]}
    } == set()
