"""The deployment files say what the service does: linted against its routes, settings and times. `make deploy-lint` has
hadolint and the Kubernetes schemas read them as well: 160 MB, too much to be in the environment of every test."""
import re
from pathlib import Path

import yaml

from cv_lab.service.app import routes

ROOT = Path(__file__).resolve().parents[1]; SERVE = (ROOT/'cv_lab/serve.py').read_text()
FREE = {path for _, path, _, scope, _, _ in routes(True) if scope is None}


def test_kubernetes():
    docs = {d['kind']: d for d in yaml.safe_load_all((ROOT/'deploy/kubernetes.yaml').read_text())}
    assert set(docs) == {'Deployment', 'Service', 'HorizontalPodAutoscaler', 'PodDisruptionBudget'}
    spec = docs['Deployment']['spec']
    pod = spec['template']['spec']
    (box,) = pod['containers']
    env = {e['name']: e['value'] for e in box['env']}
    labels = spec['template']['metadata']['labels']
    assert (
        spec['selector']['matchLabels']
        == labels
        == docs['Service']['spec']['selector']
        == docs['PodDisruptionBudget']['spec']['selector']['matchLabels']
    )
    for probe in ('startupProbe', 'livenessProbe', 'readinessProbe'):
        assert (
            box[probe]['httpGet']['path'] in FREE and box[probe]['httpGet']['port'] == box['ports'][0]['name']
        )  # a probe has no key
    assert (
        box['readinessProbe']['httpGet']['path'] == '/readyz' != box['livenessProbe']['httpGet']['path']
    )  # a service that drains is not to be killed
    assert all(n in SERVE for n in env) and all(
        k in box['resources'][r] for r in ('requests', 'limits') for k in ('cpu', 'memory')
    )
    drain, seen = (
        float(env['CVLAB_DRAIN_SECONDS']),
        box['readinessProbe']['periodSeconds'] * box['readinessProbe']['failureThreshold']
        + box['readinessProbe']['timeoutSeconds'],
    )
    assert (
        drain > seen and pod['terminationGracePeriodSeconds'] > drain + 10
    )  # seen as not ready before it goes; its own cut before the kernel's
    mounts = {m['mountPath'] for m in box['volumeMounts']}
    assert {m['name'] for m in box['volumeMounts']} == {v['name'] for v in pod['volumes']}
    assert str(Path(env['CVLAB_KEYS']).parent) in mounts and env['CVLAB_TELEMETRY'] in mounts
    assert (
        pod['securityContext']['runAsNonRoot']
        and not box['securityContext']['allowPrivilegeEscalation']
        and not box['image'].endswith(':latest')
    )
    auto = docs['HorizontalPodAutoscaler']['spec']
    assert (
        auto['scaleTargetRef']['name'] == docs['Deployment']['metadata']['name']
        and 2 <= auto['minReplicas'] < auto['maxReplicas']
        and auto['metrics'][0]['resource']['name'] == 'cpu'
    )
    assert spec['strategy']['rollingUpdate']['maxUnavailable'] == 0


def test_dockerfile():
    text = (ROOT / 'deploy/Dockerfile').read_text()
    steps = [l.split(None, 1) for l in re.sub(r'\\\n', ' ', text).splitlines() if l and not l.startswith('#')]
    names = [s[0] for s in steps]
    assert (
        names[0] == 'FROM'
        and names[-1] == 'CMD'
        and names.index('USER') > max(i for i, n in enumerate(names) if n == 'RUN')
        and dict(steps)['USER'] not in ('0', 'root')
    )
    assert steps[-1][1].startswith('["bentoml", "serve"')  # exec form: signals arrive
    assert (
        next(l for l in (ROOT / 'requirements.lock').read_text().splitlines() if l.startswith('bentoml==')) in text
    )  # what opens the Bento is what wrote it
    assert (
        '/readyz' in dict(steps)['HEALTHCHECK']
        and 'CMD ["' in dict(steps)['HEALTHCHECK']
        and dict(steps)['EXPOSE'] in steps[-1][1]
        and 'http://' not in text.replace('http://127.0.0.1', '')
    )
