"""Runs that cannot go on: every rank has to end by itself, with the line that its job gives."""

import pytest

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.errors import UserError
from sedd_megatron.training.pretrain import pretrain
from tests.distributed.launch import own_jobs

if __name__ == "__main__":
    for arguments, message in own_jobs():
        with pytest.raises(UserError, match=message):
            pretrain(parse_pretrain_options(arguments))
