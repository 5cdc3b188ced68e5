"Texts, reading order and CTC decoding against independent implementations, and against all paths counted one by one."
import itertools

import numpy as np, pytest, torch
from torch.nn.functional import ctc_loss
from torchmetrics.functional.text import char_error_rate, edit_distance, word_error_rate

from cv_lab.core import Annotation, BadInput
from cv_lab.ctc import beam_search, best_path, log_probability, log_softmax, read_line, to_codes, to_text
from cv_lab.text import compose, confusable, edits, page_text, reading_rows, text_metrics


def texts(rng, n, letters='ab c\n1'):
    "Pairs of texts, the second one a spoiled copy of the first, or another text."
    out = []
    for _ in range(n):
        a = ''.join(rng.choice(list(letters), rng.integers(0, 14))); b = list(a)
        for _ in range(rng.integers(0, 5)):
            i, c = rng.integers(0, len(b) + 1), str(rng.choice(list(letters)))
            if (op := rng.integers(3)) == 0: b.insert(i, c)
            elif i < len(b): b[i:i+1] = [c] if op == 1 else []
        out.append((a, ''.join(b) if rng.random() < .9 else ''.join(rng.choice(list(letters), 5))))
    return out


# ---- metrics: torchmetrics 1.9, which has its own edit distance

@pytest.mark.parametrize('seed', range(4))
def test_error_rates_are_those_of_torchmetrics(seed):
    pairs = texts(np.random.default_rng(seed), 60)
    true, said = map(list, zip(*pairs))
    got = text_metrics(pairs)(np.ones((1, 60)))
    each = edit_distance(said, true, reduction='none').numpy()
    longer = np.array([max(len(t), len(s), 1) for t, s in pairs])
    assert got['cer'][0] == pytest.approx(float(char_error_rate(said, true)), abs=1e-6)
    assert got['wer'][0] == pytest.approx(float(word_error_rate(said, true)), abs=1e-6)
    assert got['exact_match'][0] == pytest.approx(np.mean([t == s for t, s in pairs]), abs=1e-12)
    assert got['normalised_edit_distance'][0] == pytest.approx((each/longer).mean(), abs=1e-9)


def test_a_weight_is_how_often_a_text_is_there():
    rng = np.random.default_rng(0)
    pairs = texts(rng, 20)
    w = rng.multinomial(20, np.full(20, 0.05), 50).astype(float)
    many = text_metrics(pairs)(w)
    for b in range(50):
        drawn = [p for p, n in zip(pairs, w[b].astype(int)) for _ in range(n)]
        one = text_metrics(drawn)(np.ones((1, 20)))
        for k in one: assert many[k][b] == pytest.approx(one[k][0], abs=1e-12)


def test_nothing_written_and_nothing_read_is_right():
    assert {k: v[0] for k, v in text_metrics([('', '')])(np.ones((1, 1))).items()} == dict(
        cer=0, wer=0, exact_match=1, normalised_edit_distance=0
    )


@pytest.mark.parametrize('seed', range(3))
def test_edits_lead_from_one_text_to_the_other_and_none_is_too_many(seed):
    for a, b in texts(np.random.default_rng(seed), 60):
        found = edits(a, b); assert len(found) == edit_distance([b], [a], reduction='none')
        kinds = [k for k, _, _ in found]; assert len(a) + kinds.count('insertion') - kinds.count('deletion') == len(b)
        for kind, x, y in found:
            assert (kind == 'insertion') == (x == '') and (kind == 'deletion') == (y == '') and x != y


def test_confusable_pairs_are_counted():
    t = confusable([('1717', '7717'), ('11', '71'), ('4', '')])
    assert t.iloc[0].to_dict() == dict(true='1', said='7', times=2, of=4) and t.iloc[1].to_dict() == dict(
        true='4', said='', times=1, of=1
    )


# ---- reading order

@pytest.mark.parametrize('slope', [-.3, -.1, 0, .1, .3])
def test_the_order_is_that_of_rows_also_when_they_climb(slope):
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows, n = rng.integers(1, 4), rng.integers(2, 7); pitch, size = 22., 20.
        x = np.arange(n) * pitch
        boxes = np.array(
            [
                [
                    a,
                    r * 28 + slope * a,
                    a + size * rng.uniform(0.5, 1),
                    r * 28 + slope * a + size * rng.uniform(0.8, 1.2),
                ]
                for r in range(rows)
                for a in x
            ]
        )
        mixed = rng.permutation(len(boxes)); got = [[int(mixed[i]) for i in row] for row in reading_rows(boxes[mixed])]
        assert got == [list(range(r*n, r*n + n)) for r in range(rows)]


