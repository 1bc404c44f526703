"""Corpora are Megatron's files, appear whole, and bad ones are refused by name."""

import json
import subprocess
import sys

import numpy as np
import pytest

from sedd_megatron.data.corpus import documents, input_files, open_tokens, unigram_entropy, write_corpus
from sedd_megatron.data.tokenizers import ByteTokenizer
from sedd_megatron.errors import UserError


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
    assert unigram_entropy(np.array([7])) == 0
    assert unigram_entropy(np.array([1, 3])) == pytest.approx(-0.25 * np.log(0.25) - 0.75 * np.log(0.75))


def test_a_failed_preparation_leaves_what_was_there(tmp_path):
    write_corpus(iter(["old text"]), ByteTokenizer(), tmp_path / "c")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file() and not p.name.startswith(".")}

    def breaks_off():
        yield "new text"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_corpus(breaks_off(), ByteTokenizer(), tmp_path / "c")
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file() and not p.name.startswith(".")}
    assert after == before
    write_corpus(iter(["new"]), ByteTokenizer(), tmp_path / "c")
    assert bytes(open_tokens(str(tmp_path / "c_text_document")).astype(np.uint8)) == b"new"


def test_folders_and_jsonl(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first", "title": "t"}\n\n{"text": "1b", "title": "u"}\n')
    (tmp_path / "image.png").write_bytes(b"\xff\xd8")
    files = input_files([str(tmp_path)])
    assert list(documents(files, "text")) == ["first", "1b", "second"]
    assert list(documents(files[:1], "title")) == ["t", "u"]


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


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sedd_megatron.prepare_data", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_command_end_to_end(tmp_path):
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": f"document {i}"}) for i in range(5)))
    prefix = str(tmp_path / "out" / "p")
    done = run_command("--input", str(tmp_path / "in.jsonl"), "--output-prefix", prefix, "--tokenizer-type",
                       "CharTokenizer")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"--data-path {prefix}_text_document" in done.stdout
    stats = json.loads((tmp_path / "out" / "p_text_document_stats.json").read_text())
    assert (stats["num_documents"], stats["num_tokens"]) == (5, 50)


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
    ],
)
def test_command_mistakes_get_one_line_and_code_2(tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "ok.txt").write_text("fine")
    (tmp_path / "latin.txt").write_bytes(b"a\xe4b")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\nnot json\n')
    done = run_command(*arguments, "--output-prefix", "p", "--tokenizer-type", "ByteTokenizer")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "Warning" not in line and "warnings.warn" not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert text in lines[0]
    assert not list(tmp_path.glob("p_*"))
