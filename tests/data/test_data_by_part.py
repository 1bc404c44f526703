"""Data by part (--train-data-path and its like) and made-up data: what is read, what is refused."""

import itertools

import pytest
import torch

from sedd_megatron.arguments import corpora_by_flag, parse_pretrain_options, weighted_corpora
from sedd_megatron.data.corpus import write_corpus
from sedd_megatron.data.mock import mock_windows
from sedd_megatron.data.splits import check_tokens_of_parts, open_parts
from sedd_megatron.data.tokenizers import ByteTokenizer, CharTokenizer
from sedd_megatron.data.windows import open_windows
from sedd_megatron.errors import UserError

LENGTH = 8
NULL = ["--tokenizer-type", "NullTokenizer"]


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory) -> dict[str, str]:
    """Corpora of 20, 6 and 4 windows, each of one letter, and one with a token of its own."""
    folder = tmp_path_factory.mktemp("parts")
    texts = {"a": "a" * 20 * LENGTH, "b": "b" * 6 * LENGTH, "c": "c" * 4 * LENGTH, "beyond": "\xff" * LENGTH}
    for name, text in texts.items():
        write_corpus([text], ByteTokenizer(), folder / name)
    return {name: str(folder / f"{name}_text_document") for name in texts}


def data_of(*flags: str):
    return parse_pretrain_options([*flags, "--seq-length", str(LENGTH)]).data


def parts(*flags: str):
    return open_parts(corpora_by_flag(data_of(*flags)), seq_length=LENGTH, split="1,0,0", num_tokens=256, seed=1)


def letters(dataset, count: int) -> str:
    rows = [dataset[n][1] for n in range(count)]
    assert all(len(set(row.tolist())) == 1 for row in rows)
    return "".join(chr(row[0]) for row in rows)


def test_each_part_is_whole_and_of_its_own_corpora(prefixes):
    windows = parts("--train-data-path", "1", prefixes["a"], "1", prefixes["b"], "--valid-data-path", prefixes["c"])
    assert [len(part) for part in windows] == [26, 4, 0]
    assert sorted(letters(windows.train, 40)) == ["a"] * 20 + ["b"] * 20
    assert letters(windows.valid, 4) == "cccc"
    # As the same corpora are trained on with a split that leaves nothing to the other parts.
    blend = ["--data-path", "1", prefixes["a"], "1", prefixes["b"]]
    same = open_windows(weighted_corpora(data_of(*blend)), seq_length=LENGTH, split="1,0,0", num_tokens=256, seed=1)
    assert all(torch.equal(windows.train[n][1], same.train[n][1]) for n in range(60))
    windows = parts("--train-data-path", prefixes["a"], "--test-data-path", "2", prefixes["b"], "1", prefixes["c"])
    assert [len(part) for part in windows] == [20, 0, 10]
    assert letters(windows.test, 9).count("b") == 6


def test_validation_reads_from_the_beginning_every_time(tmp_path):
    text = "".join(map(chr, range(33, 33 + 5 * LENGTH)))
    write_corpus([text], ByteTokenizer(), tmp_path / "x")
    prefix = str(tmp_path / "x_text_document")
    windows = parts("--train-data-path", prefix, "--valid-data-path", prefix)
    read = [bytes(windows.valid[n][1].tolist()).decode() for n in range(10)]
    assert "".join(read) == text * 2
    assert "".join(bytes(windows.train[n][1].tolist()).decode() for n in range(5)) != text


