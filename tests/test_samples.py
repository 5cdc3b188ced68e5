"The embedded datasets: what they hold, that they are the same everywhere, and made once."
from dataclasses import replace

import numpy as np, pytest
from pycocotools import mask as coco
from scipy import ndimage
from sklearn.datasets import load_digits

from cv_lab.core import BadInput, digest
from cv_lab.data.dataset import load_dataset, save_dataset
from cv_lab.data.groups import shared_groups
from cv_lab.data.manifest import first_labels, tags_of
from cv_lab.data.samples import (CAMERAS, LIGHTS, SAMPLES, digit_scenes, digits, glyph, ground_part, make_sample,
                                 plan_scenes)
from cv_lab.image import decode
from cv_lab.spec import load_problem, select


@pytest.fixture(scope='module')
def made(tmp_path_factory): return digits(tmp_path_factory.mktemp('digits'))


def test_every_file_is_the_scan(made):
    truth = load_digits()
    for row, scan, label in zip(made.table.to_pylist(), truth.images, truth.target):
        data = made.read(row['uri']); rgb = decode(data)
        assert (
            digest(data) == row['sha256']
            and row['annotations'][0]['label'] == str(label)
            and rgb.shape == (row['height'], row['width'], 3)
        )
        np.testing.assert_array_equal(np.rint(rgb[..., 0]*(16/255)), scan)


def test_the_split(made):
    counts = {s: made.split(s).num_rows for s in ('train', 'val', 'test')}
    assert (
        sum(counts.values()) == len(made) == 1797
        and counts['test'] >= 0.2 * len(made)
        and shared_groups(made.table) == []
    )
    for s in counts: assert min(np.unique(first_labels(made.split(s)), return_counts=True)[1]) >= .8*counts[s]/10


def test_the_slices_of_its_problem_have_items(made):
    problem = load_problem('problems/digits.yaml'); test = tags_of(made.split('test'))
    assert made.classes == problem.classes
    for where in problem.slices.values(): assert select(where, test).sum() >= 30


def test_made_twice_is_the_same_once_is_enough_and_what_is_missing_or_corrected_is_seen(made, tmp_path):
    again = digits(tmp_path); stamp = (tmp_path/'images/digit-0000.png').stat().st_mtime_ns
    assert again.version == made.version and again.table.equals(made.table)
    assert digits(tmp_path).version == made.version and (tmp_path/'images/digit-0000.png').stat().st_mtime_ns == stamp
    assert load_dataset(tmp_path).version == made.version
    (tmp_path/'images/digit-0007.png').unlink()
    assert digits(tmp_path).version == made.version and (tmp_path/'images/digit-0007.png').is_file()
    corrected = save_dataset(replace(again, table=again.table.slice(0, 1000), version=''), tmp_path)
    assert digits(tmp_path).version == corrected.version != made.version


def test_an_unknown_sample_is_refused_with_the_list(tmp_path):
    with pytest.raises(BadInput) as e: make_sample('mnist', tmp_path)
    assert all(name in str(e.value) for name in SAMPLES)


# digit_scenes ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def scenes(tmp_path_factory): return digit_scenes(tmp_path_factory.mktemp('scenes'), scenes=150)


@pytest.fixture(scope='module')
def rows(scenes): return [dict(r, tags=dict(r['tags'])) for r in scenes.table.to_pylist()]


def objects(row): return [a for a in row['annotations'] if a['label'] is not None]


def test_any_process_makes_the_same_scenes(tmp_path):
    "Workers are processes of their own, each with another hash seed."
    a, b = (digit_scenes(tmp_path/str(n), scenes=45, workers=n) for n in (1, 2)); assert a.version == b.version
    for row in a.table.to_pylist(): assert digest(a.read(row['uri'])) == digest(b.read(row['uri'])) == row['sha256']


def test_made_once_and_another_seed_is_another_dataset(scenes, tmp_path):
    a = digit_scenes(tmp_path, scenes=12); stamp = (tmp_path/'dataset.json').stat().st_mtime_ns
    assert (
        digit_scenes(tmp_path, scenes=12, workers=1).version == a.version
        and (tmp_path / 'dataset.json').stat().st_mtime_ns == stamp
    )
    assert digit_scenes(tmp_path, scenes=12, seed=1).version != a.version


