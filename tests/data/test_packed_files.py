"""What is packed comes out whole or is refused, and what is no text is never trained on."""

import bz2
import io
import os
import random
import subprocess
import sys
import tarfile

import pytest

from sedd_megatron.data.input_files import input_files
from sedd_megatron.errors import UserError
from tests.data.test_input_files import LINES, refusal_of, texts_in, written
from tests.distributed.launch import child_environment

TEXTS = ["".join(random.Random(seed).choices("abcdefgh \n", k=40_000)) for seed in range(3)]
STREAMS = [bz2.compress(text.encode()) for text in TEXTS]


def test_all_streams_of_a_bzip2_file_are_read(tmp_path):
    path = written(tmp_path, "a.txt.bz2", b"".join(STREAMS) + bz2.compress(b""))
    assert texts_in(path) == ["".join(TEXTS)]
    lines = written(tmp_path, "b.jsonl.bz2", bz2.compress(LINES) + bz2.compress(LINES))
    assert texts_in(lines) == ["one {1}", "two\n"] * 2


@pytest.mark.parametrize("at", [0, 4, 40, -10])
def test_a_bzip2_stream_that_is_damaged_is_not_taken_for_the_end(tmp_path, at):
    damaged = bytearray(STREAMS[1])
    damaged[at] ^= 0xFF
    path = written(tmp_path, "a.txt.bz2", STREAMS[0] + damaged + STREAMS[2])
    for input_format in (None, "text"):
        assert "a.txt.bz2: damaged or cut short, and cannot be unpacked (" in refusal_of(
            path, input_format=input_format
        )


@pytest.mark.parametrize("behind", [STREAMS[1][:-1], STREAMS[1][:3], b"behind it", b"\0" * 8])
def test_a_bzip2_file_ends_with_a_stream(tmp_path, behind):
    path = written(tmp_path, "a.txt.bz2", STREAMS[0] + behind)
    assert "cannot be unpacked" in refusal_of(path, input_format="text")


def tar(format: int) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=format) as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"text"))
    return content.getvalue()


# As tar wrote before there was a sign for it.
TAR_OF_V7 = tar(tarfile.USTAR_FORMAT)[:257] + b"\0" * 8 + tar(tarfile.USTAR_FORMAT)[265:]
AR = b"!<arch>\na.txt/          0           0     0     644     5         `\ntext\n\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("some text".encode("utf-16-le"), "has a NUL character at byte 1, as UTF-16 and files that are no text have"),
        (LINES.decode().encode("utf-16-be"), "has a NUL character at byte 0"),
        (TAR_OF_V7, "has a NUL character at byte 5"),
        (tar(tarfile.GNU_FORMAT), "is a tar archive; unpack it, and name its files or their folder"),
        (AR, "is an ar archive; unpack it"),
        (b"PK\x03\x04" + b"text" * 9, "is a zip archive; unpack it"),
        (b"\0" * 4096, "has a NUL character at byte 0"),
    ],
)
def test_what_is_no_text_is_refused_whatever_it_is_called(tmp_path, content, why):
    for name in ("a.txt", "a.jsonl", "a.txt.bz2"):
        path = written(tmp_path, name, bz2.compress(content) if name.endswith("bz2") else content)
        for input_format in (None, "text", "jsonl"):
            assert refusal_of(path, input_format=input_format).startswith(f"--input {path}: {why}")


def test_of_a_folder_what_is_no_text_is_left_out_with_a_line(tmp_path, capsys):
    written(tmp_path, "a.txt", "text")
    written(tmp_path, "b.txt", "text".encode("utf-16-le"))
    assert texts_in(tmp_path) == ["text"]
    said = capsys.readouterr().err
    assert said == f"warning: left out 1 file of archives or with NUL characters, first {tmp_path / 'b.txt'}\n"


def test_a_json_text_may_have_nul_characters(tmp_path):
    assert texts_in(written(tmp_path, "a.jsonl", b'{"text": "a\\u0000b"}\n')) == ["a\0b"]


def test_links_that_are_not_followed_are_named(tmp_path, capsys):
    written(tmp_path, "elsewhere/b.txt", "2")
    written(tmp_path, "texts/a.txt", "1")
    (tmp_path / "texts" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "texts" / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "texts" / "c.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")
    assert texts_in(tmp_path / "texts") == ["1", "2"]
    assert capsys.readouterr().err == (
        f"warning: --input {tmp_path}/texts: left out 2 links to folders or to what is not there: gone.txt, linked\n"
    )


UNREADABLE = """
import os, sys
from sedd_megatron.data.input_files import input_files
from sedd_megatron.errors import UserError
if os.geteuid() == 0:
    os.seteuid(65534)
try:
    print(input_files([sys.argv[1]]))
except UserError as error:
    print(error)
"""


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path):
    written(tmp_path, "a.txt", "1")
    written(tmp_path, "closed/b.txt", "2")
    tmp_path.chmod(0o755)
    (tmp_path / "closed").chmod(0)
    for parent in tmp_path.parents[:3]:
        if parent.stat().st_uid == os.getuid():
            parent.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", UNREADABLE, str(tmp_path)], env=child_environment(),
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.stdout == (
        f"--input {tmp_path}: {tmp_path}/closed cannot be read (Permission denied); mend that, or name the files one "
        "by one\n"
    ), done.stderr
    (tmp_path / "closed").chmod(0o755)


def test_a_folder_of_what_is_no_text_alone_is_refused(tmp_path):
    written(tmp_path, "b.txt", b"\0")
    with pytest.raises(UserError, match="no UTF-8 file in it"):
        input_files([str(tmp_path)])
