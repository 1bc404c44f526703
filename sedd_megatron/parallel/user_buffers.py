"""--tp-comm-overlap: Transformer Engine's user buffers, in which products of matrices and the exchange of their parts
among tensor-parallel ranks run together.
"""

import contextlib
import os
from collections.abc import Iterator

import torch

from sedd_megatron.config import ParallelOptions, PretrainOptions
from sedd_megatron.errors import UserError
from sedd_megatron.parallel.groups import ParallelGroups
from sedd_megatron.wording import how_to_install


def check_user_buffers(parallel: ParallelOptions, device: torch.device) -> None:
    """Refuse what this machine cannot run, before any of its memory is taken.

    Raises:
        UserError: there is no GPU, no Transformer Engine that has them, or no multicast between these GPUs.
    """
    if not parallel.tp_comm_overlap:
        return
    missing = None
    if device.type != "cuda":
        missing = "GPU"
    else:
        try:
            from transformer_engine.pytorch.module.base import UserBufferQuantizationMode  # noqa: F401
        except ImportError:
            missing = "Transformer Engine of 2.7 or newer"
    if missing is not None:
        raise UserError(
            f"--tp-comm-overlap needs GPUs and Transformer Engine, and there is no {missing}; on a GPU "
            f"machine {how_to_install('gpu')} --no-build-isolation, or leave the flag out"
        )
    import transformer_engine_torch

    # What initialize_ub asserts.
    if os.environ.get("UB_SKIPMC", "0") != "1" and not transformer_engine_torch.device_supports_multicast():
        raise UserError(
            "--tp-comm-overlap needs GPUs with multicast, and these, or their driver, have none; set UB_SKIPMC=1 to "
            "exchange by CUDA IPC, or leave the flag out"
        )


@contextlib.contextmanager
def user_buffers(options: PretrainOptions, groups: ParallelGroups) -> Iterator[None]:
    """Around building and training a model: the buffers, as Megatron-LM's initialize.py makes them. Collective."""
    if not options.parallel.tp_comm_overlap:
        yield
        return
    from transformer_engine.pytorch.module.base import UserBufferQuantizationMode, destroy_ub, initialize_ub

    is_fp8 = options.precision.fp8_format is not None
    mode = UserBufferQuantizationMode.FP8 if is_fp8 else UserBufferQuantizationMode.NONE
    rows = options.model.seq_length * options.training.micro_batch_size // groups.context_size
    initialize_ub(
        shape=[rows, options.model.hidden_size],
        tp_size=groups.tensor_size,
        quantization_modes=[mode],
        ub_cfgs={},
        bootstrap_backend="nccl",
    )
    try:
        yield
    finally:
        destroy_ub()