def test_characters_become_lines_and_a_gap_parts_them():
    at = lambda c, x, y, s=.9: Annotation(c, bbox=[x, y, x + 8, y + 12], score=s)
    found = compose([at('3', 40, 2), at('1', 0, 0), at('4', 50, 1, .5), at('2', 10, 1), at('5', 0, 30)])
    assert (
        [(a.text, a.score) for a in found] == [('12', 0.9), ('34', 0.5), ('5', 0.9)]
        and found[0].bbox == [0, 0, 18, 13]
        and page_text(found) == '12 34\n5'
    )


def test_a_page_without_boxes_keeps_its_order_and_candidates_are_not_said():
    assert page_text([dict(text='b'), dict(text='a'), dict(text='c', accepted=False)]) == 'b\na' and page_text([]) == ''


# ---- CTC

def every_path(lp):
    "The probability of every text, by walking all paths."
    T, C = lp.shape; out = {}
    for path in itertools.product(range(C), repeat=T):
        text = tuple(c for i, c in enumerate(path) if c and (i == 0 or path[i-1] != c))
        out[text] = out.get(text, 0) + np.exp(sum(lp[t, c] for t, c in enumerate(path)))
    return out


@pytest.mark.parametrize('seed', range(5))
def test_probability_and_beam_are_the_sums_over_all_paths(seed):
    lp = log_softmax(np.random.default_rng(seed).normal(0, 1.5, (6, 4))); want = every_path(lp)
    for text, p in want.items(): assert np.exp(log_probability(lp, text)) == pytest.approx(p, abs=1e-12)
    found = beam_search(lp, width=10**6, floor=0)
    assert {tuple(t): np.exp(p) for t, p in found} == pytest.approx(want, abs=1e-12)
    assert tuple(found[0][0]) == max(want, key=want.get) == tuple(beam_search(lp, width=64)[0][0])


def test_probability_is_that_of_torch():
    rng = np.random.default_rng(0)
    B, T, C = 16, 20, 8
    logits = rng.normal(0, 2, (B, T, C))
    codes = [rng.integers(1, C, rng.integers(1, 8)) for _ in range(B)]
    want = ctc_loss(
        torch.tensor(logits).log_softmax(-1).transpose(0, 1),
        torch.tensor(np.concatenate(codes)),
        torch.full((B,), T),
        torch.tensor([len(c) for c in codes]),
        reduction='none',
    )
    np.testing.assert_allclose([-log_probability(log_softmax(x), c) for x, c in zip(logits, codes)], want, atol=1e-9)


def test_the_beam_finds_what_the_best_path_misses():
    lp = np.log(np.array([[0.6, 0.4], [0.6, 0.4]]))
    assert (
        best_path(lp) == []
        and beam_search(lp)[0][0] == [1]
        and best_path(np.log(np.array([[0.1, 0.9], [0.9, 0.1], [0.1, 0.9]]))) == [1, 1]
    )


@pytest.mark.parametrize('seed', range(5))
def test_a_lexicon_allows_its_words_only_and_finds_the_likeliest(seed):
    rng = np.random.default_rng(seed)
    lp = log_softmax(rng.normal(0, 1, (12, 6)))
    words = [tuple(rng.integers(1, 6, rng.integers(1, 6)).tolist()) for _ in range(30)]
    found = beam_search(lp, 500, words)
    best = max(set(words), key=lambda w: (log_probability(lp, w), w))
    assert tuple(found[0][0]) == best and {tuple(t) for t, _ in found} <= set(words)
    assert beam_search(lp, 1, [(1, 2, 3)])[0][0] == [1, 2, 3]       # though it is unlikely


def test_a_line_is_read_and_told_with_its_probability():
    logits = np.full((9, 4), -4.); logits[np.arange(9), [0, 1, 1, 0, 1, 0, 3, 3, 0]] = 4
    text, p = read_line(logits, 'abc')
    assert text == 'aac' and 0.9 < p < 1 and read_line(logits, 'abc', beam=8) == (text, pytest.approx(p))
    assert (
        read_line(logits, 'abc', lexicon=['bac', 'aab'])[0] in ('bac', 'aab')
        and read_line(logits, 'abc', temperature=4.0)[1] < p
    )


def test_what_is_not_in_the_alphabet_is_named():
    assert to_text(to_codes('cab', 'abc'), 'abc') == 'cab'
    with pytest.raises(BadInput, match="'x' 'y'"): to_codes('axyb', 'abc')
    with pytest.raises(BadInput, match='single characters'): to_codes('a', ['a', 'ten'])
