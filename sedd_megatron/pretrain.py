"""sedd-pretrain, or python -m sedd_megatron.pretrain: train a score entropy discrete diffusion model."""

import sys

from sedd_megatron.errors import run_command
from sedd_megatron.training.stop_requests import StopRequests, ignore_from_now_on


def main() -> None:
    """Train as the command line says."""
    run_command(_train)


def _train() -> int:
    with StopRequests() as requests:
        requests.is_to_save = not {"--skip-train", "--verify-layout"} & set(sys.argv)
        # These take seconds, and whoever asks meanwhile for an end is heard.
        from sedd_megatron.arguments import parse_pretrain_options
        from sedd_megatron.training.pretrain import pretrain

        options = parse_pretrain_options(sys.argv[1:])
        # A file of options may ask for either, too.
        requests.is_to_save = not (options.training.skip_train or options.verify.verify_layout)
        code = pretrain(options, requests)
    ignore_from_now_on()
    return code


if __name__ == "__main__":
    main()
