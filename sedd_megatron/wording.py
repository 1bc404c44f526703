"""What is said in many places: numbers with their nouns, what to install, the system's errors in one line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sedd_megatron.errors import UserError


def how_to_install(extra: str) -> str:
    """The command that installs one of setup.py's extras, for this checkout, or where there is none for the package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "setup.py").is_file():
        return f"pip install 'sedd_megatron[{extra}]'"
    return f"pip install -e '{'.' if root == Path.cwd() else root}[{extra}]'"


def counted(number: int, noun: str) -> str:
    """1 document, 2 documents, 1,000 documents."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


@contextlib.contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Around what reads a file or folder.

    Raises:
        UserError: in place of an OSError, as for want of permission.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: cannot be read ({error.strerror or error}); mend that, or use another copy"
        ) from error
