"""Every bit of a corpus counts: digests find each flip, an index is held against itself, and training ends."""

import contextlib
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sedd_megatron.data import background_check as module
from sedd_megatron.data.background_check import check_in_background
from sedd_megatron.data.corpus import INDEX_HEADER, INDEX_MAGIC, open_tokens, write_corpus
from sedd_megatron.data.digests import digests_path, find_fault
from sedd_megatron.data.tokenizers import ByteTokenizer, load_tokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.options import parse_options
from sedd_megatron.prepare_data import PrepareOptions, prepare


@pytest.fixture
def prefix(tmp_path) -> str:
    write_corpus(["hello", "world, and more"], ByteTokenizer(), tmp_path / "c")
    return str(tmp_path / "c_text_document")


def check(*flags: str) -> None:
    (options,) = parse_options((PrepareOptions,), ["--check", *flags], "", "")
    prepare(options)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_every_flipped_bit_is_found(prefix, capsys):
    check(prefix)
    assert capsys.readouterr().out == f"{prefix}: its 20 tokens, index and tokenizer are what was written\n"
    for suffix in (".bin", ".idx", "_stats.json", "_tokenizer/description.json"):
        path = Path(prefix + suffix)
        for bit in range(8 * path.stat().st_size):
            flip(path, bit)
            assert find_fault(prefix).startswith(f"{path}: is not what was written: its sha256 is ")
            if bit % 37 == 0:
                with pytest.raises(UserError, match=rf"{suffix}: is not what was written") as error:
                    check(prefix)
                assert "\n" not in str(error.value)
            flip(path, bit)
    assert find_fault(prefix) is None


def test_a_damaged_tokenizer_is_called_that(prefix):
    path = Path(f"{prefix}_tokenizer/description.json")
    path.write_text(path.read_text().replace("ByteTokenizer", "ByteTokEnizer"))
    with pytest.raises(UserError, match=f"^{path}: damaged \\(there is no 'ByteTokEnizer'\\); prepare the data again"):
        load_tokenizer(path.parent)


def test_what_there_is_no_digest_for_is_said(prefix, capsys):
    digests_path(prefix).unlink()
    with pytest.raises(UserError, match=r"^--check \S+: has no c_text_document_digests.json beside it, as corpora of "):
        check(prefix)
    assert check_in_background([prefix], 256).fault() is None
    assert capsys.readouterr().err == f"{prefix}: has no digests, and is used as it is\n"


def test_a_full_disk_under_the_log_keeps_no_run_from_its_data(prefix, monkeypatch):
    digests_path(prefix).unlink()
    # Closing it fails as well: it has what it could not write.
    with contextlib.suppress(OSError), open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        begun = check_in_background([prefix], 256)
    assert begun.fault() is None


def test_check_is_by_itself_and_names_its_flag(prefix):
    with pytest.raises(UserError, match=r"^--check \S+: reads a corpus and nothing else; leave all other flags out$"):
        check(prefix, "--append-eod")
    with pytest.raises(UserError, match=r"^--check nowhere: no file nowhere.idx"):
        check("nowhere")
    digests_path(prefix).write_text("{}")
    with pytest.raises(UserError, match=r"c_text_document_digests.json: damaged; copy it again, or prepare the data"):
        check(prefix)


def test_a_new_corpus_of_the_name_has_digests_of_its_own(prefix):
    write_corpus(["other"], ByteTokenizer(), Path(prefix.removesuffix("_text_document")))
    assert find_fault(prefix) is None


