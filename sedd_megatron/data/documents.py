"""Where texts come from: files, folders, text8. A source gives the same texts in the same order every time."""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol

from sedd_megatron.data.input_files import InputFile, json_value, lines_of
from sedd_megatron.errors import UserError, say

TEXT8_CHARACTERS = " abcdefghijklmnopqrstuvwxyz"
TEXT8_LENGTH = 100_000_000


class DocumentSource(Protocol):
    """What a preparation reads."""

    name: str  # as errors call it: --input FILE, --dataset NAME
    unit: str  # what `total` and `position` count
    total: int | None
    position: int
    num_nulls: int  # of the texts that were read, how many are null: they become empty ones

    def identity(self) -> Any:
        """Plain values that change when the texts may have changed, without reading them."""

    def texts(self, key: str, skip: int = 0) -> Iterator[str]:
        """The texts at `key`, without the first `skip`."""


class FileSource:
    """Text files, one document each, and files with a JSON object in each line, which is a document."""

    unit = "B"

    def __init__(self, files: Sequence[InputFile], key_flag: str = "--json-keys") -> None:
        """`key_flag` is the flag that names keys, for errors."""
        self.files, self._key_flag = tuple(files), key_flag
        self.name = self.files[0].where
        self.total = sum(file.size for file in self.files)
        self.position = self.num_nulls = 0

    def identity(self) -> Any:
        """Paths, sizes and times of change."""
        return [file.identity() for file in self.files]

    def texts(self, key: str, skip: int = 0) -> Iterator[str]:
        """The value at `key` of each line of JSON, an empty text for null, and the other files whole.

        Raises:
            UserError: naming the file and line that is not UTF-8, not JSON or lacks the key.
        """
        return (text or "" for text in self.values(key, skip))

    def values(self, key: str, skip: int = 0) -> Iterator[str | None]:
        """The same with None for null."""
        self.position = self.num_nulls = before = 0
        for file in self.files:
            if skip > 0 and not file.is_json_lines:
                skip, before = skip - 1, before + file.size
                continue
            with file.open() as (content, packed):
                # Line ends as they are: text that is read back must be the text that was written.
                parts = lines_of(content) if file.is_json_lines else [(None, content.read())]
                for number, part in parts:
                    self.position = before + packed.tell()
                    if file.is_json_lines and part.isspace():
                        continue
                    if skip > 0:
                        skip -= 1
                    elif file.is_json_lines:
                        yield self._json_text(part, key, f"{file.where} line {number}")
                    else:
                        yield _utf8(part, file.where).removeprefix("\ufeff")
            before += file.size

    def _json_text(self, line: bytes, key: str, where: str) -> str | None:
        try:
            value = json_value(_utf8(line, where))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON; each line must be an object") from error
        if not isinstance(value, dict) or key not in value:
            raise UserError(f"{where}: no text at key {key!r}; name the right one with {self._key_flag}")
        if value[key] is None:
            self.num_nulls += 1
            return None
        return valid_text(value[key], key, where, f"name the right one with {self._key_flag}")


class Text8Source:
    """The texts of another source in one, checked and cut into training, validation and test text: 90, 5 and 5 %."""

    unit = "documents"
    total = 3

    def __init__(self, source: DocumentSource) -> None:
        self.source = source
        self.name = source.name
        self.position = 0

    @property
    def num_nulls(self) -> int:
        """The other source's."""
        return self.source.num_nulls

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
            say(f"warning: {self.name}: {len(text):,} characters, text8 has {TEXT8_LENGTH:,}", to_stderr=True)
        bounds = [len(text) * twentieths // 20 for twentieths in (0, 18, 19, 20)]
        for self.position, (first, last) in islice(enumerate(pairwise(bounds), start=1), skip, None):
            yield text[first:last]


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


def valid_text(value: Any, key: str, where: str, way_out: str) -> str:
    """`value`, if it is text that every tokenizer can take; `way_out` ends the error of what is no text.

    Raises:
        UserError: opening with `where`.
    """
    if not isinstance(value, str):
        raise UserError(f"{where}: no text at key {key!r}; {way_out}")
    try:
        # JSON can write half of a surrogate pair, as \ud800; no tokenizer can.
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} of {key!r} is half a surrogate pair; mend the line"
        ) from error
    return value


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}; convert it or leave it out") from error
