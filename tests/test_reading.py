"Reading: maps to lines and columns, metrics of whole pages, mistakes, and the way from file to text through the exported graph."

import numpy as np, pytest, torch

from cv_lab.core import Annotation, BadInput, digest
from cv_lab.data.dataset import Dataset
from cv_lab.data.manifest import PREDICTIONS, make_table
from cv_lab.image import Preprocess, decode as pixels, placement
from cv_lab.lines import hat, line_logits, merged_lines, reading_columns
from cv_lab.reader import columns_at, columns_of, core_places, reader_loss
from cv_lab.spec import Problem
from cv_lab.task import Prediction, in_image, predictions_table
from cv_lab.tasks import reading
from cv_lab.loading import Images

DIGITS = list('0123456789')


def problem(**changes):
    return Problem(
        **dict(
            name='numbers',
            task='reading',
            classes=DIGITS,
            owner='o',
            intended_use='i',
            acceptance=[dict(metric='cer', at_most=0.1)],
            metrics=dict(primary='cer'),
        )
        | changes
    )


def tables(true, said): # lists of lists of annotations
    ids = [str(i) for i in range(len(true))]
    return make_table([dict(id=i, sha256=digest(i), annotations=a) for i, a in zip(ids, true)]), predictions_table(
        ids, [Prediction(s) for s in said]
    )


def line(text, x=0.0, y=0.0, score=None, **more):
    return Annotation(text=text, bbox=[x, y, x + 15 * len(text), y + 20], score=score, **more)


# ---- lines and columns

def maps_of(boxes, rng, shape=(16, 24), stride=8, noise=.1):
    "What a network that knows the truth, but guesses far edges badly, would say."
    y, x = (np.mgrid[:shape[0], :shape[1]] + .5)*stride; core, edges = np.zeros(shape), np.ones((4, *shape))
    places = core_places(torch.tensor(boxes), torch.zeros(len(boxes), dtype=torch.long), (1, *shape), stride).numpy()
    for (x1, y1, x2, y2), p in zip(boxes, places):
        core[p] = rng.uniform(0.6, 1, p.sum())
        d = np.stack([x - x1, y - y1, x2 - x, y2 - y])
        edges[:, p] = (d * rng.normal(1, noise, d.shape))[:, p]
    return core, edges


@pytest.mark.parametrize('seed', range(8))
def test_every_line_gets_one_box_near_its_own(seed):
    rng = np.random.default_rng(seed)
    n = rng.integers(1, 4)
    high = rng.uniform(20, 34, n)
    y = np.cumsum(np.r_[4, high[:-1] + rng.uniform(4, 8, n - 1)])
    boxes = np.array([[x, a, x + rng.uniform(30, 180 - x), a + h] for a, h, x in zip(y, high, rng.uniform(2, 60, n))])
    found, score = merged_lines(*maps_of(boxes, rng), 8)
    assert len(found) == len(score) == n
    from cv_lab.geometry import box_iou
    assert (box_iou(boxes, found).max(1) > .85).all()


def test_no_place_no_line():
    found, score = merged_lines(np.zeros((4, 6)), np.ones((4, 4, 6)), 8)
    assert found.shape == (0, 4) and len(score) == 0 and line_logits(np.zeros((12, 8, 12)), found, 4) == []


def test_a_small_line_has_a_place_and_none_has_two():
    boxes = torch.tensor([[1.0, 1, 5, 5], [0, 0, 180, 120], [60, 60, 64, 90]])
    p = core_places(boxes, torch.tensor([0, 0, 1]), (2, 16, 24), 8)
    assert (p.flatten(1).sum(1) > 0).all() and (p[0].int() + p[1].int()).max() == 1


def test_tensors_and_arrays_are_read_alike():
    rng = np.random.default_rng(0)
    maps = rng.normal(0, 1, (13, 24, 36)).astype(np.float32)
    boxes = np.array([[3, 5, 100, 37], [-4, 60, 30, 99], [50, 2, 60, 9.0]])
    want = line_logits(maps, boxes, 4); b = torch.tensor(boxes); x, y, n = columns_at(b, 4)
    for a, v in zip(reading_columns(boxes, 4), (x, y, n)): np.testing.assert_allclose(a, v, atol=1e-4)
    got = columns_of(torch.tensor(maps)[None].double(), torch.zeros(3, dtype=torch.long), x.double(), y.double(), 4)
    for w, g, k in zip(want, got, n): np.testing.assert_allclose(w, g[:k], atol=1e-5)


