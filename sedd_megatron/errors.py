"""The one error that is meant for people, and how a command ends with it."""

import contextlib
import os
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterator


class UserError(Exception):
    """A mistake a person can mend. The message is one line: the value, the rule, the way out.

    It may quote whatever a person or a file says, and so is made printable.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


# What a text of several lines keeps of its control characters.
KEPT_CONTROLS = "\n\t"


def printable(text: str, kept: str = "") -> str:
    """Text that a terminal shows and does not obey: control characters as \\x1b and the like, but for those `kept`.

    Halves of surrogate pairs, which no file takes, become \\udcff and the like.
    """
    return "".join(
        one if one in kept or unicodedata.category(one) not in ("Cc", "Cs") else one.encode("unicode_escape").decode()
        for one in text
    )


def scores_not_finite(where: str, sigma: float) -> UserError:
    """What samplers and bounds end with over NaN or infinite scores; `where` says whose."""
    return UserError(
        f"{where}: the model's scores are not finite at sigma {sigma:.4g}; its weights are damaged, or it diverged in "
        "training: take an earlier checkpoint"
    )


def one_line(error: Exception, width: int = 200) -> str:
    """What a library's error says, for a UserError: on one line, and the beginning where it is long."""
    return textwrap.shorten(str(error), width, placeholder=" ...")


@contextlib.contextmanager
def output_errors() -> Iterator[None]:
    """Around what is printed.

    Raises:
        UserError: standard output is full, as /dev/full is.
        BrokenPipeError: nobody reads it any more.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"standard output: cannot be written ({error.strerror}); send it elsewhere") from error


def print_output(text: str) -> None:
    """Print a line and have it written at once; errors as output_errors has them."""
    with output_errors():
        print(text, flush=True)


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main function and exit with what it returns; a UserError becomes one line on stderr and exit
    code 2.

    Every rank exits with 2; only the first rank of each node prints, so that the line is not repeated by its
    neighbours.
    """
    try:
        code = main()
        with output_errors():
            _flush()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            _flush()
        # Not sys.exit: a rank that holds process groups or loader threads must not wait for them on its way out.
        os._exit(2)
    except BrokenPipeError:
        # Whoever read the output has enough, as head does: 128 + SIGPIPE, the shell's code for that.
        os._exit(141)
    sys.exit(code)


def _flush() -> None:
    # None where the command was started with it closed, and then nothing was printed.
    if sys.stdout is not None:
        sys.stdout.flush()
