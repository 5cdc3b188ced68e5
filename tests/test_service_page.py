"The page at `/` in a real browser, where there is one: an image goes in, the answer is drawn, nothing is fetched from elsewhere."

import asyncio, base64, json, os, shutil, subprocess, threading, time
from pathlib import Path

import httpx, pytest, uvicorn
from PIL import Image

from cv_lab.service.app import Service
from cv_lab.service.models import folders
from cv_lab.serve import free_port
from tests.toys import TASKS, scene, toy

BROWSER = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
tornado = pytest.importorskip('tornado.websocket')


class Tab:
    "A page, driven over the DevTools protocol."
    def __init__(self, socket): self.socket, self.n, self.urls = socket, 0, []

    async def call(self, method, **params):
        self.n += 1; await self.socket.write_message(json.dumps(dict(id=self.n, method=method, params=params)))
        while True:
            m = json.loads(await asyncio.wait_for(self.socket.read_message(), 60))
            if m.get('method') == 'Network.requestWillBeSent': self.urls.append(m['params']['request']['url'])
            if m.get('id') == self.n: assert 'error' not in m, m; return m['result']

    async def value(self, script):
        return (await self.call('Runtime.evaluate', expression=script, returnByValue=True))['result'].get('value')

    async def until(self, script):
        for _ in range(300):
            if (v := await self.value(script)): return v
            await asyncio.sleep(.1)
        raise AssertionError(f'never: {script}; the page says {await self.value("document.body.innerText")}')


@pytest.fixture
def url(tmp_path):
    server = uvicorn.Server(
        uvicorn.Config(
            Service(folders(*(toy(tmp_path / t, t) for t in TASKS))),
            port=(port := free_port()),
            log_level='error',
            access_log=False,
        )
    )
    thread = threading.Thread(target=server.run, daemon=True); thread.start()
    while not server.started: time.sleep(.05)
    yield f'http://127.0.0.1:{port}'
    server.should_exit = True; thread.join(10)


@pytest.mark.skipif(not BROWSER, reason='no Chromium on this machine')
def test_an_image_is_dropped_and_the_answer_is_drawn(url, tmp_path):
    shots = Path(os.environ.get('CVLAB_SCREENSHOTS', tmp_path))
    shots.mkdir(exist_ok=True)
    (tmp_path / 'scene.png').write_bytes(scene())
    Image.new('L', (40, 30), 220).save(tmp_path / 'bright.png')
    (tmp_path / 'broken.png').write_bytes(b'no image')
    port = free_port()
    browser = subprocess.Popen(
        [
            BROWSER,
            '--headless=new',
            '--no-sandbox',
            '--disable-gpu',
            '--disable-background-networking',
            f'--user-data-dir={tmp_path}/profile',
            f'--remote-debugging-port={port}',
            'about:blank',
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    async def go():
        for _ in range(300):
            try: tabs = [t for t in httpx.get(f'http://127.0.0.1:{port}/json').json() if t['type'] == 'page']; break
            except (httpx.TransportError, ValueError): await asyncio.sleep(.1)
        tab = Tab(await tornado.websocket_connect(tabs[0]['webSocketDebuggerUrl'], max_message_size=50_000_000))
        for domain in ('Network', 'Page', 'DOM'): await tab.call(f'{domain}.enable')
        await tab.call('Page.navigate', url=url)
        await tab.until("document.querySelector('#model option') && document.querySelector('#about').textContent")

        async def choose(name):
            root = (await tab.call('DOM.getDocument'))['root']['nodeId']
            node = (await tab.call('DOM.querySelector', nodeId=root, selector='#file'))['nodeId']
            await tab.call('DOM.setFileInputFiles', nodeId=node, files=[str(tmp_path/name)])

        await choose('bright.png')
        answer = await tab.until("document.querySelector('.answer')?.textContent")
        size = await tab.value("document.querySelector('canvas').width")
        bars = await tab.value("[...document.querySelectorAll('.bar i')].map(b => b.getBoundingClientRect().width)")
        (shots/'classification.png').write_bytes(base64.b64decode((await tab.call('Page.captureScreenshot'))['data']))
        await choose('scene.png')
        await tab.until("document.querySelector('.answer')?.textContent === 'dark'")
        drawn = {}  # another model is asked about the same image
        for task in TASKS[1:]:
            await tab.value(
                f"document.querySelector('#result').replaceChildren(); document.querySelector('#model').value = '{task}'; document.querySelector('#model').dispatchEvent(new Event('change'))"
            )
            await tab.until("document.querySelector('.found li') !== null")
            drawn[task] = await tab.value(
                """[document.querySelectorAll('.found li').length, [...'0123'].map(k => [...document.querySelector('canvas').getContext('2d').getImageData([28, 17, 60, 3][k]*5, [24, 24, 47, 60][k]*5, 1, 1).data].slice(0, 3))]"""
            )
            Path(shots/f'{task}.png').write_bytes(base64.b64decode((await tab.call('Page.captureScreenshot'))['data']))
        await choose('broken.png')
        fault = await tab.until("document.querySelector('.fault')?.innerText")
        return answer, size, bars, fault, drawn, tab.urls

    try: answer, size, bars, fault, drawn, urls = asyncio.run(go())
    finally: browser.terminate(); browser.wait(10)
    assert (
        answer == 'bright'
        and size >= 40
        and bars[1] < bars[0] / 20
        and 'PNG or JPEG' in fault
        and 'unsupported_format' in fault
    )
    assert urls and all(u.startswith((url, 'blob:', 'data:')) for u in urls)
    wood, edge = [250, 240, 200], [200, 250, 240]  # of the two things in the scene; see tests/toys.py
    n, (inside, _, _, ground) = drawn['segmentation']
    assert n == 1 and inside != wood and ground == [20, 30, 40]  # painted over, and only there
    n, (inside, _, other, ground) = drawn['detection']
    assert n == 2 and inside == wood and other == edge and ground == [20, 30, 40]
    assert drawn['reading'][0] >= 1
