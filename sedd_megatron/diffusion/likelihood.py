"""The bound on the negative log-likelihood (arXiv 2310.16834, theorem 3.6), by Monte Carlo, with its standard error.

    -log p(x_0) <= prior + diffusion + reconstruction
    prior           KL(p_1|0(. | x_0) || law that sampling starts from), in closed form
    diffusion       integral over t from time_eps to 1 of sigma_rate(t) E[score entropy], by random noise
    reconstruction  -E[log p(x_0 | x_t)] at t = time_eps, by the last step of sampling

Which noise, diffusion/integration.py says.

The published evaluation has the diffusion term alone, as a mean over [time_eps, 1] and not an integral.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_megatron.diffusion.draws import Stream, philox_uniforms
from sedd_megatron.diffusion.graph import AbsorbingGraph, UniformGraph
from sedd_megatron.diffusion.integration import INTEGRATIONS, Corrupted, Draw, Integration, Process
from sedd_megatron.diffusion.score_entropy import ScoreEntropyCoefficients, ScoreSums
from sedd_megatron.diffusion.score_reader import ScoreFn, Scores, ScoresNotFiniteError, asked_positions
from sedd_megatron.diffusion.transfers import to_device, to_host

# (graph, scores, sigma [C], x_t [C], x_0 [C]) -> [C]
Value = Callable[[AbsorbingGraph | UniformGraph, Scores, Tensor, Tensor, Tensor], Tensor]


class Bound(NamedTuple):
    """Terms of the bound of B sequences, in nats; each [B] float64."""

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor
    standard_error: Tensor  # of the two random terms together

    @property
    def total(self) -> Tensor:
        """[B], the bound itself."""
        return self.prior + self.diffusion + self.reconstruction


def stratified(uniform: Tensor) -> Tensor:
    """One number in each of K equal parts of [0, 1) from uniform [..., K] float64; [..., K]."""
    count = uniform.shape[-1]
    return (torch.arange(count, dtype=torch.float64) + uniform) / count


def prior_divergence(graph: AbsorbingGraph | UniformGraph, sigma: Tensor) -> Tensor:
    """KL of one position's law after noise sigma from the law that sampling starts from; in sigma's shape.

    Under the absorbing graph a token survives with probability exp(-sigma), and a start at the mask alone would give
    it probability 0. Counted is the start that has a uniform token with that probability, and else the mask: a
    reverse process from there is as valid, and costs exp(-sigma) log(num_tokens).
    """
    survival = torch.exp(-sigma)
    if graph.mask_token_id is not None:
        return survival * math.log(graph.num_tokens)
    moved = -torch.expm1(-sigma) / graph.num_states
    stayed = survival + moved
    return stayed * torch.log(stayed * graph.num_states) + (graph.num_states - 1) * moved * torch.log(
        moved * graph.num_states
    )


def mean_of_strata(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the last axis of values [..., K], one draw of each of K strata, and its standard error; K even.

    The variance within a stratum is taken from its neighbour: (f_1 - f_2)^2 estimates the sum of both, and also has the
    difference of their means in it, so that the error is over- and not underestimated (Cochran, Sampling Techniques,
    section 5A.12: collapsed strata).
    """
    count = values.shape[-1]
    pairs = values.unflatten(-1, (count // 2, 2))
    return values.mean(-1), (pairs[..., 0] - pairs[..., 1]).square().sum(-1).sqrt() / count


def score_entropy_of(
    graph: AbsorbingGraph | UniformGraph, scores: Scores, sigma: Tensor, x_t: Tensor, x_0: Tensor
) -> Tensor:
    """Score entropy of positions [C] from their scores; sigma [C] float64, x_t and x_0 [C] int64; [C] float64."""
    uses_log_sum = graph.mask_token_id is None
    sums = ScoreSums(
        exp_sum=_finite_or_nan(scores.sum_of(scores.values)),
        log_sum=scores.log_score_sum() if uses_log_sum else torch.zeros_like(sigma),
        target=scores.log_score_at(x_0),
    )
    # Each position as a sequence of one.
    coefficients = ScoreEntropyCoefficients(*(c[:, 0] for c in graph.coefficients(sigma, x_t[:, None], x_0[:, None])))
    return coefficients.apply(sums)


def reconstruction_of(
    graph: AbsorbingGraph | UniformGraph, scores: Scores, sigma: Tensor, x_t: Tensor, x_0: Tensor
) -> Tensor:
    """-log p(x_0 | x_t) of positions [C] when all noise goes in one step; arguments as for score_entropy_of.

    Under the absorbing graph a mask becomes y in proportion to score_y. Under the uniform graph x_t stays with weight
    1 and becomes y with weight expm1(sigma) / N score_y, which for little noise is the analytic step without its cut
    at 0: any law will do for a bound, and this one is nowhere 0.
    """
    log_score = scores.log_score_at(x_0)
    total = _finite_or_nan(scores.sum_of(scores.values))
    if graph.mask_token_id is not None:
        return torch.where(total > 0, torch.log(total), math.nan) - log_score
    rate = torch.expm1(sigma) / graph.num_states
    return torch.log1p(rate * total) - torch.where(x_t == x_0, 0.0, torch.log(rate) + log_score)


def _finite_or_nan(sums: Tensor) -> Tensor:
    """Sums of scores, NaN where they are infinite: an infinite bound must come from a log-score of -inf alone."""
    return torch.where(sums.isfinite(), sums, math.nan)


class RandomTerm(NamedTuple):
    """A term that is drawn: with which random numbers and noise, and what is summed there."""

    stream: Stream
    draw: Draw
    value: Value


@dataclass(frozen=True)
class BoundEstimator:
    """What the Monte Carlo estimate of the bound depends on, beside the sequences."""

    score_fn: ScoreFn
    process: Process
    seed: int
    num_draws: int  # even; of the diffusion term of each sequence
    batch_size: int  # of corrupted sequences that go through the network at once; does not change the draws
    integration: Integration = INTEGRATIONS["time"]

    @torch.no_grad()
    def __call__(self, x_0: Tensor, given: Tensor, numbers: Sequence[int], first_draw: int = 0) -> Bound:
        """The bound of sequences x_0 [B, S] int64, or of their positions that are not `given` [B, S] bool.

        Given positions are never corrupted: under the absorbing graph this bounds the conditional likelihood of the
        others. Draws depend on (seed, number of the sequence, number of the draw) alone: `first_draw` numbers them on,
        for further draws of the same sequences.

        Raises:
            ScoresNotFiniteError: the network's scores are NaN or infinite. A bound that is infinite because a token is
                impossible is no error.
        """
        device, x_0, given = x_0.device, to_host(x_0), to_host(given)
        strata = stratified(philox_uniforms(self.seed, Stream.EVALUATION_TIME, numbers, self.num_draws, first_draw))
        term = RandomTerm(Stream.EVALUATION_NOISE, self.integration.diffusion, score_entropy_of)
        diffusion = self._draws(term, x_0, given, numbers, first_draw, strata, device)
        # Hardly noise and a small term: an eighth of the draws leaves its error below that of the other.
        strata = strata[:, : max(self.num_draws // 8, 2)]
        term = RandomTerm(Stream.EVALUATION_LAST, self.integration.reconstruction, reconstruction_of)
        reconstruction = self._draws(term, x_0, given, numbers, first_draw, strata, device)
        most = self.process.schedule(torch.ones((), dtype=torch.float64))
        prior = prior_divergence(self.process.graph, most.sigma) * (~given).sum(1)
        mean, error = mean_of_strata(diffusion)
        variance = error**2 + reconstruction.var(1) / reconstruction.shape[1]
        return Bound(prior, mean, reconstruction.mean(1), variance.sqrt())

    def _draws(
        self,
        term: RandomTerm,
        x_0: Tensor,
        given: Tensor,
        numbers: Sequence[int],
        first_draw: int,
        strata: Tensor,
        device: torch.device,
    ) -> Tensor:
        """One draw of the term for each of strata [B, K]; [B, K] float64."""
        numbers, sums, weights, sigmas = torch.as_tensor(numbers), [], [], []
        rows, draws = (pair.flatten() for pair in torch.meshgrid(*map(torch.arange, strata.shape), indexing="ij"))
        for row, k in zip(rows.split(self.batch_size), draws.split(self.batch_size), strict=True):
            uniforms = philox_uniforms(self.seed, term.stream, numbers[row], 2 * x_0.shape[1], first_draw + k)
            uniforms = uniforms.view(len(row), 2, -1)
            corrupted = term.draw(self.process, x_0[row], given[row], strata[row, k], uniforms)
            sums.append(self._sum_over_positions(term, x_0[row], corrupted, device))
            weights.append(corrupted.weight)
            sigmas.append(corrupted.sigma)
        # Read at the end alone: the next batch is drawn while the device computes this one.
        found, weight = to_host(torch.cat(sums)), torch.cat(weights)
        if found.isnan().any():
            first = int(found.isnan().int().argmax())
            raise ScoresNotFiniteError(int(rows[first]), torch.cat(sigmas)[first].item())
        return (found.masked_fill(weight == 0, 0.0) * weight).view_as(strata)

    def _sum_over_positions(self, term: RandomTerm, x_0: Tensor, corrupted: Corrupted, device: torch.device) -> Tensor:
        """The term's values at the positions of x_0 [B, S] that count, summed; [B] float64 on the device, NaN where a
        score is not finite.
        """
        total = torch.zeros(len(x_0), dtype=torch.float64, device=device)
        if not corrupted.counts.any():
            return total
        active, index, asked = asked_positions(corrupted.counts, device)
        x_t, clean, sigma = (to_device(field, device) for field in (corrupted.x_t, x_0, corrupted.sigma))
        own, clean, of = x_t.flatten()[index], clean.flatten()[index], active[asked.sequence]

        def law(scores: Scores, part: slice | Tensor) -> Tensor:
            return term.value(self.process.graph, scores, sigma[of[part]], own[part], clean[part])

        values = self.score_fn(x_t[active], sigma[active].float(), asked, law, dtype=torch.float64)
        return total.index_add(0, of, values)