def test_no_scan_and_no_ground_is_in_two_splits(scenes, rows, made):
    home = {
        r['id'].removeprefix('digit-').lstrip('0') or '0': r['split'] for r in made.table.to_pylist()
    }  # as in `digits`
    for r in rows: assert {home[i] for i in r['tags']['scans'].split()} <= {r['split']}
    assert shared_groups(scenes.table) == []
    page = np.arange(101 * 203).reshape(101, 203)
    parts = [ground_part(page, s).ravel() for s in ('train', 'val', 'test')]
    assert sum(map(len, parts)) == page.size == len(np.unique(np.concatenate(parts)))
    share = {s: np.mean([r['split'] == s for r in rows]) for s in ('train', 'val', 'test')}
    assert share['test'] >= .2 and share['train'] == pytest.approx(.64, abs=.03)


def test_boxes_and_masks_are_of_the_visible_ink(scenes, rows):
    "Decoded by pycocotools; inside the mask the picture differs from just outside it, and a mask moved aside does not do that."
    gaps, moved = [], []
    for r in rows:
        grey = decode(scenes.read(r['uri'])).astype(float).mean(2); seen = np.zeros(grey.shape, int)
        assert grey.shape == (r['height'], r['width'])
        for a in objects(r):
            m = coco.decode(dict(size=a['mask']['size'], counts=a['mask']['counts'].encode())).astype(bool); seen += m
            ys, xs = np.nonzero(m); assert a['bbox'] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            ring = ndimage.binary_dilation(m, iterations=4) & ~ndimage.binary_dilation(m, iterations=2)
            for out, mm, rr in ((gaps, m, ring), (moved, np.roll(m, 9, 1), np.roll(ring, 9, 1))):
                out.append(abs(grey[mm].mean() - grey[rr].mean()))
        assert seen.max() <= 1                                                     # no pixel belongs to two digits
    assert np.mean(np.array(gaps) > 12) > .97 and np.median(gaps) > 3*np.median(moved)


def test_lines_spell_the_digits_from_left_to_right(rows):
    two, empty = 0, 0
    for r in rows:
        lines = [a for a in r['annotations'] if a['text'] is not None]
        found = objects(r)
        two += len(lines) == 2
        empty += not found
        assert (
            all(a['label'] is None for a in lines)
            and len(lines) == int(r['tags']['lines'])
            and len(found) == int(r['tags']['digits'])
        )
        assert [a['bbox'][1] for a in lines] == sorted(a['bbox'][1] for a in lines)
        for a in lines:
            inside = [
                b
                for b in found
                if a['bbox'][0] <= b['bbox'][0]
                and b['bbox'][2] <= a['bbox'][2]
                and a['bbox'][1] <= b['bbox'][1]
                and b['bbox'][3] <= a['bbox'][3]
            ]
            assert ''.join(b['label'] for b in sorted(inside, key=lambda b: b['bbox'][0] + b['bbox'][2])) == a['text']
            B = np.array([b['bbox'] for b in inside]); assert a['bbox'] == [*B[:, :2].min(0), *B[:, 2:].max(0)]
        caption, = [a['caption'] for a in r['annotations'] if a['caption'] is not None]
        assert all(a['text'] in caption for a in lines) and (bool(found) or caption.startswith('No digits'))
    assert two > 5 and empty > 0


def test_some_digits_overlap_and_all_stay_visible(rows):
    touching = 0
    for r in rows:
        masks = [coco.decode(dict(size=a['mask']['size'], counts=a['mask']['counts'].encode())) for a in objects(r)]
        assert all(m.sum() >= 40 for m in masks)
        boxes = np.array([a['bbox'] for a in objects(r)]).reshape(-1, 4)
        touching += bool((boxes[1:, 0] < boxes[:-1, 2]).any())
    assert touching > 5


