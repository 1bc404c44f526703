"""What a run is asked to find out about its own speed: times of its parts, a profile, the operations per second; and
when Python collects garbage. Megatron-LM's flags; without them a step is as it was, and waits for nothing.
"""

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.timers import Timers

from sedd_megatron.data.micro_batch import MicroBatch
from sedd_megatron.errors import one_line, say
from sedd_megatron.output_files import unused_path
from sedd_megatron.parallel.groups import tell
from sedd_megatron.training.build import TrainingRun
from sedd_megatron.training.summary import trained_flops_per_token
from sedd_megatron.training_schedule import is_due
from sedd_megatron.wording import counted

# Megatron's name of the time that a rank waits for its micro-batches.
DATA_TIMER = "batch-generator"


class StepProbe:
    """What is found out around the steps of one rank."""

    def __init__(self, run: TrainingRun, folder: Path | None) -> None:
        """`folder` is where profiles go, and is there if one is asked for."""
        self.run, self.options, self.folder = run, run.options.profiling, folder
        level = self.options.timing_log_level
        # Megatron's own: each waits for the device as it starts and stops, and at level 1 for the other ranks first.
        self.timers = Timers(level, "max") if level > 0 else None
        self.first_iteration = self.last_told = run.iteration
        self.profiler: torch.profiler.profile | None = None
        first, last = self.options.profile_step_start, self.options.profile_step_end
        if self.options.profile and not (run.iteration < last and first < run.end.iteration):
            steps = f"iteration {run.iteration} to {run.end.iteration}"
            tell([f"--profile-step-start {first} --profile-step-end {last}: the run goes from {steps}, and nothing is "
                  "profiled"])  # fmt: skip
        self.tflop_per_token = trained_flops_per_token(run) / 1e12 / torch.distributed.get_world_size()
        self.give_timers(self.timers)

    def timed(self, batches: list[Iterator[MicroBatch]]) -> list[Iterator[MicroBatch]]:
        """The same micro-batches, whose waits are timed at level 2."""
        return batches if self.timers is None else [self._timed(iterator) for iterator in batches]

    def before_step(self) -> None:
        """Begin the profile, if it is time."""
        options, iteration = self.options, self.run.iteration
        is_due = options.profile and options.profile_step_start <= iteration < options.profile_step_end
        if is_due and self.profiler is None and torch.distributed.get_rank() in options.profile_ranks:
            self.first_iteration = iteration
            self.profiler = torch.profiler.profile()
            self.profiler.start()

    def after_step(self, metrics: dict[str, Any]) -> dict[str, float]:
        """End the profile and collect garbage, if it is time. Collective where the times are told.

        Args:
            metrics: the step's line of metrics.jsonl.

        Returns:
            What the line gets besides: at --log-interval seconds per step of each timed part, of the rank that took the
            longest; with --log-throughput the operations.
        """
        iteration, added = self.run.iteration, {}
        if iteration == self.options.profile_step_end:
            self.finish()
        if is_due(iteration, self.options.manual_gc_interval):
            gc.collect()
        if self.options.log_throughput and "tokens_per_second" in metrics:  # one that was skipped has no speed
            added["tflops_per_device"] = metrics["tokens_per_second"] * self.tflop_per_token
        is_told = is_due(iteration, self.run.options.logging.log_interval)
        if self.timers is not None and (is_told or iteration == self.run.end.iteration):
            added |= self._times(iteration)
        return added

    @contextlib.contextmanager
    def around_validation(self) -> Iterator[None]:
        """No times of training are taken inside, and garbage is collected on both sides."""
        collects = self.options.manual_gc and self.options.manual_gc_eval
        if collects:
            gc.collect()
        self.give_timers(None)
        yield
        self.give_timers(self.timers)
        if collects:
            gc.collect(generation=0)

    def finish(self) -> None:
        """Write the profile that has begun; a disk that refuses it ends nothing."""
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        if self.run.iteration == self.first_iteration:
            return
        rank = torch.distributed.get_rank()
        stem = f"profile-rank{rank}-steps{self.first_iteration + 1}-{self.run.iteration}"
        path = unused_path(self.folder, stem, ".json.gz")
        try:
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            say(f"warning: {path}: {one_line(error)}; training goes on without the profile", to_stderr=True)
        else:
            steps = counted(self.run.iteration - self.first_iteration, "step")
            say(f"{path}: {steps} of rank {rank}, for chrome://tracing or ui.perfetto.dev")

    def give_timers(self, timers: Timers | None) -> None:
        # Where Megatron's schedules, its reduction of gradients and its optimizer look for them.
        for chunk in self.run.model_chunks:
            chunk.config.timers = timers
        self.run.optimizer.config.timers = timers
        for optimizer in self.run.optimizer.chained_optimizers:
            optimizer.config.timers = timers

    def _timed(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        while True:
            timer = self.timers(DATA_TIMER, log_level=2)
            timer.start()
            try:
                batch = next(batches)
            finally:
                timer.stop()
            yield batch

    def _times(self, iteration: int) -> dict[str, float]:
        """Seconds per step since they were told last."""
        steps, self.last_told = iteration - self.last_told, iteration
        own = {name: timer.elapsed(reset=True) / steps for name, timer in self.timers._timers.items()}
        # A first stage has other parts than a last one.
        of_ranks: list[dict[str, float]] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_ranks, own)
        names = dict.fromkeys(name for times in of_ranks for name in times)
        slowest = {name: max(times.get(name, 0.0) for times in of_ranks) for name in names}
        parts = ", ".join(f"{name} {seconds * 1000:.1f}" for name, seconds in slowest.items())
        tell([f"milliseconds per step on the slowest rank: {parts}"])
        return {f"{name.replace('-', '_')}_seconds": seconds for name, seconds in slowest.items()}


@contextlib.contextmanager
def profiling(run: TrainingRun, folder: Path | None) -> Iterator[StepProbe]:
    """Around the steps of a run: a probe, whose profile is written at the end whatever happens, and Python's collector
    of garbage off under --manual-gc.
    """
    probe, was_on = StepProbe(run, folder), gc.isenabled()
    if run.options.profiling.manual_gc:
        gc.disable()
        gc.collect()
    try:
        yield probe
    finally:
        probe.finish()
        probe.give_timers(None)
        if was_on:
            gc.enable()
