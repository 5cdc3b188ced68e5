"The OpenAPI file is true: schemathesis makes requests from it, and holds the answers against it. CVLAB_EXAMPLES=300 asks more often."

import logging, os, tempfile

import pytest, requests
from hypothesis import HealthCheck, Phase, given, seed, settings
from starlette.testclient import TestClient

from cv_lab.service.app import Service
from cv_lab.service.faults import FAULTS
from cv_lab.service.models import folders, toy_model
from cv_lab.service.openapi import Envelope

schemathesis = pytest.importorskip('schemathesis')
from schemathesis.checks import load_all_checks, negative_data_rejection, not_a_server_error, positive_data_acceptance  # noqa: E402

logging.getLogger('cv_lab.service').setLevel(100); load_all_checks()
EXAMPLES = int(os.environ.get('CVLAB_EXAMPLES', '10')) # for each operation, and as many that break its schema
# What a schema cannot say: whether bytes are an image, a text is base64, a name is there, a deadline too short.
BEYOND = {
    'unsupported_format',
    'bad_image',
    'empty_body',
    'malformed',
    'not_found',
    'overloaded',
    'deadline',
    'conflict',
}


def operations(folder):
    "Of a service with everything switched on; every second problem and version that is asked for is there."
    document = Service(folders(), challengers=folders(), jobs=folder).document
    for methods in document['paths'].values():
        for p in (p for o in methods.values() for p in o.get('parameters', []) if p['name'] == 'problem'):
            p['schema'] = dict(type='string', enum=['brightness', 'nobody'])
        for p in (p for o in methods.values() for p in o.get('parameters', []) if p['name'] == 'version'):
            p['schema'] = dict(type='string', enum=['toy', 'none'])
    return [o.ok() for o in schemathesis.openapi.from_dict(document).get_all_operations()]


with tempfile.TemporaryDirectory() as d: OPERATIONS = operations(d)


@pytest.fixture(scope='module')
def http(tmp_path_factory):
    at = tmp_path_factory.mktemp('contract')
    service = Service(
        folders(toy_model(at / 'toy')),
        jobs=at / 'jobs',
        challengers=folders(toy_model(at / 'other', gain=0.06)),
        max_inflight=10**6,
    )
    with TestClient(service) as http: yield http


def ask(case, http):
    "The request as it goes over the line."
    kw = case.as_transport_kwargs(base_url='http://testserver')
    p = requests.Request(
        **{
            k: v
            for k, v in kw.items()
            if k in ('method', 'url', 'headers', 'files', 'data', 'json', 'params', 'cookies')
        }
    ).prepare()
    return http.request(
        p.method,
        p.url,
        headers=dict(p.headers),
        content=p.body if isinstance(p.body, bytes) else (p.body or '').encode(),
    )


def judge(case, r, positive):
    "Every check of schemathesis; of the codes that no schema can foresee only that they are in the file."
    assert r.status_code < 500 or r.status_code in (503, 504), r.text
    code = None
    if r.status_code >= 400:
        code = Envelope.model_validate(r.json()).error.code
        assert FAULTS[code][0] == r.status_code
    skip = [not_a_server_error]
    uncounted = code == 'bad_input' and case.path.endswith('/infer') # whether a shape counts its data
    if positive and (code in BEYOND or uncounted): skip.append(positive_data_acceptance)
    if (
        case.media_type == 'multipart/form-data'
        or case.media_type == 'application/octet-stream'
        or (case.media_type or '').startswith('image/')
    ):
        skip.append(negative_data_rejection)  # any bytes are a file
    case.validate_response(r, excluded_checks=skip)


@pytest.mark.parametrize('operation', OPERATIONS, ids=lambda o: o.label)
def test_the_openapi_file_is_true(operation, http):
    seen = []
    for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
        @seed(0)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def asked(case):
            r = ask(case, http)
            seen.append(r.status_code)
            judge(case, r, mode is schemathesis.GenerationMode.POSITIVE)  # noqa: B023

        if mode is schemathesis.GenerationMode.NEGATIVE and not operation.body and not operation.query:
            continue  # any text may stand in a path
        asked()
    assert seen
