"""The non-causal DiT layer as Megatron ModuleSpecs: plain torch, and Transformer Engine where there is a GPU."""

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from sedd_megatron.model.conditioning import ScaleNorm
from sedd_megatron.model.dit_layer import BiasFreeSelfAttention, BidirectionalAttention, DiTLayer


def dit_layer_spec(cond_dim: int, column_linear: type, row_linear: type, core_attention: type) -> ModuleSpec:
    """A DiT layer of the given parallel linear layers and attention; parameter names are the same for all of them."""
    return ModuleSpec(
        module=DiTLayer,
        params={"cond_dim": cond_dim},
        submodules=TransformerLayerSubmodules(
            input_layernorm=ScaleNorm,
            self_attention=ModuleSpec(
                module=BiasFreeSelfAttention,
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column_linear, core_attention=core_attention, linear_proj=row_linear
                ),
            ),
            pre_mlp_layernorm=ScaleNorm,
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


def choose_layer_spec(cond_dim: int, device: torch.device) -> ModuleSpec:
    """Transformer Engine's layer where there is a GPU and the library, the local one elsewhere."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    # The library alone is not enough: it imports on machines without a GPU and fails when first used.
    return transformer_engine_layer_spec(cond_dim) if HAVE_TE and device.type == "cuda" else local_layer_spec(cond_dim)
