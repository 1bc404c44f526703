"""Files, links and devices that commands write to; that one cannot be written is found before any work."""

import contextlib
import errno
import itertools
import json
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sedd_megatron.errors import UserError


class OutputFile:
    """A file that `flag` names, for text that is on the disk line by line; its folder is made.

    A link is written through, and so is a device.

    Raises:
        UserError: from every method, where the file cannot be opened, written or closed.
    """

    def __init__(self, flag: str, path: str | Path) -> None:
        self.flag, self.path = flag, path
        with self._errors():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115  closed at the with statement's end

    def write(self, text: str) -> None:
        """Text, on the disk up to its last line end."""
        with self._errors():
            self.file.write(text)

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, *_: object) -> None:
        with self._errors():
            self.file.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _unwritable(self.flag, self.path, error) from error


def check_output(
    flag: str,
    path: str | None,
    others: Iterable[tuple[str, str | None]] = (),
    model: Path | None = None,
) -> None:
    """Raise OutputFile's error if there is a path and opening it has one; what is in the file stays.

    `others` are files that the command reads or writes as well, with their flags: none may be this one, nor one in the
    folder of the `model` that it reads. Nothing is left where there was nothing. Pipes and devices are not opened: who
    reads a pipe would see its end.
    """
    if path is None:
        return
    if path == "-":
        raise UserError(f"{flag} -: names no file; standard output is /dev/stdout")
    if model is not None and Path(path).resolve().is_relative_to(model.resolve()):
        raise UserError(f"{flag} {path}: is in the folder of the model, {model}; name a file elsewhere")
    for other_flag, other in others:
        if other is not None and os.path.isfile(path) and os.path.exists(other) and os.path.samefile(path, other):
            raise UserError(f"{flag} {path}: is {other_flag} as well, which would be lost; name another file")
        if other is not None and not os.path.exists(path) and os.path.abspath(path) == os.path.abspath(other):
            raise UserError(f"{flag} {path}: is {other_flag} as well; name another file")
    try:
        if not os.path.exists(path):
            parent = Path(path).parent
            parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=parent).close()
        elif os.path.isfile(path):
            open(path, "a").close()
        elif os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _unwritable(flag, path, error) from error


def write_output(flag: str, path: str | Path, pieces: Iterable[str]) -> None:
    """Write a whole file.

    Raises:
        UserError: it cannot be opened or written.
    """
    with OutputFile(flag, path) as file:
        for piece in pieces:
            file.write(piece)


def unused_path(folder: Path, stem: str, suffix: str) -> Path:
    """Where a file goes that replaces none, as another run's that shares the folder: STEM, or STEM.2 and so on."""
    names = itertools.chain([stem], (f"{stem}.{number}" for number in itertools.count(2)))
    return next(path for name in names if not (path := folder / f"{name}{suffix}").exists())


def write_whole(flag: str, path: Path, text: str) -> None:
    """Write all of a file or nothing: what was at the path is still there if that fails.

    Only a file that is no link is put in place of another. Links and devices are written through, and may be left with
    a part.

    Raises:
        UserError: the file cannot be written.
    """
    if os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path)):
        write_output(flag, path, [text])
        return
    # Not by the process' number, which two containers may share.
    unfinished = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise _unwritable(flag, path, error) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def script_json(data: Any) -> str:
    """For a page's script: JSON in ASCII without a character that means anything to an HTML parser."""
    text = json.dumps(data, separators=(",", ":"))
    # Outside of its strings JSON has none of these, and inside them the escapes mean the same.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _unwritable(flag: str, path: str | Path, error: OSError) -> UserError:
    return UserError(f"{flag} {path}: cannot be written ({error.strerror}); name another file")
