"""A run in which rank 1 stands still or dies in its third step; a job is the command line and the signal by name."""

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.errors import run_command
from sedd_megatron.training.pretrain import pretrain
from tests.distributed.launch import own_jobs
from tests.distributed.signalled_step import signal_in_third_step


def train(arguments: list[str], name: str) -> int:
    with signal_in_third_step(name):
        return pretrain(parse_pretrain_options(arguments))


if __name__ == "__main__":
    ((arguments, name),) = own_jobs()
    run_command(lambda: train(arguments, name))
