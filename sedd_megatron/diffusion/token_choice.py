"""Which token a position takes once it jumps: the model's law, or one that is sharpened on purpose."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sedd_megatron.diffusion.categorical import sample_categorical


@dataclass(frozen=True)
class TokenChoice:
    """Temperature, top-k and top-p, in this order; the defaults are the model's own law.

    They act on the token of a position that jumps, never on when it jumps.
    """

    temperature: float = 1.0  # 0 takes the most probable token
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0  # the most probable tokens whose sum first reaches this share

    @property
    def is_unmodified(self) -> bool:
        """Whether the model's law is left alone."""
        return (self.temperature, self.top_k, self.top_p) == (1.0, 0, 1.0)

    def __call__(self, weights: Tensor, uniform: Tensor) -> Tensor:
        """Draw one token for each row.

        Args:
            weights: [R, N] floating, at least 0, a positive one in each row; need not sum to 1.
            uniform: [R] float64 in [0, 1).

        Returns:
            [R] int64.
        """
        if not self.is_unmodified:
            weights = self.sharpened(weights)
        return sample_categorical(weights, uniform)

    def sharpened(self, weights: Tensor) -> Tensor:
        """weights [R, N] after temperature, top-k and top-p; [R, N] float64, unnormalised."""
        weights = weights.double()
        # Relative to the largest, so that small temperatures neither overflow nor lose every weight.
        weights = weights / weights.amax(-1, keepdim=True)
        if self.temperature == 0:
            return torch.zeros_like(weights).scatter_(-1, weights.argmax(-1, keepdim=True), 1.0)
        weights = weights ** (1 / self.temperature)
        if self.top_k == 0 and self.top_p == 1:
            return weights
        # Stable, so that among equals the lower ids stay, on every rank.
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        if self.top_k > 0:
            ordered[..., self.top_k :] = 0
        above = ordered.cumsum(-1) - ordered
        ordered = torch.where(above < self.top_p * ordered.sum(-1, keepdim=True), ordered, 0.0)
        return torch.zeros_like(weights).scatter_(-1, order, ordered)
