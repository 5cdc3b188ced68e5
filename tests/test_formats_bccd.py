"A real dataset through the formats: 364 blood-cell photographs in VOC, when shared/data/bccd is there."
from pathlib import Path
import pytest
from cv_lab.core import canonical_json
from cv_lab.data.exports import export_dataset
from cv_lab.data.formats import formats
from cv_lab.data.imports import import_dataset

BCCD = next(
    (p for p in (Path(__file__).resolve().parents[k] / 'shared/data/bccd' for k in (1, 2, 3)) if p.is_dir()), None
)
pytestmark = pytest.mark.skipif(BCCD is None, reason='shared/data/bccd is not there')


@pytest.fixture(scope='module')
def bccd(tmp_path_factory): return import_dataset(BCCD, 'auto', tmp_path_factory.mktemp('bccd'), workers=1)


def said(t, fields=('label', 'bbox')):
    return sorted(
        canonical_json([r['sha256'], r['split'], sorted([[a[f] for f in fields] for a in r['annotations']])])
        for r in t.to_pylist()
    )


def test_all_of_it_comes_in(bccd):
    t = bccd.tally
    assert t['items'] == 364 and t['annotations'] == 4888 and t['labels'] == dict(Platelets=361, RBC=4155, WBC=372)
    assert (
        t['splits'] == dict(train=205, val=87, test=72)
        and not len(bccd.quarantine)
        and bccd.dataset.about['format'] == 'voc'
    )
    assert (
        sum(
            dict(a['attributes'] or []).get('truncated') == '1'
            for r in bccd.dataset.table.to_pylist()
            for a in r['annotations']
        )
        == 1131
    )


@pytest.mark.parametrize(
    'name',
    [
        n
        for n in (
            'coco',
            'yolo',
            'cvat',
            'labelstudio',
            'voc',
            'csv',
            'huggingface',
            'fiftyone',
            'openimages',
            'kitti',
            'webdataset',
        )
        if n in formats()
    ],
)
def test_out_and_back_the_boxes_are_identical(name, bccd, tmp_path):
    out = export_dataset(bccd.dataset, name, tmp_path/'out', images='link')
    back = import_dataset(tmp_path/'out', name, tmp_path/'back', workers=1)
    assert said(back.dataset.table) == said(bccd.dataset.table) and not len(back.quarantine)
    assert set(back.dataset.classes) == set(bccd.dataset.classes) and set(out.lost) <= {'attributes'}
    if not out.lost:
        assert said(back.dataset.table, ('label', 'bbox', 'attributes')) == said(
            bccd.dataset.table, ('label', 'bbox', 'attributes')
        )
