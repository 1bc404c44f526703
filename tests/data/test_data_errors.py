"""What training says of data that is not there, may not be read or is damaged: one line with the way out."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.data.background_check import check_in_background
from sedd_megatron.data.corpus import open_tokens, write_corpus
from sedd_megatron.data.digests import digests_path, find_fault
from sedd_megatron.data.preparation import Preparation, preparation_of, stats_path
from sedd_megatron.data.splits import check_tokens_of_parts
from sedd_megatron.data.tokenizers import ByteTokenizer, SentencePieceTokenizer
from sedd_megatron.data.windows import open_windows
from sedd_megatron.errors import UserError
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.wording import counted
from tests.distributed.launch import child_environment
from tests.distributed.layouts import MODEL

cpu_backend.install()

from sedd_megatron.training.pretrain import data_tokenizer  # noqa: E402


@pytest.fixture
def prefix(tmp_path) -> str:
    for name in ("mine", "mine2", "mine3", "mine4", "other"):
        write_corpus(["some text of some length"], ByteTokenizer(), tmp_path / name)
    return str(tmp_path / "mine_text_document")


def refusal_of(data_path: str, *flags: str) -> str:
    with pytest.raises(UserError) as error:
        data_tokenizer(parse_pretrain_options([*MODEL, "--data-path", data_path, *flags]))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("flags", [[], ["--tokenizer-type", "ByteTokenizer"]])
def test_a_prefix_that_is_none_is_called_that(prefix, flags):
    folder = Path(prefix).parent
    assert refusal_of(f"{folder}/mine_text", *flags) == (
        f"--data-path {folder}/mine_text: no file {folder}/mine_text.idx; that folder has {folder}/mine_text_document, "
        f"{folder}/mine4_text_document, {folder}/mine3_text_document"
    )
    for suffix in (".bin", ".idx"):
        assert refusal_of(prefix + suffix, *flags) == (
            f"--data-path {prefix}{suffix}: is a file of a corpus; leave {suffix} out"
        )
    assert refusal_of(f"{folder}/quite/elsewhere", *flags) == (
        f"--data-path {folder}/quite/elsewhere: no file {folder}/quite/elsewhere.idx; give the prefix that "
        "sedd_megatron.prepare_data printed"
    )


# The standard library may be closed to others as well, and numpy imports mmap when it needs it.
CLOSED = """
import mmap, os, sys
from pathlib import Path
from sedd_megatron.data.blend import common_tokenizer
from sedd_megatron.data.corpus import open_tokens
from sedd_megatron.errors import UserError
if os.geteuid() == 0:
    os.seteuid(65534)
try:
    common_tokenizer([sys.argv[1], sys.argv[1]])
    open_tokens(sys.argv[1])
    print("read")
except UserError as error:
    print(error)
"""


def test_what_may_not_be_read_is_one_line(tmp_path, prefix):
    for folder in (tmp_path, *tmp_path.parents[:3]):
        if folder.stat().st_uid == os.getuid():
            folder.chmod(0o755)

    def said() -> str:
        done = subprocess.run([sys.executable, "-c", CLOSED, prefix], env=child_environment(), capture_output=True,
                              text=True, timeout=60)  # fmt: skip
        return done.stdout + done.stderr[-500:]

    assert said() == "read\n"
    for suffix in (".bin", ".idx", "_tokenizer/description.json"):
        path = Path(prefix + suffix)
        path.chmod(0)
        assert said() == f"{path}: cannot be read (Permission denied); mend that, or use another copy\n"
        path.chmod(0o644)


def test_tokens_outside_the_vocabulary_may_be_damage(prefix):
    tokens = np.array(open_tokens(prefix))
    tokens[3] = 23130
    tokens.tofile(f"{prefix}.bin")

    def said() -> str:
        with pytest.raises(UserError) as error:
            check_tokens_of_parts(open_windows([(1, prefix)], seq_length=4, split="1,0,0", num_tokens=256, seed=0), 256)
        return str(error.value)

    line = (
        f"{prefix}.bin: has tokens 32 to 23130, the tokenizer's vocabulary has tokens 0 to 255; prepare the data with "
        "this tokenizer"
    )
    assert said() == f"{line}, or see by prepare_data --check {prefix} whether it is damaged"
    digests_path(prefix).unlink()
    assert said() == line


def test_damaged_statistics_may_be_deleted_as_it_is_said(prefix, capsys):
    path = stats_path(prefix)
    path.write_text("{")
    with pytest.raises(UserError, match="or delete it"):
        preparation_of([prefix])
    path.unlink()
    assert preparation_of([prefix]) == Preparation()
    assert check_in_background([prefix], 256).last_fault(10) is None
    line = f"{path}: is not there, and nothing is known of how the data was prepared\n"
    assert capsys.readouterr().err == line
    Path(f"{prefix}_tokenizer/description.json").unlink()
    assert find_fault(prefix).startswith(f"{prefix}_tokenizer/description.json: cannot be read (")


def test_a_vocabulary_that_is_not_possible_is_told_with_one_that_is():
    texts = ["a short text of few words " * 20]
    with pytest.raises(UserError) as error:
        SentencePieceTokenizer.train(iter(texts), 8192)
    assert (
        str(error.value) == "--vocab-size 8192: is more than this input has pieces for; give at most 273, or more text"
    )
    assert SentencePieceTokenizer.train(iter(texts), 273).num_tokens == 273
    with pytest.raises(UserError) as error:
        SentencePieceTokenizer.train(iter(texts), 10)
    fewest = int(str(error.value).rsplit(" ", 1)[1])
    assert str(error.value) == (
        f"--vocab-size 10: is less than bytes and characters of this input need; give at least {fewest}"
    )
    assert SentencePieceTokenizer.train(iter(texts), fewest).num_tokens == fewest
    for size, text in ((300, []), (0, texts), (-3, texts)):
        with pytest.raises(UserError) as error:
            SentencePieceTokenizer.train(iter(text), size)
        assert ".cc(" not in str(error.value)


@pytest.mark.parametrize(("number", "text"), [(0, "0 files"), (1, "1 file"), (2, "2 files"), (1000, "1,000 files")])
def test_nouns_are_counted(number, text):
    assert counted(number, "file") == text
