"""Preparation in several processes, broken off, and gone on with: the bytes are those of one unbroken process."""

import fcntl
import json
import os
import pty
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from sedd_megatron.data.corpus import open_tokens, write_corpus
from sedd_megatron.data.encoding import encode_chunk, encoded_chunks, token_dtype
from sedd_megatron.data.preparation import Preparation
from sedd_megatron.data.tokenizers import ByteTokenizer, CharTokenizer, SentencePieceTokenizer, load_tokenizer
from tests.benchmarks.test_benchmarks import cells, table_of
from tests.data.test_corpus import run_command
from tests.data.test_tokenizers import LAYOUT, SOURCES, random_text
from tests.distributed.launch import child_environment

WORDS = " ".join(SOURCES).split()


@pytest.fixture(scope="module")
def long_input(tmp_path_factory) -> Path:
    """A .jsonl file of about 10 MB, with blank lines and empty documents, and a SentencePiece model beside it."""
    folder = tmp_path_factory.mktemp("long")
    generator = random.Random(0)
    with (folder / "in.jsonl").open("w", encoding="utf-8") as file:
        for number in range(4000):
            text = " ".join(generator.choices(WORDS, k=generator.choice([0, 20, 400, 800])))
            file.write(json.dumps({"text": text, "title": f"document {number}"}) + "\n" * generator.choice([1, 1, 2]))
    (folder / "sp.model").write_bytes(SentencePieceTokenizer.train(SOURCES, 700).model)
    return folder / "in.jsonl"


def command(source: Path, prefix: Path, *arguments: str) -> list[str]:
    return ["--input", str(source), "--output-prefix", str(prefix), "--tokenizer-type", "SentencePieceTokenizer",
            "--tokenizer-model", str(source.parent / "sp.model"), "--part-megabytes", "1", *arguments]  # fmt: skip


