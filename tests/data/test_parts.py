"""The folder of a corpus' parts goes away with its lock, and which commands may share one."""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from sedd_megatron.data.corpus import append_chunks
from sedd_megatron.data.encoding import encoded_chunks
from sedd_megatron.data.parts import Extent, PartialCorpus, parts_folder
from sedd_megatron.data.preparation import Preparation
from sedd_megatron.data.tokenizers import ByteTokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.options import parse_options
from sedd_megatron.prepare_data import PrepareOptions, check_and_open, digest_of
from tests.distributed.launch import child_environment


def test_nothing_in_the_folder_is_open_when_it_goes_away(tmp_path):
    """An open file would stay there on NFS."""
    script = """
import os, sys
from pathlib import Path
from sedd_megatron.data.corpus import append_chunks
from sedd_megatron.data.encoding import encoded_chunks
from sedd_megatron.data.parts import Extent, PartialCorpus, parts_folder
from sedd_megatron.data.preparation import Preparation
from sedd_megatron.data.tokenizers import ByteTokenizer
folder = Path(sys.argv[1])
removed = []
def watch(event, arguments):
    if event == "os.rmdir" and str(arguments[0]) == str(folder):
        removed.append([path for path in map(os.path.realpath, Path("/proc/self/fd").iterdir()) if str(folder) in path])
sys.addaudithook(watch)
with parts_folder(folder, "digest", True):
    (folder / "tokenizer").mkdir()
assert removed == [[]], removed
assert not folder.exists()
try:
    with parts_folder(folder, "digest", True):
        raise KeyError
except KeyError:
    pass
assert removed == [[], []], removed
assert not folder.exists()
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / ".p.parts")], env=child_environment(),
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_removed_is_no_error_and_hides_none(tmp_path):
    folder, elsewhere = tmp_path / ".p.parts", tmp_path / "elsewhere"

    def failing() -> None:
        with parts_folder(folder, "digest", True):
            folder.rename(elsewhere)
            raise UserError("what went wrong")

    with pytest.raises(UserError, match=r"^what went wrong$"):
        failing()
    elsewhere.rename(folder)
    with parts_folder(folder, "digest", True):
        folder.rename(elsewhere)
    assert not folder.exists()


def test_finished_parts_stay_after_an_error_and_a_second_process_is_kept_out(tmp_path):
    folder = tmp_path / ".p.parts"
    state = folder / "p_text_document.json"

    def failing() -> None:
        with parts_folder(folder, "digest", True):
            finished_part(folder)
            with pytest.raises(UserError, match="is running; wait for it"), parts_folder(folder, "digest", True):
                pass
            assert state.is_file()
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert state.is_file()
    with pytest.raises(UserError, match="of another command"), parts_folder(folder, "other", True):
        pass
    with parts_folder(folder, "digest", True):
        assert state.is_file()
    assert not folder.exists()


def finished_part(folder: Path, content: str = "some text") -> None:
    chunks = encoded_chunks([content], ByteTokenizer(), Preparation())
    append_chunks(chunks, np.uint16, folder / "p_text_document")


def extent_there(folder: Path) -> Extent:
    return PartialCorpus.finished_extent(folder / "p_text_document", np.uint16)


def broken_off(folder: Path, digest: str = "digest") -> None:
    """As after a kill: one finished part."""
    folder.mkdir()
    (folder / "command.json").write_text(digest)
    finished_part(folder)


def test_parts_that_were_published_are_nobodys(tmp_path):
    """As after a kill between publication and clean-up, of which the tokens are gone."""
    folder = tmp_path / ".p.parts"
    broken_off(folder)
    assert extent_there(folder) == Extent(1, 1, 9, 9)
    with pytest.raises(UserError, match="of another command"), parts_folder(folder, "other", True):
        pass
    (folder / "p_text_document.bin").unlink()
    with parts_folder(folder, "other", True):
        assert extent_there(folder) == Extent()
    assert not folder.exists()


@pytest.mark.parametrize(
    "damaged",
    [b"{", b"[]", b'{"x": 1}', b"\xff", b"null", b"[" * 100_000]
    + [json.dumps(asdict(Extent(1, 1, 9, 9)) | change).encode()
       for change in ({"num_texts": "1"}, {"num_bytes": -1}, {"num_unknown": None}, {"num_texts": True},
                      {"num_texts": 1.5}, {"more": 1})],
    ids=str,
)  # fmt: skip
def test_a_damaged_part_is_made_again(tmp_path, damaged, capsys):
    folder = tmp_path / ".p.parts"
    broken_off(folder)
    state = folder / "p_text_document.json"
    state.write_bytes(damaged)
    with parts_folder(folder, "digest", True):
        assert capsys.readouterr().err == f"{state}: damaged, so that its parts are made again\n"
        assert extent_there(folder) == Extent()
        finished_part(folder, "other")
        assert extent_there(folder) == Extent(1, 1, 5, 5)
    broken_off(folder)
    state.write_bytes(damaged)
    with parts_folder(folder, "other", True):
        assert not state.exists()


@pytest.mark.parametrize("change", [{"num_tokens": 3}, {"num_documents": 0}, {"num_tokens": 10**30}])
def test_parts_that_do_not_fit_their_lengths_are_made_again(tmp_path, change):
    folder = tmp_path / ".p.parts"
    broken_off(folder)
    (folder / "p_text_document.json").write_text(json.dumps(asdict(Extent(1, 1, 9, 9)) | change))
    assert extent_there(folder) == Extent()


def test_a_damaged_command_is_another_one(tmp_path):
    folder = tmp_path / ".p.parts"
    broken_off(folder)
    (folder / "command.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match="of another command"), parts_folder(folder, "digest", True):
        pass
    with parts_folder(folder, "digest", False):
        assert extent_there(folder) == Extent()


@pytest.fixture
def digest(tmp_path, hugging_face_folder):
    (tmp_path / "in.txt").write_text("the fox")
    flags = ["--input", str(tmp_path / "in.txt"), "--output-prefix", str(tmp_path / "p"), "--tokenizer-type",
             "HuggingFaceTokenizer", "--tokenizer-model", str(hugging_face_folder)]  # fmt: skip
    (options,) = parse_options((PrepareOptions,), flags, "", "")
    return lambda: digest_of(*check_and_open(options))


def test_parts_depend_on_the_tokenizers_files_and_not_on_the_model_beside_them(digest, hugging_face_folder):
    before = digest()
    with (hugging_face_folder / "model.safetensors").open("wb") as file:
        file.truncate(1 << 40)
    start = time.monotonic()
    assert digest() == before
    assert time.monotonic() - start < 10, "a terabyte was read"
    config = hugging_face_folder / "tokenizer_config.json"
    config.write_text('{"eos_token": "fox"}')
    other = digest()
    config.unlink()
    assert len({before, other, digest()}) == 3


def test_parts_of_another_release_are_others(digest, tmp_path, monkeypatch):
    digests = [digest()]
    for version in ("1000.1", "1000.2"):
        information = Path(tmp_path, version, f"sedd_megatron-{version}.dist-info")
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sedd_megatron\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(information.parent))
        digests.append(digest())
    assert len(set(digests)) == 3
