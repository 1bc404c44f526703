"""A run in which a rank stands still or dies in its third step; a job is the command line, the signal by name, whose it
is, and the minutes of the time-out, which a test wants shorter than a person may have them.
"""

from dataclasses import replace

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.errors import run_command
from sedd_megatron.training.pretrain import pretrain
from tests.distributed.launch import own_jobs
from tests.distributed.signalled_step import signal_in_third_step


def train(arguments: list[str], name: str, rank: int, minutes: float) -> int:
    options = parse_pretrain_options(arguments)
    parallel = replace(options.parallel, distributed_timeout_minutes=minutes)
    with signal_in_third_step(name, rank):
        return pretrain(replace(options, parallel=parallel))


if __name__ == "__main__":
    ((arguments, name, rank, minutes),) = own_jobs()
    run_command(lambda: train(arguments, name, rank, minutes))
