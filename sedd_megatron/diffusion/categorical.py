"""Exact categorical draws."""

import torch
from torch import Tensor


def sample_categorical(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw by the inverse of the cumulative distribution, in float64.

    A float32 Gumbel draw cannot be rarer than about 2^-24 and starves rare tokens; this costs one uniform per draw
    and is exact to 1e-16 of the total.

    Args:
        probs: [..., N] floating, at least 0, not all 0; need not sum to 1.
        uniform: [...] float64 in [0, 1).

    Returns:
        [...] int64; a state of probability 0 is never drawn.
    """
    cumulative = probs.double().cumsum(-1)
    total = cumulative[..., -1:]
    # uniform * total may round up to the total, past the last state of positive probability.
    below_total = torch.nextafter(total, torch.zeros_like(total))
    threshold = torch.minimum(uniform.double()[..., None] * total, below_total)
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
