"""Two ways of doing one thing, timed in turns in one process, with their peak memory."""

import datetime
import itertools
import os
import platform
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch


class Measured(NamedTuple):
    """Medians over the pairs; bytes above what was there before."""

    seconds: float
    opponent_seconds: float
    speedup: float  # the median of the pairs' ratios
    memory: int
    opponent_memory: int


def measure_pairs(ours: Callable[[], None], opponent: Callable[[], None], pairs: int) -> Measured:
    """One call of each that is not timed, but whose peak memory is; then `pairs` times one after the other."""
    memory, opponent_memory = peak_memory(ours), peak_memory(opponent)
    times, opponent_times = [], []
    for _ in range(pairs):
        times.append(seconds_of(ours))
        opponent_times.append(seconds_of(opponent))
    speedup = statistics.median(b / a for a, b in zip(times, opponent_times, strict=True))
    return Measured(statistics.median(times), statistics.median(opponent_times), speedup, memory, opponent_memory)


def seconds_of(function: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(function: Callable[[], None]) -> int:
    """Bytes of tensors at the worst moment of a call above those before it."""
    function()  # once for what stays: caches, code, gradients' buffers
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    # Counted at the allocator: what the process holds depends on what it held before.
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    changes = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


class Lines(list[str]):
    """The lines of a table; printed as they come, for a benchmark takes minutes."""

    def say(self, line: str) -> None:
        self.append(line)
        print(line, flush=True)


def write_table(title: str, module: str, argv: Sequence[str], output: Path | None, lines: Sequence[str]) -> None:
    """The lines into `output`, with the date, the machine in words and the command."""
    if output is None:
        return
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    threads = torch.get_num_threads()
    machine = gpu or f"CPU ({platform.machine()}, {os.cpu_count()} cores), {threads} thread{'s' * (threads > 1)}"
    command = shlex.join(["python", "-m", module, *argv])
    about = f"{datetime.date.today()}, {machine}, torch {torch.__version__}\n\n    OMP_NUM_THREADS=1 {command}\n\n"
    output.write_text(f"# {title}\n\n{about}" + "\n".join(lines) + "\n")
