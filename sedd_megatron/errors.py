"""The one error that is meant for people, and how a command speaks and ends."""

import contextlib
import ctypes
import os
import signal
import sys
import textwrap
from collections.abc import Callable

# What asks a process to end; training saves first.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class UserError(Exception):
    """A mistake a person can mend. The message is one line: the value, the rule, the way out."""


class LostRankError(UserError):
    """Another rank is gone or stands still. Each that notices says so: the first of the node may be the lost one."""


def one_line(error: Exception, width: int = 200) -> str:
    """What a library's error says, for a UserError: on one line, and the beginning where it is long."""
    return textwrap.shorten(str(error), width, placeholder=" ...")


def say(text: str, to_stderr: bool = False) -> None:
    """Print a line that a run can do without: a log on a full disk or a terminal that is gone ends no training."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr if to_stderr else sys.stdout, flush=True)


def forget_unsaid() -> None:
    """Drop what `say` could not print, for which Python would end with code 120 after a run that did its work."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main function and exit with what it returns; a UserError becomes one line on stderr and exit
    code 2, Ctrl-C exit code 130.

    Every rank exits with 2; only the first rank of each node prints, so that the line is not repeated by its
    neighbours.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Killed, torchrun takes no rank with it, and they would train on beside those of the next start. No one else's
        # processes: what nohup started has to outlive its shell. torchrun starts its ranks from its main thread; one
        # that died before this line is missed at the rendezvous, whose store it kept.
        die_with_parent(os.getppid())
    try:
        code = main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, LostRankError):
            say(f"error: {error}", to_stderr=True)
        _exit_at_once(2)
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            say("interrupted", to_stderr=True)
        _exit_at_once(128 + signal.SIGINT)
    except BrokenPipeError:
        # Whoever read the output has enough, as head does.
        os._exit(128 + signal.SIGPIPE)
    sys.exit(code)


def _exit_at_once(code: int) -> None:
    """Not sys.exit: a rank that holds process groups or loader threads must not wait for them on its way out."""
    with contextlib.suppress(OSError):
        print(end="", flush=True)
    os._exit(code)


def die_with_parent(parent: int) -> None:
    """On Linux, have the kernel kill this process when its `parent` is gone; at once if that has happened already.

    The signal comes when the thread that started this process ends, which has to live as long as its process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
