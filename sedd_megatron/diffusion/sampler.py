"""One reverse step of a batch of sequences, by each sampler: free functions of one signature, SAMPLERS by name.

A step asks the network only about positions that it may move, and draws a token only for those that move. One uniform
number decides both: below the probability to leave, it is a uniform number again once divided by that.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_megatron.diffusion.draws import Stream
from sedd_megatron.diffusion.graph import AbsorbingGraph, StepLaw, UniformGraph
from sedd_megatron.diffusion.noise_schedule import NoiseLevel
from sedd_megatron.diffusion.score_reader import AGAIN, NO_LAW, Positions, ScoreReader, Scores
from sedd_megatron.diffusion.token_choice import TokenChoice
from sedd_megatron.diffusion.transfers import to_device, to_host


class Step(NamedTuple):
    """What a step of B sequences needs beside the network; each sequence may be at a step of its own.

    now and later are the noise [B] at the step's beginning and at its end, which is nearer to the data.
    """

    graph: AbsorbingGraph | UniformGraph
    now: NoiseLevel
    later: NoiseLevel
    delta_t: Tensor  # [B] float64, positive
    free: Tensor  # [B, S] bool on the host: may change; the others are given, or not due yet
    draw: Callable[[Stream], Tensor]  # [B, S] float64 in [0, 1), this step's own of each stream
    choose: TokenChoice
    corrector_strength: float


# (network, x_t [B, S] int64, step) -> x of the step's end [B, S] int64
StepFunction = Callable[[ScoreReader, Tensor, Step], Tensor]


def euler_step(network: ScoreReader, x: Tensor, step: Step) -> Tensor:
    """Stay, plus delta_t * sigma_rate * reverse rate (arXiv 2310.16834, section 4.2)."""
    rate_time = step.delta_t * step.now.sigma_rate
    return _move(network, x, step, lambda total, of: step.graph.euler_law(total, rate_time[of]))


def analytic_step(network: ScoreReader, x: Tensor, step: Step) -> Tensor:
    """Tweedie tau-leaping (theorem 4.2): exact for each position by itself while the score holds."""
    delta_sigma = step.now.sigma - step.later.sigma
    return _move(network, x, step, lambda total, of: step.graph.analytic_law(total, delta_sigma[of]))


def ancestral_step(network: ScoreReader, x: Tensor, step: Step) -> Tensor:
    """Absorbing: unmask with the true probability, expm1(delta_sigma) / expm1(sigma), whatever the scores add up to.

    The analytic step has the network's estimate of 1 / expm1(sigma) in its place. Without it the network is asked
    about the positions that jump, and about nothing in a step that has none.
    """
    leave = torch.expm1(step.now.sigma - step.later.sigma) / torch.expm1(step.now.sigma)
    uniform = step.draw(Stream.SAMPLING) / leave[:, None]
    due = step.free & network.can_change(step.graph, x) & to_host(uniform < 1)
    return _choose(network, x, step, step.now.sigma, due, uniform)


def event_step(network: ScoreReader, x: Tensor, step: Step) -> Tensor:
    """Absorbing: every free position takes a token. The loop has drawn before which are free at this step."""
    due = step.free & network.can_change(step.graph, x)
    return _choose(network, x, step, step.now.sigma, due, step.draw(Stream.SAMPLING))


def predictor_corrector_step(network: ScoreReader, x: Tensor, step: Step) -> Tensor:
    """An analytic step, then a Gibbs correction at the noise where it ended."""
    return gibbs_correction(network, analytic_step(network, x, step), step)


def denoise_step(network: ScoreReader, x: Tensor, step: Step) -> Tensor:
    """The last step: all the noise that is left goes, and no position stays masked."""
    if step.graph.mask_token_id is not None:
        return event_step(network, x, step)
    return _move(network, x, step, lambda total, of: step.graph.analytic_law(total, step.now.sigma[of]))


def gibbs_correction(network: ScoreReader, x: Tensor, step: Step) -> Tensor:
    """Resample each position, with probability corrector_strength * delta_t, from its law given the others.

    The law at noise step.later: under the uniform graph score_y / (1 + sum of scores), and 1 in place of the score at
    x_t; under the absorbing graph the mask with probability 1 - exp(-sigma), and else the token that is there, or for a
    mask one of probability score_y / sum of scores. One position at a time leaves the marginal law as it is; that many
    move at once costs an error of second order in the step. A corrector's place: arXiv 2205.14987, section 4.4.
    """
    uniform = step.draw(Stream.CORRECTOR) / (step.corrector_strength * step.delta_t).clamp_max(1)[:, None]
    if step.graph.mask_token_id is None:
        return _resample(network, x, step, step.free & to_host(uniform < 1), uniform)
    to_mask = -torch.expm1(-step.later.sigma)[:, None]
    # One read for all that the host has to know.
    read = to_host(torch.stack([uniform < 1, uniform < to_mask, step.graph.can_change(x)]))
    resampled, into_mask, can_change = step.free & read[0], read[1], read[2]
    masked = resampled & into_mask
    x = torch.where(to_device(masked, x.device), step.graph.mask_token_id, x)
    network.know(can_change | masked)
    due = resampled & ~into_mask & can_change
    return _choose(network, x, step, step.later.sigma, due, (uniform - to_mask) / (1 - to_mask))


def _move(network: ScoreReader, x: Tensor, step: Step, law_of: Callable[[Tensor, Tensor], StepLaw]) -> Tensor:
    """All free positions by law_of(their sums of scores [C], their sequences [C]).

    Few leave, and only their rows are looked at one token at a time.
    """

    def leaving(scores: Scores, at: Positions) -> tuple[Tensor, Tensor]:
        return _leave(scores, law_of(scores.sum_of(scores.values), at.sequence))

    def stay_or_again(scores: Scores, at: Positions) -> Tensor:
        _, leave = leaving(scores, at)
        # NaN where a score is, or where they add up to infinity.
        return torch.where(leave.isnan(), NO_LAW, torch.where(at.uniform < leave, AGAIN, at.state))

    def token(scores: Scores, at: Positions) -> Tensor:
        weights, leave = leaving(scores, at)
        return step.choose(scores.whole_rows(weights), at.uniform / leave)

    where = step.free & network.can_change(step.graph, x)
    return network.draw(x, step.now.sigma, where, step.draw(Stream.SAMPLING), stay_or_again, token)


def _resample(network: ScoreReader, x: Tensor, step: Step, where: Tensor, uniform: Tensor) -> Tensor:
    """Uniform graph: a state for each position `where` is True, by its law at step.later given all others.

    Most of these few leave, so that all are looked at one token at a time and nobody waits to learn which.
    """

    def law(scores: Scores, at: Positions) -> Tensor:
        one = torch.ones_like(at.uniform)
        weights, leave = _leave(scores, StepLaw(one, None, one))
        state = torch.where(at.uniform < leave, step.choose(scores.whole_rows(weights), at.uniform / leave), at.state)
        return torch.where(leave.isnan(), NO_LAW, state)

    return network.draw(x, step.later.sigma, where, uniform, law)


def _leave(scores: Scores, law: StepLaw) -> tuple[Tensor, Tensor]:
    """Of each position, the weights of where it may go [C, columns] and the probability to leave [C]."""
    weights = scores.values
    if law.floor is not None:
        weights = (weights - law.floor[:, None].to(weights.dtype)).clamp_min_(0)
    mass = law.scale * scores.sum_of(weights)
    return weights, mass / (mass + law.stay)


def _choose(network: ScoreReader, x: Tensor, step: Step, sigma: Tensor, due: Tensor, uniform: Tensor) -> Tensor:
    """A token for each masked position that is due [B, S] bool, in proportion to its scores."""
    still_masked = network.can_change(step.graph, x) & ~due

    def law(scores: Scores, at: Positions) -> Tensor:
        total = scores.sum_of(scores.values)
        token = step.choose(scores.whole_rows(scores.values), at.uniform)
        return torch.where((total > 0) & (total < math.inf), token, NO_LAW)

    x = network.draw(x, sigma, due, uniform, law)
    network.know(still_masked)
    return x


class Sampler(NamedTuple):
    """A step function, the graphs it works for, and how the loop has to call it."""

    step: StepFunction
    graphs: tuple[type, ...] = (AbsorbingGraph, UniformGraph)
    draws_jumps_first: bool = False


SAMPLERS = {
    "euler": Sampler(euler_step),
    "analytic": Sampler(analytic_step),
    "ancestral": Sampler(ancestral_step, graphs=(AbsorbingGraph,)),
    "event-driven": Sampler(event_step, graphs=(AbsorbingGraph,), draws_jumps_first=True),
    "predictor-corrector": Sampler(predictor_corrector_step),
}
