"""A file is taken for what it holds, packed or not; what may be a text or lines of JSON is refused by name."""

import bz2
import gzip
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from backports import zstd

from sedd_megatron.data.corpus import open_tokens
from sedd_megatron.data.documents import FileSource
from sedd_megatron.data.input_files import InputFile, input_files
from sedd_megatron.data.tokenizers import load_tokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.options import parse_options
from sedd_megatron.prepare_data import PrepareOptions, prepare
from tests.commands import run

LINES = b'{"text": "one {1}", "n": 1}\n\n{"n": 2, "text": "two\\n"}\n'
TEXTS = ["one {1}", "two\n"]
POEM = "{ braces }\nare flowers,\n{ or } birds\nin a cage.\n"
SOURCE = "int f()\n{\n    return 1;\n}\n\nint g()\n{\n    return f();\n}\n"
MARKDOWN = '# Settings\n\n```json\n{\n  "a": 1\n}\n```\n[link](there)\n'
PYTHON = 'X = {\n    "a": {"b": 1},\n}\n{"a": 1}\n'
JINJA = "{% if a %}\n{{ a }}\n{% endif %}\nend\n"


def zstd_packed(content: bytes) -> bytes:
    """With a checksum, as the command zstd writes it."""
    return zstd.compress(content, options={zstd.CompressionParameter.checksum_flag: 1})


PACKINGS = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd_packed}


def texts_in(path: Path, key: str = "text", **options) -> list[str]:
    return list(FileSource(input_files([str(path)], **options)).texts(key))


