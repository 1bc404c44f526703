"""Runs whose disk refuses rank 1's part of some checkpoints; a job is the command line, the steps of these
checkpoints, and the error that has to end every rank, or None.
"""

import os
import resource

import pytest

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.errors import UserError
from sedd_megatron.parallel import cpu_backend
from tests.distributed.launch import own_jobs


def train(arguments: list[str], refused: list[int], message: str | None) -> None:
    cpu_backend.install()
    from sedd_megatron.training import checkpoint
    from sedd_megatron.training.pretrain import pretrain

    write, (_, hard) = checkpoint.write_own_shards, resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_to_full_disk(directory, own):
        step = int(directory.name.split("_")[1].split(".")[0])
        if os.environ["RANK"] == "1" and step in refused:
            # In bytes of a file: the kernel writes a part of the shards and refuses the rest.
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            return write(directory, own)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    checkpoint.write_own_shards = write_to_full_disk
    try:
        if message is None:
            pretrain(parse_pretrain_options(arguments))
        else:
            with pytest.raises(UserError, match=message):
                pretrain(parse_pretrain_options(arguments))
    finally:
        checkpoint.write_own_shards = write


if __name__ == "__main__":
    for job in own_jobs():
        train(*job)
