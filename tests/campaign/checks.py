"""What the rows ask of a command that has ended."""

import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.campaign import runs
from tests.campaign.attempts import FailedError, SilentlyWrongError, expect
from tests.campaign.processes import Done, Job, RealProcess
from tests.commands import EXAMPLE
from tests.distributed.launch import REPOSITORY


def is_ours(line: str) -> bool:
    """Whether a line of a traceback is of the product: torchrun has one of its own below a rank that failed."""
    return line.startswith('  File "') and (f"{REPOSITORY / 'sedd_megatron'}/" in line or str(EXAMPLE) in line)


def expect_no_traceback(done: Done) -> None:
    """No traceback, and no hang."""
    expect(not done.timed_out, f"hung; it said {tail(done)}")
    expect(not any(map(is_ours, done.said.splitlines())), f"traceback: {tail(done)}")


def expect_done(done: Done) -> None:
    """Exit code 0 and no traceback."""
    expect_no_traceback(done)
    expect(done.code == 0, f"exit codes {done.codes}: {tail(done)}")


def expect_refused(done: Done, *names: str) -> None:
    """Exit code 2 and one line, which has all of these names; of unknown flags one line each."""
    expect_no_traceback(done)
    expect(done.code == 2, f"exit codes {done.codes}, must be 2: {tail(done)}")
    lines = [line for line in done.said.splitlines() if line.startswith("error: ")]
    are_unknown = all(line.startswith("error: unknown flag ") for line in lines)
    expect(len(lines) == 1 or (lines and are_unknown), f"{len(lines)} lines of error: {tail(done)}")
    expect(done.said.rstrip("\n").splitlines()[-1] == lines[-1], f"an error of several lines: {tail(done)}")
    for name in names:
        expect(name in lines[0], f"the line does not name {name}: {lines[0]}")


def expect_same_run(expected: runs.Result, save: Path, tolerance: float = 0.0, log_dir: Path | None = None) -> None:
    """A run that ended with 0 has come to what an unbroken one comes to."""
    try:
        found = runs.result(save, log_dir=log_dir)
    except (OSError, ValueError, KeyError) as error:
        raise SilentlyWrongError(f"exit code 0 and no whole result: {error!r}") from error
    difference = found.first_difference(expected, tolerance)
    if difference is not None:
        raise SilentlyWrongError(difference)


def expect_same_tensors(expected: runs.Result, save: Path, iteration: int = runs.STEPS) -> None:
    """The same of the checkpoint alone, where metrics.jsonl is what was attacked."""
    try:
        found = runs.Result({}, runs.tensors(save / f"iter_{iteration:07d}"))
    except (OSError, ValueError, KeyError) as error:
        raise SilentlyWrongError(f"exit code 0 and no whole checkpoint: {error!r}") from error
    difference = found.first_difference(runs.Result({}, expected.tensors))
    if difference is not None:
        raise SilentlyWrongError(difference)


def metrics_of(log_dir: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """runs.metrics, of a command that has ended well."""
    try:
        return runs.metrics(log_dir)
    except ValueError as error:
        raise SilentlyWrongError(str(error)) from error


def expect_samples(done: Done, output: Path, allowed: Iterable[list[dict[str, Any]]]) -> None:
    """Samples of one of some checkpoints."""
    expect_done(done)
    if runs.records(output) not in list(allowed):
        raise SilentlyWrongError(f"samples of no checkpoint that was whole: {runs.records(output)}")


def tail(done: Done, width: int = 700) -> str:
    """The end of what it said, on one line."""
    return " / ".join(line for line in done.said.strip().splitlines() if line.strip())[-width:]


def wait_until(holds: Callable[[], bool], is_running: Callable[[], bool], timeout: float = 60) -> None:
    """Wait until it holds or the command has ended."""
    deadline = time.monotonic() + timeout
    while not holds() and is_running():
        if time.monotonic() > deadline:
            raise FailedError("nothing happened within a minute")
        time.sleep(0.002)


def wait_for_moment(job: Job, save: Path, random: Any, seconds: float) -> None:
    """Until a moment of the run: half of them anywhere in it, half while it trains."""
    if random.random() < 0.5:
        deadline = time.monotonic() + random.uniform(0, seconds)
        wait_until(lambda: time.monotonic() >= deadline, job.is_running)
    else:
        iteration, pause = random.randint(1, runs.STEPS), random.uniform(0, 0.03)
        wait_until(lambda: runs.last_iteration(save) >= iteration, job.is_running)
        time.sleep(pause)


def wait_for_training(process: RealProcess, save: Path, iteration: int) -> None:
    """Until a real process has trained this far, or ended."""
    wait_until(lambda: runs.last_iteration(save) >= iteration, lambda: process.process.poll() is None)


def kill_sessions(job: Job) -> None:
    """SIGKILL to the processes of a job and to what they have started."""
    for process in job.ranks:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
