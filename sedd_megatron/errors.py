"""The one error that is meant for people, and how a command speaks and ends."""

import contextlib
import ctypes
import os
import signal
import sys
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterator

from sedd_megatron.launcher import FROM_TORCHRUN, ends_with_the_first, is_of_a_step, rank_variables

# What asks a process to end; training saves first.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
SECONDS_FOR_THE_FIRST_RANK = 5.0  # to end and say why
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class UserError(Exception):
    """A mistake a person can mend. The message is one line: the value, the rule, the way out. Several mistakes of one
    kind may come together, each with its line.

    It may quote whatever a person or a file says, and so is made printable.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*map(printable, lines))

    def __str__(self) -> str:
        # Each line as run_command begins the first.
        return "\nerror: ".join(self.args)


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


def require(holds: bool, message: str) -> None:
    """Raise a UserError with this message unless a rule holds."""
    if not holds:
        raise UserError(message)


class LostRankError(UserError):
    """Another rank is gone or stands still. Each that notices says so: the first of the node may be the lost one."""


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


def say(text: str, to_stderr: bool = False) -> None:
    """Print a line that a run can do without: a log on a full disk or a terminal that is gone ends no training."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr if to_stderr else sys.stdout, flush=True)


def forget_unsaid() -> None:
    """Drop what `say` could not print, for which Python would end with code 120 after a run that did its work."""
    try:
        _flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main function and exit with what it returns; a UserError becomes one line on stderr and exit
    code 2, Ctrl-C exit code 130.

    It first gives a task of a step of Slurm, or of mpirun, the variables of torchrun's ranks.

    Every rank ends with 2, or by its launcher once another has; only one of those whose words come to one log prints
    (of each machine under torchrun, of all under srun and mpirun), so that the line is not repeated by its neighbours.
    Where that one does not have the error, another one prints.
    """
    if FROM_TORCHRUN in os.environ:
        # Killed, torchrun takes no rank with it, and they would train on beside those of the next start. No one else's
        # processes: what nohup started has to outlive its shell. torchrun starts its ranks from its main thread; one
        # that died before this line is missed at the rendezvous, whose store it kept.
        die_with_parent(os.getppid())
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            # A log that takes no UTF-8 ends no run over a folder's name.
            stream.reconfigure(errors="backslashreplace")
    try:
        _take_rank()
        code = main()
        with output_errors():
            _flush()
    except UserError as error:
        is_said = _speaks_first() or isinstance(error, LostRankError)
        if is_said:
            say(f"error: {error}", to_stderr=True)
        if _waits_for_the_first_rank() and not is_said:
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


def _take_rank() -> None:
    try:
        os.environ.update(rank_variables(os.environ))
    except ValueError as error:
        raise UserError(str(error)) from error


def _speaks_first() -> bool:
    """Whether this rank says an error's line without waiting whether another does."""
    is_one_log = ends_with_the_first(os.environ) and FROM_TORCHRUN not in os.environ
    return os.environ.get("RANK" if is_one_log else "LOCAL_RANK", "0") == "0"


def _waits_for_the_first_rank() -> bool:
    """Let the rank that speaks first have the last word where the launcher ends all ranks as soon as one has ended.
    Returns whether this rank has waited for it in vain.
    """
    if _speaks_first() or not ends_with_the_first(os.environ):
        return False
    # One second apart, so that only one of those that waited says the line.
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(SECONDS_FOR_THE_FIRST_RANK + int(os.environ.get("LOCAL_RANK", "0")))
    return not _another_task_has_ended()


def _another_task_has_ended() -> bool:
    """Whether of a Slurm step's tasks on this node one is gone, which has spoken then: srun ends the others only by
    --kill-on-bad-exit.
    """
    if not is_of_a_step(os.environ):
        return False
    import psutil

    step, tasks = psutil.Process(os.getppid()), 0
    if step.name() != "slurmstepd":
        return False  # started through a script: who its neighbours are is not known
    for task in step.children():
        with contextlib.suppress(psutil.Error):
            tasks += "SLURM_PROCID" in task.environ()
    return tasks < int(os.environ["LOCAL_WORLD_SIZE"])


def _flush() -> None:
    # None where the command was started with it closed, and then nothing was printed.
    if sys.stdout is not None:
        sys.stdout.flush()


def _exit_at_once(code: int) -> None:
    """Not sys.exit: a rank that holds process groups or loader threads must not wait for them on its way out."""
    with contextlib.suppress(OSError):
        _flush()
    os._exit(code)


def die_with_parent(parent: int) -> None:
    """On Linux, have the kernel kill this process when its `parent` is gone; at once if that has happened already.

    The signal comes when the thread that started this process ends, which has to live as long as its process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
