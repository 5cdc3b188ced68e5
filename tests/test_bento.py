"The real thing: `bentoml serve`, and a Bento served where there is no workspace."
import base64, io, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import httpx, pytest, yaml
from packaging.requirements import Requirement
from PIL import Image

from cv_lab.client import Client
from cv_lab.core import RunFailed
from cv_lab.predict import Predictor
from cv_lab.release import Registry, make_bundle
from cv_lab.serve import PACKAGES, free_port, start_service
from cv_lab.service.models import toy_model
from cv_lab.spec import parse_problem
from cv_lab.task import get_task
from tests.toys import CLASSES, TASKS, scene, toy

ROOT = Path(__file__).resolve().parents[1]
PROBLEM = '''
name: TASK
task: TASK
owner: us
intended_use: tests
classes: CLASSES
acceptance: [{metric: METRIC, at_least: 0.5}]
metrics: {primary: METRIC}
serving: {max_image_mb: 1, max_batch: 4}
'''


def grey(level):
    b = io.BytesIO(); Image.new('L', (40, 30), level).save(b, 'PNG'); return b.getvalue()


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    "A clone with a production bundle in its registry, and things that no Bento should carry."
    at = tmp_path_factory.mktemp('clone'); (at/'problems').mkdir()
    shutil.copytree(ROOT/'cv_lab', at/'cv_lab', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('bentofile.yaml', 'settings.ini', 'requirements.lock', 'pyproject.toml', 'README.md'):
        shutil.copy(ROOT / name, at)
    for name in ('.env', 'secrets.pem', 'cv_lab/.env', 'data/private.png', 'runs/run.json'):
        (at / name).parent.mkdir(exist_ok=True)
        (at / name).write_text('PLANTED SECRET')
    registry = Registry(at/'registry')
    for task in TASKS:
        text = (
            PROBLEM.replace('TASK', task)
            .replace('METRIC', next(iter(get_task(task).METRICS)))
            .replace('CLASSES', str(CLASSES.get(task, ['dark', 'bright'])))
        )
        toy(at / 'runs' / task / 'export', task)
        registry.promote(
            registry.add(make_bundle(at / 'runs' / task, parse_problem(text), text)), override='a test', by='the tests'
        )
    return at


def bentoml(*args, home, cwd):
    env = {k: v for k, v in os.environ.items() if k not in ('BENTOML_HOME', 'CVLAB_MODEL', 'CVLAB_HOME')} | dict(
        HOME=str(home), BENTOML_DO_NOT_TRACK='True', PYTHONPATH=''
    )
    r = subprocess.run(
        [sys.executable, '-m', 'bentoml', *args], env=env, cwd=cwd, capture_output=True, text=True, timeout=400
    )
    assert r.returncode == 0, r.stdout + r.stderr
    return r.stdout


@pytest.fixture(scope='module')
def bento(clone, tmp_path_factory):
    "`bentoml build` as a user types it: the tag, and the home where it went."
    home = tmp_path_factory.mktemp('home'); said = bentoml('build', '-o', 'tag', home=home, cwd=clone)
    return said.strip().splitlines()[-1].removeprefix('__tag__:'), home


def test_the_bento_holds_the_listed_files_the_model_and_no_torch(bento, clone):
    tag, home = bento
    at = home / 'bentoml/bentos' / tag.replace(':', '/')
    files = [p for p in at.rglob('*') if p.is_file()]
    names = {p.relative_to(at).as_posix() for p in files}
    assert {'src/cv_lab/serve.py', 'src/cv_lab/service/page.html', 'src/cv_lab/tasks/classification.py'} <= names
    assert not any(b'PLANTED SECRET' in p.read_bytes() for p in files) and not any(
        '.env' in n or n.startswith(('src/runs', 'src/data', 'src/registry', 'src/nbs')) for n in names
    )
    about = yaml.safe_load((at / 'bento.yaml').read_text())
    models = {m['tag'] for s in about['services'] for m in s['models']}
    assert models == {Registry(clone/'registry').resolve(t) for t in TASKS}
    needs = {Requirement(line) for line in (at / 'env/python/requirements.txt').read_text().splitlines() if line}
    lock = {Requirement(l) for l in (ROOT / 'requirements.lock').read_text().splitlines()}
    assert {n.name for n in needs} == set(PACKAGES) and needs <= lock
    for version in ('3.11.9', '3.12.4'):  # the lock has two versions of numpy: one of them is for this Python
        fits = [n.name for n in needs if not n.marker or n.marker.evaluate(dict(python_full_version=version))]
        assert sorted(fits) == sorted(PACKAGES), version



def test_a_bento_answers_for_every_task_in_an_empty_folder_without_the_workspace(bento, clone, tmp_path):
    tag, home = bento; other, empty = tmp_path/'other', tmp_path/'empty'; other.mkdir(); empty.mkdir()
    bentoml('export', tag, str(tmp_path/'x.bento'), home=home, cwd=empty)
    bentoml('import', str(tmp_path/'x.bento'), home=other, cwd=empty)
    env = dict(HOME=str(other), BENTOML_HOME=str(other/'bentoml'), PYTHONPATH=str(empty), CVLAB_HOME=str(empty))
    registry, image = Registry(clone/'registry'), scene()
    with start_service(bento=tag, env=env, cwd=empty, seconds=300) as s, Client(s.url) as client:
        for task in TASKS:
            want = Predictor(registry.path(task), 'cpu').predict([image])[0]
            one = client.predict(image, problem=task, masks='rle').model_dump(exclude_none=True)
            many = client.predict_many([image, b'broken', image], problem=task)
            assert {k: one[k] for k in want} == want and want['annotations'], task
            assert f"{task}:{one['model']['version']}" == registry.resolve(task) and one['model']['digest'].startswith(
                one['model']['version']
            )
            assert [
                many.predictions[i].annotations == client.predict(image, problem=task).annotations for i in (0, 2)
            ] == [True, True] and many.predictions[1].error.code == 'unsupported_format'
        assert httpx.get(f'{s.url}/v1/models').json()['models'][0]['limits'] == dict(
            max_image_bytes=1_000_000, max_pixels=20_000_000, max_images=4
        )
        maps = {
            p
            for pid in [s.process.pid, *children(s.process.pid)]
            for p in Path(f'/proc/{pid}/maps').read_text().split()
            if 'libtorch' in p
        }
        assert maps == set(), 'the CPU service has loaded torch'
        assert s.stop() == 0
    assert list(empty.iterdir()) == []


def children(pid): return [int(c) for c in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def test_bentoml_serve_from_start_to_end(tmp_path):
    "One service: asked in every way, its worker killed, and ended politely."
    toy = toy_model(tmp_path/'toy'); image = grey(140); want = Predictor(toy, 'cpu').predict([image])[0]
    with (
        start_service(port=free_port(), model=toy, env=dict(CVLAB_DRAIN_SECONDS='2')) as s,
        httpx.Client(base_url=s.url) as http,
    ):
        asked(s, http, image, want); idled(s, image); killed(s); ended(s)


def asked(s, http, image, want):
    for way in (
        dict(content=image),
        dict(files={'image': image}),
        dict(json={'image': base64.b64encode(image).decode()}),
    ):
        assert {k: v for k, v in http.post('/v1/predict', **way).json().items() if k in want} == want
    assert http.post('/v1/predict', content=b'no image').status_code == 415
    big = http.post('/v1/predict', content=iter([bytes(1 << 20)] * 12))
    assert big.status_code == 413 and big.json()['error']['code'] == 'too_large'  # chunked
    for path, text in (
        ('/readyz', 'ok'),
        ('/livez', 'ok'),
        ('/metrics', 'cvlab_requests_total'),
        ('/openapi.json', '/v1/predict'),
        ('/', '<title>'),
    ):
        r = http.get(path); assert r.status_code == 200 and text in r.text, path
    assert http.get('/nowhere').json()['error']['code'] == 'not_found'
    import bentoml as theirs

    with theirs.SyncHTTPClient(s.url) as client:
        assert {k: v for k, v in client.predict(image).items() if k in want} == want
        client.client.headers['X-Problem'] = 'brightness'
        assert client.predict(image)['model']['problem'] == 'brightness'
    assert (
        http.post('/predict', content=b'no image', headers={'content-type': 'application/octet-stream'}).status_code
        == 415
    )
    assert http.post('/predict', content=iter([bytes(1 << 20)]*101)).status_code == 413
    assert http.post('/predict', content=image, headers={'x-problem': 'nothing'}).status_code == 404


def idled(s, image):
    "A connection that was idle for longer than clients keep theirs is still one: closed then, it would reset a request."
    def port_of(http):
        with http.stream('POST', '/v1/predict', content=image) as r:
            r.read()
            return r.status_code, r.extensions['network_stream'].get_extra_info('client_addr')[1]
    with httpx.Client(base_url=s.url, limits=httpx.Limits(keepalive_expiry=60)) as http:
        first = port_of(http)
        time.sleep(6)  # httpx keeps 5 s, and the service's host closed after 5 s too
        assert port_of(http) == first


def killed(s):
    "A killed worker comes back; meanwhile a probe gets no answer, or one that is not 200."
    worker, = children(s.process.pid); os.kill(worker, signal.SIGKILL); start = time.monotonic(); said = None
    while said != 200:
        try: said = httpx.get(f'{s.url}/readyz', timeout=1).status_code
        except httpx.TransportError: pass
        assert time.monotonic() - start < 90
    assert children(s.process.pid) != [worker]


def ended(s):
    "SIGTERM: not ready any more and still answering, then nothing."
    s.process.send_signal(signal.SIGTERM); seen = []
    while s.process.poll() is None:
        try:
            seen.append(
                (
                    httpx.get(f'{s.url}/readyz', timeout=2).status_code,
                    httpx.post(f'{s.url}/v1/predict', content=grey(9), timeout=2).status_code,
                )
            )
        except httpx.TransportError:
            seen.append('refused')
            time.sleep(0.05)
    assert s.process.returncode == 0 and (503, 200) in seen and (503, 503) not in seen
    assert 'refused' not in seen[:seen.index((503, 200))]


def test_a_model_that_cannot_load_ends_the_process(tmp_path):
    toy = toy_model(tmp_path/'toy'); (toy/'model.onnx').write_bytes(b'no graph')
    with pytest.raises(RunFailed) as e:
        with start_service(model=toy, seconds=30): pass
    assert 'ended with status 1' in str(e.value) and 'the service cannot start' in str(e.value)
