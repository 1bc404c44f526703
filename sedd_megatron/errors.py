"""The one error that is meant for people, and how a command ends with it."""

import os
import sys
import textwrap
from collections.abc import Callable


class UserError(Exception):
    """A mistake a person can mend. The message is one line: the value, the rule, the way out."""


def one_line(error: Exception, width: int = 200) -> str:
    """What a library's error says, for a UserError: on one line, and the beginning where it is long."""
    return textwrap.shorten(str(error), width, placeholder=" ...")


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main function and exit with what it returns; a UserError becomes one line on stderr and exit
    code 2.

    Every rank exits with 2; only the first rank of each node prints, so that the line is not repeated by its
    neighbours.
    """
    try:
        code = main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        # Not sys.exit: a rank that holds process groups or loader threads must not wait for them on its way out.
        sys.stdout.flush()
        os._exit(2)
    except BrokenPipeError:
        # Whoever read the output has enough, as head does: 128 + SIGPIPE, the shell's code for that.
        os._exit(141)
    sys.exit(code)