def test_between_two_cells_is_between_their_values():
    "torch's own grid_sample, which pads with the border."
    rng = np.random.default_rng(1)
    m = rng.normal(0, 1, (6, 9))
    x, y = rng.uniform(-5, 45, 50), rng.uniform(-5, 30, 50)
    at = torch.tensor(np.stack([x/4/9*2 - 1, y/4/6*2 - 1], -1))[None, None]
    want = torch.nn.functional.grid_sample(torch.tensor(m)[None, None], at, align_corners=False, padding_mode='border')[
        0, 0, 0
    ]
    np.testing.assert_allclose(np.einsum('ph,hw,pw->p', hat(y, 6, 4), m, hat(x, 9, 4)), want, atol=1e-12)


# ---- targets

def test_a_text_that_was_cut_is_not_taught():
    t = reading.targets(
        [line('12').said(), line('345', y=40).said() | dict(visible=0.7), dict(label='3', bbox=[0, 0, 5, 5])],
        reading.Config(),
        DIGITS,
    )
    assert t['length'].tolist() == [2, 0] and t['codes'].tolist() == [[2, 3], [0, 0]] and t['box'].shape == (2, 4)
    assert reading.targets([], reading.Config(), DIGITS)['codes'].shape == (0, 0)


def test_characters_stand_where_they_are_annotated_else_evenly():
    said = line('17').said(); boxes = [[0., 0, 6, 20], [10., 0, 30, 20]]     # the line is 30 wide
    own = [dict(label=c, bbox=b) for c, b in zip('17', boxes)]
    np.testing.assert_allclose(reading.spans(said, own), [[.05, .15], [1/3 + 1/6, 1 - 1/6]], atol=1e-6)
    for others in ([], own[:1], [own[0], dict(label='1', bbox=boxes[1])]):
        np.testing.assert_allclose(reading.spans(said, others), [[0.125, 0.375], [0.625, 0.875]], atol=1e-6)


def test_a_text_without_a_box_is_the_whole_image(tmp_path):
    notes = reading.example(tmp_path)
    rows = [
        r | dict(annotations=[dict(text=a['text']) for a in r['annotations'][:1]], tags=dict(r['tags']))
        for r in notes.table.to_pylist()
    ]
    lines = Dataset(make_table(rows), 'lines', tmp_path, notes.classes)
    images = Images(lines, lines.split('train'), problem(classes=notes.classes), reading.Config())
    i = next(i for i in range(len(images)) if images.said[i])
    assert images[i][1]['box'].tolist() == [[0, 0, 144, 96]] and images[i][1]['length'][0] > 0


def test_an_alphabet_of_words_is_refused():
    with pytest.raises(BadInput, match='single characters'): reading.network(reading.Config(), ['cat', 'dog'])


def test_a_batch_without_lines_has_a_loss():
    cfg = reading.Config()
    net = reading.network(cfg, DIGITS)
    empty = {k: torch.as_tensor(v) for k, v in reading.targets([], cfg, DIGITS).items()}
    loss = reader_loss(net(torch.zeros((2, 3, 64, 96), dtype=torch.uint8)), reading.collate([empty, empty]))
    loss.backward()
    assert torch.isfinite(loss)


# ---- decode