def test_a_clip_shows_the_same_digits_moving(rows):
    clips = {}
    for r in rows:
        if 'clip' in r['tags']: clips.setdefault(r['group'], []).append(r)
        else: assert all(a['track_id'] is None for a in r['annotations'])
    assert len(clips) == 6; far = []
    for frames in clips.values():
        assert [f['tags']['frame'] for f in frames] == list('01234') and len({f['split'] for f in frames}) == 1
        tracks = [{a['track_id']: a for a in objects(f)} for f in frames]
        for a, b in zip(tracks, tracks[1:]):
            assert a.keys() == b.keys() and [v['label'] for v in a.values()] == [v['label'] for v in b.values()]
            far += [abs(np.subtract(a[k]['bbox'], b[k]['bbox'])).max() for k in a]
        assert len({f['captured_at'] for f in frames}) == 5
    assert 1 < np.mean(far) and max(far) < 60


def test_what_was_captured_makes_sense(rows):
    for r in rows:
        hour = int(r['captured_at'][11:13]); light = r['tags']['lighting']
        assert (light == 'night') == (hour >= 21) and (light == 'dusk') == (18 <= hour < 20) and r['device'] in CAMERAS
        assert r['license'].startswith('CC-BY-4.0 AND ') and r['captured_at'] >= (
            '2025-10-01' if r['device'] == 'camera-D' else '2025-01-01'
        )
    assert {r['device'] for r in rows} == set(CAMERAS) and {r['tags']['lighting'] for r in rows} == set(LIGHTS)
    assert all(len({r['tags'][t] for r in rows}) > 1 for t in ('blur', 'background', 'site', 'scale', 'ink', 'plate'))


def test_the_new_camera_can_be_had_alone_and_sees_otherwise(tmp_path):
    tone = {}
    for c in ('camera-A', 'camera-D'):
        d = digit_scenes(tmp_path / c, scenes=60, cameras=[c], clips=0)
        px = np.stack([decode(d.read(u)) for u in d.table['uri'].to_pylist()]).astype(float)
        assert set(d.table['device'].to_pylist()) == {c}; tone[c] = (px[..., 2] - px[..., 0]).mean()
    assert tone['camera-D'] > tone['camera-A'] + 8


def test_every_scan_of_the_training_split_is_used(made):
    plan = plan_scenes(made.table['split'].to_pylist(), 1000, 0, tuple(CAMERAS), 0.2)
    used = {i for s in plan if s.split == 'train' for line in s.lines for i in line}
    assert (
        sum(s.frames for s in plan) == 1000
        and len({s.name for s in plan}) == len(plan)
        and len(used) == made.split('train').num_rows
    )


def test_a_glyph_that_is_not_turned_is_the_scan():
    scan = load_digits().images[3]; g = glyph(scan, 64); inner = g[len(g)//2 - 32:, len(g)//2 - 32:][:64, :64]
    cells = inner.reshape(8, 8, 8, 8).mean((1, 3)); assert np.corrcoef(cells.ravel(), scan.ravel())[0, 1] > .9
    up = glyph(scan, 64, shift=(3, -2))
    np.testing.assert_allclose(np.roll(g, (-2, 3), (0, 1))[10:-10, 10:-10], up[10:-10, 10:-10], atol=1e-4)
    a, b = (ndimage.center_of_mass(glyph(scan, 64, angle=v)[:, :]) for v in (0, 0.3))
    c, s = np.cos(0.3), np.sin(0.3)
    m = len(g) / 2 - 0.5
    np.testing.assert_allclose(
        (b[1] - m, b[0] - m), (c * (a[1] - m) - s * (a[0] - m), s * (a[1] - m) + c * (a[0] - m)), atol=0.6
    )


@pytest.mark.parametrize('task', ['detection', 'segmentation', 'instances', 'reading'])
def test_the_problems_of_the_scenes_ask_for_tags_that_are_there(scenes, task):
    problem = load_problem(f'problems/scenes_{task}.yaml'); tags = tags_of(scenes.table)
    assert problem.classes == scenes.classes and all(select(where, tags).any() for where in problem.slices.values())


@pytest.mark.parametrize(
    'wrong', [dict(scenes=0), dict(size=(32, 32)), dict(clips=1.5), dict(cameras=['camera-Z']), dict(cameras=[])]
)
def test_parameters_that_make_no_sense_are_refused(tmp_path, wrong):
    with pytest.raises(BadInput): digit_scenes(tmp_path, **wrong)
