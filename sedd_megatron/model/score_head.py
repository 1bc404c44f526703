"""From hidden states to logits over the states: final adaLN and the vocabulary-parallel projection; and their sigma
scaling.
"""

import math

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from sedd_megatron.diffusion.graph import AbsorbingGraph, UniformGraph
from sedd_megatron.model.conditioning import Modulation, ScaleNorm, modulate
from sedd_megatron.model.model_config import start_at_zero


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
        self.norm = ScaleNorm(config, config.hidden_size, config.layernorm_epsilon, device)
        self.linear = ColumnParallelLinear(
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
        shift, scale = self.modulation(conditioning)
        logits, _ = self.linear(modulate(self.norm(hidden_states), shift, scale))
        return logits.transpose(0, 1)


def log_score_offset(graph: AbsorbingGraph | UniformGraph, sigma: Tensor) -> Tensor:
    """What is subtracted from the logits to give log-scores: [B] float32.

    The absorbing graph's true ratios are p(token | context) / expm1(sigma); with this scaling (arXiv 2310.16834,
    section 5.1, "scale by sigma") a fresh network already has their size. The uniform graph's ratios need none.
    """
    if graph.mask_token_id is None:
        return torch.zeros_like(sigma)
    return torch.log(torch.expm1(sigma)) + math.log(graph.num_tokens)
