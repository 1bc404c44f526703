"""`--verify-layout` on this rank, with the layout broken in one way or in none; ends with its exit code."""

import sys

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.parallel import cpu_backend
from tests.distributed.launch import own_jobs


def break_layout(way: str) -> None:
    """Each is a mistake that trains without an error."""
    cpu_backend.install()
    from sedd_megatron.model import conditioning, model_config
    from sedd_megatron.training import build

    if way == "sequence-parallel gradients not summed":
        conditioning.mark_sequence_parallel = lambda module, config: None
    if way == "stages not summed":
        made = model_config.transformer_config

        def without_cond_embedder(*arguments):
            config = made(*arguments)
            config.has_cond_embedder = False
            return config

        build.transformer_config = without_cond_embedder


if __name__ == "__main__":
    ((way, arguments),) = own_jobs()
    break_layout(way)
    from sedd_megatron.training.pretrain import pretrain

    sys.exit(pretrain(parse_pretrain_options(arguments)))
