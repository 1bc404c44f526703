"""Files that texts come from: those of a folder, packed ones, and whether a file is a text or has one in each line.

What a file holds is told by its content. It is line-delimited JSON if each of its first lines is a JSON object, and by
the suffixes .jsonl and .ndjson. If more than half of them begin with a brace all the same, or it begins with an object
over several lines or is a list, or more than half of them are objects, lists, strings or records of a JSON text
sequence (RFC 7464), it is refused, for nobody means to train on braces: --input-format says what it is.
"""

import codecs
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sedd_megatron.data.digests import sha256_of
from sedd_megatron.data.packed_files import LONGEST_SIGN, PACKED_SUFFIXES, TEXT_BEGINNING, unpacker, why_no_text
from sedd_megatron.data.tokenizer_folder import DESCRIPTION, holds_tokenizer
from sedd_megatron.errors import UserError, one_line, say
from sedd_megatron.wording import counted

INPUT_FORMATS = ("text", "jsonl")
STANDARD_INPUT = "-"
SOURCE_SUFFIXES = (".md", ".py")
TEXT_SUFFIXES = (".txt", ".text", *SOURCE_SUFFIXES)
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
FIRST_LINES, FIRST_BYTES = 1000, 1 << 24
SHOWN_NAMES = 3
RECORD_SEPARATOR = b"\x1e"  # of RFC 7464, before each value


@dataclass(frozen=True)
class InputFile:
    """A file that a flag names, or that lies in a folder that it names."""

    path: Path
    flag: str = "--input"
    is_json_lines: bool = False
    spool: IO[bytes] | None = None  # what came by standard input

    @property
    def where(self) -> str:
        """As errors call it."""
        return f"{self.flag} {self.path}"

    @property
    def suffix(self) -> str:
        """In small letters, without that of its packing."""
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        return next((suffix for suffix in reversed(suffixes) if suffix not in PACKED_SUFFIXES), "")

    @property
    def size(self) -> int:
        """In bytes, packed as it is."""
        return os.fstat(self.spool.fileno()).st_size if self.spool else self.path.stat().st_size

    def identity(self) -> list[Any]:
        """Plain values that change when the content may have changed."""
        if self.spool is None:
            status = self.path.stat()
            return [str(self.path.resolve()), status.st_size, status.st_mtime_ns, self.is_json_lines]
        with self.open_packed() as content:
            return [STANDARD_INPUT, sha256_of(content), self.is_json_lines]

    @contextmanager
    def open_packed(self) -> Iterator[IO[bytes]]:
        """Its bytes as they are."""
        with os.fdopen(os.dup(self.spool.fileno()), "rb") if self.spool else self.path.open("rb") as file:
            file.seek(0)
            yield file

    @contextmanager
    def open(self) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
        """Its content unpacked, and the file itself, which says how much of it was read.

        Raises:
            UserError: it is packed and damaged, or by zstd and the package for it is missing, or what is read of it at
                once does not fit into memory.
        """
        with self.open_packed() as file:
            start = file.read(LONGEST_SIGN)
            file.seek(0)
            unpack = unpacker(start, self.where)
            try:
                if unpack is None:
                    yield file, file
                    return
                with unpack(file) as content:
                    yield content, file
            except UserError:
                raise
            except MemoryError as error:
                what = "" if unpack is None else "what is packed in it "
                raise UserError(
                    f"{self.where}: {what}does not fit into memory; write it as lines of JSON or as several files, or "
                    "raise the limit"
                ) from error
            except Exception as error:  # each packing has errors of its own, among them plain OSErrors
                if unpack is None or (isinstance(error, OSError) and error.errno is not None):
                    raise
                raise UserError(
                    f"{self.where}: damaged or cut short, and cannot be unpacked ({one_line(error)}); use another copy"
                ) from error


