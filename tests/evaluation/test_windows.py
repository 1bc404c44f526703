"""Every token counts once, whatever the windowing; intervals against hand-made numbers."""

import math

import pytest

from sedd_megatron.data.batches import batches_of
from sedd_megatron.data.tokenizers import ByteTokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.evaluation.intervals import ratio_interval, student_t_quantile
from sedd_megatron.evaluation.windows import WINDOWINGS, windows_of

TEXTS = ["a", "", "bcdefgh", "ij" * 13]


class WithEnd(ByteTokenizer):
    eod_id = 0


@pytest.mark.parametrize("windowing", WINDOWINGS)
def test_every_token_counts_once_and_in_order(windowing):
    windows = windows_of(TEXTS, ByteTokenizer(), 8, windowing, may_give=True)
    counted = b"".join(bytes(window.tokens[window.num_given :]) for window in windows)
    assert counted == "".join(TEXTS).encode()
    assert [window.number for window in windows] == list(range(len(windows)))
    assert max(len(window.tokens) for window in windows) == 8
    if windowing != "concatenate":
        for unit, text in enumerate(TEXTS):
            own = b"".join(bytes(w.tokens[w.num_given :]) for w in windows if w.unit == unit)
            assert own == text.encode()


def test_strided_windows_have_half_of_them_given_and_are_parts_of_the_document():
    text = "".join(chr(ord("a") + i) for i in range(26))
    windows = windows_of([text], ByteTokenizer(), 8, "strided", may_give=True)
    assert [window.num_given for window in windows] == [0, 4, 4, 4, 4, 6]
    for window in windows:
        assert bytes(window.tokens).decode() in text
        assert len(window.tokens) == 8


def test_concatenation_ends_documents_where_the_tokenizer_can():
    windows = windows_of(["ab", "c"], WithEnd(), 3, "concatenate", may_give=False)
    assert [window.tokens for window in windows] == [(97, 98, 0), (99, 0)]
    windows = windows_of(["ab", "c"], WithEnd(), 3, "concatenate", may_give=False, append_eod=False)
    assert [window.tokens for window in windows] == [(97, 98, 99)]


def test_mistakes():
    with pytest.raises(UserError, match=r"^--windowing strided: the uniform graph has no exact likelihood given a"):
        windows_of(["abc"], ByteTokenizer(), 2, "strided", may_give=False)
    for tokenizer, windowing in ((ByteTokenizer(), "separate"), (WithEnd(), "concatenate")):
        with pytest.raises(UserError, match=r"^there is no token to evaluate; give documents with text$"):
            windows_of(["", ""], tokenizer, 2, windowing, may_give=False)


def test_batches_hold_one_length_and_lose_nothing():
    windows = windows_of(TEXTS, ByteTokenizer(), 8, "separate", may_give=True)
    batches = list(batches_of(windows, 2))
    assert sorted(window.number for batch in batches for window in batch) == list(range(len(windows)))
    assert all(len({len(window.tokens) for window in batch}) == 1 and len(batch) <= 2 for batch in batches)


def test_student_t_is_that_of_the_tables():
    for degrees, quantile in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (30, 2.0423), (1000, 1.9623)):
        assert math.isclose(student_t_quantile(0.975, degrees), quantile, rel_tol=2e-3)


def test_ratio_interval_of_hand_made_units():
    interval = ratio_interval([2.0, 4.0, 9.0], [1, 2, 3])
    # Ratio 15/6; residuals -0.5, -1, 1.5; variance 3.5 * 3/2; t for 2 degrees of freedom.
    half = 4.30265 * math.sqrt(3.5 * 1.5) / 6
    assert math.isclose(interval.value, 2.5)
    assert math.isclose(interval.half_width, half, rel_tol=1e-4)
    assert ratio_interval([3.0], [2]).half_width == math.inf
