"""A run in which rank 1 stands still or dies in its third step; a job is the command line and the signal by name."""

import os
import signal

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.errors import run_command
from sedd_megatron.parallel import cpu_backend
from tests.distributed.launch import own_jobs


def train(arguments: list[str], name: str) -> int:
    cpu_backend.install()
    from sedd_megatron.training import loop
    from sedd_megatron.training.pretrain import pretrain

    step = loop.train_step

    def lost_step(run, batches, flags):
        if run.iteration == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.Signals[name])
        return step(run, batches, flags)

    loop.train_step = lost_step
    return pretrain(parse_pretrain_options(arguments))


if __name__ == "__main__":
    ((arguments, name),) = own_jobs()
    run_command(lambda: train(arguments, name))
