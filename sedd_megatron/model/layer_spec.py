"""The non-causal DiT layer as Megatron ModuleSpecs: plain torch, and Transformer Engine where there is a GPU."""

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from sedd_megatron.config import PrecisionOptions
from sedd_megatron.errors import UserError
from sedd_megatron.model.conditioning import NormScale
from sedd_megatron.model.dit_layer import BidirectionalAttention, DiTLayer, DiTSelfAttention
from sedd_megatron.wording import how_to_install

# The first GPUs whose matrix units take each recipe's FP8: Ada and Hopper; block scaling from Hopper on.
FP8_COMPUTE_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0)}


def dit_layer_spec(cond_dim: int, column_linear: type, row_linear: type, core_attention: type) -> ModuleSpec:
    """A DiT layer of the given parallel linear layers and attention; parameter names are the same for all of them."""
    return ModuleSpec(
        module=DiTLayer,
        params={"cond_dim": cond_dim},
        submodules=TransformerLayerSubmodules(
            input_layernorm=NormScale,
            self_attention=ModuleSpec(
                module=DiTSelfAttention,
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column_linear, core_attention=core_attention, linear_proj=row_linear
                ),
            ),
            pre_mlp_layernorm=NormScale,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column_linear, linear_fc2=row_linear)),
        ),
    )


def local_layer_spec(cond_dim: int) -> ModuleSpec:
    """The layer in plain torch: any device."""
    return dit_layer_spec(cond_dim, ColumnParallelLinear, RowParallelLinear, BidirectionalAttention)


def transformer_engine_layer_spec(cond_dim: int) -> ModuleSpec:
    """The layer on Transformer Engine's kernels: a GPU, and the extra 'gpu'."""
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TERowParallelLinear,
    )

    return dit_layer_spec(cond_dim, TEColumnParallelLinear, TERowParallelLinear, TEDotProductAttention)


def choose_layer_spec(
    cond_dim: int, precision: PrecisionOptions, device: torch.device, for_training: bool
) -> ModuleSpec:
    """The layer that `--transformer-impl` names."""
    use_engine = takes_transformer_engine(precision, for_training, transformer_engine_runs_on(device))
    return transformer_engine_layer_spec(cond_dim) if use_engine else local_layer_spec(cond_dim)


def takes_transformer_engine(precision: PrecisionOptions, for_training: bool, has_engine: bool) -> bool:
    """Whether the layers are Transformer Engine's; auto takes them for bf16 training alone.

    In float32 its products are TF32 (common/gemm/cublaslt_gemm.cu: CUBLAS_COMPUTE_32F_FAST_TF32), off by 1e-3, and its
    attention makes the [S, S] matrix: scores, samples and likelihoods would silently be other numbers.
    """
    automatic = has_engine and for_training and precision.bf16
    return {"auto": automatic, "local": False, "transformer_engine": True}[precision.transformer_impl]


def transformer_engine_runs_on(device: torch.device) -> bool:
    """Whether Transformer Engine is installed and can run on `device`."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    # The library alone is not enough: it imports on machines without a GPU and fails when first used.
    return HAVE_TE and device.type == "cuda"


def check_transformer_engine(precision: PrecisionOptions, device: torch.device) -> None:
    """Refuse what this machine cannot run, before any of its memory is taken.

    Raises:
        UserError: Transformer Engine is asked for and missing, or FP8 on a GPU without it.
    """
    if precision.fp8_format is None and precision.transformer_impl != "transformer_engine":
        return
    flag = f"--fp8-format {precision.fp8_format}" if precision.fp8_format else "--transformer-impl transformer_engine"
    if not transformer_engine_runs_on(device):
        missing = "GPU" if device.type != "cuda" else "Transformer Engine"
        raise UserError(
            f"{flag} needs a GPU and Transformer Engine, and there is no {missing}; on a GPU machine "
            f"{how_to_install('gpu')} --no-build-isolation, or leave the flag out"
        )
    needed = FP8_COMPUTE_CAPABILITY[precision.recipe] if precision.fp8_format else (0, 0)
    found = torch.cuda.get_device_capability(device)
    if found < needed:
        raise UserError(
            f"{flag} --fp8-recipe {precision.recipe} needs compute capability {needed[0]}.{needed[1]}, and this "
            f"GPU has {found[0]}.{found[1]}; train with --bf16 alone"
        )
