"""R13: files as people have them; the right tokens, or one line."""

import bz2
import gzip
import importlib.util
import json
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.campaign import runs
from tests.campaign.attempts import Attempt, Row, expect, expect_right
from tests.campaign.checks import expect_done, expect_refused
from tests.campaign.processes import run

HEADER = struct.Struct("<9sQBQQ")
WORDS = ["the", "fox", "é", "naïve", "日本", "🦊", '"', "\\", "\n", "\t", "{", "}", "a,b", "</s>", "\u2028", " "]


@dataclass(frozen=True)
class Input:
    """An input file, and what is to come of it."""

    path: Path | str
    documents: list[str] | None  # None: it is refused
    flags: tuple[str, ...] = ()
    may_be_refused: bool = False
    stdin: Path | None = None


def prepare(attempt: Attempt) -> None:
    """One kind of file, prepared; or one kind of index, trained on."""
    dice = attempt.random
    kinds = [*KINDS, "index"]
    kind = kinds[attempt.number % len(kinds)]
    if kind == "index":
        break_index(attempt, dice)
        return
    documents = [" ".join(dice.choices(WORDS, k=dice.randint(1, 30))) for _ in range(dice.randint(1, 12))]
    made = KINDS[kind](attempt.folder, documents, dice)
    flags = made.flags if "--tokenizer-type" in made.flags else ("--tokenizer-type", "ByteTokenizer", *made.flags)
    command = ["prepare_data", "--input", str(made.path), "--output-prefix", str(attempt.folder / "out" / "c"), *flags]
    done = run(command, attempt.folder, stdin=made.stdin)
    if made.documents is None or (made.may_be_refused and done.code):
        if made.documents is None:
            expect_right(done.code != 0, f"{kind}: exit code 0, must be refused: {done.said[-500:]}")
        expect_refused(done)
        expect(not list((attempt.folder / "out").glob("*.idx")), f"{kind}: refused, and a corpus is there")
        return
    expect_done(done)
    (data,) = (attempt.folder / "out").glob("*.bin")
    expected = [list(document.encode()) for document in made.documents if document]
    found = read_documents(data)
    expect_right(found == expected, f"{kind}: other tokens: {found} instead of {expected}"[:600])