def test_answers_lie_in_the_image_and_say_what_is_in_the_maps():
    "Maps that a person could have drawn: a line of three characters, in a letterboxed image."
    cfg = reading.Config(image=Preprocess(64, 96))
    box = np.array([[20.0, 20, 68, 40]])
    rng = np.random.default_rng(0)
    core, edges = maps_of(box, rng, (8, 12), 8, 0)
    chars = np.full((12, 16, 24), -4.); chars[0] = 2; chars[-1] = 0
    for k, c in enumerate((9, 9, 4)): chars[c + 1, 5:10, 5 + 4*k + 2] = 8
    z = np.log(core.clip(1e-6, 1 - 1e-6)/(1 - core.clip(1e-6, 1 - 1e-6)))
    p = reading.decode(dict(chars=chars[None], lines=np.concatenate([z[None], edges])[None]), cfg, DIGITS, {})[0]
    assert [a.text for a in p.annotations] == ['994'] and .5 < p.annotations[0].score < 1
    back = in_image(p, placement(192, 96, cfg.image)).annotations[0]
    np.testing.assert_allclose(back.bbox, [40, 24, 136, 64], atol=1e-6)
    for c in (cfg.model_copy(update=dict(beam=8)), cfg.model_copy(update=dict(lexicon=['994', '123']))):
        assert (
            reading.decode(dict(chars=chars[None], lines=np.concatenate([z[None], edges])[None]), c, DIGITS, {})[0]
            .annotations[0]
            .text
            == '994'
        )
    assert not reading.decode(
        dict(chars=chars[None], lines=np.concatenate([z[None], edges])[None]), cfg, DIGITS, dict(min_confidence=0.9999)
    )[0].accepted


# ---- score and mistakes

def test_lines_count_as_found_and_as_read():
    truth, said = tables([[line('926')], [line('355'), line('11', y=30)], [], [line('43')]],
                         [[line('926', 1)], [line('355'), line('71', 2, 31)], [line('8', 50, 50)], []])
    got = {k: v[0] for k, v in reading.score(truth, said, problem())(np.ones((1, 4))).items()}
    assert (
        got['line_recall'] == 3 / 4
        and got['line_precision'] == 3 / 4
        and got['line_f1'] == 2 * 2 / (4 + 4)
        and got['cer'] == (1 + 1 + 2) / (3 + 6 + 2)
        and got['exact_match'] == 1 / 4
    )


def test_order_of_the_lines_in_a_table_does_not_matter():
    a, b = line('355'), line('11', y=30)
    truth, said = tables([[a, b]], [[b, a]])
    assert reading.score(truth, said, problem())(np.ones((1, 1)))['cer'][0] == 0
    truth, said = tables([[a, b]], [[line('355', y=30), line('11')]])
    assert reading.score(truth, said, problem())(np.ones((1, 1)))['cer'][0] > 0


def test_texts_of_others_without_boxes_are_judged_too():
    truth, said = tables([[line('355'), line('11', y=30)]], [[Annotation(text='355'), Annotation(text='17')]])
    got = reading.score(truth, said, problem())(np.ones((1, 1)))
    assert got['cer'][0] == 1 / 6 and got['line_f1'][0] == 0.5
    assert reading.mistakes(truth, said, problem())['what'].tolist() == ['1 → 7']


def test_an_item_without_a_prediction_is_named():
    truth, said = tables([[line('1')], [line('2')]], [[line('1')], []])
    with pytest.raises(BadInput, match='1 items have no prediction: 1'):
        reading.score(truth, said.slice(0, 1), problem())


def test_mistakes_are_told_apart():
    truth, said = tables([[line('171'), line('22', y=40)]], [[line('771', 1, 0, .9), line('4', 100, 100, .7)]])
    found = reading.mistakes(truth, said, problem())
    assert sorted(zip(found['kind'], found['what'])) == [
        ('invented line', '“4” invented'),
        ('missed line', '“22” missed'),
        ('substitution', '1 → 7'),
    ]
    truth, said = tables([[line('17')], [line('17')]], [[line('1')], [line('177')]])
    assert sorted(zip(*(reading.mistakes(truth, said, problem())[k] for k in ('id', 'kind', 'what')))) == [
        ('0', 'deletion', '7 → nothing'),
        ('1', 'insertion', 'nothing → 7'),
    ]