def written(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal_of(*arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        texts_in(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name", ["a.json", "a.ndjson", "a.JSONL", "a.jsonl", "a.txt", "a", "a.log", "a.jsonl.gz", "a.zst", "a.tar.json"]
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_of_json_are_told_by_content_whatever_the_name(tmp_path, name, mark):
    path = written(tmp_path, name, PACKINGS.get(path_suffix(name), bytes)(mark + LINES))
    assert texts_in(path) == TEXTS
    assert texts_in(path, input_format="text") == [LINES.decode()], "told to, it is a text"


def path_suffix(name: str) -> str:
    return Path(name).suffix


@pytest.mark.parametrize(
    "text",
    [
        POEM,
        SOURCE,
        MARKDOWN,
        PYTHON,
        "",
        "\n\n",
        "x",
        "[1] a reference",
        "{\n" * 5 + "x\n" * 5,
        '"To be."\n',
        '"Yes."\n"No," he said.\n',
        '"a",\n"b",\n["c"],\n',
        "[section]\n[other]\n",
        "[]\n[]\n",
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.py", "a.md", "a"])
def test_texts_with_braces_are_texts(tmp_path, name, text):
    assert texts_in(written(tmp_path, name, text)) == [text]
    assert texts_in(tmp_path / name, input_format="text") == [text]


@pytest.mark.parametrize("text", [JINJA, LINES.decode() + '{"text": "cut', '# by hand\n{"text": "a"}\n{"text": "b"}\n',
                                  '{"text": "a"}\n{"text": b}\n', '{"text": "a'])  # fmt: skip
def test_a_text_of_braces_is_refused_with_the_flag_that_says_what_it_is(tmp_path, text):
    path = written(tmp_path, "a.txt", text)
    assert refusal_of(path) == (
        f"--input {path}: most lines begin with a brace, but not all are JSON objects; --input-format jsonl if there "
        "is to be one in each line, text to train on it as it stands"
    )
    assert texts_in(path, input_format="text") == [text]
    assert f"--input {path} line " in refusal_of(path, input_format="jsonl")


@pytest.mark.parametrize(
    ("name", "value"),
    [("a.json", [{"text": "x"}, {"text": "y"}]), ("a.txt", {"text": ["x"], "b": 1}), ("a", [1]), ("a.json", "x")],
)
def test_json_that_is_not_one_object_a_line_is_refused(tmp_path, name, value):
    path = written(tmp_path, name, json.dumps(value, indent=1) + "\n")
    assert_refused_as_json(path)
    if isinstance(value, dict):
        assert_refused_as_json(written(tmp_path, name, 2 * path.read_bytes()))


@pytest.mark.parametrize(
    "text",
    [
        '["text 1"]\n["text 2"]\n',
        '"text 1"\n"text 2"\nx\n',
        '\x1e{"text": "a"}\n',
        '\x1e{"text": "a"}\n\x1e"b"\n',
        '["b"]\n{"a": 1}\nx\n',
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a"])
def test_lines_of_other_json_are_refused(tmp_path, name, text):
    path = written(tmp_path, name, text)
    assert refusal_of(path) == (
        f"--input {path}: most lines are JSON, but not all of them objects; write one object in each line (jq -c "
        "'{text: .}' for strings), or give --input-format text to train on it as it stands"
    )
    assert texts_in(path, input_format="text") == [text]


def assert_refused_as_json(path: Path) -> None:
    assert f"--input {path}: is JSON, but not one object in each line; write it so (jq -c" in refusal_of(path)
    assert texts_in(path, input_format="text") == [path.read_text()]


def test_a_folder_names_what_it_leaves_out(tmp_path, capsys):
    for name, content in [("a.txt", "1"), ("b.json", LINES), ("c.json", '{\n"text": 1\n}'), ("d.NDJSON", LINES),
                          ("e.txt.gz", gzip.compress(b"2")), ("deep/f.MD", "3"), ("g.pdf", "%PDF"), ("h", "no suffix"),
                          ("i.csv", "a,b"), ("z.gz", gzip.compress(b"4"))]:  # fmt: skip
        written(tmp_path, name, content)
    assert texts_in(tmp_path) == ["1", *TEXTS, *TEXTS, "3", "2"]
    assert capsys.readouterr().err == (
        f"warning: --input {tmp_path}: left out 5 files of other kinds: c.json, g.pdf, h, ...\n"
    )
    for name in (".git/a.txt", "deep/.b.txt", "deep/.c/d.txt"):
        written(tmp_path, name, "hidden")
    assert texts_in(tmp_path) == ["1", *TEXTS, *TEXTS, "3", "2"]
    assert capsys.readouterr().err.startswith(
        f"warning: --input {tmp_path}: left out 3 hidden files or files of tokenizers: .git/a.txt, deep/.b.txt, "
        f"deep/.c/d.txt\nwarning: --input {tmp_path}: left out 5 files of other kinds: "
    )
    written(tmp_path, "j.txt", JINJA)
    assert f"--input {tmp_path}/j.txt: most lines begin with a brace" in refusal_of(tmp_path)


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_files(tmp_path, packing):
    pack = PACKINGS[packing]
    # By content: a packed file may be called anything. Two of them one after the other are one, as zcat has it.
    assert texts_in(written(tmp_path, "a.txt", pack("é\r\n".encode()) + pack(b"b"))) == ["é\r\nb"]
    source = FileSource(input_files([str(written(tmp_path, f"b.jsonl{packing}", pack(LINES * 1000)))]))
    assert list(source.texts("text")) == TEXTS * 1000
    assert source.position == source.total == (tmp_path / f"b.jsonl{packing}").stat().st_size
    assert list(source.texts("text", skip=1999)) == TEXTS[1:]
    whole = pack(np.random.Generator(np.random.Philox(0)).bytes(30_000).hex().encode())
    for damaged in (whole[: len(whole) // 2], whole[:-1], whole[:12], whole[:50] + bytes(8) + whole[58:]):
        path = written(tmp_path, "c.txt", damaged)
        assert f"--input {path}: damaged or cut short, and cannot be unpacked (" in refusal_of(path)


def test_what_does_not_fit_into_memory_is_not_called_damaged(tmp_path):
    for name, pack, what in (("a.txt.gz", gzip.compress, "what is packed in it "), ("a.txt", bytes, "")):
        path = written(tmp_path, name, pack(b"text"))
        with pytest.raises(UserError) as error, InputFile(path).open():
            bytearray(1 << 62)
        assert str(error.value) == (
            f"--input {path}: {what}does not fit into memory; write it as lines of JSON or as several files, or raise "
            "the limit"
        )


def test_a_list_that_does_not_fit_into_memory_is_one_line(tmp_path):
    path = written(tmp_path, "a.txt", '[\n"text"\n]')
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    script = (
        "import resource\nfrom sedd_megatron.data.input_files import InputFile, _begins_with_json\n"
        "from sedd_megatron.errors import run_command\nfrom pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))\n"
        f"run_command(lambda: print(_begins_with_json(InputFile(Path({str(path)!r})))))"
    )
    done = run([sys.executable, "-c", script])
    assert (done.returncode, done.stderr) == (
        2,
        f"error: --input {path}: does not fit into memory; write it as lines of JSON or as several files, or raise the "
        "limit\n",
    )


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_of_texts_is_no_text(tmp_path, mode):
    with tarfile.open(tmp_path / "a.txt", mode) as archive:
        archive.add(written(tmp_path, "b.txt", "text"))
    assert refusal_of(tmp_path / "a.txt") == (
        f"--input {tmp_path}/a.txt: is a tar archive; unpack it, and name its files or their folder"
    )


def test_what_only_begins_like_a_packed_file_is_a_text(tmp_path):
    assert texts_in(written(tmp_path, "a.txt", "BZhang is a name")) == ["BZhang is a name"]
    assert texts_in(written(tmp_path, "b.txt", "")) == [""]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("été".encode("utf-16"), "has a NUL character at byte 3, as UTF-16 "),
        ("été".encode("latin-1"), "not UTF-8 at byte "),
    ],
)
def test_other_encodings_are_one_line(tmp_path, content, why):
    path = written(tmp_path, "a.txt", content)
    assert refusal_of(path).startswith(f"--input {path}: {why}")


def test_nulls_are_counted_and_left_out(tmp_path):
    path = written(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": null}\n{"text": ""}\n{"text": null}\n{"text": "b"}\n')
    source = FileSource([InputFile(path, is_json_lines=True)])
    assert (list(source.texts("text")), source.num_nulls) == (["a", "", "", "", "b"], 2)
    assert list(source.values("text")) == ["a", None, "", None, "b"]
    assert list(source.texts("text", skip=3)) == ["", "b"], "as many as were read, null or not"
    written(tmp_path, "b.jsonl", '{"title": "a"}\n')
    assert "line 1: no text at key 'text'; name the right one with --json-keys" in refusal_of(tmp_path / "b.jsonl")


def test_deeply_nested_json_is_one_line(tmp_path):
    line = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    assert "line 2: not JSON" in refusal_of(written(tmp_path, "a.jsonl", LINES.split(b"\n")[0] + b"\n" + line))
    assert "most lines begin with a brace" in refusal_of(written(tmp_path, "a.txt", line))
    assert "is JSON, but not" in refusal_of(written(tmp_path, "a.json", line.replace(b"{", b" x")))


def test_standard_input_that_is_closed_is_one_line(tmp_path):
    command = [sys.executable, "-m", "sedd_megatron.prepare_data", "--input", "-", "--output-prefix",
               str(tmp_path / "p"), "--tokenizer-type", "ByteTokenizer"]  # fmt: skip
    done = run(["bash", "-c", 'exec "$@" <&-', "bash", *command])
    assert (done.returncode, done.stderr) == (
        2, "error: --input -: standard input is closed; send it the texts, or name files\n"
    )  # fmt: skip


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_numbers_of_any_length_beside_a_text_are_read(tmp_path, name):
    path = written(tmp_path, name, f'{{"n": {"1" * 5000}, "text": "one"}}\n')
    assert texts_in(path) == ["one"]
    assert "line 1: no text at key 'n'" in refusal_of(path, key="n")


@pytest.mark.parametrize("name", ["", "x" * 5000, "x/" * 3000, "a\0b"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(UserError, match=r"^--data .*: no such file or folder; check the path$"):
        input_files([name], "--data")


def prepared(folder: Path, *flags: str) -> list[str]:
    """The documents that prepare_data makes in this process."""
    (options,) = parse_options((PrepareOptions,), ["--output-prefix", str(folder / "p"), *flags], "", "")
    prepare(options)
    tokenizer = load_tokenizer(folder / "p_text_document_tokenizer")
    index = folder / "p_text_document.idx"
    (num_documents,) = np.fromfile(index, np.int64, 1, offset=18)
    lengths = np.fromfile(index, np.int32, num_documents, offset=34)
    tokens = open_tokens(str(folder / "p_text_document")).tolist()
    return [tokenizer.decode(tokens[end - length : end])
            for end, length in zip(np.cumsum(lengths), lengths, strict=True)]  # fmt: skip


@pytest.mark.parametrize("pack", [bytes, zstd.compress])
def test_standard_input_is_read_as_often_as_it_is_needed(tmp_path, monkeypatch, capsys, pack):
    """Once to find what it is, once for the characters, once for their tokens."""
    content = b'{"text": "ab"}\n{"text": null}\n{"text": "c"}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(pack(content))))
    flags = ("--input", "-", "--tokenizer-type", "CharTokenizer")
    assert prepared(tmp_path, *flags) == ["ab", "c"]
    assert "left out 1 document with null at key 'text'\n" in capsys.readouterr().out
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(UserError, match=r"^--input -: standard input is read once; name it once$"):
        prepared(tmp_path, *flags, "--input", "-", "-")
    with pytest.raises(UserError, match=r"^--data -: no such file"):
        input_files(["-", "-"], "--data")


def test_keys_with_slashes_are_files_of_one_folder(tmp_path):
    path = written(tmp_path, "a.jsonl", '{"a/b": "one", "b": "two", "a%2Fb": "three"}\n')
    flags = ["--output-prefix", str(tmp_path / "p"), "--input", str(path), "--tokenizer-type", "ByteTokenizer"]
    (options,) = parse_options((PrepareOptions,), [*flags, "--json-keys", "a/b", "b", "a%2Fb"], "", "")
    prepare(options)
    found = {name: bytes(open_tokens(str(tmp_path / f"p_{name}_document")).astype(np.uint8))
             for name in ("a%2Fb", "b", "a%252Fb")}  # fmt: skip
    assert found == {"a%2Fb": b"one", "b": b"two", "a%252Fb": b"three"}


@pytest.fixture
def words(tmp_path) -> list[str]:
    """Flags for a tokenizer of two words and an end of document that is among its words."""
    import tokenizers as hf

    folder = tmp_path / "words"
    folder.mkdir()
    tokenizer = hf.Tokenizer(hf.models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder), "--output-prefix",
            str(tmp_path / "p")]  # fmt: skip


def tokens_of(folder: Path, *flags: str) -> list[int]:
    (options,) = parse_options((PrepareOptions,), flags, "", "")
    prepare(options)
    return open_tokens(str(folder / "p_text_document")).tolist()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_names_of_special_tokens_are_text_unless_they_are_allowed(tmp_path, words, workers):
    path = written(tmp_path, "in.jsonl", '{"text": "a b </s> b"}\n{"text": "b</s>a"}\n')
    flags = (*words, "--input", str(path), "--append-eod", "--workers", workers)
    tokens = tokens_of(tmp_path, *flags, "--max-unknown-share", "1")
    assert tokens.count(3) == 2, "one for each document"
    allowed = tokens_of(tmp_path, *flags, "--allow-special-tokens")
    # As the four documents, each with its end.
    assert allowed == [1, 2, 3, 2, 3, 2, 3, 1, 3]


def test_special_tokens_need_a_tokenizer_that_has_some(tmp_path):
    path = written(tmp_path, "in.txt", "a")
    with pytest.raises(UserError, match=r"^--allow-special-tokens: ByteTokenizer has none; leave the flag out$"):
        prepared(tmp_path, "--input", str(path), "--tokenizer-type", "ByteTokenizer", "--allow-special-tokens")


def test_unknown_tokens_are_counted_and_too_many_refused(tmp_path, words, capsys):
    flags = (*words, "--input", str(written(tmp_path, "in.txt", "a b " * 49 + "c d")))
    with pytest.raises(UserError) as error:
        tokens_of(tmp_path, *flags)
    assert str(error.value) == (
        "--max-unknown-share 0.01: of the 100 tokens at key 'text' 2.00% are unknown to this HuggingFaceTokenizer; "
        "give one that fits the text and --no-resume, or raise the share"
    )
    assert not list(tmp_path.glob("p_*"))
    assert tokens_of(tmp_path, *flags, "--max-unknown-share", "0.02").count(0) == 2
    shown = capsys.readouterr().out
    assert "going on after 1 document" in shown
    assert "100 tokens of 4, 2 of them unknown (2.00%), unigram entropy" in shown
    for share in ("-0.1", "1.5"):
        with pytest.raises(UserError, match=f"^--max-unknown-share {share} must be from 0 to 1$"):
            tokens_of(tmp_path, *flags, "--max-unknown-share", share)