def read_documents(tokens: Path) -> list[list[int]]:
    """The tokens of each document, as .idx cuts .bin."""
    index = tokens.with_suffix(".idx").read_bytes()
    num_sequences = HEADER.unpack_from(index)[3]
    lengths = np.frombuffer(index, np.int32, num_sequences, HEADER.size)
    values, ends = np.fromfile(tokens, np.uint16), np.cumsum(lengths)
    return [values[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]


def _lines(documents: list[str], key: str = "text") -> str:
    return "".join(json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(documents))


def _file(name: str, change: Callable[[bytes], bytes] = bytes, **how: object) -> Callable:
    """JSON lines in a file of this name, its bytes changed."""

    def make(folder: Path, documents: list[str], dice: random.Random) -> Input:
        path = folder / name
        path.write_bytes(change(_lines(documents).encode()))
        return Input(path, documents, **how)

    return make


def _refused(name: str, change: Callable[[bytes], bytes]) -> Callable:
    def make(folder: Path, documents: list[str], dice: random.Random) -> Input:
        path = folder / name
        path.write_bytes(change(_lines([*documents, "é"]).encode()))
        return Input(path, None)

    return make


def _zstandard(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-q", "-c"], input=data, capture_output=True, check=True).stdout


def _nulls(folder: Path, documents: list[str], dice: random.Random) -> Input:
    # Not splitlines, which ends a line at U+2028 too.
    lines = _lines(documents).rstrip("\n").split("\n")
    for _ in range(dice.randint(1, 5)):
        lines.insert(dice.randint(0, len(lines)), dice.choice(('{"text": null}', '{"text": null, "id": 3}')))
    (folder / "nulls.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return Input(folder / "nulls.jsonl", documents)


def _key_with_slash(folder: Path, documents: list[str], dice: random.Random) -> Input:
    (folder / "keys.jsonl").write_text(_lines(documents, "a/b"), encoding="utf-8")
    return Input(folder / "keys.jsonl", documents, ("--json-keys", "a/b"))


def _missing_key(folder: Path, documents: list[str], dice: random.Random) -> Input:
    (folder / "keys.jsonl").write_text(_lines(documents) + '{"other": "x"}\n', encoding="utf-8")
    return Input(folder / "keys.jsonl", None)


def _standard_input(folder: Path, documents: list[str], dice: random.Random) -> Input:
    (folder / "piped").write_text(_lines(documents), encoding="utf-8")
    return Input("-", documents, ("--input-format", "jsonl"), stdin=folder / "piped")


def _plain(folder: Path, documents: list[str], dice: random.Random) -> Input:
    (folder / "plain.txt").write_bytes("\r\n".join(documents).encode())
    text = "\r\n".join(documents)
    return Input(folder / "plain.txt", [text], may_be_refused=text.lstrip().startswith("{"))


def _braces(folder: Path, documents: list[str], dice: random.Random) -> Input:
    (folder / "code.txt").write_text("{ begin\n" * dice.randint(5, 50))
    return Input(folder / "code.txt", None)


def _braces_as_text(folder: Path, documents: list[str], dice: random.Random) -> Input:
    text = "{ begin\n" * dice.randint(5, 50)
    (folder / "code.txt").write_text(text)
    return Input(folder / "code.txt", [text], ("--input-format", "text"))


def _raw(folder: Path, documents: list[str], dice: random.Random) -> Input:
    text = "".join(documents)
    dtype = dice.choice(("uint8", "uint16", "int32"))
    np.array(list(text.encode()), dtype).tofile(folder / "train.bin")
    return Input(folder / "train.bin", [text], ("--input-dtype", dtype), may_be_refused=dtype == "uint8")


def _raw_outside(folder: Path, documents: list[str], dice: random.Random) -> Input:
    np.array([1, 2, dice.randint(256, 60000)], "uint16").tofile(folder / "train.bin")
    return Input(folder / "train.bin", None, ("--input-dtype", "uint16"))


def _raw_odd(folder: Path, documents: list[str], dice: random.Random) -> Input:
    (folder / "train.bin").write_bytes(bytes(2 * dice.randint(1, 9) + 1))
    return Input(folder / "train.bin", None, ("--input-dtype", "uint16"))


def _unknown(folder: Path, documents: list[str], dice: random.Random) -> Input:
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "the": 1}, "unk_token": "[UNK]"}
    (folder / "words").mkdir()
    (folder / "words" / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
                    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": model})
    )  # fmt: skip
    (folder / "text.txt").write_text("the fox jumps over the dog " * dice.randint(3, 30))
    return Input(
        folder / "text.txt", None, ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", f"{folder}/words")
    )


def _deep(folder: Path, documents: list[str], dice: random.Random) -> Input:
    deep = "[" * 100_000 + "]" * 100_000
    (folder / "deep.jsonl").write_text(f'{_lines(documents)}{{"text": {deep}}}\n', encoding="utf-8")
    return Input(folder / "deep.jsonl", None)


def _folder(folder: Path, documents: list[str], dice: random.Random) -> Input:
    inside = folder / "inside"
    inside.mkdir()
    (inside / "a.jsonl").write_text(_lines(documents), encoding="utf-8")
    (inside / "b.txt").write_text("plain text")
    (inside / "c.png").write_bytes(b"\x89PNG\xff\xfe")
    return Input(inside, [*documents, "plain text"])


KINDS: dict[str, Callable[[Path, list[str], random.Random], Input]] = {
    "jsonl": _file("a.jsonl"),
    "byte order mark": _file("a.jsonl", lambda data: b"\xef\xbb\xbf" + data),
    "CRLF": _file("a.jsonl", lambda data: data.replace(b"\n", b"\r\n")),
    "blank lines": _file("a.jsonl", lambda data: b"\n" + data.replace(b"\n", b"\n  \n")),
    "no last line end": _file("a.jsonl", lambda data: data[:-1]),
    ".json": _file("a.json"),
    ".ndjson": _file("a.ndjson"),
    ".JSONL": _file("a.JSONL"),
    "without a suffix": _file("data"),
    ".txt with JSON lines": _file("a.txt", may_be_refused=True),
    "gzip": _file("a.jsonl.gz", gzip.compress),
    "bzip2": _file("a.jsonl.bz2", bz2.compress),
    "gzip in pieces": _file("a.jsonl.gz", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:])),
    "cut gzip": _refused("a.jsonl.gz", lambda data: gzip.compress(data)[:-9]),
    "no gzip": _file("a.jsonl.gz", may_be_refused=True),
    "UTF-16": _refused("a.jsonl", lambda data: data.decode().encode("utf-16")),
    "Latin-1": _refused("a.jsonl", lambda data: b'{"text": "caf\xe9"}\n'),
    "half a pair": _refused("a.jsonl", lambda data: b'{"text": "a\\ud800b"}\n'),
    "cut line": _refused("a.jsonl", lambda data: data + b'{"text": "abc'),
    "array": _refused("a.jsonl", lambda data: data + b'["text"]\n'),
    "number": _refused("a.jsonl", lambda data: data + b'{"text": 5}\n'),
    "empty": _refused("a.jsonl", lambda data: b""),
    "nulls": _nulls,
    "key with a slash": _key_with_slash,
    "missing key": _missing_key,
    "standard input": _standard_input,
    "plain text": _plain,
    "braces": _braces,
    "braces as text": _braces_as_text,
    "raw": _raw,
    "raw outside the vocabulary": _raw_outside,
    "raw of odd size": _raw_odd,
    "unknown tokens": _unknown,
    "deep": _deep,
    "folder": _folder,
}
# The reader is of the extra `data`.
if shutil.which("zstd") and importlib.util.find_spec("backports.zstd"):
    KINDS["zstandard"] = _file("a.jsonl.zst", _zstandard)
    KINDS["cut zstandard"] = _refused("a.jsonl.zst", lambda data: _zstandard(data)[:-9])


