"""python -m sedd_megatron.harness: the command of lm-evaluation-harness, which then knows `--model sedd`."""

import contextlib
import os

from sedd_megatron.errors import UserError, run_command
from sedd_megatron.parallel.groups import is_first_rank
from sedd_megatron.wording import how_to_install


def main() -> None:
    """Register the model and hand over to the harness."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise UserError(f"this needs lm-evaluation-harness (package lm_eval); {how_to_install('harness')}") from error
    import sedd_megatron.harness_model  # noqa: F401  registers it

    # The harness prints its table on the first rank of every node.
    with contextlib.ExitStack() as stack:
        if not is_first_rank():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        cli_evaluate()


if __name__ == "__main__":
    run_command(main)
