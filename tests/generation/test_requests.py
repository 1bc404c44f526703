"""From what a person asks for to positions: which are given, which are to be made, and what every mistake is called."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
import sentencepiece

from sedd_megatron.data.tokenizers import ByteTokenizer, CharTokenizer, SentencePieceTokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.generation.requests import AS_ARGUMENTS, Frame, TextRequest, frames_of, read_requests

LETTERS = CharTokenizer("abcdefgh ")
SEQ_LENGTH = 8
EXAMPLE = 'write it as {"prompt": "Once upon", "num_samples": 2}'


def shown(frame: Frame) -> str:
    """The given letters in their places, and _ where one is to be made."""
    assert len(frame.tokens) == len(frame.given)
    return "".join(
        LETTERS.decode([token]) if given else "_" for token, given in zip(frame.tokens, frame.given, strict=True)
    )


def only_frame(request: TextRequest, **others) -> Frame:
    (frame,) = frames_of(request, LETTERS, SEQ_LENGTH, **others)
    return frame


def read(path: Path, *lines: str | dict, defaults: TextRequest | None = None, first_sample: int = 0) -> list[Frame]:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return read_requests(path, LETTERS, SEQ_LENGTH, defaults or TextRequest(), first_sample)


@pytest.fixture(scope="module")
def without_bytes() -> SentencePieceTokenizer:
    """A SentencePiece model that has no bytes to stand in for a character that its text did not have."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc cab abc", "bca abc cab"] * 20), model_writer=model, vocab_size=20,
        hard_vocab_limit=False, byte_fallback=False, minloglevel=2,
    )  # fmt: skip
    return SentencePieceTokenizer(model.getvalue())


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (TextRequest(), "________"),
        (TextRequest(prompt="ab a"), "ab a____"),
        (TextRequest(suffix="cd"), "______cd"),
        (TextRequest(prompt="a", suffix="cd", length=6), "a___cd"),
        (TextRequest(prompt="abcd", suffix="efgh"), "abcdefgh"),
        (TextRequest(prompt="a", length=11), "a__________"),
        (TextRequest(length=1), "_"),
        (TextRequest(infill="[MASK]"), "_"),
        (TextRequest(infill="a[MASK*3]b"), "a___b"),
        (TextRequest(infill="[MASK*12]"), "____________"),
        (TextRequest(infill="a[MASK][MASK*2]b[MASK]c"), "a___b_c"),
        (TextRequest(infill="[MASK*2]ab[MASK]"), "__ab_"),
        (TextRequest(infill="[MASK]aaaaaaaa"), "_aaaaaaaa"),
    ],
)
def test_given_text_keeps_its_place_and_the_rest_is_to_be_made(wanted, expected):
    assert shown(only_frame(wanted)) == expected


@pytest.mark.parametrize("text", ["[mask]", "[MASK *2]", "[MASK*]", "[MASK*-1]", "[ MASK ]", "MASK*2", "[MASK*2"])
def test_what_only_looks_like_a_mask_is_text(text):
    (frame,) = frames_of(TextRequest(infill=f"{text}[MASK]"), ByteTokenizer(), SEQ_LENGTH)
    assert bytes(frame.tokens[:-1]).decode() == text
    assert frame.given == (True,) * len(text) + (False,)


def test_a_position_is_a_token_and_not_a_character():
    (frame,) = frames_of(TextRequest(infill="é[MASK*2]世[MASK]"), ByteTokenizer(), SEQ_LENGTH)
    assert frame.given == (True, True, False, False, True, True, True, False)
    assert bytes(frame.tokens[:2]).decode() == "é"
    assert bytes(frame.tokens[4:7]).decode() == "世"


def test_token_ids_stand_where_they_are_given_and_the_first_id_counts_as_given():
    frame = only_frame(TextRequest(), tokens=[None, 3, 0, None])
    assert shown(frame) == "_da_"
    assert frame.given == (False, True, True, False)


def test_samples_are_numbered_on_and_share_all_else():
    frames = frames_of(TextRequest(prompt="a", num_samples=3, seed=5), LETTERS, SEQ_LENGTH, first_sample=7)
    assert [frame.sample for frame in frames] == [7, 8, 9]
    assert len({dataclasses.replace(frame, sample=0) for frame in frames}) == 1
    assert (frames[0].seed, frames[0].line) == (5, None)


