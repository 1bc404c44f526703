"""From hidden states to logits over the states: final adaLN and the vocabulary-parallel projection; and their sigma
scaling.
"""

import math
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from sedd_megatron.diffusion.graph import AbsorbingGraph, UniformGraph
from sedd_megatron.model.conditioning import Modulation, NormScale
from sedd_megatron.model.fused_operations import modulated_norm
from sedd_megatron.model.model_config import start_at_zero
from sedd_megatron.parallel.fused_head import FusedHeadSettings, HeadLoss, ScoreEntropyRows, fused_head_score_entropy
from sedd_megatron.parallel.main_grad import add_product
from sedd_megatron.parallel.score_tile import logit_at
from sedd_megatron.parallel.vocab_parallel import zero_at_state

# What the rows of sampling's tiles are padded to in memory.
ROW_MULTIPLE = {"cpu": 16, "cuda": 1}


class VocabularyProjection(ColumnParallelLinear):
    """Megatron's linear layer over vocabulary shards; or norm, layer and loss in one.

    One module for both: Megatron gathers the parameters of a module when it is called.
    """

    def forward(self, hidden: Tensor, *fused: Any) -> tuple[Tensor | HeadLoss, Tensor | None]:
        """ColumnParallelLinear's answer, logits; or with `fused`, (factor, shift, rows, settings, eps), the loss of
        parallel/fused_head.py.
        """
        if not fused:
            return super().forward(hidden)
        factor, shift, *rest = fused
        return fused_head_score_entropy(hidden, factor, shift, self.weight, self.bias, *rest, self.tp_group), None


class ScoreHead(MegatronModule):
    """Final norm with adaLN, then a linear layer whose output columns are split over the tensor-parallel ranks."""

    def __init__(
        self,
        config: TransformerConfig,
        cond_dim: int,
        padded_vocab_size: int,
        device: torch.device,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.modulation = Modulation(2, config.hidden_size, cond_dim, config, device)
        self.norm = NormScale(config, config.hidden_size, config.layernorm_epsilon, device)
        self.linear = VocabularyProjection(
            config.hidden_size,
            padded_vocab_size,
            config=config,
            init_method=start_at_zero,
            bias=True,
            gather_output=False,
            tp_group=tp_group,
        )

    def forward(self, hidden_states: Tensor, conditioning: Tensor) -> Tensor:
        """hidden_states [S, B, H], conditioning [B, cond_dim] -> logits [B, S, padded_vocab_size / TP]."""
        logits, _ = self.linear(self.normalized(hidden_states, conditioning))
        return logits.transpose(0, 1)

    def loss(
        self, hidden_states: Tensor, conditioning: Tensor, rows: ScoreEntropyRows, settings: FusedHeadSettings
    ) -> HeadLoss:
        """The rows' loss from hidden_states [S, B, H], without logits; other positions cost nothing from here on."""
        factor, shift = (vectors[0] for vectors in self._modulation(conditioning))
        if self.config.sequence_parallel:
            # The ranks hold each their vocabulary shard's part of the gradients of norm and modulation, which Megatron
            # sums as it does everywhere under sequence parallelism.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        else:
            hidden_states, factor, shift = (
                copy_to_tensor_model_parallel_region(tensor, group=self.tp_group)
                for tensor in (hidden_states, factor, shift)
            )
        return self.linear(hidden_states, factor, shift, rows, settings, self.norm.eps)[0]

    def normalized(self, hidden_states: Tensor, conditioning: Tensor) -> Tensor:
        """What the linear layer multiplies: hidden_states [S, B, H] after the final norm and adaLN."""
        factor, shift = self._modulation(conditioning)
        return modulated_norm(hidden_states, factor, shift, self.norm.eps, self.training)

    def scores(self, rows: Tensor, log_offset: Tensor, states: Tensor, num_tokens: int, out: Tensor) -> Tensor:
        """Scores, not their logarithms, of rows [C, H] for this rank's tokens; 0 at the row's own state.

        Args:
            log_offset: [C] float32, `log_score_offset` of each row's noise.
            states: [C] int64, x_t.
            num_tokens: of all ranks; other columns are left out.
            out: float32, columns times C filled up to a multiple of ROW_MULTIPLE at least; it is overwritten: on a CPU
                a new tensor costs as much again.

        Returns:
            [C, columns] float32, a transposed view of `out`.
        """
        first_state, columns = self._own_tokens(num_tokens)
        # Transposed and its rows padded: CPU libraries take up to five times as long for a few long rows, and up to 1.6
        # times as long where rows begin at odd places.
        multiple = ROW_MULTIPLE[out.device.type]
        stride = len(rows) if len(rows) < multiple else -(-len(rows) // multiple) * multiple
        tile = out[: stride * columns].view(columns, stride)[:, : len(rows)]
        torch.sub(self.linear.bias[:columns, None], log_offset, out=tile)
        scores = add_product(tile, self.linear.weight[:columns], rows.t()).exp_().t()
        if columns > 0:
            zero_at_state(scores, states, first_state)
        return scores

    def logits_at(self, rows: Tensor, tokens: Tensor, num_tokens: int) -> Tensor:
        """Logits of one token for each of the rows [C, H]: [C] float32, 0 where another rank has the token."""
        first_state, columns = self._own_tokens(num_tokens)
        if columns == 0:
            return torch.zeros(len(rows), device=rows.device)
        return logit_at(tokens - first_state, rows, self.linear.weight[:columns], self.linear.bias[:columns])

    def logit_sums(self, rows: Tensor, num_tokens: int) -> Tensor:
        """Sums of the rows' [C, H] logits over this rank's tokens: [C] float32, linear in the rows."""
        _, columns = self._own_tokens(num_tokens)
        weight, bias = self.linear.weight[:columns], self.linear.bias[:columns]
        return rows.float() @ weight.sum(0, dtype=torch.float32) + bias.sum(dtype=torch.float32)

    def _own_tokens(self, num_tokens: int) -> tuple[int, int]:
        """The state of this rank's first column, and how many of its columns are tokens."""
        shard_columns = self.linear.weight.shape[0]
        first_state = self.tp_group.rank() * shard_columns
        return first_state, min(max(num_tokens - first_state, 0), shard_columns)

    def _modulation(self, conditioning: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.modulation(conditioning)
        return self.norm(scale), shift


def log_score_offset(graph: AbsorbingGraph | UniformGraph, sigma: Tensor) -> Tensor:
    """What is subtracted from the logits to give log-scores: [B] float32.

    The absorbing graph's true ratios are p(token | context) / expm1(sigma); with this scaling (arXiv 2310.16834,
    section 5.1, "scale by sigma") a fresh network already has their size. The uniform graph's ratios need none.
    """
    if graph.mask_token_id is None:
        return torch.zeros_like(sigma)
    return torch.log(torch.expm1(sigma)) + math.log(graph.num_tokens)
