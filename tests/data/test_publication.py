"""A new corpus takes the place of the old one whole or not at all, and of nothing that is no corpus."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from sedd_megatron.data.corpus import open_tokens
from sedd_megatron.data.digests import find_fault
from sedd_megatron.data.tokenizers import ByteTokenizer, load_tokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.options import parse_options
from sedd_megatron.prepare_data import PrepareOptions, prepare
from tests.distributed.launch import child_environment


def run(folder: Path, *flags: str) -> None:
    """Prepare in.txt as p, unless told otherwise."""
    (options,) = parse_options(
        (PrepareOptions,),
        ["--input", str(folder / "in.txt"), "--tokenizer-type", "ByteTokenizer", "--output-prefix", str(folder / "p"),
         *flags], "", "",
    )  # fmt: skip
    prepare(options)


def text_of(prefix: Path) -> str:
    assert find_fault(str(prefix)) is None
    assert load_tokenizer(Path(f"{prefix}_tokenizer")).num_tokens == 256
    return ByteTokenizer().decode(open_tokens(str(prefix)).tolist())


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal_of(folder: Path, *flags: str) -> str:
    before = files_in(folder)
    with pytest.raises(UserError) as error:
        run(folder, *flags)
    assert files_in(folder) == before, "nobody's data is lost"
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "in.txt").write_text("old text")
    run(tmp_path)
    (tmp_path / "in.txt").write_text("new text")
    return tmp_path


def test_a_linked_tokenizer_is_replaced_and_what_it_leads_to_stays(folder):
    tokenizer, elsewhere = folder / "p_text_document_tokenizer", folder / "elsewhere"
    tokenizer.rename(elsewhere)
    tokenizer.symlink_to(elsewhere)
    run(folder)
    assert text_of(folder / "p_text_document") == "new text"
    assert not tokenizer.is_symlink()
    assert load_tokenizer(elsewhere).num_tokens == 256
    assert not list(folder.glob(".*"))


def test_parts_may_lie_on_another_disk(folder):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        if os.stat(elsewhere).st_dev == folder.stat().st_dev:
            pytest.skip("there is one disk alone")
        (folder / ".p.parts").symlink_to(elsewhere)
        run(folder)
        assert text_of(folder / "p_text_document") == "new text"
        assert os.listdir(elsewhere) == []
    assert [path.name for path in folder.glob(".*")] == [".p.parts"]


FAILING = """
import errno, sys
from pathlib import Path
from sedd_megatron.data.corpus import write_corpus
from sedd_megatron.data.tokenizers import ByteTokenizer
folder, renamed, failing = Path(sys.argv[1]), [], None
def fail(event, arguments):
    if event == "os.rename" and failing is not None:
        renamed.append(arguments)
        if len(renamed) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
sys.addaudithook(fail)
files_in = lambda: {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
before = files_in()
for failing in range(1, 16):
    renamed.clear()
    try:
        write_corpus(["new text"], ByteTokenizer(), folder / "p")
        raise SystemExit(f"nothing failed: {failing}")
    except OSError as error:
        assert error.errno == errno.ENOSPC
    assert files_in() == before, failing
"""


def test_the_old_corpus_is_whole_wherever_a_publication_fails(folder):
    done = subprocess.run([sys.executable, "-c", FAILING, str(folder)], env=child_environment(), capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    run(folder)
    assert text_of(folder / "p_text_document") == "new text"


def test_the_input_is_not_what_is_written(folder):
    np.array([1, 2, 3], np.int64).tofile(folder / "w_text_document.bin")
    said = refusal_of(folder, "--input", str(folder / "w_text_document.bin"), "--input-dtype", "int64",
                      "--output-prefix", str(folder / "w"))  # fmt: skip
    assert said == (
        f"{folder}/w_text_document.bin: is there already and belongs to no corpus of prepare_data, which would replace "
        "it; move it, or give another --output-prefix"
    )
    (folder / "linked.txt").symlink_to("p_text_document_stats.json")
    for name in ("p_text_document_stats.json", "linked.txt"):
        said = refusal_of(folder, "--input", str(folder / name), "--input-format", "text")
        assert said == f"{folder}/{name}: is read and would be replaced; give another --output-prefix"


@pytest.mark.parametrize("suffix", [".bin", ".idx", "_stats.json", "_digests.json"])
def test_a_file_that_is_of_no_corpus_stays(tmp_path, suffix):
    (tmp_path / "in.txt").write_text("text")
    (tmp_path / f"p_text_document{suffix}").write_text('{"mine": 1}')
    said = refusal_of(tmp_path)
    assert said.startswith(f"{tmp_path}/p_text_document{suffix}: is there already and belongs to no corpus")
    (tmp_path / f"p_text_document{suffix}").unlink()
    (tmp_path / f"p_text_document{suffix}").mkdir()
    assert "belongs to no corpus" in refusal_of(tmp_path)


def test_a_folder_that_is_no_tokenizer_of_ours_stays(folder):
    tokenizer = folder / "y_text_document_tokenizer"
    tokenizer.mkdir()
    run(folder, "--output-prefix", str(folder / "y"))
    (tokenizer / "mine.txt").write_text("mine")
    assert refusal_of(folder, "--output-prefix", str(folder / "y")) == (
        f"{tokenizer}/mine.txt: was not written by prepare_data, which would replace that folder; move it, or give "
        "another --output-prefix"
    )
    (tokenizer / "mine.txt").unlink()
    (tokenizer / "description.json").rename(tokenizer / "tokenizer.json")
    assert "tokenizer.json: was not written by prepare_data" in refusal_of(folder, "--output-prefix", str(folder / "y"))


def test_a_publication_that_broke_off_is_made_again(folder):
    """However far the old files had gone away, or the new ones had come."""
    names = ("_tokenizer", "_stats.json", "_digests.json", ".bin", ".idx")
    for gone in ([".idx"], [".idx", ".bin"], [".idx", ".bin", "_digests.json"], names[1:], names):
        hidden = folder / ".p_text_document.old"
        hidden.mkdir()
        for suffix in gone:
            (folder / f"p_text_document{suffix}").rename(hidden / f"p_text_document{suffix}")
        run(folder)
        assert text_of(folder / "p_text_document") == "new text"
        assert not list(folder.glob(".*"))


def test_a_corpus_of_another_program_is_replaced(folder):
    for path in folder.glob("p_text_document_*.json"):
        path.unlink()
    for path in (folder / "p_text_document_tokenizer").iterdir():
        path.unlink()
    run(folder)
    assert text_of(folder / "p_text_document") == "new text"


def test_its_own_tokenizer_may_be_given(folder):
    run(folder, "--tokenizer-model", str(folder / "p_text_document_tokenizer"))
    assert text_of(folder / "p_text_document") == "new text"


def test_no_key_is_published_if_one_has_no_text(tmp_path):
    (tmp_path / "in.txt").write_text('{"a": "old", "b": "old"}\n')
    run(tmp_path, "--json-keys", "a", "b")
    (tmp_path / "in.txt").write_text('{"a": "new", "b": ""}\n{"a": "new", "b": null}\n')
    with pytest.raises(
        UserError, match=r"^--json-keys: the input has no text at key 'b'; mend it, or leave that key out"
    ):
        run(tmp_path, "--json-keys", "a", "b")
    assert text_of(tmp_path / "p_a_document") == text_of(tmp_path / "p_b_document") == "old"