def test_lines_are_numbered_on_and_say_which_line_they_are(tmp_path):
    lines = ["", {"num_samples": 2}, "  \t", {"seed": 4, "length": 2}, "", {"num_samples": 3, "infill": "[MASK]"}]
    frames = read(tmp_path / "requests", *lines, first_sample=10)
    assert [frame.sample for frame in frames] == [10, 11, 12, 13, 14, 15]
    assert [frame.line for frame in frames] == [2, 2, 4, 6, 6, 6]
    assert [frame.seed for frame in frames] == [0, 0, 4, 0, 0, 0]
    assert [len(frame.tokens) for frame in frames] == [8, 8, 2, 1, 1, 1]


def test_a_line_says_what_differs_from_the_defaults(tmp_path):
    defaults = TextRequest(prompt="ab", suffix="g", length=5, num_samples=1, seed=9)
    lines = [{}, {"prompt": ""}, {"suffix": "", "seed": 0}, {"length": 3}, {"infill": "c[MASK]"}, {"tokens": [7, None]}]
    frames = read(tmp_path / "requests", *lines, defaults=defaults)
    assert [shown(frame) for frame in frames] == ["ab__g", "____g", "ab___", "abg", "c_", "h_"]
    assert [frame.seed for frame in frames] == [9, 9, 0, 9, 9, 9]


def test_a_file_from_another_system_reads_the_same(tmp_path):
    path = tmp_path / "requests"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "ab"}\r\n\r\n{"suffix": "c"}\r\n')
    frames = read_requests(path, LETTERS, 3, TextRequest())
    assert [(shown(frame), frame.line) for frame in frames] == [("ab_", 1), ("__c", 3)]


KEYS = "prompt, suffix, infill, length, num_samples, seed, tokens"
NULLS = "tokens must be a list of ids with null where one is to be made"
EMPTY = "infill has nothing to fill in; write [MASK] or [MASK*12] where tokens are wanted"
NOTHING = "fills in nothing; write a number of at least 1, or leave it out"
UNKNOWN = "is not among the 9 that this CharTokenizer knows; leave it out, or train with ByteTokenizer"
WHOLE = "infill is the whole text; leave out prompt, suffix, length"
MISTAKES = [
    ({"prompt": "a" * 9}, "prompt of 9 tokens: longer than a sample of 8; shorten the text or raise length"),
    ({"prompt": "ab", "suffix": "cd", "length": 3},
     "prompt and suffix of 4 tokens: longer than a sample of 3; shorten the text or raise length"),
    ({"infill": ""}, EMPTY),
    ({"infill": "abc"}, EMPTY),
    ({"infill": "a[MASK*0]b[MASK]"}, f"infill: [MASK*0] {NOTHING}"),
    ({"infill": "[MASK*00]"}, f"infill: [MASK*00] {NOTHING}"),
    ({"infill": "[MASK]", "prompt": "a"}, WHOLE),
    ({"infill": "[MASK]", "suffix": "a"}, WHOLE),
    ({"infill": "[MASK]", "length": 8}, WHOLE),
    ({"prompt": "abz"}, f"prompt: character 'z' {UNKNOWN}"),
    ({"suffix": "\n"}, f"suffix: character '\\n' {UNKNOWN}"),
    ({"infill": "[MASK]a[MASK]Z"}, f"infill: character 'Z' {UNKNOWN}"),
    ('{"prompt": "\\ud800"}', "prompt: '\\ud800' is not a character; write the text in UTF-8"),
    ({"num_samples": 0}, "num_samples 0 must be at least 1"),
    ({"seed": -1}, "seed -1 must be at least 0"),
    ({"seed": 2**63}, f"seed {2**63} must be at most {2**63 - 1}"),
    ({"length": 0}, "length 0 must be at least 1"),
    ({"lenght": 4}, f"unknown key 'lenght'; choose from {KEYS}"),
    ({"sampler": "euler"}, f"unknown key 'sampler'; choose from {KEYS}"),
    ({"length": "4"}, "length is '4', must be of type int"),
    ({"length": 4.0}, "length is 4.0, must be of type int"),
    ({"length": None}, "length is None, must be of type int"),
    ({"seed": True}, "seed is True, must be of type int"),
    ({"prompt": 4}, "prompt is 4, must be of type str"),
    ({"infill": ["[MASK]"]}, "infill is ['[MASK]'], must be of type str"),
    ({"tokens": [1, 9, None]}, "token 9 must be an id from 0 to 8, or null"),
    ({"tokens": [-1, None]}, "token -1 must be an id from 0 to 8, or null"),
    ({"tokens": [None, True]}, "token True must be an id from 0 to 8, or null"),
    ({"tokens": [None, "a"]}, "token 'a' must be an id from 0 to 8, or null"),
    ({"tokens": [1, 2]}, NULLS),
    ({"tokens": []}, NULLS),
    ({"tokens": "ab"}, NULLS),
    ({"tokens": [1, None], "seed": 3, "prompt": "a", "length": 2},
     "tokens are the whole text; leave out prompt, length"),
    ({"tokens": [1, None], "infill": "[MASK]"}, "tokens are the whole text; leave out infill"),
    ("[]", f"not a JSON object; {EXAMPLE}"),
    ('"prompt"', f"not a JSON object; {EXAMPLE}"),
    ("prompt: a", f"not JSON (Expecting value: line 1 column 1 (char 0)); {EXAMPLE}"),
    ("[" * 100_000, f"not JSON (maximum recursion depth exceeded while decoding a JSON array from a unicode string); "
     f"{EXAMPLE}"),
    ('{"prompt": "a"', f"not JSON (Expecting ',' delimiter: line 1 column 15 (char 14)); {EXAMPLE}"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "text"), MISTAKES)
