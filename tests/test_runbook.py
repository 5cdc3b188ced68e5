"The runbook of a bundle, step by step against a live service: each command is run as it stands there, and shows what it should."

import os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import httpx, pytest
from PIL import Image

from cv_lab.cards import RUNBOOK, runbook
from cv_lab.core import file_digest, read_json, write_json
from cv_lab.release import Registry
from cv_lab.serve import free_port
from cv_lab.service.models import toy_model
from tests.test_release import PROBLEM, TEXT, make_run, model_files, release

STEP = re.compile(r'```sh\n(.*?)\n```\n(?:You see `([^`]+)`|You see the new `([^`]+)`)?', re.S)


def text():
    "The runbook of the problem; the figures do not matter here."
    return runbook(
        dict(
            problem=PROBLEM,
            name='a',
            performance=dict(latency_ms_p95=10, hardware='here'),
            lineage=dict(dataset='shapes@1'),
        )
    )


def steps(): return [(m[1], m[2] or m[3]) for m in STEP.finditer(text())]


def released(at, name, gain):
    "A bundle that passed its gate and can be served."
    run = make_run(at / 'runs', name)
    toy_model(run / 'export', gain=gain, problem='shapes')
    p = run / 'evaluation/performance.json'
    about = read_json(p)
    write_json(
        p,
        about
        | dict(model=file_digest(run / 'export/model.onnx'), parity=about['parity'] | dict(artifact=model_files(run))),
    )
    (run / 'golden.parquet').unlink()
    return release(run, Registry(at/'registry'))


def test_it_says_what_to_see_after_every_step():
    assert (
        len(steps()) == text().count('```sh') >= 13
        and all(see for _, see in steps()[1:])
        and not re.search(r'`make |YOU', RUNBOOK)
    )


@pytest.mark.skipif(not shutil.which('curl'), reason='no curl on this machine')
def test_every_step_against_a_live_service(tmp_path):
    at = tmp_path / 'workspace'
    at.mkdir()
    (at / 'settings.ini').touch()
    (at / 'problems').mkdir()
    (at / 'problems/shapes.yaml').write_text(TEXT)
    old, registry = released(at, 'a', 0.05), Registry(at / 'registry')
    registry.promote(old, reason='first', by='Ada')
    new = released(at, 'b', 0.06)
    Image.new('L', (40, 30), 220).save(at/'image.png'); (bin := tmp_path/'bin').mkdir(); cvlab = bin/'cvlab'
    cvlab.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from cv_lab.cli.main import main; main()" "$@"\n')
    cvlab.chmod(0o755)
    port = free_port()
    env = {k: v for k, v in os.environ.items() if k != 'BENTOML_HOME'} | dict(
        CVLAB_HOME=str(at),
        PORT=str(port),
        NEW=new.split(':')[1],
        PATH=f'{bin}:{os.environ["PATH"]}',
        CVLAB_DRAIN_SECONDS='0',
        BENTOML_DO_NOT_TRACK='True',
    )
    (set_up, _), (start, serving), *rest = steps(); log = open(tmp_path/'log', 'w+')
    service = subprocess.Popen(start, shell=True, cwd=at, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        wait(port, service, tmp_path/'log'); assert serving in (tmp_path/'log').read_text(); version = None
        for command, see in rest:
            r = subprocess.run(
                f'{set_up}\n{command}', shell=True, cwd=at, env=env, capture_output=True, text=True, timeout=120
            )
            assert r.returncode == 0 and see in r.stdout, (command, r.stdout, r.stderr)
            if 'sleep' in command: version = httpx.get(f'http://127.0.0.1:{port}/v1/models/shapes').json()['version']
        assert f'shapes:{version}' == new and registry.resolve('shapes') == old
    finally: os.killpg(service.pid, signal.SIGTERM); service.wait(30)


def wait(port, service, log):
    end = time.monotonic() + 300
    while time.monotonic() < end and service.poll() is None:
        try:
            if httpx.get(f'http://127.0.0.1:{port}/readyz', timeout=2).status_code == 200: return
        except httpx.TransportError: pass
        time.sleep(.2)
    raise AssertionError(Path(log).read_text())
