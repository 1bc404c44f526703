"""Training steps before which something happens to a rank, for the scripts of tests that lose, stop or break one."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

from sedd_megatron.parallel import cpu_backend


@contextlib.contextmanager
def before_each_step(action: Callable[[Any], None]) -> Iterator[None]:
    """Have `action` called with the run at the beginning of each step of a run inside."""
    cpu_backend.install()
    from sedd_megatron.training import loop

    step = loop.train_step

    def step_after_action(run, batches, flags):
        action(run)
        return step(run, batches, flags)

    loop.train_step = step_after_action
    try:
        yield
    finally:
        loop.train_step = step


@contextlib.contextmanager
def signal_in_third_step(name: str, rank: int = 1) -> Iterator[None]:
    """Have this rank send itself the signal of this name at the beginning of the third step of a run inside."""

    def send(run) -> None:
        if run.iteration == 2 and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.Signals[name])

    with before_each_step(send):
        yield
