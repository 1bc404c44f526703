"""What a run tells: a progress line for people, metrics.jsonl for notebooks, TensorBoard on request."""

import json
import math
import time
from pathlib import Path
from typing import Any

from sedd_megatron.config import LoggingOptions
from sedd_megatron.errors import UserError


def open_tensorboard(directory: str | None) -> Any:
    """A TensorBoard writer, or None without a directory.

    Raises:
        UserError: the package is not installed.
    """
    if directory is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--tensorboard-dir {directory} needs TensorBoard; pip install 'sedd_megatron[log]'") from error
    return SummaryWriter(directory)


class MetricsWriter:
    """Writes each training step and validation to LOG_DIR/metrics.jsonl as it happens, and progress lines at the
    interval.
    """

    def __init__(
        self,
        options: LoggingOptions,
        log_dir: Path | None,
        train_iters: int,
        tflop_per_token: float = 0.0,
        peak_tflops: float | None = None,
    ) -> None:
        """`tflop_per_token` is one device's share of the work, 0 to leave its speed out; `peak_tflops` its peak."""
        self.tflop_per_token = tflop_per_token
        self.peak_tflops = peak_tflops
        self.log_interval = options.log_interval
        self.train_iters = train_iters
        self.tensorboard = open_tensorboard(options.tensorboard_dir)
        self.file = None
        if log_dir is not None:
            log_dir.mkdir(parents=True, exist_ok=True)
            self.file = (log_dir / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self.window_start, self.window_tokens, self.window_steps = time.monotonic(), 0, 0

    def train_step(self, metrics: dict[str, Any], num_tokens: int) -> None:
        """Record one step; every `log_interval` steps print a line whose speed is the mean since the last one."""
        self._write(metrics)
        self.window_tokens += num_tokens
        self.window_steps += 1
        iteration = metrics["iteration"]
        if iteration % self.log_interval and iteration != self.train_iters:
            return
        now = time.monotonic()
        seconds = now - self.window_start
        time_left = seconds / self.window_steps * (self.train_iters - iteration)
        tokens_per_second = self.window_tokens / seconds
        print(
            f"iteration {iteration:>{len(str(self.train_iters))}}/{self.train_iters} | loss {metrics['loss']:.4f} | "
            f"learning rate {metrics['learning_rate']:.2e} | grad norm {metrics['grad_norm']:.2f} | "
            f"{tokens_per_second:,.0f} tokens/s | {self._device_speed(tokens_per_second)}"
            f"{format_seconds(time_left)} left",
            flush=True,
        )
        self.window_start, self.window_tokens, self.window_steps = now, 0, 0

    def _device_speed(self, tokens_per_second: float) -> str:
        if not self.tflop_per_token:
            return ""
        speed = tokens_per_second * self.tflop_per_token
        utilization = f" ({speed / self.peak_tflops:.1%} MFU)" if self.peak_tflops else ""
        return f"{speed:.1f} TFLOP/s per GPU{utilization} | "

    def validation(self, metrics: dict[str, Any]) -> None:
        """Record and print a validation."""
        self._write(metrics)
        loss = metrics["validation_loss"]
        print(
            f"validation at iteration {metrics['iteration']} | loss {loss:.4f} | perplexity below {_exp(loss):.2f}",
            flush=True,
        )

    def close(self) -> None:
        """Bring everything to the disk."""
        if self.file is not None:
            self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _write(self, metrics: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(metrics) + "\n")
        if self.tensorboard is not None:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, metrics["iteration"])


def format_seconds(seconds: float) -> str:
    """3725 -> 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