def input_files(
    names: Sequence[str],
    flag: str = "--input",
    input_format: str | None = None,
    spool_folder: Path | None = None,
    are_texts: bool = True,
) -> list[InputFile]:
    """The files that a flag names; a folder stands for the text files in it, in the order of their names.

    Files of a folder that are hidden, part of a tokenizer that lies there, not UTF-8 or of another kind are left out,
    with a warning on stderr for each reason; the check reads each file once.

    Args:
        input_format: what all of them are, one of INPUT_FORMATS; None to tell by their content.
        spool_folder: where standard input, named -, is kept while this process lives; None takes none.
        are_texts: False for files of anything, which nothing is asked of.

    Raises:
        UserError: a path that is not there, a folder without text files, a file that is named twice, by itself or by
            its folder, one that may be of either format, or one that is no text, as an archive.
    """
    if spool_folder is not None and names.count(STANDARD_INPUT) > 1:
        raise UserError(f"{flag} {STANDARD_INPUT}: standard input is read once; name it once")
    files, names_by_path = [], {}
    for position, name in enumerate(names):
        if name == STANDARD_INPUT and spool_folder is not None:
            found = named = [InputFile(Path(name), flag, spool=_spooled(spool_folder))]
        elif name and os.path.isdir(name):
            found, named = _folder_files(Path(name), flag, input_format), []
        elif os.path.isfile(name):
            found = named = [InputFile(Path(name), flag)]
        else:
            raise UserError(f"{flag} {name}: no such file or folder; check the path")
        for file in found:
            # Two links of one folder to a file are what somebody has made on purpose.
            other = names_by_path.setdefault(os.path.realpath(file.path), (position, name))
            if other[0] != position and file.spool is None:
                raise UserError(
                    f"{file.where}: is named twice, by {other[1]} and by {name}, and would be read twice; name it once"
                )
        for file in named if are_texts else []:
            fault = why_no_text(_beginning(file))
            if fault is not None:
                raise UserError(f"{file.where}: {fault}")
        files += found
    return [_of_its_kind(file, input_format) for file in files] if are_texts else files


