"""A training step in which a rank signals itself, for the scripts of tests that lose or stop a rank."""

import contextlib
import os
import signal
from collections.abc import Iterator

from sedd_megatron.parallel import cpu_backend


@contextlib.contextmanager
def signal_in_third_step(name: str, rank: int = 1) -> Iterator[None]:
    """Have this rank send itself the signal of this name at the beginning of the third step of a run inside."""
    cpu_backend.install()
    from sedd_megatron.training import loop

    step = loop.train_step

    def signalled_step(run, batches, flags):
        if run.iteration == 2 and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.Signals[name])
        return step(run, batches, flags)

    loop.train_step = signalled_step
    try:
        yield
    finally:
        loop.train_step = step
