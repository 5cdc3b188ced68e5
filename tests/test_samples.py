"The embedded datasets: what they hold, that they are the same everywhere, and made once."
from dataclasses import replace

import numpy as np, pytest
from sklearn.datasets import load_digits

from cv_lab.core import BadInput, digest
from cv_lab.data.manifest import first_labels, load_dataset, save_dataset, shared_groups, tags_of
from cv_lab.data.samples import SAMPLES, digits, make_sample
from cv_lab.image import decode
from cv_lab.spec import load_problem, select


@pytest.fixture(scope='module')
def made(tmp_path_factory): return digits(tmp_path_factory.mktemp('digits'))


def test_every_file_is_the_scan(made):
    truth = load_digits()
    for row, scan, label in zip(made.table.to_pylist(), truth.images, truth.target):
        data = made.read(row['uri']); rgb = decode(data)
        assert digest(data) == row['sha256'] and row['annotations'][0]['label'] == str(label) and rgb.shape == (row['height'], row['width'], 3)
        np.testing.assert_array_equal(np.rint(rgb[..., 0]*(16/255)), scan)


def test_the_split(made):
    counts = {s: made.split(s).num_rows for s in ('train', 'val', 'test')}
    assert sum(counts.values()) == len(made) == 1797 and counts['test'] >= .2*len(made) and shared_groups(made.table) == []
    for s in counts: assert min(np.unique(first_labels(made.split(s)), return_counts=True)[1]) >= .8*counts[s]/10


def test_the_slices_of_its_problem_have_items(made):
    problem = load_problem('problems/digits.yaml'); test = tags_of(made.split('test'))
    assert made.classes == problem.classes
    for where in problem.slices.values(): assert select(where, test).sum() >= 30


def test_made_twice_is_the_same_and_once_is_enough(made, tmp_path):
    again = digits(tmp_path); stamp = (tmp_path/'images/digit-0000.png').stat().st_mtime_ns
    assert again.version == made.version and again.table.equals(made.table)
    assert digits(tmp_path).version == made.version and (tmp_path/'images/digit-0000.png').stat().st_mtime_ns == stamp
    assert load_dataset(tmp_path).version == made.version


def test_what_is_broken_is_made_again_and_what_is_corrected_stays(made, tmp_path):
    again = digits(tmp_path); (tmp_path/'images/digit-0007.png').unlink()
    assert digits(tmp_path).version == made.version and (tmp_path/'images/digit-0007.png').is_file()
    corrected = save_dataset(replace(again, table=again.table.slice(0, 1000), version=''), tmp_path)
    assert digits(tmp_path).version == corrected.version != made.version


def test_an_unknown_sample_is_refused_with_the_list(tmp_path):
    with pytest.raises(BadInput) as e: make_sample('mnist', tmp_path)
    assert all(name in str(e.value) for name in SAMPLES)
