"""The opponent's step: the published Euler sampler (arXiv 2310.16834, section 4.2), written from its formulas.

As published: rates of all states at all positions as one [B, S, num_states] table, one-hot tables beside it, and a
float32 Gumbel draw over the whole of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sedd_megatron.diffusion import LogLinearSchedule
from tests.benchmarks.published import PublishedModel


def published_euler_step(
    model: PublishedModel, schedule: LogLinearSchedule, x: Tensor, t: float, delta_t: float
) -> Tensor:
    """x [B, S] at time t -> x at t - delta_t."""
    noise = schedule(torch.full((len(x),), t, device=x.device))
    probs = euler_probs(model(x, noise.sigma).exp(), x, delta_t * noise.sigma_rate, model.absorbing)
    return gumbel_draw(probs)


def euler_probs(score: Tensor, x: Tensor, rate_time: Tensor, absorbing: bool) -> Tensor:
    """one-hot(x) + rate_time [B] * reverse rate, [B, S, num_states]."""
    num_states = score.shape[-1]
    rate = rate_time[:, None, None] * (rates_into(x, num_states, absorbing) * score)
    rate.scatter_(-1, x[..., None], torch.zeros_like(rate))
    rate.scatter_(-1, x[..., None], -rate.sum(-1, keepdim=True))
    return F.one_hot(x, num_states).to(rate) + rate


def rates_into(x: Tensor, num_states: int, absorbing: bool) -> Tensor:
    """Row x of the rate matrix for each position, [B, S, num_states]."""
    if absorbing:
        rates = -F.one_hot(x, num_states)
        rates[x == num_states - 1] += 1
        return rates
    rates = torch.full((*x.shape, num_states), 1 / num_states, device=x.device)
    return rates.scatter(-1, x[..., None], 1 / num_states - 1)


def gumbel_draw(probs: Tensor) -> Tensor:
    """The published draw: of float32 exponentials, the smallest of which is about 1e-10."""
    return (probs / (1e-10 - (torch.rand_like(probs) + 1e-10).log())).argmax(-1)
