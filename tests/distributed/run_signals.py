"""Runs of which one rank is asked to end, in the third step; a job is the command line and the signal's name."""

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.training.pretrain import pretrain
from tests.distributed.launch import own_jobs
from tests.distributed.signalled_step import signal_in_third_step

if __name__ == "__main__":
    for arguments, name in own_jobs():
        with signal_in_third_step(name):
            pretrain(parse_pretrain_options(arguments))