def test_the_background_finds_what_is_wrong(prefix, monkeypatch, capsys):
    assert check_in_background([prefix], 256).fault() is None
    flip(Path(prefix + ".bin"), 9)
    # Of a small corpus before anything else; of any at last.
    assert check_in_background([prefix, prefix], 256).fault() == find_fault(prefix)
    monkeypatch.setattr(module, "SECONDS_TO_WAIT", 0.0)
    running = check_in_background([prefix], 256)
    deadline = time.monotonic() + 20
    while running.fault() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running.fault() == find_fault(prefix)
    reading = threading.Event()
    monkeypatch.setattr(module, "find_fault", lambda prefix: "found" if reading.wait(20) else None)
    running = check_in_background([prefix], 256)
    assert running.last_fault(0.0) is None
    assert capsys.readouterr().out == "the data's digests: not read to the end, since the run is over before\n"
    reading.set()
    assert running.last_fault(20.0) == "found"
    assert capsys.readouterr().out == ""
    Path(prefix + ".bin").unlink()
    monkeypatch.undo()
    assert check_in_background([prefix], 256).fault() == (
        f"{prefix}.bin: cannot be read (No such file or directory); mend that, or prepare the data again"
    )


def write_index(prefix: str, *, version=1, dtype=8, lengths=(5, 15), pointers=(0, 10), documents=(0, 1, 2), **other):
    counts = other.get("num_sequences", len(lengths)), other.get("num_documents", len(documents))
    Path(prefix + ".idx").write_bytes(
        INDEX_HEADER.pack(INDEX_MAGIC, version, dtype, *counts)
        + np.array(lengths, np.int32).tobytes()
        + np.array(pointers, np.int64).tobytes()
        + np.array(documents, np.int64).tobytes()
        + other.get("modes", b"")
    )


@pytest.mark.parametrize("documents", [(0, 1, 2), (0, 2), (0, 1, 1, 2)])
def test_documents_are_runs_of_sequences(prefix, documents):
    write_index(prefix, documents=documents)
    assert len(open_tokens(prefix)) == 20


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lengths": (15, 5)}, "its pointers are not those of its lengths"),
        ({"lengths": (-5, 25)}, "its pointers are not those of its lengths"),
        ({"pointers": (0, 12)}, "its pointers are not those of its lengths"),
        ({"pointers": (2, 10)}, "its pointers are not those of its lengths"),
        ({"documents": (0, 2, 1, 2)}, "its pointers are not those of its lengths"),
        ({"documents": (1, 1, 2)}, "its pointers are not those of its lengths"),
        ({"documents": (0, 1, 3)}, "its pointers are not those of its lengths"),
        ({"documents": ()}, "its pointers are not those of its lengths"),
        ({"dtype": 4}, "its pointers are not those of its lengths"),
        ({"dtype": 6}, "is of numbers that are no tokens (type 6)"),
        ({"dtype": 200}, "is of numbers that are no tokens (type 200)"),
        ({"version": 2}, "is of version 2, which Megatron-Core 0.16 does not write for text"),
        ({"num_sequences": 2**63}, "its header says 110680464442257309"),
        ({"num_documents": 2**64 - 1}, "its header says "),
        ({"modes": b"\0\1"}, "is of a multimodal dataset, with a mode for each sequence, and this trains on text"),
        ({"modes": b"\0"}, "it is damaged"),
    ],
)
def test_an_index_is_held_against_itself(prefix, change, text):
    write_index(prefix, **change)
    with pytest.raises(UserError) as error:
        open_tokens(prefix)
    assert str(error.value).startswith(f"{prefix}.idx: ")
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_the_multimodal_index_is_the_one_that_megatron_writes(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16, multimodal=True)
    for length in (3, 4):
        builder.add_item(torch.arange(length), 1)
        builder.end_document()
    builder.finalize(str(tmp_path / "m.idx"))
    with pytest.raises(UserError, match="is of a multimodal dataset"):
        open_tokens(str(tmp_path / "m"))


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000 + "b"])
def test_names_that_no_file_can_have_are_one_line(name):
    from sedd_megatron.data.tokenizers import load_tokenizer

    with pytest.raises(UserError, match=r"^--data-path .*: no file "):
        open_tokens(name)
    with pytest.raises(UserError, match="no tokenizer there"):
        load_tokenizer(Path(f"{name}_tokenizer"))
    with pytest.raises(OSError, match="too long"):
        Path(name).read_bytes()
