"""Starts the commands: as forks of a process that has imported everything, which takes a tenth of a second where a new
process takes five, or as real ones, with torchrun or without.

A fork runs the command's own file as __main__, with its own output, session and exit handlers. What it shares with a
real process's neighbours and they do not is the hash seed.
"""

import atexit
import contextlib
import ctypes
import math
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.commands import EXAMPLE, torchrun
from tests.distributed.launch import REPOSITORY, child_environment, free_ports

TRAIN = "train"
PR_SET_PDEATHSIG = 1
# What a real process of an attempt has in its environment, and its children too: so they are found and ended.
MARK = "CAMPAIGN_ATTEMPT"
_LIBC = ctypes.CDLL(None)


@dataclass
class Process:
    """A command that was started; `returncode` is negative for a signal, as in subprocess."""

    pid: int
    output: Path
    returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def said(self) -> str:
        """Standard output and error together."""
        return self.output.read_text(encoding="utf-8", errors="replace")


@dataclass
class Done:
    """All processes of a command, ended."""

    codes: list[int]
    said: str
    timed_out: bool = False

    @property
    def code(self) -> int:
        """0 if all ended well; else the first rank's that did not."""
        return next((code for code in self.codes if code), 0)


@dataclass
class Job:
    """A command as one process or as several ranks."""

    ranks: list[Process] = field(default_factory=list)

    def is_running(self) -> bool:
        """Whether any rank runs."""
        return any([rank.poll() is None for rank in self.ranks])

    def wait(self, timeout: float = 60, grace: float = 8) -> Done:
        """Wait as torchrun does: half a second after a rank has failed, which is for the others' own last words, they
        get SIGTERM, and SIGKILL after `grace` seconds.
        """
        deadline, failed_at, is_told, timed_out = time.monotonic() + timeout, math.inf, False, False
        while self.is_running():
            now = time.monotonic()
            if any(rank.returncode for rank in self.ranks):
                failed_at = min(failed_at, now)
            if now > failed_at + 0.5 and not is_told:
                self.signal(signal.SIGTERM)
                is_told = True
            timed_out = now > deadline
            if timed_out or now > failed_at + grace:
                self.signal(signal.SIGKILL)
            time.sleep(0.004)
        said = "".join(rank.said for rank in self.ranks)
        return Done([rank.returncode for rank in self.ranks], said, timed_out)

    def signal(self, number: int) -> None:
        """Send a signal to every rank that runs."""
        for rank in self.ranks:
            rank.signal(number)


def start(
    command: Sequence[str],
    folder: Path,
    *,
    ranks: int = 1,
    before: Callable[[int], None] = lambda rank: None,
    stdin: Path | None = None,
) -> Job:
    """Fork a command: "train" or the name of a module of the package, then its flags.

    Args:
        folder: where its output goes, and the folder that it runs in.
        before: called in each rank before the command.
        stdin: a file to read as standard input; nothing if not given.
    """
    job, port, run = Job(), free_ports(1)[0], uuid.uuid4().hex[:8]
    for rank in range(ranks):
        output = folder / f"said-{run}-{rank}.txt"
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}  # fmt: skip

        def act(rank: int = rank, environment: dict = environment) -> None:
            os.environ.update({name: str(value) for name, value in environment.items()})
            os.chdir(folder)
            before(rank)
            _run_as_main(command)

        job.ranks.append(fork(act, output, stdin))
    return job


def run(command: Sequence[str], folder: Path, *, timeout: float = 60, **how: object) -> Done:
    """Start a command and wait for it."""
    return start(command, folder, **how).wait(timeout)


def fork(act: Callable[[], None], output: Path, stdin: Path | None = None) -> Process:
    """Run `act` in a fork that writes to `output`, and ends as Python ends a process."""
    sys.stdout.flush()
    sys.stderr.flush()
    output.touch()
    parent, pid = os.getpid(), os.fork()
    if pid:
        return Process(pid, output)
    code = 70
    try:
        os.setsid()
        die_with(parent)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(os.open(stdin or os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8", closefd=False)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
        code = _exit_code(act)
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        code = code or 120
    finally:
        os._exit(code)


def die_with(parent: int) -> None:
    """Have this process killed when its parent ends: a hung attempt leaves nothing behind."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(70)


def _exit_code(act: Callable[[], None]) -> int:
    try:
        act()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run_as_main(command: Sequence[str]) -> None:
    import torch

    # A fork has its pool made anew at the first use, by whatever thread; two at once break each other's.
    torch.set_num_threads(1)
    name, *flags = command
    if name == TRAIN:
        sys.argv = [str(EXAMPLE), *flags]
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    else:
        # The campaign itself may have read its options.
        sys.modules.pop(f"sedd_megatron.{name}", None)
        sys.argv = [name, *flags]
        runpy.run_module(f"sedd_megatron.{name}", run_name="__main__", alter_sys=True)


class RealProcess:
    """A command as a person starts it; with several ranks, under torchrun."""

    def __init__(self, command: Sequence[str], folder: Path, ranks: int = 1, torchrun_flags: Sequence[str] = ()):
        name = uuid.uuid4().hex[:8]
        # The folder's name is in it, by which `end_marked` finds what an attempt that was killed has left.
        self.mark = f"{folder}/{name}"
        self.output = folder / f"said-{name}.txt"
        program = [str(EXAMPLE)] if command[0] == TRAIN else ["-m", f"sedd_megatron.{command[0]}"]
        start = [sys.executable] if ranks == 1 else [*torchrun(ranks), *torchrun_flags]
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*start, *program, *command[1:]],
                env=child_environment(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", **{MARK: self.mark}),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of what was started: torchrun itself, or the one process."""
        return self.process.pid

    @property
    def said(self) -> str:
        """Standard output and error together."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def ranks(self) -> list[int]:
        """Processes of the command that are not torchrun; those that have ended are not among them."""
        return [pid for pid in marked(self.mark) if pid != self.pid and b"pretrain_sedd" in _read(pid, "cmdline")
                and b"torch.distributed.run" not in _read(pid, "cmdline")]  # fmt: skip

    def wait(self, timeout: float) -> Done:
        """Wait for what was started, and end whatever it left behind."""
        timed_out = False
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
        self.end()
        return Done([self.process.wait()], self.said, timed_out)

    def end(self) -> None:
        """End it and its children."""
        end_marked(self.mark)
        self.process.wait()


def end_marked(mark: str) -> None:
    """End the real processes that were started with this mark, or one that begins with it."""
    for pid in marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def marked(mark: str) -> list[int]:
    """Processes whose mark begins so, zombies left out."""
    return [pid for pid in _pids() if f"{MARK}={mark}".encode() in _read(pid, "environ")]


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def import_everything() -> None:
    """What the commands import, before any fork; no operation that starts threads."""
    sys.path.insert(0, str(REPOSITORY))
    # A name that is no folder is asked for nowhere.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    from sedd_megatron.parallel import cpu_backend

    cpu_backend.install()
    import sentencepiece  # noqa: F401
    import tokenizers  # noqa: F401

    import sedd_megatron.arguments
    import sedd_megatron.evaluation.bounds
    import sedd_megatron.evaluation.corpora
    import sedd_megatron.evaluation.published_table
    import sedd_megatron.generation.engine
    import sedd_megatron.generation.observers
    import sedd_megatron.pretrained
    import sedd_megatron.saved_model
    import sedd_megatron.training.loop
    import sedd_megatron.training.pretrain
    import sedd_megatron.training.verify_layout  # noqa: F401
