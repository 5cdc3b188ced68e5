"Feedback: the truth about a prediction, sent by a client, kept beside the log, joined by the monitor."

import asyncio, io, json

import httpx, pytest
from PIL import Image

from cv_lab.client import AsyncClient, ServiceFault
from cv_lab.monitor import read_log, read_truths, told
from cv_lab.service.app import Service
from cv_lab.service.models import folders, toy_model
from cv_lab.service.telemetry import PredictionLog


def grey(level):
    b = io.BytesIO()
    Image.new('L', (20, 20), level).save(b, 'PNG')
    return b.getvalue()


def session(folder, model, do):
    async def go():
        service = Service(folders(model), kept=PredictionLog(folder) if folder else None, poll=0)
        await service.start()
        try:
            async with AsyncClient('http://service', transport=httpx.ASGITransport(service)) as client:
                return await do(client)
        finally: await service.stop()

    return asyncio.run(go())


async def fault(asked):
    with pytest.raises(ServiceFault) as e: await asked
    return e.value.status, e.value.code


def test_truths_are_checked_kept_and_joined(tmp_path):
    model = toy_model(tmp_path / 'toy')
    log = tmp_path / 'log'

    async def first(client):
        ids = [(await client.predict(grey(level))).id for level in (10, 20, 220, 230)]
        kept = [await client.feedback(i, said) for i, said in zip(ids, ('dark', 'bright', 'dark'))]
        assert [k.prediction for k in kept] == ids[:3] and kept[0].problem == 'brightness'
        await client.feedback(ids[2], 'bright')  # corrected: the last counts
        await client.feedback(ids[2], 'bright')  # and again, after a broken line
        assert await fault(client.feedback('0' * 24, 'dark')) == (404, 'not_found')
        assert await fault(client.feedback(ids[0], 'grey')) == (422, 'bad_input')
        assert await fault(client.feedback(ids[0])) == (422, 'bad_input')
        assert await fault(client.feedback('../../x', 'dark')) == (422, 'bad_input')
        for bad in ([1, 1, 1, 5], [1, 2, 3], [0, 0, 'x', 1]):
            wrong = client.feedback(ids[0], annotations=[dict(label='dark', bbox=bad)])
            assert await fault(wrong) == (422, 'bad_input')
        return ids

    ids = session(log, model, first)
    # another process: the prediction is found in the files
    session(log, model, lambda client: client.feedback(ids[3], annotations=[dict(label='bright')]))
    truths = read_truths(log)
    assert truths == {ids[0]: 'dark', ids[1]: 'bright', ids[2]: 'bright', ids[3]: ['bright']}
    lines = [json.loads(l) for f in log.glob('feedback-*') for l in f.read_text().splitlines()]
    assert len(lines) == 6 and all(l['digest'] == read_log(log)['digest'][0] for l in lines)
    seen = told(read_log(log), truths)
    assert (seen['n'].item(), seen['right'].item()) == (4, 0.75)


def test_without_a_log_nothing_can_be_told(tmp_path):
    model = toy_model(tmp_path / 'toy')
    assert session(None, model, lambda client: fault(client.feedback('0' * 24, 'dark'))) == (404, 'not_found')
