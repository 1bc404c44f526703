"""Train a score entropy discrete diffusion model: torchrun --nproc-per-node N examples/pretrain_sedd.py [--config
YAML] [flags]. On a cluster: examples/slurm/train.sbatch.
"""

import sys

from sedd_megatron.errors import run_command
from sedd_megatron.training.stop_requests import StopRequests, ignore_from_now_on


def main() -> int:
    """Train as the command line says."""
    with StopRequests() as requests:
        # These take seconds, and whoever asks meanwhile for an end is heard.
        from sedd_megatron.arguments import parse_pretrain_options
        from sedd_megatron.training.pretrain import pretrain

        code = pretrain(parse_pretrain_options(sys.argv[1:]), requests)
    ignore_from_now_on()
    return code


if __name__ == "__main__":
    run_command(main)
