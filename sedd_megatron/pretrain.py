"""sedd-pretrain, or python -m sedd_megatron.pretrain: train a score entropy discrete diffusion model."""

import sys

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.errors import run_command
from sedd_megatron.training.pretrain import pretrain


def main() -> None:
    """Train as the command line says."""
    run_command(lambda: pretrain(parse_pretrain_options(sys.argv[1:])))


if __name__ == "__main__":
    main()