def corpus_bytes(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx", "_stats.json")]


@pytest.fixture(scope="module")
def unbroken(long_input) -> list[bytes]:
    prefix = long_input.parent / "unbroken"
    done = run_command(*command(long_input, prefix, "--append-eod"))
    assert done.returncode == 0, done.stderr
    assert " MB/s, " in done.stdout
    assert " tokens/s\n" in done.stdout
    return corpus_bytes(prefix)


def test_megatrons_builder_writes_the_same_index(tmp_path):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    texts = ["one", "three words ä", "x" * 1000]
    write_corpus(iter(texts), ByteTokenizer(), tmp_path / "c")
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16)
    for text in texts:
        ids = ByteTokenizer().encode(text)
        builder.add_document(np.array(ids, np.uint16), [len(ids)])
    builder.finalize(str(tmp_path / "m.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"c_text_document{suffix}").read_bytes() == (tmp_path / f"m{suffix}").read_bytes()
    for num_tokens in (1, 256, 65499, 65500, 65536, 100_000):
        assert token_dtype(num_tokens) == DType.optimal_dtype(num_tokens)


@pytest.mark.parametrize("seed", range(5))
def test_tables_give_what_the_tokenizers_give(seed):
    texts = [random_text(seed), "", LAYOUT]
    for tokenizer in (ByteTokenizer(), CharTokenizer.from_texts(texts)):
        chunk = encode_chunk(texts, tokenizer, Preparation(False))
        assert chunk.tokens.tolist() == [token for text in texts for token in tokenizer.encode(text)]
        assert chunk.num_bytes == sum(len(text.encode()) for text in texts)
        assert chunk.num_texts == 3


def test_chunks_do_not_wait_for_the_end_of_the_texts(tmp_path):
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield "x" * 2_000_000

    ByteTokenizer().save(tmp_path / "tokenizer")
    chunks = encoded_chunks(
        endless(), ByteTokenizer(), Preparation(), workers=2, tokenizer_folder=tmp_path / "tokenizer"
    )
    for _ in range(10):
        assert len(next(chunks).tokens) == 2_000_000
    chunks.close()
    assert read <= 10 + 2 * 2 + 1


def test_three_processes_write_the_bytes_of_one(long_input, unbroken, tmp_path):
    done = run_command(*command(long_input, tmp_path / "p", "--append-eod", "--workers", "3"))
    assert done.returncode == 0, done.stderr
    assert corpus_bytes(tmp_path / "p") == unbroken
    assert not list(tmp_path.glob(".*"))


def kill_after_a_part(arguments: list[str], parts: Path) -> None:
    process = subprocess.Popen([sys.executable, "-m", "sedd_megatron.prepare_data", *arguments],
                               env=child_environment(), stdout=subprocess.DEVNULL)  # fmt: skip
    while not list(parts.glob("p_*.json")):
        assert process.poll() is None
        time.sleep(0.005)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive, "a killed preparation leaves no process behind"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_killed_preparation_goes_on_to_the_same_bytes(long_input, unbroken, tmp_path, workers):
    parts = tmp_path / ".p.parts"
    arguments = command(long_input, tmp_path / "p", "--append-eod", "--workers", workers)
    kill_after_a_part(arguments, parts)
    assert not list(tmp_path.glob("p_*"))
    # What a part that was not finished leaves.
    for name in ("p_text_document.bin", "p_text_document.lengths"):
        with (parts / name).open("ab") as file:
            file.write(b"half a part")
    finished = json.loads((parts / "p_text_document.json").read_text())["num_documents"]

    other = run_command(*command(long_input, tmp_path / "p"))
    assert other.returncode == 2
    assert "finished parts of another command" in other.stderr
    assert other.stderr.count("\n") == 1

    done = run_command(*command(long_input, tmp_path / "p", "--append-eod"))
    assert done.returncode == 0, done.stderr
    assert f"going on after {finished:,} documents" in done.stdout
    assert corpus_bytes(tmp_path / "p") == unbroken
    assert not list(tmp_path.glob(".*"))


def test_changed_inputs_are_not_mixed_with_old_parts(long_input, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(long_input.read_bytes())
    (tmp_path / "sp.model").write_bytes((long_input.parent / "sp.model").read_bytes())
    arguments = command(source, tmp_path / "p")
    kill_after_a_part(arguments, tmp_path / ".p.parts")
    source.write_text('{"text": "another text"}\n')
    done = run_command(*arguments)
    assert done.returncode == 2
    assert "inputs that have changed since; give --no-resume" in done.stderr
    done = run_command(*arguments, "--no-resume")
    assert done.returncode == 0, done.stderr
    prefix = tmp_path / "p_text_document"
    tokenizer = load_tokenizer(Path(f"{prefix}_tokenizer"))
    assert tokenizer.decode(open_tokens(str(prefix)).tolist()) == "another text"


def test_a_full_disk_is_one_line_and_costs_no_finished_part(long_input, unbroken, tmp_path):
    arguments = command(long_input, tmp_path / "p", "--append-eod")
    limit = len(unbroken[0]) // 2
    done = subprocess.run(
        [sys.executable, "-m", "sedd_megatron.prepare_data", *arguments], capture_output=True, text=True, timeout=60,
        env=child_environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: --output-prefix {tmp_path / 'p'}: File too large; give another path, or room"
    )
    assert done.stderr.count("\n") == 1
    done = run_command(*arguments)
    assert "going on after" in done.stdout
    assert corpus_bytes(tmp_path / "p") == unbroken


def test_two_preparations_of_one_prefix_do_not_write_at_once(long_input, tmp_path):
    parts = tmp_path / ".p.parts"
    parts.mkdir()
    with (parts / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run_command(*command(long_input, tmp_path / "p"))
    assert done.returncode == 2
    assert "another preparation of this --output-prefix is running" in done.stderr


def test_a_tokenizer_of_another_corpus_is_taken_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_text("abcdef")
    (tmp_path / "b.txt").write_text("fade")
    common = ["--tokenizer-type", "CharTokenizer"]
    assert (
        run_command("--input", str(tmp_path / "a.txt"), "--output-prefix", str(tmp_path / "a"), *common).returncode == 0
    )
    done = run_command("--input", str(tmp_path / "b.txt"), "--output-prefix", str(tmp_path / "b"), *common,
                       "--tokenizer-model", str(tmp_path / "a_text_document_tokenizer"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert open_tokens(str(tmp_path / "b_text_document")).tolist() == [5, 0, 3, 4]


def test_text8_is_cut_by_characters(tmp_path):
    text = "".join(random.Random(0).choices(" abcdefghijklmnopqrstuvwxyz", k=2000))
    (tmp_path / "text8").write_text(text)
    arguments = ("--input", str(tmp_path / "text8"), "--preset", "text8", "--output-prefix", str(tmp_path / "p"))
    done = run_command(*arguments, "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"warning: --input {tmp_path / 'text8'}: 2,000 characters, text8 has 100,000,000\n"
    prefix = tmp_path / "p_text_document"
    assert done.stdout.endswith(f"--data-path {prefix} --split 90,5,5\n")
    tokenizer = load_tokenizer(Path(f"{prefix}_tokenizer"))
    assert (tokenizer.tokenizer_type, tokenizer.num_tokens) == ("CharTokenizer", 27)
    assert tokenizer.decode(open_tokens(str(prefix)).tolist()) == text
    lengths = np.fromfile(f"{prefix}.idx", np.int32, 3, offset=34)
    assert lengths.tolist() == [1800, 100, 100]
    (tmp_path / "text8").write_text(text[:700] + "\n" + text)
    done = run_command(*arguments)
    assert done.returncode == 2
    assert "has '\\n' at character 700, and text8 has a-z and blanks alone" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "missing --input, --dataset or --preset"),
        (["--input", "ok.txt", "--dataset", "x"], "give one of them"),
        (["--input", "ok.txt", "--preset", "lm1b"], "--preset lm1b: comes from the hub"),
        (["--input", "ok.txt", "--streaming"], "belong to --dataset"),
        (["--input", "ok.txt", "--workers", "0"], "--workers 0 must be from 1 to 4096"),
        (["--input", "ok.txt", "--workers", str(2**63 - 1)], "--workers 9223372036854775807 must be from 1 to 4096"),
        (["--input", "ok.txt", "--preset", "text8"], "--tokenizer-type ByteTokenizer: text8 is a corpus of 27"),
        (["--input", "ok.txt", "--json-keys", "a", "a"], "names a key twice"),
    ],
)
def test_flags_that_do_not_belong_together(arguments, text, tmp_path, monkeypatch):
    from sedd_megatron.errors import UserError
    from sedd_megatron.options import parse_options
    from sedd_megatron.prepare_data import PrepareOptions, prepare

    monkeypatch.chdir(tmp_path)
    (tmp_path / "ok.txt").write_text("fine")
    flags = ["--output-prefix", "p", "--tokenizer-type", "ByteTokenizer", *arguments]
    (options,) = parse_options((PrepareOptions,), flags, "prepare_data", "")
    with pytest.raises(UserError, match=text):
        prepare(options)
    assert [path.name for path in tmp_path.iterdir()] == ["ok.txt"]


def test_a_terminal_gets_a_bar(long_input, tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 150, 0, 0))
    done = subprocess.run(
        [sys.executable, "-m", "sedd_megatron.prepare_data", *command(long_input, tmp_path / "p")], stderr=theirs,
        stdout=subprocess.DEVNULL, env=child_environment(), timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    bar = os.read(ours, 1 << 16).decode().split("\r")[-2]
    assert bar.startswith("100%")
    size = long_input.stat().st_size / 1e6
    assert f"{size:.1f}M/{size:.1f}M" in bar
    assert re.search(r" documents, [\d,]+ tokens, [\d.]+ MB/s, [\d,]+ tokens/s", bar)


def test_the_benchmark_writes_its_table(tmp_path):
    text = table_of(
        "data", tmp_path, "--cases", "smallest", "--pairs", "1", "--megabytes", "0.05", "--vocab-size", "400"
    )
    (loader,) = cells(text, "smallest")
    assert float(loader[5][:-1]) > 0
    for name in ("ByteTokenizer", "CharTokenizer", "SentencePieceTokenizer"):
        (row,) = cells(text, name)
        assert all(float(cell) >= 0 for cell in row[1:])
