"""Runs training jobs one after another on this rank; each job is the command line of examples/pretrain_sedd.py."""

import json
import os
import sys

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.training.pretrain import pretrain

if __name__ == "__main__":
    for arguments, port in zip(json.loads(sys.argv[1]), json.loads(sys.argv[2]), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        pretrain(parse_pretrain_options(arguments))
