"""Megatron-Core's TransformerLayer with adaLN-zero conditioning, and bidirectional attention without bias."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from sedd_megatron.model.conditioning import Modulation, modulate


class DiTLayer(TransformerLayer):
    """One layer of the score network (arXiv 2212.09748, section 3.2, block with adaLN-zero).

    `cond_dim` comes through the layer spec's params; the conditioning vector comes as TransformerBlock's `context`,
    which activation recompute threads through as well.
    """

    def __init__(
        self, config: TransformerConfig, submodules: TransformerLayerSubmodules, *, cond_dim: int, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, **kwargs)
        device = torch.cuda.current_device()
        self.modulation = Modulation(6, config.hidden_size, cond_dim, config, device)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Megatron's layer signature; hidden_states [S, B, H], context is the conditioning [B, cond_dim]."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(context)
        normed = modulate(self.input_layernorm(hidden_states), shift_1, scale_1)
        hidden_states = self._add_gated(
            hidden_states, gate_1, self.self_attention(normed, attention_mask=None, rotary_pos_emb=rotary_pos_emb)
        )
        normed = modulate(self.pre_mlp_layernorm(hidden_states), shift_2, scale_2)
        hidden_states = self._add_gated(hidden_states, gate_2, self.mlp(normed))
        return hidden_states, context

    def _add_gated(self, residual: Tensor, gate: Tensor, output_with_bias: tuple[Tensor, Tensor | None]) -> Tensor:
        output, bias = output_with_bias
        if bias is not None:
            output = output + bias
        if self.hidden_dropout > 0 and self.training:
            output = F.dropout(output, self.hidden_dropout)
        return torch.addcmul(residual, gate, output)


class BiasFreeSelfAttention(SelfAttention):
    """Megatron's self-attention without biases; its MLP keeps them, and `add_bias_linear` is one field for both."""

    def __init__(
        self, config: TransformerConfig, submodules: SelfAttentionSubmodules, layer_number: int, **kwargs: Any
    ) -> None:
        config = copy.copy(config)
        config.add_bias_linear = False
        super().__init__(config, submodules, layer_number, attn_mask_type=AttnMaskType.no_mask, **kwargs)


class BidirectionalAttention(nn.Module):
    """Attention of every position to every position by torch's fused kernel; no [S, S] matrix is kept."""

    def __init__(self, config: TransformerConfig, layer_number: int, **megatron_options: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any) -> Tensor:
        """query, key, value [S, B, heads / TP, head size] -> [S, B, H / TP]."""
        batch_first = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        output = F.scaled_dot_product_attention(*batch_first)
        return output.permute(2, 0, 1, 3).flatten(2)
