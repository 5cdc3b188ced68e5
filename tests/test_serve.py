"The service, asked in this process: every promise against what it would look like if it were broken."
import asyncio, base64, contextlib, io, json, logging, struct, time, zlib
from dataclasses import replace
from functools import partial

import httpx, numpy as np, pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from cv_lab.geometry import rle_encode
from cv_lab.image import decode, preprocess
from cv_lab.predict import Predictor
from cv_lab.service import calls
from cv_lab.service.app import Service
from cv_lab.service.bodies import Options
from cv_lab.service.faults import FAULTS
from cv_lab.service.models import folders, toy_model
from cv_lab.service.openapi import Answer, BatchAnswer, Envelope, ModelList

logging.getLogger('cv_lab.service').setLevel(100)


def grey(level, format='PNG', size=(40, 30), **kw):
    b = io.BytesIO(); Image.new('L', size, level).save(b, format, **kw); return b.getvalue()


def run(coroutine): return asyncio.run(coroutine)


@contextlib.asynccontextmanager
async def serving(*paths, **settings):
    "A started service and a client for it."
    service = Service(folders(*paths), **settings); await service.start()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(service), base_url='http://service') as http:
        try: yield service, http
        finally: await service.stop()


@pytest.fixture(scope='module')
def toy(tmp_path_factory): return toy_model(tmp_path_factory.mktemp('models')/'toy')


def test_every_way_to_send_an_image_gives_the_answer_of_the_predictor(toy):
    image = grey(140); want = Predictor(toy, 'cpu').predict([image])[0]; text = base64.b64encode(image).decode()
    async def go():
        async with serving(toy) as (_, http):
            ways = [
                dict(content=image, headers={'content-type': 'image/png'}),
                dict(content=image, headers={'content-type': 'application/octet-stream'}),
                dict(content=image),
                dict(files={'image': ('a.png', image, 'image/png')}),
                dict(json={'image': text}),
                dict(json={'image': f'data:image/png;base64,{text}'}),
            ]
            one = [await http.post(p, **w) for w in ways for p in ('/v1/predict', '/v1/models/brightness/predict')]
            many = [
                await http.post(p, **w)
                for w in (dict(files=[('images', image)] * 3), dict(json={'images': [text] * 3}))
                for p in ('/v1/predict/batch', '/v1/models/brightness/predict/batch')
            ]
            return one, many
    one, many = run(go())
    for r in one:
        assert r.status_code == 200, r.text
        got = r.json(); Answer.model_validate(got)
        assert (
            {k: got[k] for k in want} == want
            and got['image'] == dict(width=40, height=30)
            and r.headers['x-request-id']
        )
    for r in many:
        BatchAnswer.model_validate(r.json()); assert r.json()['failed'] == 0
        assert [{k: p[k] for k in want} for p in r.json()['predictions']] == [want]*3
    ids = [r.json()['id'] for r in one] + [p['id'] for r in many for p in r.json()['predictions']]
    assert len(set(ids)) == len(ids)


def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png(width, height, rows=b'', depth=8, colour=0):
    "A PNG whose header may lie."
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress(rows))
        + chunk(b'IEND', b'')
    )