def test_every_part_is_checked_and_each_file_once(prefixes, monkeypatch):
    flags = ["--train-data-path", prefixes["a"], "--valid-data-path", prefixes["beyond"]]
    opened = open_parts(corpora_by_flag(data_of(*flags)), seq_length=LENGTH, split="", num_tokens=128, seed=1)
    line = r"beyond_text_document\.bin: has tokens 191 to 195, the"
    with pytest.raises(UserError, match=line):
        check_tokens_of_parts(opened, 128)
    with pytest.raises(UserError, match=line):
        opened.valid[0]
    from sedd_megatron.data import windows

    read, range_of_blocks = [], windows.range_of_blocks

    def noted(tokens, *place):
        read.append(str(tokens.filename))
        return range_of_blocks(tokens, *place)

    monkeypatch.setattr(windows, "range_of_blocks", noted)
    a, b = prefixes["a"], prefixes["b"]
    check_tokens_of_parts(parts("--data-path", a), 256)
    check_tokens_of_parts(parts("--train-data-path", a, "--valid-data-path", "1", b, "1", a), 256)
    check_tokens_of_parts(mock_windows(9, LENGTH, 0), 9)
    assert read == [f"{prefix}.bin" for prefix in (a, a, b)]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "missing --data-path: required"),
        (["--data-path", "a", "--train-data-path", "b"], "--data-path a stands in place of --train-data-path b"),
        (["--data-path", "a", "--mock-data"], "--data-path a stands in place of --mock-data; leave"),
        (["--valid-data-path", "a"], "--valid-data-path: only beside --train-data-path; name that too, or cut"),
        (["--data-path", "a", "--test-data-path", "b"], "--data-path a stands in place of --test-data-path b"),
        (["--train-data-path", "a", "b"], "--train-data-path a b: the weight a must be a number above 0"),
        (["--mock-data"], "--mock-data has no text, and needs --tokenizer-type NullTokenizer and"),
        (["--mock-data", "--tokenizer-type", "NullTokenizer"], "--tokenizer-type NullTokenizer needs --vocab-size"),
        (["--data-path", "a", "--vocab-size", "9"], "--vocab-size 9 belongs to --tokenizer-type NullTokenizer;"),
        (["--data-path", "a", "--vocab-size", "0"], "--vocab-size 0 must be at least 1"),
        ([*NULL, "--mock-data", "--vocab-size", "2000000000"], "--vocab-size 2000000000 of --hidden-size 768 is"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(flags, text):
    with pytest.raises(UserError) as refused:
        data_of(*flags)
    assert str(refused.value).startswith(text)


def test_an_error_names_the_flag_of_the_part(prefixes, tmp_path):
    write_corpus(["abc"], ByteTokenizer(), tmp_path / "short")
    short = str(tmp_path / "short_text_document")
    with pytest.raises(UserError, match=rf"--valid-data-path {short}: has 3 tokens, fewer than one window"):
        parts("--train-data-path", prefixes["a"], "--valid-data-path", short)
    from sedd_megatron.training.pretrain import data_tokenizer

    write_corpus(["abc"], CharTokenizer("abc"), tmp_path / "chars")
    for valid, text in (
        ("nowhere", "--valid-data-path nowhere: no file nowhere.idx"),
        (f"{tmp_path}/chars_text_document", "chars_text_document: its tokenizer is not that of"),
    ):
        options = parse_pretrain_options(["--train-data-path", prefixes["a"], "--valid-data-path", valid])
        with pytest.raises(UserError, match=text):
            data_tokenizer(options)


def test_made_up_windows_are_functions_of_seed_part_and_number():
    windows = mock_windows(50, 64, seed=3)
    for part in windows:
        n, row = part[7]
        assert (n, row.dtype, row.shape) == (7, torch.int64, (64,))
        steps = set((row.diff() % 50).tolist())
        assert len(steps) == 1
        assert steps <= {1, 2, 3, 4}
        assert torch.equal(part[7 + len(part)][1], row)
    rows = [tuple(part[n][1].tolist()) for part in windows for n in range(40)]
    assert len(set(rows)) > 80
    assert len(set(itertools.chain(*rows))) == 50
    assert not torch.equal(mock_windows(50, 64, seed=4).train[7][1], windows.train[7][1])
    assert mock_windows(1, 4, seed=0).train[0][1].tolist() == [0] * 4