def break_index(attempt: Attempt, dice: random.Random) -> None:
    """An .idx that is not what it says, or not for text; without its digest, as another program writes it."""
    data = attempt.folder / "corpus_text_document"
    for suffix in (".bin", ".idx"):
        shutil.copy2(f"{attempt.base.data}{suffix}", f"{data}{suffix}")
    shutil.copytree(f"{attempt.base.data}_tokenizer", f"{data}_tokenizer")
    path = data.with_suffix(".idx")
    if dice.random() < 0.4:
        _several_documents(data, dice)
    index = bytearray(path.read_bytes())
    magic, version, code, sequences, documents = HEADER.unpack_from(index)
    how = dice.choice(("magic", "version", "dtype", "pointer", "length", "count", "modes", "cut"))
    pointers = HEADER.size + 4 * sequences
    if how == "modes":
        index += bytes(sequences)
    elif how == "cut":
        del index[dice.randrange(len(index)) :]
    elif how == "pointer":
        struct.pack_into("<q", index, pointers + 8 * dice.randrange(sequences), dice.choice((-8, 2, 1 << 40)))
    elif how == "length":
        struct.pack_into("<i", index, HEADER.size + 4 * dice.randrange(sequences), dice.choice((-1, 1, 1 << 30)))
    else:
        fields = {"magic": (b"X" * 9, version, code, sequences, documents), "version": (magic, 2, code, sequences,
                  documents), "dtype": (magic, version, 77, sequences, documents),
                  "count": (magic, version, code, sequences + 1, documents)}[how]  # fmt: skip
        HEADER.pack_into(index, 0, *fields)
    path.write_bytes(index)
    done = run(runs.train(attempt.folder / "run", data, steps=2), attempt.folder)
    expect_right(done.code != 0, f".idx with another {how}: exit code 0")
    expect_refused(done, ".idx" if how != "length" else "corpus_text_document")


def _several_documents(data: Path, dice: random.Random) -> None:
    """Cut the one document into some."""
    tokens = np.fromfile(f"{data}.bin", np.uint16)
    cuts = sorted(dice.sample(range(1, len(tokens)), dice.randint(1, 5)))
    bounds = np.array([0, *cuts, len(tokens)], np.int64)
    with open(f"{data}.idx", "wb") as file:
        file.write(HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, len(bounds) - 1, len(bounds)))
        file.write(np.diff(bounds).astype(np.int32).tobytes())
        file.write((bounds[:-1] * 2).tobytes())
        file.write(np.arange(len(bounds), dtype=np.int64).tobytes())


ROWS = [Row("R13", "data files of every kind", prepare, attempts=10 * (len(KINDS) + 1), short=len(KINDS) + 1)]
