"""What a file's beginning says of it: packed by gzip, bzip2 or zstd, an archive, or no text."""

import bz2
import gzip
import io
import sys
from collections.abc import Callable
from typing import IO, Any

from sedd_megatron.errors import UserError
from sedd_megatron.wording import how_to_install

PACKED_SUFFIXES = (".gz", ".bz2", ".zst")
LONGEST_SIGN = 10  # bytes at the beginning of a file that tell its packing
TAR_SIGN, TAR_SIGN_AT = b"ustar", 257
# Those of texts may be UTF-8 from end to end.
ARCHIVE_SIGNS = {
    b"!<arch>\n": "an ar archive",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a rar archive",
    b"\xfd7zXZ\x00": "packed by xz",
    b"%PDF-": "a PDF",
}
TEXT_BEGINNING = 1 << 20
BLOCK = 1 << 20


def unpacker(start: bytes, where: str) -> Callable[[IO[bytes]], IO[bytes]] | None:
    """What unpacks a file that begins like this; None if it is not packed.

    Raises:
        UserError: it is packed by zstd, and the package for it is missing.
    """
    if start.startswith(b"\x1f\x8b"):
        return gzip.open
    # With the sign of a block or of the end: BZh alone may begin a text.
    if start.startswith(b"BZh") and start[4:] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return lambda file: io.BufferedReader(_Bzip2Streams(file), BLOCK)
    # A frame of zstd, or one that it skips.
    if start.startswith(b"\x28\xb5\x2f\xfd") or (start[1:4] == b"\x2a\x4d\x18" and start[0] & 0xF0 == 0x50):
        return _zstd(where).open
    return None


def why_no_text(beginning: bytes) -> str | None:
    """What the first TEXT_BEGINNING bytes of a file, unpacked, show it to be that is no text, and the way out."""
    what = next((what for sign, what in ARCHIVE_SIGNS.items() if beginning.startswith(sign)), None)
    if beginning[TAR_SIGN_AT:].startswith(TAR_SIGN):
        what = "a tar archive"
    if what is not None:
        return f"is {what}; unpack it, and name its files or their folder"
    if b"\x00" in beginning:
        return (
            f"has a NUL character at byte {beginning.index(0)}, as UTF-16 and files that are no text have; convert it "
            "(iconv -f UTF-16 -t UTF-8), take such characters out (tr -d '\\0'), or leave it out"
        )
    return None


class _Bzip2Streams(io.RawIOBase):
    """The streams of a file one after the other, as pbzip2 writes them.

    bz2.open takes a stream that does not begin as one for the file's end, and drops it and all that follow.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._stream = bz2.BZ2Decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            block = b""
            if self._stream.eof:
                block = self._stream.unused_data or self._file.read(BLOCK)
                if not block:
                    return 0
                self._stream = bz2.BZ2Decompressor()
            elif self._stream.needs_input:
                block = self._file.read(BLOCK)
                if not block:
                    raise EOFError("it ends inside of a stream")
            content = self._stream.decompress(block, len(buffer))
            if content:
                buffer[: len(content)] = content
                return len(content)


def _zstd(where: str) -> Any:
    try:
        # Not the package zstandard: it takes a file that is cut short for a whole one.
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as error:
        raise UserError(
            f"{where}: is packed by zstd, which needs the package backports.zstd: {how_to_install('data')}"
        ) from error
    return zstd
