"""Megatron-Core's TransformerLayer with adaLN-zero conditioning, and bidirectional attention without bias."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput, get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from sedd_megatron.model.conditioning import Modulation, NormScale
from sedd_megatron.model.fused_operations import add_gated, bias_gelu, modulated_norm, rotate
from sedd_megatron.model.packed_documents import PackedDocuments, attend_within_documents
from sedd_megatron.parallel.keyed_dropout import dropped_elements, kept_share


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
        # Registered first because it is used first: parameters are gathered in that order.
        self._modules = {
            "modulation": Modulation(6, config.hidden_size, cond_dim, config, device),
            **self._modules,
        }

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedDocuments | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Megatron's layer signature.

        Args:
            hidden_states: [S, B, H].
            context: the conditioning [B, cond_dim].
            context_mask: the keys of dropout's draws [B, 2] int64 (parallel/keyed_dropout.py), in training with it.
            packed_seq_params: the documents that attention stays within; None for whole windows.
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(context)
        attend = partial(
            self.self_attention,
            attention_mask=None,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
        )
        recompute = self.recompute_input_layernorm
        output = self._after_norm(self.input_layernorm, recompute, hidden_states, shift_1, scale_1, attend)
        hidden_states = self._add_gated(hidden_states, gate_1, output, context_mask, 0)
        recompute = self.recompute_pre_mlp_layernorm
        output = self._after_norm(self.pre_mlp_layernorm, recompute, hidden_states, shift_2, scale_2, self._mlp)
        return self._add_gated(hidden_states, gate_2, output, context_mask, 1), context

    def forward_rows(self, hidden_states: Tensor, positions: Tensor, context: Tensor, rotary_pos_emb: Tensor) -> Tensor:
        """`forward` of hidden_states [S, B, H] at some positions [Q, B] of each sequence alone: [Q, B, H].

        For the last layer in sampling: the other positions give keys and values and nothing else. No gradient.
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(context)
        factor, eps = self.input_layernorm(scale_1), self.input_layernorm.eps
        normalized = modulated_norm(hidden_states, factor, shift_1, eps, self.training)
        output = self.self_attention.forward_rows(normalized, positions, rotary_pos_emb)
        rows = add_gated(take_rows(hidden_states, positions), gate_1, *output, None, 1.0, self.training)
        output = self._after_norm(self.pre_mlp_layernorm, False, rows, shift_2, scale_2, self._mlp)
        return add_gated(rows, gate_2, *output, None, 1.0, self.training)

    def _after_norm(
        self, norm: NormScale, recompute: bool, hidden_states: Tensor, shift: Tensor, scale: Tensor, block: Callable
    ) -> tuple[Tensor, Tensor | None]:
        """block(adaLN of the hidden states); where the norm is recomputed, the block's input is not kept."""
        factor, adaptive_norm = norm(scale), partial(modulated_norm, eps=norm.eps, training=self.training)
        if not (recompute and self.training):
            return block(adaptive_norm(hidden_states, factor, shift))
        # Read for what it is not: any value but None turns Transformer Engine's FP8 on in here.
        checkpoint = CheckpointWithoutOutput(fp8=self.config.fp8)
        output, bias = block(checkpoint.checkpoint(adaptive_norm, hidden_states, factor, shift))
        checkpoint.discard_output_and_register_recompute(output)
        return output, bias

    def _mlp(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Megatron's MLP, with bias and GELU in one operation."""

        def mlp(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            return self.mlp.linear_fc2(bias_gelu(*self.mlp.linear_fc1(hidden_states), self.training))

        if not (self.recompute_mlp and self.training):
            return mlp(hidden_states)

        # Adds the bias in here: a checkpoint that returned the parameter itself would become the parameter's history,
        # and its backward pass would call itself without end.
        def mlp_with_bias(hidden_states: Tensor) -> Tensor:
            output, bias = mlp(hidden_states)
            return output + bias

        if self.config.fp8 is None:
            return tensor_parallel.checkpoint(mlp_with_bias, False, hidden_states), None
        from megatron.core.extensions.transformer_engine import te_checkpoint

        return te_checkpoint(mlp_with_bias, False, get_cuda_rng_tracker, self.tp_group, hidden_states), None

    def _add_gated(
        self,
        residual: Tensor,
        gate: Tensor,
        output_with_bias: tuple[Tensor, Tensor | None],
        dropout_keys: Tensor | None,
        branch: int,
    ) -> Tensor:
        dropped = None
        if self.training and self.hidden_dropout > 0:
            length, _, width = residual.shape
            dropped = dropped_elements(
                dropout_keys,
                2 * (self.layer_number - 1) + branch,
                self._first_position(length),
                length,
                width,
                self.hidden_dropout,
            )
        return add_gated(residual, gate, *output_with_bias, dropped, kept_share(self.hidden_dropout), self.training)

    def _first_position(self, length: int) -> int:
        """Where this rank's `length` positions begin: contiguous parts, in the order of the ranks."""
        part = self.pg_collection.cp.rank()
        if self.config.sequence_parallel:
            part = part * self.tp_group.size() + self.tp_group.rank()
        return part * length


class DiTSelfAttention(SelfAttention):
    """Megatron's self-attention without biases, rotated in one operation, around any core attention.

    Its MLP keeps the biases, and `add_bias_linear` is one field for both. Megatron's own rotation would be some 25
    passes over queries and keys.
    """

    def __init__(
        self, config: TransformerConfig, submodules: SelfAttentionSubmodules, layer_number: int, **kwargs: Any
    ) -> None:
        config = copy.copy(config)
        config.add_bias_linear = False
        super().__init__(config, submodules, layer_number, attn_mask_type=AttnMaskType.no_mask, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedDocuments | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [S, B, H] -> [S, B, H], and no bias.

        Args:
            rotary_pos_emb: [2, S, 1 or B, 1, head size], cosines and sines of the angles in the hidden states' dtype.
        """
        states = self._rotated(hidden_states, rotary_pos_emb)
        if packed_seq_params is None:
            output = self.core_attention(*states, attention_mask, attn_mask_type=self.attn_mask_type)
        else:
            # Transformer Engine calls attention that stops at its sequences' ends padded.
            output = attend_within_documents(
                self.core_attention,
                *states,
                packed_seq_params,
                self.pg_collection.cp,
                attn_mask_type=AttnMaskType.padding,
            )
        return self.linear_proj(output)

    def forward_rows(self, hidden_states: Tensor, positions: Tensor, rotary_pos_emb: Tensor) -> tuple[Tensor, None]:
        """Attention [Q, B, H] of the positions [Q, B] alone to all of hidden_states [S, B, H], and no bias."""
        query, key, value = self._rotated(hidden_states, rotary_pos_emb)
        return self.linear_proj(self.core_attention(take_rows(query, positions), key, value, None))

    def _rotated(self, hidden_states: Tensor, rotary_pos_emb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        query, key = (rotate(states, *rotary_pos_emb, self.training) for states in (query, key))
        return query, key, value


class BidirectionalAttention(nn.Module):
    """Attention of every position to every position by torch's fused kernel; no [S, S] matrix is kept.

    Under context parallelism each rank has a contiguous part of the queries and gathers all keys and values. Without
    a causal mask every part costs the same, so that nothing needs to be balanced.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, *, pg_collection: ProcessGroupCollection, **kwargs: Any
    ) -> None:
        super().__init__()
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        packed_seq_params: PackedDocuments | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """query, key, value [S / CP, B, heads / TP, head size] -> [S / CP, B, H / TP].

        Packed, query [T, heads / TP, head size] and key and value [U, ...] -> [T, H / TP].
        """
        if packed_seq_params is not None:
            return _attend_packed(query, key, value, packed_seq_params)
        if self.cp_group.size() > 1:
            # Gathers along the first axis; the gradients of the other ranks' queries come back by reduce-scatter.
            gathered = gather_from_sequence_parallel_region(torch.stack([key, value], dim=1), group=self.cp_group)
            key, value = gathered.unbind(1)
        batch_first = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        output = F.scaled_dot_product_attention(*batch_first)
        return output.permute(2, 0, 1, 3).flatten(2)


def _attend_packed(query: Tensor, key: Tensor, value: Tensor, documents: PackedDocuments) -> Tensor:
    # Split at once: the gradient of as many slices would be as many tensors of the whole size.
    pieces = [query.split(documents.query_lengths), *(states.split(documents.key_lengths) for states in (key, value))]
    outputs = [
        F.scaled_dot_product_attention(*(piece.transpose(0, 1)[None] for piece in of_one))
        for of_one in zip(*pieces, strict=True)
    ]
    return torch.cat([output[0].transpose(0, 1) for output in outputs]).flatten(1)


def take_rows(states: Tensor, positions: Tensor) -> Tensor:
    """states [S, B, ...] at positions [Q, B] int64 of each sequence: [Q, B, ...]."""
    return states[positions, torch.arange(states.shape[1], device=states.device)]
