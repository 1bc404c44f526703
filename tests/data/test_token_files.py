"""Bare tokens become a corpus of the same tokens, cut into documents where they end, and foreign ones are named."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf

from sedd_megatron.data import token_files
from sedd_megatron.data.corpus import open_tokens
from sedd_megatron.data.input_files import InputFile
from sedd_megatron.data.library_tokenizers import HuggingFaceTokenizer
from sedd_megatron.data.token_files import TokenSource
from sedd_megatron.data.tokenizers import ByteTokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.options import parse_options
from sedd_megatron.prepare_data import PrepareOptions, prepare

END = 3
WORDS = HuggingFaceTokenizer(
    hf.Tokenizer(hf.models.WordLevel({"a": 0, "b": 1, "<unk>": 2, "</s>": END}, "<unk>")), "</s>"
)


def source_of(folder: Path, *contents: list[int], dtype: str = "uint16") -> TokenSource:
    for number, content in enumerate(contents):
        np.array(content, dtype).tofile(folder / f"{number}.bin")
    return TokenSource([InputFile(folder / f"{number}.bin") for number in range(len(contents))], dtype)


def documents_of(tokens: list[int], longest: int) -> list[int]:
    """Lengths, told one token at a time."""
    lengths = [0]
    for token in tokens:
        if lengths[-1] == longest:
            lengths.append(0)
        lengths[-1] += 1
        if token == END:
            lengths.append(0)
    return [length for length in lengths if length > 0]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", token_files.INPUT_DTYPES)
def test_tokens_stay_and_documents_end_where_they_end(tmp_path, monkeypatch, seed, dtype):
    """However much is read at once, and wherever it is begun again."""
    generator = np.random.Generator(np.random.Philox(seed))
    files = [generator.choice(4, size, p=[0.5, 0.2, 0.2, 0.1]).tolist() for size in generator.integers(0, 60, 3)]
    everything = [token for file in files for token in file]
    monkeypatch.setattr(token_files, "LONGEST_DOCUMENT", 7)
    monkeypatch.setattr(token_files, "TOKENS_AT_ONCE", int(generator.integers(1, 30)))
    source = source_of(tmp_path, *files, dtype=dtype)
    chunks = list(source.chunks(WORDS))
    assert [token for chunk in chunks for token in chunk.tokens.tolist()] == everything
    assert source.position == source.total
    lengths = [length for chunk in chunks for length in chunk.lengths.tolist()]
    assert lengths == [length for file in files for length in documents_of(file, 7)]
    assert sum(chunk.num_unknown for chunk in chunks) == everything.count(WORDS.unknown_id)
    for end in range(1, len(chunks)):
        done = sum(len(chunk.tokens) for chunk in chunks[:end])
        rest = list(source.chunks(WORDS, done))
        assert [length for chunk in rest for length in chunk.lengths.tolist()] == lengths[
            sum(len(chunk.lengths) for chunk in chunks[:end]) :
        ]
        assert [token for chunk in rest for token in chunk.tokens.tolist()] == everything[done:]


def test_a_tokenizer_without_an_end_of_document_has_documents_of_the_longest(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "LONGEST_DOCUMENT", 4)
    chunks = source_of(tmp_path, list(range(10)), [1, 2]).chunks(ByteTokenizer())
    assert [length for chunk in chunks for length in chunk.lengths.tolist()] == [4, 4, 2, 2]


def test_foreign_tokens_and_cut_files_are_named(tmp_path):
    with pytest.raises(UserError) as error:
        list(source_of(tmp_path, [1, 2], [0, 3, 300, 301]).chunks(ByteTokenizer()))
    assert str(error.value) == (
        f"--input {tmp_path}/1.bin: token 300 at position 2, and ByteTokenizer has tokens 0 to 255; give the tokenizer "
        "that it was made with, or another --input-dtype"
    )
    with pytest.raises(UserError, match="token -1 at position 1"):
        list(source_of(tmp_path, [1, -1], dtype="int32").chunks(ByteTokenizer()))
    (tmp_path / "0.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match="has 3 bytes, no multiple of the 2 of --input-dtype uint16"):
        TokenSource([InputFile(tmp_path / "0.bin")], "uint16")


@pytest.fixture
def gpt2_flags(tmp_path) -> list[str]:
    tokens = [*sorted(hf.pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    (tmp_path / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
    return ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", str(tmp_path / "encoder.json"), "--merge-file",
            str(tmp_path / "vocab.bpe"), "--output-prefix", str(tmp_path / "p")]  # fmt: skip


def run(*flags: str) -> None:
    (options,) = parse_options((PrepareOptions,), flags, "", "")
    prepare(options)


def test_nanogpts_file_is_the_corpus_of_its_texts(tmp_path, gpt2_flags, capsys):
    """As its prepare.py writes them: the tokens of each text and <|endoftext|>."""
    texts = ["one", "two words", "", "three!\n"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text))
    run(*gpt2_flags, "--input", str(tmp_path / "in.jsonl"), "--append-eod")
    files = [tmp_path / f"p_text_document{suffix}" for suffix in (".bin", ".idx")]
    expected = [path.read_bytes() for path in files]
    open_tokens(str(tmp_path / "p_text_document")).astype("<u2").tofile(tmp_path / "train.bin")
    run(*gpt2_flags, "--input", str(tmp_path / "train.bin"), "--input-dtype", "uint16")
    assert [path.read_bytes() for path in files] == expected
    assert "3 documents, 22 tokens of 257, unigram" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"train.bin: token \d+ at position 0, and GPT2BPETokenizer has tokens 0 to 256"
    ):
        run(*gpt2_flags, "--input", str(tmp_path / "train.bin"), "--input-dtype", "uint32")
    for flags in (["--append-eod"], ["--allow-special-tokens"], ["--json-keys", "a"], ["--input-format", "text"]):
        with pytest.raises(UserError, match=r"^--input-dtype: bare tokens are taken as they are; leave "):
            run(*gpt2_flags, "--input", str(tmp_path / "train.bin"), "--input-dtype", "uint16", *flags)
    with pytest.raises(UserError, match=r"^--input-dtype uint16: there is no text to learn a tokenizer from; give "):
        run("--output-prefix", str(tmp_path / "p"), "--tokenizer-type", "CharTokenizer", "--input",
            str(tmp_path / "train.bin"), "--input-dtype", "uint16")  # fmt: skip


def test_names_in_gpt2s_text_are_text_unless_they_are_allowed(tmp_path, gpt2_flags):
    (tmp_path / "in.txt").write_text("one<|endoftext|>two words<|endoftext|>")
    for flags, num_ends in (([], 0), (["--append-eod"], 1), (["--allow-special-tokens"], 2)):
        run(*gpt2_flags, "--input", str(tmp_path / "in.txt"), *flags)
        assert open_tokens(str(tmp_path / "p_text_document")).tolist().count(256) == num_ends


def test_tokens_are_never_taken_for_a_packed_file(tmp_path):
    chunks = list(
        source_of(tmp_path, [0x8B1F, 8, 1], dtype="uint16").chunks(type("T", (ByteTokenizer,), {"num_tokens": 60000})())
    )
    assert [chunk.tokens.tolist() for chunk in chunks] == [[0x8B1F, 8, 1]]


class Wide(ByteTokenizer):
    """A tokenizer of many tokens."""

    num_tokens = 200_000


@pytest.mark.parametrize(
    ("written", "read", "largest"),
    [("uint32", "uint16", 200), ("uint32", "uint16", 150_000), ("int32", "uint16", 60_000), ("int64", "uint16", 60_000),
     ("int64", "uint16", 150_000), ("int64", "uint32", 150_000), ("int64", "int32", 200)],
)  # fmt: skip
def test_tokens_of_another_width_are_told(tmp_path, written, read, largest):
    generator = np.random.Generator(np.random.Philox(0))
    generator.integers(0, largest, 4000).astype(written).tofile(tmp_path / "0.bin")
    with pytest.raises(UserError) as error:
        TokenSource([InputFile(tmp_path / "0.bin")], read)
    fits = "int64" if written == "int64" else "uint32"
    assert str(error.value) == (
        f"--input {tmp_path}/0.bin: of its tokens as {read} all are 0 or small but for those that begin a {fits}; give "
        f"--input-dtype {fits}"
    )


@pytest.mark.parametrize("dtype", token_files.INPUT_DTYPES)
def test_tokens_of_the_right_width_are_taken(tmp_path, dtype):
    generator = np.random.Generator(np.random.Philox(1))
    for tokens in (generator.integers(0, 256, 5000), generator.integers(0, 60_000, 5000), generator.integers(0, 4, 500),
                   np.zeros(5000), np.ones(5000), np.array([5, 0, 7, 0]), generator.integers(0, 2, 64)):  # fmt: skip
        tokens.astype(dtype).tofile(tmp_path / "0.bin")
        chunks = TokenSource([InputFile(tmp_path / "0.bin")], dtype).chunks(Wide())
        assert [token for chunk in chunks for token in chunk.tokens.tolist()] == tokens.tolist()


def test_headers_and_packed_files_are_no_tokens(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(100, dtype=np.uint16))
    with pytest.raises(UserError, match=r"a.npy: is a NumPy file, with a header before its tokens; write them bare"):
        TokenSource([InputFile(tmp_path / "a.npy")], "uint16")
    packed = gzip.compress(np.arange(100, dtype=np.uint16).tobytes())
    (tmp_path / "a.bin.gz").write_bytes(packed + b"\0" * (len(packed) % 2))
    with pytest.raises(UserError, match=r"a.bin.gz: is packed, and bare tokens are taken as they are; unpack it$"):
        TokenSource([InputFile(tmp_path / "a.bin.gz")], "uint16")
