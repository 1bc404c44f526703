"""Corpora are Megatron's files, appear whole, and bad ones are refused by name."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sedd_megatron import prepare_data
from sedd_megatron.data.corpus import corpus_path, open_tokens, unigram_entropy, write_corpus
from sedd_megatron.data.documents import FileSource
from sedd_megatron.data.input_files import InputFile, input_files
from sedd_megatron.data.tokenizers import ByteTokenizer, load_tokenizer
from sedd_megatron.errors import UserError
from tests.data.test_tokenizers import SOURCES
from tests.distributed.launch import child_environment


def test_megatron_reads_the_same_documents(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    texts = ["one", "", "three words ä", "x" * 1000]
    stats = write_corpus(iter(texts), ByteTokenizer(), tmp_path / "c")
    dataset = IndexedDataset(str(tmp_path / "c_text_document"))
    written = [text for text in texts if text]
    assert [ByteTokenizer().decode(document.tolist()) for document in dataset] == written
    assert stats.num_documents == 3
    tokens = open_tokens(str(tmp_path / "c_text_document"))
    assert bytes(tokens.astype(np.uint8)) == "".join(written).encode()
    assert stats.num_tokens == len(tokens)


def test_unigram_entropy_in_closed_form():
    assert unigram_entropy(np.array([5, 0, 5, 5, 5])) == pytest.approx(np.log(4))
    assert str(unigram_entropy(np.array([7]))) == "0.0"
    assert unigram_entropy(np.array([1, 3])) == pytest.approx(-0.25 * np.log(0.25) - 0.75 * np.log(0.75))


def test_a_failed_preparation_leaves_what_was_there(tmp_path):
    write_corpus(iter(["old text"]), ByteTokenizer(), tmp_path / "c")
    before = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def breaks_off():
        yield "new text"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_corpus(breaks_off(), ByteTokenizer(), tmp_path / "c")
    after = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert after == before
    with pytest.raises(UserError, match="has no text"):
        write_corpus(iter(["", ""]), ByteTokenizer(), tmp_path / "none")
    assert not list(tmp_path.glob("*none*"))
    write_corpus(iter(["new"]), ByteTokenizer(), tmp_path / "c")
    assert bytes(open_tokens(str(tmp_path / "c_text_document")).astype(np.uint8)) == b"new"


def test_folders_and_jsonl(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first", "title": "t"}\n\n{"text": "1b", "title": "u"}\n')
    (tmp_path / "image.png").write_bytes(b"\xff\xd8")
    files = input_files([str(tmp_path)])
    assert list(FileSource(files).texts("text")) == ["first", "1b", "second"]
    assert list(FileSource(files[:1]).texts("title")) == ["t", "u"]


def test_files_of_a_folder_that_are_not_utf8_are_left_out_and_counted(tmp_path, capsys):
    for name, content in [("a.txt", b"fine"), ("b.txt", b"\xff\xfe"), ("deep/c.md", b"\xc3"), ("deep/d.py", b"x = 1")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert [file.path.name for file in input_files([str(tmp_path)])] == ["a.txt", "d.py"]
    assert capsys.readouterr().err == f"warning: left out 2 files that are not UTF-8, first {tmp_path / 'b.txt'}\n"
    for name in ("a.txt", "deep/d.py"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="no UTF-8 file in it"):
        input_files([str(tmp_path)])


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b'{"text": 1}', "no text at key 'text'"),
        (b'["text"]', "no text at key 'text'"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_bad_lines_of_jsonl_are_named(tmp_path, line, text):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"in.jsonl line 2: .*{text}"):
        list(FileSource([InputFile(path, is_json_lines=True)]).texts("text"))


def refusal(tmp_path, change) -> str:
    write_corpus(iter(["hello world"]), ByteTokenizer(), tmp_path / "c")
    prefix = tmp_path / "c_text_document"
    change(prefix)
    with pytest.raises(UserError) as error:
        open_tokens(str(prefix))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_foreign_and_damaged_files_are_named(tmp_path):
    def index(prefix):
        return prefix.with_name(prefix.name + ".idx")

    def tokens(prefix):
        return prefix.with_name(prefix.name + ".bin")

    assert "no file" in refusal(tmp_path, lambda p: index(p).unlink())
    assert "no file" in refusal(tmp_path, lambda p: tokens(p).unlink())
    assert "not a Megatron index" in refusal(tmp_path, lambda p: index(p).write_bytes(b"PK\x03\x04 something else"))
    assert "not a Megatron index" in refusal(tmp_path, lambda p: index(p).write_bytes(b""))
    assert "damaged" in refusal(tmp_path, lambda p: index(p).write_bytes(index(p).read_bytes()[:-3]))
    assert "cut short" in refusal(tmp_path, lambda p: tokens(p).write_bytes(tokens(p).read_bytes()[:-2]))


def run_command(*arguments: str, variables: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sedd_megatron.prepare_data", *arguments]
    environment = child_environment(**(variables or {}))
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_command_end_to_end(tmp_path):
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": f"document {i}"}) for i in range(5)))
    prefix = str(tmp_path / "out" / "p")
    done = run_command("--input", str(tmp_path / "in.jsonl"), "--output-prefix", prefix, "--tokenizer-type",
                       "CharTokenizer")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"--data-path {prefix}_text_document" in done.stdout
    stats = json.loads((tmp_path / "out" / "p_text_document_stats.json").read_text())
    assert (stats["num_documents"], stats["num_tokens"]) == (5, 50)


def test_command_trains_sentencepiece_and_ends_each_document(tmp_path):
    inputs = []
    for number, source in enumerate(SOURCES):
        inputs.append(str(tmp_path / f"{number}.py"))
        Path(inputs[-1]).write_text(source, encoding="utf-8")
    done = run_command("--input", *inputs, "--output-prefix", str(tmp_path / "p"), "--append-eod", "--tokenizer-type",
                       "SentencePieceTokenizer", "--train-tokenizer", "--vocab-size", "600")  # fmt: skip
    assert done.returncode == 0, done.stderr
    prefix = tmp_path / "p_text_document"
    tokenizer = load_tokenizer(prefix.with_name(prefix.name + "_tokenizer"))
    tokens = open_tokens(str(prefix))
    ends = np.flatnonzero(tokens == tokenizer.eod_id)
    texts = [tokenizer.decode(part[part != tokenizer.eod_id].tolist()) for part in np.split(tokens, ends + 1)[:-1]]
    assert texts == SOURCES
    assert ends[-1] == len(tokens) - 1


def test_command_writes_a_corpus_for_each_json_key(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"body": "abc", "title": "t"}\n{"body": "de", "title": "u"}\n')
    arguments = ("--input", str(source), "--tokenizer-type", "ByteTokenizer", "--json-keys", "body", "title")
    done = run_command(*arguments, "--output-prefix", str(tmp_path / "p"))
    assert done.returncode == 0, done.stderr
    for key, text in (("body", b"abcde"), ("title", b"tu")):
        prefix = corpus_path(tmp_path / "p", key)
        assert f"--data-path {prefix}\n" in done.stdout
        assert bytes(open_tokens(str(prefix)).astype(np.uint8)) == text


def test_command_takes_a_hub_name_from_the_cache(tmp_path, hugging_face_folder):
    # The layout in which huggingface_hub keeps what it has fetched; this test needs no network.
    repository = tmp_path / "hub" / "models--group--words"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    hugging_face_folder.rename(repository / "snapshots" / ("0" * 40))
    (tmp_path / "in.txt").write_text("the fox " * 10)
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    arguments = ("--input", str(tmp_path / "in.txt"), "--output-prefix", str(tmp_path / "p"), "--append-eod",
                 "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model")  # fmt: skip
    done = run_command(*arguments, "group/words", variables=offline)
    assert done.returncode == 0, done.stderr
    assert open_tokens(str(tmp_path / "p_text_document")).tolist() == [1, 2] * 10 + [7]
    done = run_command(*arguments, "group/unknown", variables=offline)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --tokenizer-model group/unknown: neither a folder")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("flag", ["--input", "--tokenizer-model", "--output-prefix", "--check", "--dataset"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x" * 5000, "must be at most 4095 bytes long"),
        ("x/" * 2000 + "x", "must be at most 255 parts between slashes"),
        ("x/" * 254 + "y" * 256, "must be at most 4095 bytes long, and 255 between slashes"),
    ],
)
def test_names_that_no_file_can_have_are_one_line(tmp_path, monkeypatch, flag, name, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ok.txt").write_text("fine")
    flags = {"--input": "ok.txt", "--output-prefix": "p", "--tokenizer-type": "SentencePieceTokenizer"}
    if flag == "--dataset":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        del flags["--input"]
    flags = {flag: name} if flag == "--check" else flags | {flag: name}
    monkeypatch.setattr(sys, "argv", ["prepare_data", *(word for pair in flags.items() for word in pair)])
    with pytest.raises(UserError, match=text) as error:
        prepare_data.main()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--input", "/nowhere"], "--input /nowhere: no such file or folder"),
        (["--input", "empty.txt"], "has no text"),
        (["--input", "latin.txt"], "not UTF-8 at byte 1"),
        (["--input", "bad.jsonl"], "line 2: not JSON"),
        (["--input", "bad.jsonl", "--json-keys", "body"], "no text at key 'body'"),
        (["--input", "ok.txt", "--append-eod"], "has no end-of-document token"),
        (["--input", "ok.txt", "--train-tokenizer"], "is not trained"),
        (["--inputs", "ok.txt"], "did you mean --input"),
        (["--input", "ok.txt", "--json-keys", "body"], "ok.txt has no keys"),
        (["--input", "ok.txt", "--output-prefix", "ok.txt/p"], "error: ok.txt: "),
        (["--input", "ok.txt", "--tokenizer-type", "WordTokenizer"], "invalid choice: 'WordTokenizer'"),
    ],
)
def test_command_mistakes_get_one_line_and_code_2(tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "ok.txt").write_text("fine")
    (tmp_path / "latin.txt").write_bytes(b"a\xe4b")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\nnot json\n')
    done = run_command("--output-prefix", "p", "--tokenizer-type", "ByteTokenizer", *arguments)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert text in lines[0]
    assert not list(tmp_path.glob("p_*"))
    assert not list(tmp_path.glob(".*")), "nothing was finished, so nothing is kept"