def hostile():
    "Requests that no client should send: (what, method, path, kwargs)."
    good, text = grey(99), base64.b64encode(grey(99)).decode(); one, many = '/v1/predict', '/v1/predict/batch'
    raw = lambda b, kind='image/png': dict(content=b, headers={'content-type': kind})
    js = lambda b: raw(b if isinstance(b, bytes) else json.dumps(b).encode(), 'application/json')
    form = lambda b, kind='multipart/form-data; boundary=X': raw(b, kind)
    part = lambda name, data, head=b'': (
        b'--X\r\nContent-Disposition: form-data; name="'
        + name
        + b'"; filename="a"\r\n'
        + head
        + b'\r\n'
        + data
        + b'\r\n'
    )
    rng = np.random.default_rng(0); out = []
    two = io.BytesIO(); Image.new('L', (9, 9)).save(two, 'TIFF', save_all=True, append_images=[Image.new('L', (9, 9))])
    files = {f: grey(77, f, (33, 21)) for f in ('PNG', 'JPEG', 'WEBP', 'BMP', 'GIF', 'TIFF')}
    for name, f in files.items():
        out += [
            (f'{name} cut at {n}', 'POST', one, raw(f[:n]))
            for n in np.unique(np.linspace(0, len(f) - 1, 12).astype(int))
        ]
        out += [
            (f'{name} after text', 'POST', one, raw(b'hello' + f)),
            (f'{name} said to be html', 'POST', one, raw(f, 'text/html')),
        ]
        for _ in range(12):
            b = bytearray(f)
            b[rng.integers(0, len(b))] ^= 1 << int(rng.integers(0, 8))
            out.append((f'{name} with a flipped bit', 'POST', one, raw(bytes(b))))
    out += [(f'noise of {n}', 'POST', one, raw(rng.bytes(int(n)))) for n in rng.integers(1, 5000, 20)]
    huge = [(2**31 - 1, 2**31 - 1), (100_000, 100_000), (0, 5), (5, 0), (60_000, 2), (50_001, 1000)]
    out += [(f'PNG of {w} x {h}', 'POST', one, raw(png(w, h, bytes(1000)))) for w, h in huge]
    out += [
        ('GIF of 65535 x 65535', 'POST', one, raw(b'GIF89a' + struct.pack('<HH', 65535, 65535) + b'\0\0\0;')),
        ('BMP of negative width', 'POST', one, raw(files['BMP'][:18] + struct.pack('<i', -5) + files['BMP'][22:])),
        ('SVG', 'POST', one, raw(b'<svg xmlns="http://www.w3.org/2000/svg" onload="x()"/>', 'image/svg+xml')),
        ('TIFF of two pages', 'POST', one, raw(two.getvalue())),
        ('ICO', 'POST', one, raw(grey(3, 'ICO'))),
        ('PDF', 'POST', one, raw(grey(3, 'PDF'))),
        ('polyglot', 'POST', one, raw(b'PK\x03\x04' + good)),
        ('EPS', 'POST', one, raw(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n')),
        ('unknown depth', 'POST', one, raw(png(4, 4, bytes(100), depth=3))),
        ('script', 'POST', one, raw(b'<script>alert(1)</script>')),
        ('zip bomb chunk', 'POST', one, raw(png(10, 10, bytes(10**7)))),
    ]
    deep = b'{"image":' + b'['*200_000 + b']'*200_000 + b'}'
    values = [
        None,
        1,
        1.5,
        True,
        [],
        {},
        [text],
        {'b64': text},
        '',
        ' ',
        'ä',
        '\ud800',
        'AAA',
        '====',
        text + '!',
        text[:-3],
        'http://127.0.0.1/a.png',
        'file:///etc/passwd',
        'data:',
        'data:image/png;base64,',
        'x' * 1000,
    ]
    out += [(f'JSON image {v!r}'[:40], 'POST', one, js({'image': v})) for v in values] + [
        (f'JSON images {v!r}'[:40], 'POST', many, js({'images': v})) for v in values if v != [text]
    ]
    bodies = [
        b'{',
        b'[]',
        b'null',
        b'1',
        b'"a"',
        b'{"image": NaN}',
        b'{"image": Infinity}',
        deep,
        b'\xff\xfe',
        b'{"image"',
        b'{}',
        b'1' * 5000,
        b'{"a":1,"a":2}',
        b'\0',
        b' ',
    ]
    out += [(f'JSON {b[:20]!r}', 'POST', p, js(b)) for b in bodies for p in (one, many)]
    options = (
        [{'threshold': v} for v in (2, -1, 'x', None, [], 1e300)]
        + [{'top_k': v} for v in (0, -1, 1.5, 'x', 10**30)]
        + [{'max_detections': 0}, {'unknown': 1}, {'__proto__': {}}]
    )
    out += [
        (f'options {o}', 'POST', one, js({'image': text, 'options': o})) for o in options if o != {'threshold': None}
    ] + [('options a list', 'POST', one, js({'image': text, 'options': [1]}))]
    out += [
        (f'query {q}', 'POST', f'{one}?{q}', raw(good))
        for q in (
            'threshold=9',
            'threshold=nan',
            'threshold=inf',
            'top_k=a',
            'tok=1',
            'a=1&' * 50,
            'threshold=',
            '%00=1',
            'threshold=%ff',
        )
    ]
    whole = part(b'image', good) + b'--X--\r\n'
    forms = [
        b'',
        b'--X',
        b'--X--\r\n',
        b'--Y\r\n\r\n--Y--',
        whole[:40],
        whole[:-6],
        part(b'picture', good) + b'--X--\r\n',
        part(b'', good) + b'--X--\r\n',
        part(b'image', b'') + b'--X--\r\n',
        part(b'image', good) * 2 + b'--X--\r\n',
        part(b'images', good) + b'--X--\r\n',
        part(b'image', good, b'Content-Transfer-Encoding: base64\r\n')[:30],
        b'--X\r\n' + b'A' * 9000 + b': 1\r\n\r\n--X--',
        b'--X\r\nContent-Disposition: nonsense\r\n\r\na\r\n--X--\r\n',
        b'--X\r\n\r\na\r\n--X--\r\n',
        b'--X\r\n' + b'H: v\r\n' * 5000 + b'\r\na\r\n--X--\r\n',
        part(b'image', good) + part(b'threshold', b'7') + b'--X--\r\n',
        part(b'image', good) + part(b'note', b'hi') + b'--X--\r\n',
        b'\r\n'.join([b'--X'] * 1000),
    ]
    out += [
        (f'form {i} to {p}', 'POST', p, form(b))
        for i, b in enumerate(forms)
        for p in (one, many)
        if not (p == many and b'images' in b)
    ]
    kinds = [
        'multipart/form-data',
        'multipart/form-data; boundary=',
        'multipart/form-data; boundary=' + 'b' * 300,
        'multipart/form-data; boundary="X',
        'multipart/mixed; boundary=X',
        'application/x-www-form-urlencoded',
        'text/plain',
        'application/xml',
        'video/mp4',
        ';',
        'a',
        'image',
        '\xe4',
    ]
    out += [(f'content type {k[:30]}', 'POST', one, form(whole, k.encode('latin1'))) for k in kinds]
    out += [
        ('too many images', 'POST', many, js({'images': [text] * 65})),
        ('too many parts', 'POST', many, form(part(b'images', good) * 100 + b'--X--\r\n')),
        ('no images', 'POST', many, js({'images': []})),
        ('raw to many', 'POST', many, raw(good)),
    ]
    out += [
        (f'length {n!r}', 'POST', one, dict(content=good, headers={'content-type': 'image/png', 'content-length': n}))
        for n in ('-1', 'x', '99999999999999999999999', '1e3', '0x10')
    ]
    out += [
        (f'deadline {d!r}', 'POST', one, dict(content=good, headers={'x-deadline-ms': d}))
        for d in ('0', '-5', 'x', '1.5', '9' * 30)
    ]
    out += [
        ('no body', 'POST', one, {}),
        ('empty many', 'POST', many, {}),
        ('11 MB', 'POST', one, raw(bytes(11_000_000))),
        ('15 MB of JSON', 'POST', one, js({'image': 'A' * 15_000_000})),
    ]
    out += [
        (f'{m} {p}', m, p, {})
        for m in ('GET', 'PUT', 'DELETE', 'PATCH', 'OPTIONS', 'BREW')
        for p in (one, many, '/v1/models/x/predict')
    ] + [('POST to models', 'POST', '/v1/models', {})]
    paths = [
        '/v2',
        '/v1',
        '/v1/',
        '/v1/predict/',
        '/v1/predict/batch/x',
        '/../etc/passwd',
        '/v1/models/..%2f..%2fetc/predict',
        '/%00',
        '/v1/models/nobody',
        '/' + 'a' * 5000,
        '//',
        '/v1/models//predict',
        '/\xfc',
    ]
    out += [(f'path {p[:30]}', 'POST', p, raw(good)) for p in paths]
    return out


def test_no_client_fault_is_a_5xx(toy):
    cases = hostile(); assert len(cases) >= 300
    async def go():
        async with serving(toy, max_inflight=10**6) as (service, http):
            return [(what, await http.request(method, path, **kw)) for what, method, path, kw in cases], (
                await http.get('/metrics')
            ).text

    answers, text = run(go()); good = 0
    for what, r in answers:
        assert r.status_code < 500, (what, r.text)
        if r.status_code == 200: good += 1; continue # a flipped bit may leave an image that can be read
        e = Envelope.model_validate(r.json()).error
        assert (
            FAULTS[e.code][0] == r.status_code and e.message and e.todo and e.request_id == r.headers['x-request-id']
        ), (what, r.text)
    allowed = ('flipped', 'cut at', 'query threshold=%ff', 'bomb', 'PNG of 60000 x 2', 'content type ;', 'JSON image')
    assert [w for w, r in answers if r.status_code == 200 and not any(a in w for a in allowed)] == [] and good < 60
    seen = {r.status_code for _, r in answers}
    assert seen >= {400, 404, 405, 413, 415, 422}
    assert sum(len(f.samples) for f in text_string_to_metric_families(text)) < 900


@pytest.mark.parametrize('kind', ['exif', 'cmyk', '16 bit', 'alpha', 'palette', 'grey', 'gif', 'webp', 'tiff', 'progressive'])
def test_served_pixels_are_training_pixels(tmp_path, kind):
    "The network echoes its input: what the service saw against what `decode` and `preprocess` give."
    rng = np.random.default_rng(1)
    rgb = rng.integers(0, 256, (20, 30, 3), np.uint8)
    b = io.BytesIO()
    im = Image.fromarray(rgb)
    if kind == 'exif':
        exif = Image.Exif(); exif[0x112] = 6; im.save(b, 'JPEG', exif=exif)
    elif kind == 'cmyk': im.convert('CMYK').save(b, 'JPEG')
    elif kind == '16 bit': Image.fromarray(rng.integers(0, 65536, (20, 30), np.uint16)).save(b, 'PNG')
    elif kind == 'alpha': Image.fromarray(rng.integers(0, 256, (20, 30, 4), np.uint8)).save(b, 'PNG')
    elif kind == 'palette': im.convert('P').save(b, 'PNG')
    elif kind == 'grey': im.convert('L').save(b, 'PNG')
    elif kind == 'progressive': im.save(b, 'JPEG', progressive=True)
    else: im.save(b, kind.upper())
    folder = toy_model(tmp_path/'toy', size=16)
    async def go():
        async with serving(folder) as (service, http):
            model, seen = service.models.pick(None), []; inner = model.predictor.infer
            def watch(x): seen.append(x.copy()); return inner(x)
            model.predictor.infer = watch
            assert (await http.post('/v1/predict', content=b.getvalue())).status_code == 200
            return seen[0][0], model.predictor.image
    seen, cfg = run(go())
    assert np.array_equal(seen, preprocess(decode(b.getvalue()), cfg))


def test_a_body_that_never_ends_is_refused_while_it_is_read(toy, monkeypatch):
    "Chunked, without a length: after the limit comes the answer; what follows is not kept, and not heard for long."
    monkeypatch.setattr(calls, 'heard_out', partial(calls.heard_out, most=0.5))
    async def go():
        service = Service(folders(toy)); await service.start(); taken, sent, heard = 0, [], []
        async def receive():
            nonlocal taken
            taken += 1
            if sent: heard.append(asyncio.get_running_loop().time()); await asyncio.sleep(.1)
            return dict(type='http.request', body=bytes(65536), more_body=True)
        async def send(m): sent.append(m | dict(after=taken))

        await service(
            dict(
                type='http',
                method='POST',
                path='/v1/predict',
                raw_path=b'/v1/predict',
                root_path='',
                query_string=b'',
                headers=[(b'content-type', b'image/png')],
            ),
            receive,
            send,
        )
        await service.stop(); return sent, heard
    sent, heard = run(go())
    assert sent[0]['status'] == 413 and (b'connection', b'close') in sent[0]['headers']
    assert sent[0]['after'] == sent[1]['after'] and sent[0]['after'] * 65536 < 10_000_000 + 2 * 65536
    assert json.loads(sent[1]['body'])['error']['code'] == 'too_large' and sent[1]['more_body']
    assert not sent[2].get('more_body') and 0.3 < heard[-1] - heard[0] < 5


def test_a_bad_image_fails_alone(toy):
    async def go():
        async with serving(toy) as (_, http):
            r = await http.post(
                '/v1/predict/batch',
                files=[('images', grey(10)), ('images', grey(9)[:50]), ('images', b''), ('images', grey(250))],
            )
            alone = await http.post('/v1/predict', content=grey(250)); return r, alone.json()
    r, alone = run(go()); p = r.json()['predictions']
    assert (
        r.status_code == 200
        and [x.get('label') for x in p] == ['dark', None, None, 'bright']
        and r.json()['failed'] == 2
    )
    assert (
        p[1]['error']['code'] == 'bad_image'
        and p[2]['error']['code'] == 'empty_body'
        and p[3]['probabilities'] == alone['probabilities']
    )


def test_the_model_failing_for_one_image_harms_no_neighbour(toy):
    async def go():
        async with serving(toy) as (service, http):
            model = service.models.pick(None); inner = model.predictor.infer
            def infer(x):
                if (x == 13).any(): raise RuntimeError('a kernel that does not like 13')
                return inner(x)
            model.predictor.infer = infer
            many = await http.post('/v1/predict/batch', files=[('images', grey(v)) for v in (10, 13, 250)])
            return (
                many.json(),
                await http.post('/v1/predict', content=grey(13)),
                await http.post('/v1/predict', content=grey(12)),
            )

    many, bad, good = run(go())
    assert [p.get('label') or p['error']['code'] for p in many['predictions']] == ['dark', 'model_failed', 'bright']
    assert (
        bad.status_code == 500
        and bad.json()['error']['code'] == 'model_failed'
        and 'kernel' not in bad.text
        and good.status_code == 200
    )


def test_probes_models_and_openapi(toy):
    async def go():
        service = Service(folders(toy))
        http = httpx.AsyncClient(transport=httpx.ASGITransport(service), base_url='http://service')
        before = await http.get('/readyz'), await http.post('/v1/predict', content=grey(1)), await http.get('/livez')
        await service.start()
        during = (
            await http.get('/readyz'),
            await http.get('/v1/models'),
            await http.get('/openapi.json'),
            await http.get('/'),
            await http.get('/healthz'),
        )
        service.drain()
        after = await http.get('/readyz'), await http.get('/livez')
        await service.stop()
        return before, during, after

    before, during, after = run(go())
    assert (
        [r.status_code for r in before] == [503, 503, 200]
        and before[1].headers['retry-after'] == '1'
        and [r.status_code for r in after] == [503, 200]
    )
    assert all(r.status_code == 200 for r in during)
    assert ModelList.model_validate(during[1].json()).models[0].problem == 'brightness'
    assert {'/v1/predict', '/v1/predict/batch', '/v1/models/{problem}/predict', '/readyz'} <= set(
        during[2].json()['paths']
    )
    page = during[3].text
    assert (
        'http://' not in page
        and 'https://' not in page
        and "default-src 'none'" in during[3].headers['content-security-policy']
    )


def test_files_with_something_wrong_in_them(): # ten thousand of them: `cvlab service promise mutations`
    from cv_lab.promises import mutations
    found, = run(mutations(300)); assert found['kept'], found


def test_a_slow_body_times_out_and_a_hung_request_is_cut(toy, monkeypatch):
    monkeypatch.setattr(calls, 'heard_out', partial(calls.heard_out, most=0.5))
    async def go():
        async with serving(toy) as (service, http):
            model = service.models.pick(None)
            model.limits = replace(model.limits, body_seconds=0.1, deadline=0.2)
            sent = []

            async def receive(): await asyncio.sleep(.06); return dict(type='http.request', body=b'x', more_body=True)
            async def send(m): sent.append(m)

            await service(
                dict(
                    type='http',
                    method='POST',
                    path='/v1/predict',
                    raw_path=b'',
                    root_path='',
                    query_string=b'',
                    headers=[],
                ),
                receive,
                send,
            )
            inner = model.predictor.infer
            def infer(x): time.sleep(.6); return inner(x)

            model.predictor.infer = infer
            start = time.monotonic()
            cut = await http.post('/v1/predict', content=grey(1))
            return sent, cut, time.monotonic() - start, service.inflight, service.held
    sent, cut, took, inflight, held = run(go())
    assert sent[0]['status'] == 408 and json.loads(sent[1]['body'])['error']['code'] == 'slow_body'
    assert (
        cut.status_code == 504
        and cut.json()['error']['code'] == 'deadline'
        and 0.19 < took < 0.6
        and inflight == held == 0
    )


def test_masks_as_the_client_wants_them():
    from pycocotools import mask as coco
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (7, 300), (300, 7), (40, 40)):
        m = (rng.random(shape) < rng.random()).astype(np.uint8)
        said = dict(annotations=[dict(label='a', mask=rle_encode(m.astype(bool))), dict(label='b')])
        with_, without = (Options(masks=k).apply(said)['annotations'] for k in ('counts', 'none'))
        runs = with_[0]['mask']['counts']
        flat = np.repeat(np.arange(len(runs)) % 2, runs)  # column by column, from off
        assert (
            np.array_equal(flat.reshape(shape, order='F'), m)
            and coco.decode(coco.frPyObjects(with_[0]['mask'], *shape)).tolist() == m.tolist()
        )
        assert without == [dict(label='a'), dict(label='b')] and Options().apply(said) is said


def test_what_a_thousand_answers_cost_is_told_when_prices_are(toy):
    async def cost(**settings):
        async with serving(toy, **settings) as (service, http):
            lines = (await http.get('/metrics')).text.splitlines()
            return [l for l in lines if l.startswith('cvlab_cost_per_1000{')], service.models.pick(
                None
            ).batcher.per_item

    prices = dict(currency='EUR', machines=dict(cpu=dict(per_hour=3.6, utilization=0.5)), per_kwh=0.0, example=False)
    (line,), seconds = run(cost(prices=prices))
    assert 'currency="EUR"' in line and float(line.split()[-1]) == pytest.approx(seconds * 1000 * 0.001 / 0.5)
    assert run(cost())[0] == run(cost(prices=prices | dict(machines=dict(cuda=dict(per_hour=1)))))[0] == []


def test_a_request_is_a_trace_with_its_stages(toy):
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from cv_lab.service.telemetry import span_writer

    spans, above = InMemorySpanExporter(), f'00-{"ab" * 16}-{"cd" * 8}-01'

    async def go():
        async with serving(toy, traced=span_writer(spans)) as (_, http):
            await http.post('/v1/predict', content=grey(200), headers=dict(traceparent=above))
        return spans.get_finished_spans()

    found = {s.name: s for s in run(go()) if s.context.trace_id == int('ab' * 16, 16)}
    whole = found.pop('POST /v1/predict')
    assert list(found) == ['decode', 'queue', 'infer', 'encode'] and whole.parent.span_id == int('cd' * 8, 16)
    assert whole.attributes['http.response.status_code'] == 200
    parts = list(found.values())
    assert all(p.parent.span_id == whole.context.span_id and p.start_time <= p.end_time for p in parts)
    edges = [whole.start_time, *(t for p in parts for t in (p.start_time, p.end_time)), whole.end_time]
    assert all(b - a > -1e5 for a, b in zip(edges, edges[1:]))  # in order, to a tenth of a millisecond