def test_a_mistake_is_named_with_its_line(tmp_path, line, text):
    path = tmp_path / "requests"
    with pytest.raises(UserError) as error:
        read(path, {"prompt": "a"}, "", line, {"prompt": "a"})
    assert str(error.value) == f"--requests {path}, line 3: {text}"


def test_numbers_run_out_at_the_last_that_a_draw_can_have(tmp_path):
    path = tmp_path / "requests"
    frames = read(path, {"seed": 2**63 - 1}, {"num_samples": 2}, first_sample=2**63 - 3)
    assert frames[-1].sample == 2**63 - 1
    with pytest.raises(UserError) as error:
        read(path, {}, {"num_samples": 2}, first_sample=2**63 - 2)
    assert str(error.value) == (
        f"--requests {path}, line 2: the last sample's number would be {2**63}, must be at most {2**63 - 1}"
    )


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_a_file_without_a_line_is_named(tmp_path, content):
    path = tmp_path / "requests"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_requests(path, LETTERS, SEQ_LENGTH, TextRequest())
    assert str(error.value) == (
        f"--requests {path}: no line there; write one JSON object a line, as in "
        '{"prompt": "Once upon", "num_samples": 2}'
    )


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    not_text = tmp_path / "not_text"
    not_text.write_bytes(b"\x80\x81")
    reasons = {tmp_path / "none": "No such file", tmp_path: "Is a directory", not_text: "can't decode byte 0x80"}
    for path, reason in reasons.items():
        with pytest.raises(UserError) as error:
            read_requests(path, LETTERS, SEQ_LENGTH, TextRequest())
        assert str(error.value).startswith(f"--requests {path}: cannot be read as UTF-8 text (")
        assert str(error.value).endswith("); name another file")
        assert reason in str(error.value)
        assert "\n" not in str(error.value)


def test_flags_and_arguments_are_named_as_they_are_written():
    too_long = TextRequest(prompt="a" * 9)
    with pytest.raises(UserError, match=r"^--prompt of 9 tokens: .* or raise --length$"):
        frames_of(too_long, LETTERS, SEQ_LENGTH)
    with pytest.raises(UserError, match=r"^prompt of 9 tokens: .* or raise length$"):
        frames_of(too_long, LETTERS, SEQ_LENGTH, wording=AS_ARGUMENTS)
    with pytest.raises(UserError, match=r"^--num-samples 0 must be at least 1$"):
        frames_of(TextRequest(num_samples=0), LETTERS, SEQ_LENGTH)
    with pytest.raises(UserError, match=r"^--infill is the whole text; leave out --prompt, --suffix, --length$"):
        frames_of(TextRequest(infill="[MASK]", prompt="a"), LETTERS, SEQ_LENGTH)


def test_text_that_a_vocabulary_has_no_token_for_is_not_replaced_in_silence(without_bytes):
    (frame,) = frames_of(TextRequest(prompt="abc cab"), without_bytes, 20)
    assert without_bytes.decode(frame.tokens[: sum(frame.given)]) == "abc cab"
    for field in ("prompt", "suffix", "infill"):
        text = "abc é" + ("[MASK]" if field == "infill" else "")
        with pytest.raises(UserError) as error:
            frames_of(TextRequest(**{field: text}), without_bytes, 20)
        assert str(error.value) == (
            f"--{field} 'abc é': the model's SentencePieceTokenizer has no token for a part of it; leave that out"
        )
    with pytest.raises(UserError, match=r"^--prompt '(abc ){10}\.\.\.': the model's SentencePieceTokenizer has no"):
        frames_of(TextRequest(prompt="abc " * 30 + "é"), without_bytes, 500)
