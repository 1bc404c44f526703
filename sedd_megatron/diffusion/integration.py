"""Which corrupted sequences estimate the integrals of the bound (diffusion/likelihood.py), and with which weight.

The diffusion term is an integral over the noise, with score entropy summed over the positions that are not given:

    integral d sigma E[sum of score entropy at x_t]

time        sigma at a stratified time t: each draw weighs (1 - time_eps) sigma_rate. For both graphs.
mask-count  absorbing. Of the L positions m are masked, m stratified over 1..L, and sigma is the noise at which the m-th
            of them is masked: s = 1 - exp(-sigma) is the m-th smallest of L uniform numbers, Beta(m, L - m + 1). With
            d sigma = ds / (1 - s), and C(L, m) B(m, L - m + 1) = 1 / m, a draw weighs L / m * s / (1 - s), which is
            L / m * expm1(sigma).

By time the number of masks is random, and few positions are often not masked at all; by count a single position has
no variance but that of its score in sigma. Models without a time are evaluated so: arXiv 2502.09992, section 2.4.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_megatron.diffusion.graph import AbsorbingGraph, UniformGraph
from sedd_megatron.diffusion.noise_schedule import GeometricSchedule, LogLinearSchedule


class Corrupted(NamedTuple):
    """One draw for each of B sequences of S tokens."""

    x_t: Tensor  # [B, S] int64
    sigma: Tensor  # [B] float64
    weight: Tensor  # [B] float64, of the sum over the positions that count
    counts: Tensor  # [B, S] bool


class Process(NamedTuple):
    """What is integrated over."""

    graph: AbsorbingGraph | UniformGraph
    schedule: LogLinearSchedule | GeometricSchedule
    time_eps: float

    def least_noise(self, like: Tensor) -> Tensor:
        """sigma at time_eps, where the diffusion term ends; in the shape of `like`."""
        return self.schedule(torch.full_like(like, self.time_eps)).sigma


# (process, x_0 [B, S], given [B, S] bool, stratum [B] in [0, 1), uniforms [B, 2, S] in [0, 1)) -> a draw for each
Draw = Callable[[Process, Tensor, Tensor, Tensor, Tensor], Corrupted]


class Integration(NamedTuple):
    """How both random terms are drawn."""

    diffusion: Draw
    reconstruction: Draw
    graphs: tuple[type, ...] = (AbsorbingGraph, UniformGraph)


def draw_time(process: Process, x_0: Tensor, given: Tensor, stratum: Tensor, uniforms: Tensor) -> Corrupted:
    """The noise at t = time_eps + (1 - time_eps) stratum."""
    noise = process.schedule(process.time_eps + (1 - process.time_eps) * stratum)
    return _corrupted(process, x_0, given, uniforms, noise.sigma, (1 - process.time_eps) * noise.sigma_rate)


def draw_least_noise(process: Process, x_0: Tensor, given: Tensor, stratum: Tensor, uniforms: Tensor) -> Corrupted:
    """The noise at time_eps."""
    sigma = process.least_noise(stratum)
    return _corrupted(process, x_0, given, uniforms, sigma, torch.ones_like(sigma))


def _corrupted(
    process: Process, x_0: Tensor, given: Tensor, uniforms: Tensor, sigma: Tensor, weight: Tensor
) -> Corrupted:
    x_t = torch.where(given, x_0, process.graph.corrupt_tokens(x_0, sigma, uniforms))
    return Corrupted(x_t, sigma, weight, process.graph.can_change(x_t) & ~given)


def draw_mask_count(process: Process, x_0: Tensor, given: Tensor, stratum: Tensor, uniforms: Tensor) -> Corrupted:
    """m = 1 + floor(stratum L) masks, at the noise of the last of them."""
    num_free = (~given).sum(1)
    num_masked = 1 + (stratum * num_free).long()
    # Given positions come after all others.
    reached = uniforms[:, 0].masked_fill(given, 2.0)
    share = reached.sort(1).values.gather(1, num_masked[:, None] - 1)
    masked = reached <= share
    sigma = -torch.log1p(-share[:, 0])
    inside = (process.least_noise(sigma) <= sigma) & (sigma <= process.schedule(torch.ones_like(sigma)).sigma)
    weight = torch.where(inside, num_free / num_masked * torch.expm1(sigma), 0.0)
    return Corrupted(x_0.masked_fill(masked, process.graph.mask_token_id), sigma, weight, masked)


def draw_one_mask(process: Process, x_0: Tensor, given: Tensor, stratum: Tensor, uniforms: Tensor) -> Corrupted:
    """The noise at time_eps, with a uniformly chosen position masked in any case, which alone counts.

    A sum over masked positions is in expectation L times the probability of a mask times such a position.
    """
    sigma = process.least_noise(stratum)
    share = -torch.expm1(-sigma)
    chosen = uniforms[:, 0].masked_fill(given, 2.0).argmin(1, keepdim=True)
    counts = torch.zeros_like(given).scatter(1, chosen, True)
    masked = counts | ((uniforms[:, 1] < share[:, None]) & ~given)
    return Corrupted(x_0.masked_fill(masked, process.graph.mask_token_id), sigma, (~given).sum(1) * share, counts)


INTEGRATIONS = {
    "time": Integration(draw_time, draw_least_noise),
    "mask-count": Integration(draw_mask_count, draw_one_mask, graphs=(AbsorbingGraph,)),
}
