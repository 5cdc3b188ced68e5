"Decoding in strips gives the pixels of Pillow's own way at once, for every mode and turn."
import io, struct

import numpy as np, pytest
from PIL import Image, ImageOps, TiffImagePlugin

from cv_lab import image as room
from cv_lab.image import BadImage, NotAnImage, TooLarge, decode


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
    for packed in ('raw', 'packbits', 'tiff_lzw', 'tiff_adobe_deflate'):
        for mode in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA'): yield f'TIFF {mode} {packed}', put(rgba.convert(mode), 'TIFF', compression=packed)
        yield f'TIFF 16 bit {packed}', put(Image.fromarray(rng.integers(0, 65536, (37, 53), np.uint16)), 'TIFF', compression=packed)


@pytest.mark.parametrize('strip', [1, 53*5, 1 << 20])
def test_strips_are_the_whole(strip, monkeypatch):
    monkeypatch.setattr(room, 'STRIP', strip)
    for name, data in files(): assert np.array_equal(decode(data), at_once(data)), name


def test_a_pixel_of_webp_counts_three_times():
    b = io.BytesIO(); Image.new('RGB', (100, 100)).save(b, 'WEBP'); decode(b.getvalue(), 30_000)
    with pytest.raises(TooLarge, match='counts 3 times'): decode(b.getvalue(), 29_999)


def tiff(im, **tags):
    "A TIFF with tags as they are given: number=value."
    b, more = io.BytesIO(), TiffImagePlugin.ImageFileDirectory_v2()
    for k, v in tags.pop('tags', {}).items(): more[k] = v; more.tagtype[k] = 4
    im.save(b, 'TIFF', tiffinfo=more, **tags)
    return b.getvalue()


@pytest.mark.parametrize('why, mode, how', [
    ('several pages', 'RGB', dict(save_all=True, append_images=[Image.new('RGB', (9, 9))])),
    ('several pages', 'L', dict(tags={254: 1})), # a preview
    ('raw photograph', 'RGB', dict(tags={330: 8})),
    ('compressed as jpeg', 'RGB', dict(compression='jpeg')),
    ('compressed as group4', '1', dict(compression='group4')),
    ('floating point', 'F', {}),
    ('signed', 'I', {}),
    ('channels are CMYK', 'CMYK', {}),
])
def test_a_tiff_of_another_kind_is_refused_in_words_before_it_is_unpacked(why, mode, how, monkeypatch):
    data = tiff(Image.new(mode, (9, 9)), **how)
    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, 'load', lambda im: pytest.fail('unpacked'))
    with pytest.raises(NotAnImage, match=f'a TIFF that is not read: .*{why}') as e: decode(data)
    assert 'PNG' in e.value.mend and why in e.value.fault


@pytest.mark.parametrize('bits, why', [(12, '12 bits'), (32, '32 bits')])
def test_a_tiff_of_other_depths_is_refused(bits, why):
    data = tiff(Image.new('I;16', (8, 8))).replace(struct.pack('<HHIHH', 258, 3, 1, 16, 0), struct.pack('<HHIHH', 258, 3, 1, bits, 0))
    with pytest.raises(NotAnImage, match=why): decode(data)


@pytest.mark.parametrize('how', ['tiff_lzw', 'tiff_adobe_deflate'])
def test_libtiff_says_nothing_past_python(how, capfd):
    data = bytearray(tiff(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), compression=how))
    data[500:900] = bytes(b ^ 0x5A for b in data[500:900])
    with pytest.raises(BadImage, match='TIFF image cannot be decoded'): decode(bytes(data))
    assert capfd.readouterr().err == ''


def test_a_tiff_is_judged_by_what_its_decoder_takes(monkeypatch):
    tifffile = pytest.importorskip('tifffile')
    def put(pixels, **kw):
        b = io.BytesIO(); tifffile.imwrite(b, pixels, photometric='rgb', metadata=None, **kw); return b.getvalue()

    deep = np.random.default_rng(0).integers(0, 65536, (50, 40, 3), np.uint16)
    assert np.array_equal(decode(put(deep), 4000), deep >> 8)
    with pytest.raises(TooLarge, match='counts 2 times in TIFF'): decode(put(deep), 3999)
    tiled = put(np.zeros((16, 16, 3), np.uint8), tile=(1600, 1600), compression='zlib') # a small picture in a large tile
    decode(tiled)
    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, 'load', lambda im: pytest.fail('unpacked'))
    with pytest.raises(TooLarge): decode(tiled, 1600*1600 - 1)
    bomb = tiff(Image.new('1', (9_000, 6_000)), compression='tiff_lzw')
    assert len(bomb) < 200_000
    with pytest.raises(TooLarge, match='9000 x 6000'): decode(bomb)
