"""Where texts come from: files, folders, text8. A source gives the same texts in the same order every time."""

import codecs
import json
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol

from sedd_megatron.errors import UserError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".py", ".jsonl")
TEXT8_CHARACTERS = " abcdefghijklmnopqrstuvwxyz"
TEXT8_LENGTH = 100_000_000


class DocumentSource(Protocol):
    """What a preparation reads."""

    name: str  # as errors call it: --input FILE, --dataset NAME
    unit: str  # what `total` and `position` count
    total: int | None
    position: int

    def identity(self) -> Any:
        """Plain values that change when the texts may have changed, without reading them."""

    def texts(self, key: str, skip: int = 0) -> Iterator[str]:
        """The texts at `key`, without the first `skip`."""


class FileSource:
    """Text files, one document each, and .jsonl files, a document per line."""

    unit = "B"

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.name = f"--input {self.files[0]}"
        self.total = sum(path.stat().st_size for path in self.files)
        self.position = 0

    def identity(self) -> Any:
        """Paths, sizes and times of change."""
        status = [(path, path.stat()) for path in self.files]
        return [[str(path.resolve()), one.st_size, one.st_mtime_ns] for path, one in status]

    def texts(self, key: str, skip: int = 0) -> Iterator[str]:
        """The value at `key` of each line of .jsonl files, and the other files whole.

        Raises:
            UserError: naming the file and line that is not UTF-8, not JSON or lacks the key.
        """
        self.position = 0
        for path in self.files:
            if path.suffix == ".jsonl":
                with path.open("rb") as lines:
                    for number, line in enumerate(lines, start=1):
                        self.position += len(line)
                        if not line.strip():
                            continue
                        if skip > 0:
                            skip -= 1
                        else:
                            yield _json_text(line, key, f"--input {path} line {number}")
                continue
            self.position += path.stat().st_size
            if skip > 0:
                skip -= 1
            else:
                # Line ends as they are: text that is read back must be the text that was written.
                yield _utf8(path.read_bytes(), f"--input {path}")


class Text8Source:
    """The texts of another source in one, checked and cut into training, validation and test text: 90, 5 and 5 %."""

    unit = "documents"
    total = 3

    def __init__(self, source: DocumentSource) -> None:
        self.source = source
        self.name = source.name
        self.position = 0

    def identity(self) -> Any:
        """The other source's, under this one's name."""
        return ["text8", self.source.identity()]

    def texts(self, key: str, skip: int = 0) -> Iterator[str]:
        """Three documents; of text8 itself with 90, 5 and 5 million characters.

        Raises:
            UserError: naming the first character that is neither a-z nor a blank, and its position.
        """
        text = "".join(self.source.texts(key))
        found = re.search("[^a-z ]", text)
        if found is not None:
            raise UserError(
                f"{self.name}: has {found[0]!r} at character {found.start()}, and text8 has a-z and blanks alone; give "
                "the file text8 of text8.zip as it is"
            )
        if len(text) != TEXT8_LENGTH:
            print(f"warning: {self.name}: {len(text):,} characters, text8 has {TEXT8_LENGTH:,}", file=sys.stderr)
        bounds = [len(text) * twentieths // 20 for twentieths in (0, 18, 19, 20)]
        for self.position, (first, last) in islice(enumerate(pairwise(bounds), start=1), skip, None):
            yield text[first:last]


def input_files(inputs: Sequence[str]) -> list[Path]:
    """The files that --input names; a folder stands for the text files in it, in the order of their names.

    Files of a folder that are not UTF-8 are left out, with one warning on stderr; the check reads each file once.

    Raises:
        UserError: a path that is not there, or a folder without text files.
    """
    files = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files += _folder_files(path)
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"--input {name}: no such file or folder; check the path")
    return files


def text_lines(flag: str, path: Path) -> list[str]:
    """The lines of a small text file that a flag names; a byte order mark is no part of the first.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: cannot be read as UTF-8 text ({error}); name another file") from error


def json_lines(flag: str, path: Path, way_out: str) -> Iterator[tuple[int, Any]]:
    """The number and value of each line of such a file that is not blank; `way_out` ends the error of one.

    Raises:
        UserError: the file cannot be read, or naming the first line that is not JSON.
    """
    for number, line in enumerate(text_lines(flag, path), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{flag} {path}, line {number}: not JSON ({error}); {way_out}") from error
        yield number, value


def valid_text(value: Any, key: str, where: str) -> str:
    """`value`, if it is text that every tokenizer can take.

    Raises:
        UserError: opening with `where`.
    """
    if not isinstance(value, str):
        raise UserError(f"{where}: no text at key {key!r}; name the right one with --json-keys")
    try:
        # JSON can write half of a surrogate pair, as \ud800; no tokenizer can.
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} of {key!r} is half a surrogate pair; mend the line"
        ) from error
    return value


def _folder_files(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
    skipped = {path for path in found if not _is_utf8(path)}
    readable = [path for path in found if path not in skipped]
    if not readable:
        raise UserError(
            f"--input {folder}: no UTF-8 file in it ends with {', '.join(TEXT_SUFFIXES)}; name the files one by one"
        )
    if skipped:
        print(f"warning: left out {len(skipped)} files that are not UTF-8, first {min(skipped)}", file=sys.stderr)
    return readable


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}; convert it or leave it out") from error


def _json_text(line: bytes, key: str, where: str) -> str:
    try:
        value = json.loads(_utf8(line, where))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON; each line must be an object") from error
    return valid_text(value.get(key) if isinstance(value, dict) else None, key, where)