def test_the_bound_of_confidence_reaches_its_target():
    rng = np.random.default_rng(0); sure = rng.uniform(0, 1, 300); right = rng.random(300) < sure
    truth, said = tables([[line('11')]]*300, [[line('11' if r else '12', score=s)] for s, r in zip(sure, right)])
    t = reading.calibrate(truth, said, problem(decision=dict(target_precision=0.9)))
    kept = sure >= t['min_confidence']
    assert right[kept].mean() >= 0.9 and 0.05 < kept.mean() < 0.6
    worse = np.sort(sure[sure < t['min_confidence']])[::-1]
    assert all(right[sure >= s].mean() < 0.9 for s in worse)  # no lower bound would do
    assert reading.calibrate(truth, said, problem())['min_confidence'] == 0


def test_lines_that_nobody_wrote_are_cut_where_the_edits_are_fewest():
    "Against every cut tried by hand."
    rng = np.random.default_rng(3); there, said = [], []
    for i in range(60):
        there.append([Annotation(text='123', bbox=[0, 0, 30, 10])])
        said.append([Annotation(text='123', bbox=[0, 0, 30, 10], score=float(rng.uniform(0.2, 1)))])
        if i % 4 == 0: said[-1].append(Annotation(text='77', bbox=[0, 50, 20, 60], score=float(rng.uniform(0, .25))))
    truth = make_table([dict(id=f'{i:02}', sha256=f'{i:064x}', annotations=a) for i, a in enumerate(there)])
    preds = make_table([dict(id=f'{i:02}', annotations=a) for i, a in enumerate(said)], PREDICTIONS)
    cut = reading.line_score(truth, preds, cuts=1000)
    edits = lambda c: sum(3*(s[0].score < c) + 2*sum(a.score >= c for a in s[1:]) for s in said)
    assert edits(cut) == min(edits(c) for c in sorted(a.score for s in said for a in s)) and 0 < edits(cut) <= edits(
        reading.calibrate(truth, preds, problem())['line_score']
    ) < edits(0)


# ---- from file to text, through the exported graph

def test_a_reader_learns_and_its_export_says_the_same(tmp_path):
    "A few lines by heart, then the ONNX graph and the checkpoint on whole files."
    from cv_lab.optimize import export_onnx
    from cv_lab.predict import Predictor, describe_model, predict_table

    notes = reading.example(tmp_path / 'notes')
    spec = problem(classes=notes.classes)
    rows = notes.split('train').slice(0, 12)
    cfg = reading.Config(network_args=dict(channels=[16, 32, 32, 32], stem_width=8), width=32, image=Preprocess(64, 96))
    torch.manual_seed(0)
    net = reading.network(cfg, notes.classes)
    images = Images(notes, rows, spec, cfg)
    batch = [images[i] for i in range(12)]
    x, y = torch.stack([b[0] for b in batch]), reading.collate([b[1] for b in batch])
    opt = torch.optim.Adam(net.parameters(), 4e-3)
    for _ in range(80): loss = reading.loss(net(x), y, cfg); opt.zero_grad(); loss.backward(); opt.step()
    net.eval()
    folder = tmp_path / 'export'
    export_onnx(net, cfg.image.height, cfg.image.width, folder / 'model.onnx')
    describe_model(folder, 'numbers', 'reading', notes.classes, cfg)
    said = predict_table(Predictor(folder, 'cpu'), rows, notes.read)
    got = reading.score(rows, said, spec)(np.ones((1, 12)))
    assert got['cer'][0] < 0.2 and got['line_recall'][0] > 0.9
    with torch.inference_mode(): out = {k: v.numpy() for k, v in net(x).items()}
    for theirs, mine in zip(said['annotations'].to_pylist(), reading.decode(out, cfg, notes.classes, {})):
        mine = in_image(mine, placement(144, 96, cfg.image))
        assert [a['text'] for a in theirs] == [a.text for a in mine.annotations]
        np.testing.assert_allclose([a['bbox'] for a in theirs], [a.bbox for a in mine.annotations], atol=0.05)
    picture = reading.draw(pixels(notes.read(rows['uri'][0].as_py())), said['annotations'][0].as_py())
    assert picture.std() > 0
    assert set(map(type, reading.figures(rows, said, spec).values())) == {__import__('matplotlib.figure').figure.Figure}
