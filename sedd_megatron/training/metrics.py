"""What a run tells: a progress line for people, metrics.jsonl for notebooks, TensorBoard on request."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from sedd_megatron.errors import UserError, say
from sedd_megatron.run_files import STARTED
from sedd_megatron.training.metrics_file import MetricsFile
from sedd_megatron.training.trackers import Tracker
from sedd_megatron.training_config import LoggingOptions
from sedd_megatron.wording import how_to_install


def open_tensorboard(directory: str | None, iteration: int = 0) -> Any:
    """A TensorBoard writer, or None without a directory or where nothing can be written to it. What a run before it
    wrote of steps after `iteration` is no longer shown.

    Raises:
        UserError: the package is not installed.
    """
    if directory is None:
        return None
    check_tensorboard(directory)
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(directory, purge_step=iteration + 1)
    except OSError as error:
        _give_up_tensorboard(error)
        return None


def check_tensorboard(directory: str) -> None:
    """Check that `directory` can be written in TensorBoard's format.

    Raises:
        UserError: the package is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError(f"--tensorboard-dir {directory} needs TensorBoard; {how_to_install('log')}") from error


def _give_up_tensorboard(error: OSError) -> None:
    say(f"warning: TensorBoard: {error.strerror}; training goes on without it until the next start", to_stderr=True)


class MetricsWriter:
    """Writes each training step and validation to metrics.jsonl as it happens, and progress lines at the interval.

    None of them ends a run because a disk is full.
    """

    def __init__(
        self,
        options: LoggingOptions,
        file: MetricsFile | None,
        train_iters: int,
        iteration: int = 0,
        tflop_per_token: float = 0.0,
        peak_tflops: float | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """`iteration` is where the run starts; `tflop_per_token` one device's share of the work, 0 to leave its speed
        out; `peak_tflops` its peak; `trackers` get every record, those of an interval at once.
        """
        self.tflop_per_token = tflop_per_token
        self.peak_tflops = peak_tflops
        self.log_interval = options.log_interval
        self.train_iters = train_iters
        self.tensorboard = open_tensorboard(options.tensorboard_dir, iteration)
        self.file = file
        self.trackers = trackers
        self.untold: list[dict[str, Any]] = []
        self.window_start, self.window_tokens = time.monotonic(), 0
        # For the file alone: a word is no point on a curve.
        self._first_only = {STARTED: time.strftime("%Y-%m-%d %H:%M:%S")}

    def train_step(self, metrics: dict[str, Any], num_tokens: int, tokens_left: int) -> None:
        """Record one step of `num_tokens`; every `log_interval` steps print a line whose speed is the mean since the
        last one, and the time that it gives to the `tokens_left`: in a ramp the steps that are left are the long ones.
        One that was skipped has a line in the file, and no point on any curve.
        """
        if self.file is not None:
            self.file.write(metrics | self._first_only)
            self._first_only = {}
        if "skipped" in metrics:
            return
        self._show(metrics)
        self.window_tokens += num_tokens
        iteration = metrics["iteration"]
        if iteration % self.log_interval and iteration != self.train_iters:
            return
        now = time.monotonic()
        seconds = now - self.window_start
        tokens_per_second = self.window_tokens / seconds
        say(
            f"iteration {iteration:>{len(str(self.train_iters))}}/{self.train_iters} | loss {metrics['loss']:.4f} | "
            f"learning rate {metrics['learning_rate']:.2e} | grad norm {metrics['grad_norm']:.2f} | "
            f"{tokens_per_second:,.0f} tokens/s | {self._device_speed(tokens_per_second)}"
            f"{format_seconds(tokens_left / tokens_per_second)} left"
        )
        self.window_start, self.window_tokens = now, 0
        self._tell_trackers()

    def _device_speed(self, tokens_per_second: float) -> str:
        if not self.tflop_per_token:
            return ""
        speed = tokens_per_second * self.tflop_per_token
        utilization = f" ({speed / self.peak_tflops:.1%} MFU)" if self.peak_tflops else ""
        return f"{speed:.1f} TFLOP/s per GPU{utilization} | "

    def held_out(self, name: str, metrics: dict[str, Any]) -> None:
        """Record and print a loss of the "validation" or "test" windows."""
        if self.file is not None:
            self.file.write(metrics)
        self._show(metrics)
        loss = metrics[f"{name}_loss"]
        say(f"{name} at iteration {metrics['iteration']} | loss {loss:.4f} | perplexity below {_exp(loss):.2f}")

    def lacks_validation(self, iteration: int) -> bool:
        """Whether the file has this step of the run and no validation after it, which a kill may have broken off."""
        return self.file is not None and self.file.lacks_validation(iteration)

    def has_step(self, iteration: int) -> bool:
        """Whether the file has this step of the run."""
        return self.file is not None and self.file.has_step(iteration)

    def has_test_loss(self, iteration: int) -> bool:
        """Whether the file has the run's loss of the test windows after this step, from an earlier start."""
        return self.file is not None and self.file.has_test_loss(iteration)

    def close(self) -> None:
        """Bring everything to the disk."""
        if self.file is not None:
            self.file.close()
        self._tell_trackers()
        for tracker in self.trackers:
            tracker.close()
        with self._tensorboard_may_fail():
            if self.tensorboard is not None:
                self.tensorboard.close()

    def _show(self, metrics: dict[str, Any]) -> None:
        if self.trackers:
            self.untold.append(metrics)
        with self._tensorboard_may_fail():
            if self.tensorboard is not None:
                for name, value in metrics.items():
                    self.tensorboard.add_scalar(name, value, metrics["iteration"])

    def _tell_trackers(self) -> None:
        for tracker in self.trackers:
            tracker.log(self.untold)
        self.untold = []

    @contextlib.contextmanager
    def _tensorboard_may_fail(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # From the thread that writes, which ended with it: this writer is of no more use.
            self.tensorboard = None
            _give_up_tensorboard(error)


def format_seconds(seconds: float) -> str:
    """3725 -> 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
