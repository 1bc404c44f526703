"""Runs training jobs one after another on this rank; each job is the command line of examples/pretrain_sedd.py."""

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.training.pretrain import pretrain
from tests.distributed.launch import own_jobs

if __name__ == "__main__":
    for arguments in own_jobs():
        pretrain(parse_pretrain_options(arguments))
