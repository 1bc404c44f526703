"""Runs steps, each a process with its own time limit and log, some at a time, and keeps a table of them from the first
to the last moment: whatever hangs or crashes, what is known until then is on disk.
"""

import contextlib
import itertools
import os
import re
import resource
import signal
import subprocess
import tarfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.distributed.launch import REPOSITORY

# In the environment of a step's processes, which finds them wherever they are: torchrun's ranks and the compiler's
# workers lead sessions of their own.
MARK = "GPU_CHECK_STEP"
# A step that is over its limit gets this long to say where it hangs.
SECONDS_TO_SPEAK = 6.0
SECONDS_TO_DIE = 2.0  # after SIGKILL, which a process inside a driver obeys late or never
# A step is not begun with less than this share of its limit left.
LEAST_SHARE = 0.25
WORTH_READING = re.compile(
    r"\||E  |FAILED |ERROR |SKIPPED |.*\b\d+ (passed|failed|skipped|error)|[\w.]*(Error|Exception): "
)
ALL_SKIPPED = re.compile(r"\d+ skipped")


class Step(NamedTuple):
    """A process, and the seconds after which it is ended."""

    name: str
    command: tuple[str, ...]
    limit: float
    goal: str = ""  # in words, for the table


class Stage(NamedTuple):
    """Steps that share the machine, `at_once` of them at a time; the next stage begins when all have ended."""

    steps: tuple[Step, ...]
    at_once: int
    leave: float = 0.0  # seconds that the stages after it need


class Outcome(NamedTuple):
    """What became of a step."""

    step: Step
    result: str  # ok, skipped (all its tests), failed with code N, timed out, cut short (by the deadline), no time left
    seconds: float
    said: Sequence[str]  # of its log: tables, failures, counts of tests


class Runner:
    """The steps of one check: `folder` gets table.md and logs.tar.gz, of what lies in `logs`. `deadline` is on
    time.monotonic's clock; every step has ended by then.
    """

    def __init__(self, folder: Path, logs: Path, environment: Mapping[str, str], deadline: float, heading: str) -> None:
        self.folder, self.logs, self.environment, self.heading = folder, logs, environment, heading
        self.deadline = deadline - SECONDS_TO_SPEAK - SECONDS_TO_DIE
        for path in (folder, logs):
            path.mkdir(parents=True, exist_ok=True)
        self.outcomes: dict[str, Outcome] = {}
        self._lock = threading.Lock()

    def run(self, stages: Sequence[Stage]) -> bool:
        """Whether every step was ok. SIGTERM and SIGINT end the running steps and skip the others."""
        # Aborted processes with a GPU's address space would write it all to disk.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for stage in stages:
                deadline = self.deadline - stage.leave
                with ThreadPoolExecutor(stage.at_once) as pool:
                    list(pool.map(lambda step, until=deadline: self._run(step, until), stage.steps))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return all(outcome.result == "ok" for outcome in self.outcomes.values())

    def _stop(self, number: int, frame: object) -> None:
        self.deadline = time.monotonic()

    def _run(self, step: Step, deadline: float) -> None:
        start = time.monotonic()
        if min(deadline, self.deadline) - start < LEAST_SHARE * step.limit:
            self._record(Outcome(step, "no time left", 0.0, ()))
            return
        self._record(Outcome(step, "running", 0.0, ()))
        log, mark = self.logs / (re.sub(r"\W+", "_", step.name) + ".log"), uuid.uuid4().hex
        with log.open("wb") as file:
            process = subprocess.Popen(step.command, cwd=REPOSITORY, env={**self.environment, MARK: mark}, stdout=file,
                                       stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
            wait_for(process, lambda: min(start + step.limit, deadline, self.deadline))
            timed_out = process.poll() is None
            if timed_out:
                ask_where_it_hangs(process, mark)
            kill_all(mark)
            # Where the system tells no process's environment, its own session at least.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        seconds, code = time.monotonic() - start, process.returncode
        said = worth_reading(log.read_text(errors="replace").splitlines(), code == 0)
        if timed_out:
            result = "timed out" if seconds >= step.limit else "cut short"
        elif code == 0:
            result = "skipped" if said and ALL_SKIPPED.match(said[-1]) else "ok"
        else:
            result = f"failed with code {code}"
        self._record(Outcome(step, result, seconds, said))

    def _record(self, outcome: Outcome) -> None:
        with self._lock:
            self.outcomes[outcome.step.name] = outcome
            if outcome.result != "running":
                print(f"{outcome.step.name}: {outcome.result} after {outcome.seconds:.0f} s", flush=True)
            (self.folder / "table.md").write_text(table(self.heading, self.outcomes.values()))
            with tarfile.open(self.folder / "logs.tar.gz", "w:gz") as archive:
                archive.add(self.logs, "logs")


def wait_for(process: subprocess.Popen, deadline: Callable[[], float]) -> None:
    """Until the process ends or the deadline, which may come nearer meanwhile."""
    while process.poll() is None and time.monotonic() < deadline():
        time.sleep(0.05)


def ask_where_it_hangs(process: subprocess.Popen, mark: str) -> None:
    """Have a step that is over its limit end with its own words, within SECONDS_TO_SPEAK.

    Ranks first: aborted, they say where they were (PYTHONFAULTHANDLER), which the test that started them reports; then
    the step itself, as by Ctrl-C.
    """
    start, share = time.monotonic(), SECONDS_TO_SPEAK / 3
    send(signal.SIGABRT, [pid for pid in family(mark) if pid != process.pid])
    wait_for(process, lambda: start + share)
    if process.poll() is None:
        send(signal.SIGINT, [process.pid])
    wait_for(process, lambda: start + 2 * share)
    send(signal.SIGABRT, family(mark))
    wait_for(process, lambda: start + 3 * share)


def kill_all(mark: str) -> None:
    """Every process of a step, those that it has left behind as well."""
    end = time.monotonic() + SECONDS_TO_DIE
    while (found := family(mark)) and time.monotonic() < end:
        send(signal.SIGKILL, found)
        time.sleep(0.02)


def family(mark: str) -> list[int]:
    """The ids of a step's living processes, whoever their parents are now."""
    found, wanted = [], f"{MARK}={mark}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def send(number: int, processes: Sequence[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def worth_reading(lines: Sequence[str], is_ok: bool) -> list[str]:
    """A log's tables, failures and counts; where it is not ok, its last lines as well."""
    first_of_last = len(lines) if is_ok else len(lines) - 12
    return [line for n, line in enumerate(lines) if n >= first_of_last or WORTH_READING.match(line)][-60:]


def table(heading: str, outcomes: Iterable[Outcome]) -> str:
    """The check in Markdown: a line for each step, then what each said."""
    lines = [heading, "", "| step | result | seconds | limit | goal |", "|---|---|---|---|---|"]
    for step, result, seconds, _ in outcomes:
        lines.append(f"| {step.name} | {result} | {seconds:.0f} | {step.limit:.0f} | {step.goal} |")
    for outcome in outcomes:
        if outcome.said:
            lines += ["", f"## {outcome.step.name}: {outcome.result}", *in_markdown(outcome.said)]
    return "\n".join(lines) + "\n"


def in_markdown(said: Sequence[str]) -> Iterator[str]:
    """Tables as they are, each after an empty line, and other lines as code."""
    for is_table, group in itertools.groupby(said, lambda line: line.startswith("|")):
        lines = list(group)
        if not is_table:
            yield from ["", "```", *lines, "```"]
            continue
        for line, following in zip(lines, [*lines[1:], ""], strict=True):
            if following.startswith("|---"):
                yield ""
            yield line
