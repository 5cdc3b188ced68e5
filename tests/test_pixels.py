"Decoding in strips gives the pixels of Pillow's own way at once, for every mode and turn."
import io

import numpy as np, pytest
from PIL import Image, ImageOps

from cv_lab import image as room
from cv_lab.image import TooLarge, decode


def at_once(data):
    "Upright first, then the whole image converted: the plain way, which holds several copies."
    im = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if im.mode.startswith('I'):
        return np.asarray(
            Image.fromarray(np.rint(np.asarray(im).astype(float).clip(0, 65535) / 257).astype(np.uint8)).convert('RGB')
        )
    if im.has_transparency_data:
        rgba = im.convert('RGBA')
        im = Image.alpha_composite(Image.new('RGBA', rgba.size, 'white'), rgba)
    return np.asarray(im.convert('RGB'))


def files():
    "Images of every kind that is read: (name, bytes)."
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (37, 53, 4), np.uint8))
    rgb = rgba.convert('RGB')

    def put(im, format, **kw): b = io.BytesIO(); im.save(b, format, **kw); return b.getvalue()
    for turn in range(1, 9):
        exif = Image.Exif(); exif[0x112] = turn
        for format in ('JPEG', 'PNG', 'WEBP'): yield f'{format} turned {turn}', put(rgb, format, exif=exif)
        yield f'alpha turned {turn}', put(rgba, 'PNG', exif=exif)
    yield 'CMYK', put(rgb.convert('CMYK'), 'JPEG')
    yield 'progressive', put(rgb, 'JPEG', progressive=True)
    yield 'one bit', put(rgb.convert('1'), 'PNG')
    for mode in ('L', 'LA', 'P'): yield mode, put(rgba.convert(mode), 'PNG')
    yield 'P, a colour clear', put(rgb.quantize(16), 'PNG', transparency=3)
    yield (
        'RGB, a colour clear',
        put(rgb.quantize(4).convert('RGB'), 'PNG', transparency=rgb.quantize(4).convert('RGB').getpixel((0, 0))),
    )
    yield '16 bit', put(Image.fromarray(rng.integers(0, 65536, (37, 53), np.uint16)), 'PNG')
    yield 'BMP', put(rgb, 'BMP')
    yield 'GIF', put(rgb, 'GIF')


@pytest.mark.parametrize('strip', [1, 53*5, 1 << 20])
def test_strips_are_the_whole(strip, monkeypatch):
    monkeypatch.setattr(room, 'STRIP', strip)
    for name, data in files(): assert np.array_equal(decode(data), at_once(data)), name


def test_a_pixel_of_webp_counts_three_times():
    b = io.BytesIO(); Image.new('RGB', (100, 100)).save(b, 'WEBP'); decode(b.getvalue(), 30_000)
    with pytest.raises(TooLarge, match='counts 3 times'): decode(b.getvalue(), 29_999)
