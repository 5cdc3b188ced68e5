"Whatever is done to a file, an import ends in a dataset with a quarantine, or in a refusal: never in a traceback."
import copy, json, random, re, warnings
import pytest
from cv_lab.core import Refusal
from cv_lab.data.exports import export_dataset
from cv_lab.data.formats import formats
from cv_lab.data.imports import import_dataset
from cv_lab.data.roundtrip import little_dataset

FORMATS = formats()
JUNK = (
    None,
    5,
    -1,
    1.5,
    'x',
    '',
    [],
    {},
    [None],
    [[]],
    {'a': 1},
    True,
    'ä\0',
    1e400,
    [1, 2, 3],
    '../../etc/passwd',
    10**30,
)


def spots(x, path=()):
    "Every place in a JSON value."
    yield path
    if isinstance(x, dict): xs = x.items()
    elif isinstance(x, list): xs = enumerate(x)
    else: return
    for k, v in xs: yield from spots(v, (*path, k))


def put(x, path, v):
    if not path: return v
    x = copy.deepcopy(x); at = x
    for k in path[:-1]: at = at[k]
    if v is ...: del at[path[-1]]
    else: at[path[-1]] = v
    return x


def damaged(data:bytes, name, rng):
    "The file with one thing wrong."
    if name.endswith('.json') and rng.random() < .85:
        x = json.loads(data)
        where = rng.choice(list(spots(x))) if x else ()
        v = rng.choice([*JUNK, ...] if where else JUNK)
        return json.dumps(put(x, where, v)).encode() if x else data
    if rng.random() < .2: return data[:rng.randrange(len(data) + 1)]
    if rng.random() < 0.2:
        i = rng.randrange(len(data) + 1)
        return data[:i] + rng.randbytes(rng.randrange(1, 9)) + data[i:]
    words = re.findall(rb'[^\s<>="\',;:/]+', data)
    if not words: return rng.randbytes(9)
    return data.replace(
        rng.choice(words),
        rng.choice(
            [
                b'',
                b'x',
                b'-1',
                b'nan',
                b'1e400',
                b'99999999999999999999',
                b'\xff\xfe',
                b'../../x',
                b'0',
                '\u0661'.encode(),
            ]
        ),
        rng.choice([1, -1]),
    )


@pytest.mark.parametrize('name', list(FORMATS))
def test_no_damage_is_a_traceback(name, tmp_path):
    export_dataset(little_dataset(tmp_path/'little', FORMATS[name]), name, tmp_path/'out'); rng = random.Random(name)
    files = [p for p in sorted((tmp_path / 'out').rglob('*')) if p.is_file() and p.suffix not in ('.png', '.jpg')] or [
        p for p in sorted((tmp_path / 'out').rglob('*')) if p.is_file()
    ]
    masks = [p for p in sorted((tmp_path/'out').rglob('Segmentation*/*.png'))]; done = 0
    for k in range(40 if name != 'imagefolder' else 5):
        p = rng.choice(files + masks); good = p.read_bytes(); bad = damaged(good, p.name, rng); p.write_bytes(bad)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                r = import_dataset(tmp_path / 'out', name, tmp_path / f'back{k}', workers=1, splits='keep')
            done += 1; assert len(r.dataset)
        except Refusal as e:
            assert str(e)
            if e.__cause__ is not None: raise AssertionError(f'{name}: {p.name} became {bad[:2000]!r}') from e.__cause__
        except Exception as e: raise AssertionError(f'{name}: {p.name} became {bad[:2000]!r}') from e
        finally: p.write_bytes(good)
    assert done
