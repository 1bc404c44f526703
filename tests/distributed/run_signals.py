"""Runs of which one rank is asked to end, in the third step; a job is the command line and the signal's name."""

import os
import signal

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.parallel import cpu_backend
from tests.distributed.launch import own_jobs


def train(arguments: list[str], name: str) -> None:
    cpu_backend.install()
    from sedd_megatron.training import loop
    from sedd_megatron.training.pretrain import pretrain

    step = loop.train_step

    def interrupted_step(run, batches, flags):
        if run.iteration == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.Signals[name])
        return step(run, batches, flags)

    loop.train_step = interrupted_step
    pretrain(parse_pretrain_options(arguments))
    loop.train_step = step


if __name__ == "__main__":
    for arguments, name in own_jobs():
        train(arguments, name)
