"""Train a score entropy discrete diffusion model: torchrun --nproc-per-node N examples/pretrain_sedd.py [--config
YAML] [flags].
"""

import sys

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.errors import run_command
from sedd_megatron.training.pretrain import pretrain

if __name__ == "__main__":
    run_command(lambda: pretrain(parse_pretrain_options(sys.argv[1:])))
