"""Conditioning on the noise level: the sigma embedding, adaLN modulation, and every gradient-synchronisation flag.

The layout decides which ranks hold a copy of a parameter and see only a part of its gradient. Megatron sums such
gradients where the parameter says so: `sequence_parallel` over tensor-parallel ranks, `pipeline_parallel` over stages;
`shared` keeps all copies but the first out of the gradient norm. Each flag that is missing makes the copies drift
apart without an error.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

FREQUENCY_EMBEDDING_SIZE = 256
MAX_PERIOD = 10_000.0


def linear(in_features: int, out_features: int, config: "TransformerConfig", device: torch.device) -> nn.Linear:
    """A linear layer held whole by every tensor-parallel rank, marked for gradient sums under sequence parallelism."""
    layer = nn.Linear(in_features, out_features, dtype=config.params_dtype, device=device)
    mark_sequence_parallel(layer, config)
    return layer


def mark_sequence_parallel(module: nn.Module, config: "TransformerConfig") -> None:
    """Have Megatron sum the gradients of these parameters over the ranks that each see a slice of the sequence."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel


class SigmaEmbedding(nn.Module):
    """sigma [B] -> conditioning [B, cond_dim]: sinusoids, a two-layer MLP, SiLU. Every pipeline stage holds a copy."""

    def __init__(self, cond_dim: int, config: "TransformerConfig", device: torch.device, is_first_stage: bool) -> None:
        super().__init__()
        self.input = linear(FREQUENCY_EMBEDDING_SIZE, cond_dim, config, device)
        self.output = linear(cond_dim, cond_dim, config, device)
        for parameter in self.parameters():
            parameter.pipeline_parallel = True
            parameter.shared = not is_first_stage
            # The distributed optimizer cuts each bucket among the replicas, and Megatron sums over the stages what a
            # replica holds after that. This name gives the parameter a bucket of its own, cut alike on every stage.
            parameter.shared_embedding = True

    def forward(self, sigma: Tensor) -> Tensor:
        """Embed sigma [B] float32; returns [B, cond_dim] in the parameters' dtype."""
        frequencies = sinusoids(sigma).to(self.input.weight.dtype)
        return F.silu(self.output(F.silu(self.input(frequencies))))


def sinusoids(sigma: Tensor) -> Tensor:
    """[B] -> [B, 256] float32: cosines, then sines, of sigma times 128 frequencies from 1 down to 1/10000."""
    half = FREQUENCY_EMBEDDING_SIZE // 2
    exponents = torch.arange(half, dtype=torch.float32, device=sigma.device) / half
    angles = sigma.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Modulation(nn.Module):
    """adaLN-zero (arXiv 2212.09748, section 3.2): conditioning [B, cond_dim] -> `parts` vectors [1, B, H].

    Shifts, scales and gates start at 0, so that a fresh layer is the identity.
    """

    def __init__(self, parts: int, hidden_size: int, cond_dim: int, config: "TransformerConfig", device: torch.device):
        super().__init__()
        self.parts = parts
        self.linear = linear(cond_dim, parts * hidden_size, config, device)

    def forward(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        """The modulation vectors, broadcast over the sequence of Megatron's [S, B, H] hidden states."""
        return self.linear(conditioning)[None].chunk(self.parts, dim=-1)


class NormScale(nn.Module):
    """The weight of a LayerNorm without bias, joined with adaLN's scale.

    norm(x) * weight * (1 + scale) + shift = normalized(x) * factor + shift: the weight meets [1, B, H] numbers here and
    not every hidden state; `fused_operations.modulated_norm` does the rest. Megatron's torch norm refuses sequence
    parallelism.
    """

    def __init__(self, config: "TransformerConfig", hidden_size: int, eps: float, device: torch.device | None = None):
        super().__init__()
        self.eps = eps
        # Megatron builds norms from (config, hidden_size, eps) alone and then means the current device.
        device = torch.cuda.current_device() if device is None else device
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        mark_sequence_parallel(self, config)

    def forward(self, scale: Tensor) -> Tensor:
        """scale [1, B, H] -> factor [1, B, H] float32."""
        return self.weight.float() * (1 + scale.float())