def lines_of(content: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Numbers from 1 and lines; a byte order mark is no part of the first."""
    for number, line in enumerate(content, start=1):
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def object_of(line: bytes) -> dict[str, Any] | None:
    """The JSON object that a line is; None for anything else."""
    try:
        value = json_value(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def json_value(text: str) -> Any:
    """What a JSON text says; whole numbers become floats, since Python refuses integers of thousands of digits."""
    return json.loads(text, parse_int=float)


def _of_its_kind(file: InputFile, input_format: str | None) -> InputFile:
    if input_format is None:
        is_json_lines = file.suffix in JSON_LINES_SUFFIXES or _has_json_lines(file)
    else:
        is_json_lines = input_format == "jsonl"
    return InputFile(file.path, file.flag, is_json_lines, file.spool)


def _beginning(file: InputFile) -> bytes:
    with file.open() as (content, _):
        return content.read(TEXT_BEGINNING)


def _has_json_lines(file: InputFile) -> bool:
    num_lines = num_braced = num_objects = num_values = num_bytes = 0
    first = b""
    with file.open() as (content, _):
        for line in (line.lstrip() for _, line in lines_of(content) if not line.isspace()):
            first = first or line[:1]
            is_braced = line.startswith(b"{")
            num_braced += is_braced
            value = _container_or_string(line)
            num_objects += is_braced and value is not None
            num_values += bool(value)
            num_lines, num_bytes = num_lines + 1, num_bytes + len(line)
            if num_lines == FIRST_LINES or num_bytes >= FIRST_BYTES:
                break
    if num_lines > 0 and num_objects == num_lines:
        return True
    if 2 * num_braced > num_lines:
        raise UserError(
            f"{file.where}: most lines begin with a brace, but not all are JSON objects; --input-format jsonl if there "
            "is to be one in each line, text to train on it as it stands"
        )
    is_suspect = first in (b"{", b"[") and file.suffix not in SOURCE_SUFFIXES
    if file.suffix == ".json" or (is_suspect and _begins_with_json(file)):
        raise UserError(
            f"{file.where}: is JSON, but not one object in each line; write it so (jq -c '.[]' for a list), or give "
            "--input-format text to train on it as it stands"
        )
    # A single line may well be a quotation.
    is_quotation = num_lines == 1 and first == b'"'
    if 2 * num_values > num_lines and not is_quotation and file.suffix not in SOURCE_SUFFIXES:
        raise UserError(
            f"{file.where}: most lines are JSON, but not all of them objects; write one object in each line (jq -c "
            "'{text: .}' for strings), or give --input-format text to train on it as it stands"
        )
    return False


def _container_or_string(line: bytes) -> dict[str, Any] | list[Any] | str | None:
    """The object, list or string that a line is, or a record of a JSON text sequence; None for anything else."""
    if not line.startswith((b"{", b"[", b'"', RECORD_SEPARATOR)):
        return None
    try:
        value = json_value(line.lstrip(RECORD_SEPARATOR).decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list | str) else None


def _begins_with_json(file: InputFile) -> bool:
    """Whether it begins with an object that is not empty, or is one list."""
    with file.open() as (content, _):
        try:
            text = content.read().decode("utf-8-sig").strip()
            value, end = json.JSONDecoder(parse_int=float).raw_decode(text)
        except (ValueError, RecursionError):
            return False
    return bool(value) and (isinstance(value, dict) or end == len(text))


def _folder_files(folder: Path, flag: str, input_format: str | None) -> list[InputFile]:
    paths, links = _files_under(folder, flag)
    kept, set_apart, others, undecodable, no_texts = [], [], [], [], []
    # As one lies beside each corpus; the parts of a corpus that is not finished are hidden.
    described = {path.parent for path in paths if path.name == DESCRIPTION} - {folder}
    tokenizers = set(filter(holds_tokenizer, described))
    for path in paths:
        file = InputFile(path, flag)
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if is_hidden or not tokenizers.isdisjoint(path.parents):
            set_apart.append(path)
        elif not _is_of_texts(file, input_format):
            others.append(path)
        elif not _is_utf8(file):
            undecodable.append(path)
        elif why_no_text(_beginning(file)) is not None:
            no_texts.append(path)
        else:
            kept.append(file)
    if not kept:
        suffixes = ", ".join((*TEXT_SUFFIXES, *JSON_LINES_SUFFIXES))
        raise UserError(f"{flag} {folder}: no UTF-8 file in it ends with {suffixes}; name the files one by one")
    for left_out, noun, kind in (
        (set_apart, "hidden file", "or files of tokenizers"),
        (others, "file", "of other kinds"),
        (links, "link", "to folders or to what is not there"),
    ):
        if left_out:
            shown = ", ".join(str(path.relative_to(folder)) for path in left_out[:SHOWN_NAMES])
            more = ", ..." if len(left_out) > SHOWN_NAMES else ""
            what = f"{counted(len(left_out), noun)} {kind}"
            say(f"warning: {flag} {folder}: left out {what}: {shown}{more}", to_stderr=True)
    for left_out, kind in ((undecodable, "that {} not UTF-8"), (no_texts, "of archives or with NUL characters")):
        if left_out:
            what = f"{counted(len(left_out), 'file')} {kind.format('is' if len(left_out) == 1 else 'are')}"
            say(f"warning: left out {what}, first {left_out[0]}", to_stderr=True)
    return kept


def _files_under(folder: Path, flag: str) -> tuple[list[Path], list[Path]]:
    """All files under a folder in the order of their paths, and the links that are not followed."""
    files, links = [], []

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{flag} {folder}: {error.filename} cannot be read ({error.strerror}); mend that, or name the files one by "
            "one"
        ) from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        links += [Path(parent, name) for name in folders if os.path.islink(os.path.join(parent, name))]
        for path in (Path(parent, name) for name in names):
            if path.is_file():
                files.append(path)
            elif path.is_symlink():
                links.append(path)
    return sorted(files), sorted(links)


def _is_of_texts(file: InputFile, input_format: str | None) -> bool:
    if file.suffix == ".json" and input_format is None:
        # Most often settings or the like, which nobody means who names their folder.
        with file.open() as (content, _):
            return object_of(next(lines_of(content), (1, b""))[1]) is not None
    return file.suffix in (*TEXT_SUFFIXES, *JSON_LINES_SUFFIXES)


def _is_utf8(file: InputFile) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with file.open() as (content, _):
        try:
            while chunk := content.read(1 << 20):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _spooled(folder: Path) -> IO[bytes]:
    """Standard input in a file without a name, which can be read again: by what learns from it, and for each key."""
    if sys.stdin is None:
        raise UserError(f"--input {STANDARD_INPUT}: standard input is closed; send it the texts, or name files")
    folder.mkdir(parents=True, exist_ok=True)
    spool = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  it lives as long as the process
    shutil.copyfileobj(sys.stdin.buffer, spool, 1 << 20)
    spool.flush()
    return spool
