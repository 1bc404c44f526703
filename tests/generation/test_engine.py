"""From frames to texts over networks whose law is known: blocks, ends of documents, batches, what a text says of
itself.
"""

import itertools
import random

import pytest

from sedd_megatron.data.batches import batches_of
from sedd_megatron.data.tokenizers import ByteTokenizer
from sedd_megatron.diffusion import SAMPLERS, SamplingSettings
from sedd_megatron.generation.engine import block_windows, decode_states, end_of_document
from sedd_megatron.generation.requests import Frame, TextRequest
from tests.generation.toy import (
    CASES,
    GRAPHS,
    LETTERS,
    SEQ_LENGTH,
    Watcher,
    any_letters,
    counting,
    engine_of,
    frames,
    scripts,
)

# Each position is drawn once for all; a corrector draws some again.
DRAWN_ONCE = ("euler", "analytic", "ancestral", "event-driven")
AROUND = TextRequest(infill="[MASK*3]ab[MASK*9]c[MASK]d[MASK*6]", num_samples=3)


@pytest.mark.parametrize("seq_length", [1, 2, 5, 8])
def test_windows_cover_every_length_and_overlap_by_half(seq_length):
    for length in range(1, 60):
        windows = block_windows(length, seq_length)
        assert (windows[0].start, windows[-1].stop) == (0, length)
        assert {window.stop - window.start for window in windows} == {min(length, seq_length)}
        for one, following in itertools.pairwise(windows):
            assert one.start < following.start
            assert one.stop - following.start >= seq_length // 2
        # As few as that allows.
        assert len(windows) == 1 + max(-(-(length - seq_length) // max(seq_length // 2, 1)), 0)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("length", [5, 8, 9, 31])
def test_a_later_block_goes_on_from_the_ones_before(sampler, length):
    settings = SamplingSettings(sampler=sampler, num_steps=6)
    # Counting is passed on by what is known, and the prompt is in the first block alone.
    texts = engine_of(counting, ends=False).make(
        frames(TextRequest(prompt="c", length=length, num_samples=3), TextRequest(prompt="gh", length=length)), settings
    )
    alphabet = LETTERS * 5
    assert [text.text for text in texts] == [alphabet[2 : 2 + length]] * 3 + [alphabet[6 : 6 + length]]


@pytest.mark.parametrize(("graph", "sampler"), CASES)
def test_what_is_given_or_made_by_an_earlier_block_stays_at_every_round(graph, sampler):
    settings = SamplingSettings(sampler=sampler, num_steps=5, corrector_strength=5.0)
    watcher, made = Watcher(settings), frames(AROUND)
    engine_of(any_letters, graph, ends=False).make(made, settings, observers=[watcher])
    windows = block_windows(len(made[0].tokens), SEQ_LENGTH)
    assert watcher.num_blocks == len(windows) > 3
    for history, frame in zip(watcher.history, made, strict=True):
        finished = []
        for block, rounds in itertools.groupby(history, key=lambda seen: seen.block):
            for seen in rounds:
                assert all(s == t for s, t, given in zip(seen.states, frame.tokens, frame.given, strict=True) if given)
                assert seen.states[: len(finished)] == finished
            finished = seen.states[: windows[block].stop]
        assert len(finished) == len(frame.tokens)
    assert len({text.text for text in watcher.texts}) == 3


@pytest.mark.parametrize("sampler", DRAWN_ONCE)
@pytest.mark.parametrize("denoise", [True, False])
def test_every_position_is_drawn_once_in_all_blocks_together(sampler, denoise):
    settings = SamplingSettings(sampler=sampler, num_steps=5, denoise=denoise)
    watcher, made = Watcher(settings), frames(AROUND)
    texts = engine_of(any_letters, ends=False).make(made, settings, observers=[watcher])
    mask = GRAPHS["absorb"].mask_token_id
    for history, frame, text in zip(watcher.history, made, texts, strict=True):
        drawn = [0] * len(frame.tokens)
        for one, following in itertools.pairwise(history):
            for position, (before, after) in enumerate(zip(one.states, following.states, strict=True)):
                if before != after:
                    assert (before, after == mask) in ((None, True), (mask, False))
                    drawn[position] += after != mask
        made_here = [not given and token != mask for given, token in zip(frame.given, text.tokens, strict=True)]
        assert drawn == [int(is_made) for is_made in made_here]
        assert sum(made_here) == frame.given.count(False) or not denoise


@pytest.mark.parametrize(("graph", "sampler"), CASES)
def test_blocks_have_draws_of_their_own(graph, sampler):
    # The law is the same in every block, so that with the first block's draws the later ones would repeat it.
    (text,) = engine_of(any_letters, graph, ends=False).make(
        frames(TextRequest(length=40)), SamplingSettings(sampler=sampler, num_steps=4)
    )
    halves = [text.text[start : start + SEQ_LENGTH // 2] for start in range(4, 40, SEQ_LENGTH // 2)]
    assert len(set(halves)) == len(halves) == 9


@pytest.mark.parametrize("sampler", ["ancestral", "event-driven"])
def test_the_network_is_asked_once_about_every_position(sampler):
    for frame in frames(AROUND):
        settings = SamplingSettings(sampler=sampler, num_steps=5)
        engine = engine_of(any_letters, ends=False)
        watcher = Watcher(settings, engine.score_fn)
        (text,) = engine.make([frame], settings, observers=[watcher])
        windows, asked, seen = block_windows(len(frame.tokens), SEQ_LENGTH), [], 0
        for (block, _), calls in zip(watcher.rounds, watcher.calls, strict=True):
            asked += [windows[block].start + i for index in engine.score_fn.asked[seen:calls] for i in index]
            seen = calls
        assert sorted(asked) == [position for position, given in enumerate(frame.given) if not given]
        assert text.network_calls == len(engine.score_fn.asked)


ENDS = [
    ("ab|cd|ef", TextRequest(), "ab", 2),
    ("|bcd|fgh", TextRequest(), "", 0),
    ("abcdefg|", TextRequest(), "abcdefg", 7),
    ("abcdefgh", TextRequest(), "abcdefgh", None),
    ("ab|cd|ef", TextRequest(infill="[MASK*4]h[MASK*3]"), "ab|ch", 5),
    ("ab|cd|ef", TextRequest(infill="[MASK*2]|[MASK*5]"), "ab|cd", 5),
    ("ab|cd|ef", TextRequest(infill="[MASK*2]|[MASK*4]g"), "ab|cd|eg", None),
    ("ab|cd|ef", TextRequest(suffix="|"), "ab|cd|e|", None),
    ("ab|cd|ef", TextRequest(prompt="|||"), "|||cd", 5),
]


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(("script", "wanted", "text", "end"), ENDS)
def test_a_text_is_cut_at_the_first_end_that_comes_after_all_given_tokens(graph, script, wanted, text, end):
    settings = SamplingSettings(num_steps=4)
    (frame,) = frames(wanted)
    (cut,) = engine_of(scripts(script), graph).make([frame], settings)
    assert (cut.text, cut.ended, len(cut.tokens)) == (text, end is not None, len(text))
    assert cut.given == list(frame.given[: len(text)])
    triples = zip(frame.tokens, frame.given, script, strict=True)
    whole = "".join(LETTERS[token] if given else letter for token, given, letter in triples)
    for ends, stop_at_eod in ((True, False), (False, True)):
        (left,) = engine_of(scripts(script), graph, ends).make([frame], settings, stop_at_eod)
        assert (left.text, left.ended) == (whole, False)
        assert left.given == list(frame.given)


def test_the_end_of_a_document_is_where_a_search_by_hand_finds_it():
    generator = random.Random(5)
    for _ in range(500):
        states = [generator.randrange(3) for _ in range(generator.randrange(1, 7))]
        given = [generator.random() < 0.3 for _ in range(generator.randrange(len(states), 9))]
        ends = [i for i in range(len(states)) if states[i] == 2 and not any(given[i:])]
        assert end_of_document(states, given, 2) == min(ends, default=len(states))
        assert end_of_document(states, given, None) == len(states)


def test_a_text_that_has_ended_gets_no_further_blocks_and_the_others_go_on():
    # A block begins with the second half of the one before: the fourth text with f, by which it gets the last script.
    law = scripts("abcdefgh", "bcdefg|a", "c|deegha", "gaaafaaa", "fbbbbb|b")
    made = frames(*[TextRequest(prompt=letter, length=16) for letter in "abcga"])
    made += frames(TextRequest(prompt="c", suffix="h", length=16))
    settings = SamplingSettings(num_steps=4)
    watcher = Watcher(settings)
    texts = engine_of(law).make(made, settings, observers=[watcher])
    assert [text.text for text in texts[1:4]] == ["bcdefg", "c", "gaaafaaabb"]
    assert [text.ended for text in texts] == [False, True, True, True, False, False]
    assert texts[0].text == texts[4].text == "abcdefghefghefgh"
    assert texts[5].text == "c|deeghaefghefgh"
    assert dict(watcher.rounds) == {0: (0, 1, 2, 3, 4, 5), 1: (0, 3, 4, 5), 2: (0, 4, 5)}
    for frame, text in zip(made, texts, strict=True):
        engine = engine_of(law)
        (same,) = engine.make([frame], settings)
        assert same.tokens == text.tokens
        assert len(engine.score_fn.asked) == same.network_calls == text.network_calls


@pytest.mark.parametrize(("graph", "sampler"), CASES)
def test_a_text_and_its_calls_do_not_depend_on_its_batch(graph, sampler):
    settings = SamplingSettings(sampler=sampler, num_steps=9)
    made = frames(AROUND, TextRequest(prompt="a", length=23, seed=3, num_samples=2))
    together = engine_of(any_letters, graph).make(made, settings)
    for frame, text in zip(made, together, strict=True):
        engine = engine_of(any_letters, graph)
        (alone,) = engine.make([frame], settings)
        assert alone.tokens == text.tokens
        assert len(engine.score_fn.asked) == alone.network_calls == text.network_calls
    assert len({tuple(text.tokens) for text in together}) == len(made)


def test_a_text_says_what_it_is():
    (frame,) = frames(TextRequest(infill="a[MASK]c[MASK*5]", seed=6))
    frame = Frame(4, frame.seed, frame.tokens, frame.given, line=12)
    (text,) = engine_of(scripts("hbhdef|h")).make([frame], SamplingSettings(num_steps=3))
    assert (text.sample, text.seed, text.text, text.line) == (4, 6, "abcdef", 12)
    assert text.tokens == [LETTERS.index(letter) for letter in "abcdef"]
    assert text.given == [True, False, True, False, False, False]
    assert text.seconds > 0
    record = text.record()
    assert record == {name: getattr(text, name) for name in record}
    assert list(record) == ["sample", "seed", "text", "tokens", "ended", "network_calls", "seconds", "line"]
    (text,) = engine_of(any_letters).make(frames(TextRequest()), SamplingSettings(num_steps=1))
    assert "line" not in text.record()


def test_without_the_denoising_a_mask_may_be_left_and_is_shown():
    mask = GRAPHS["absorb"].mask_token_id
    settings = SamplingSettings(num_steps=2, time_eps=0.5, denoise=False)
    (text,) = engine_of(counting, ends=False).make(frames(TextRequest(prompt="a", length=30)), settings)
    assert 0 < text.tokens.count(mask) < 29
    expected = ["█" if token == mask else (LETTERS * 4)[i] for i, token in enumerate(text.tokens)]
    assert text.text == "".join(expected)


def test_a_character_of_several_tokens_is_shown_once_it_is_whole():
    first, second = "é".encode()
    assert decode_states(ByteTokenizer(), [97, first, second, 256, 98]) == "aé█b"
    assert decode_states(ByteTokenizer(), [97, first, 256, 256]) == "a\ufffd██"


def test_batches_have_one_length_and_lose_nothing():
    generator = random.Random(2)
    for batch_size in (1, 2, 3, 50):
        lengths = [generator.randint(1, 4) for _ in range(40)]
        made = [Frame(k, 0, (0,) * length, (False,) * length) for k, length in enumerate(lengths)]
        batches = list(batches_of(made, batch_size))
        assert sorted(frame.sample for batch in batches for frame in batch) == list(range(40))
        for length in range(1, 5):
            same = [batch for batch in batches if len(batch[0].tokens) == length]
            assert [frame for batch in same for frame in batch] == [f for f in made if len(f.tokens) == length]
            assert all(len(batch) == batch_size for batch in same[:-1])
        assert max(map(len, batches)) <= batch_size
    assert list(batches_of([], 3)) == []
