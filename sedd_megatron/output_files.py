"""Files that commands write to; that one cannot be written is found before any work."""

from collections.abc import Iterable
from pathlib import Path
from typing import IO

from sedd_megatron.errors import UserError


def open_output(flag: str, path: str, mode: str = "w") -> IO[str]:
    """A file that `flag` names, for text that is on the disk line by line; its folder is made.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return open(path, mode, encoding="utf-8", buffering=1)
    except OSError as error:
        raise _unwritable(flag, path, error) from error


def check_output(flag: str, path: str | None) -> None:
    """Raise open_output's error if there is a path and it has one; what is in the file stays."""
    if path is not None:
        open_output(flag, path, "a").close()


def write_output(flag: str, path: str, pieces: Iterable[str]) -> None:
    """Write a whole file.

    Raises:
        UserError: it cannot be opened or written.
    """
    try:
        with open_output(flag, path) as file:
            file.writelines(pieces)
    except OSError as error:
        raise _unwritable(flag, path, error) from error


def _unwritable(flag: str, path: str, error: OSError) -> UserError:
    return UserError(f"{flag} {path}: cannot be written ({error.strerror}); name another file")
