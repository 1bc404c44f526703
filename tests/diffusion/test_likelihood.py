"""The bound with exact scores is the likelihood itself, and its interval covers the truth as often as it says."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from sedd_megatron.diffusion import LogLinearSchedule
from sedd_megatron.diffusion.likelihood import BoundEstimator, mean_of_strata, prior_divergence, stratified_times
from sedd_megatron.diffusion.score_reader import score_fn_of
from sedd_megatron.evaluation.intervals import ratio_interval
from tests.diffusion.toy import GRAPHS, LAW

SEQUENCES = torch.tensor(list(itertools.product(range(3), repeat=3)))
PROBS = LAW.flatten()
NATS = -PROBS.log()


def exact_log_score(graph):
    """log p_t(x with y at position i) / p_t(x), by summing over clean sequences, each row at a noise of its own."""

    def log_score(x: Tensor, sigma: Tensor) -> Tensor:
        batch, clean = len(x), len(SEQUENCES)
        repeated = SEQUENCES.repeat(batch, 1)
        law = graph.transition_probs(repeated, sigma.double().repeat_interleave(clean)).view(batch, clean, 3, -1)
        at_x = law.gather(-1, x[:, None, :, None].expand(-1, clean, -1, 1))[..., 0]
        rest = torch.stack([at_x[..., [j for j in range(3) if j != i]].prod(-1) for i in range(3)], dim=-1)
        joint = torch.einsum("n,bni,bnis->bis", PROBS, rest, law)
        marginal = (PROBS * at_x.prod(-1)).sum(-1)
        return (joint / marginal[:, None, None]).log().clamp_min(-80.0)

    return log_score


def estimator(name: str, num_times: int, seed: int = 0, batch_size: int = 5000) -> BoundEstimator:
    graph = GRAPHS[name]
    score_fn = score_fn_of(exact_log_score(graph), graph.num_tokens)
    # A masked position weighs 1 / t and there is one in 1 / t draws: for small t that makes long tails. What is
    # left at this time the reconstruction has, with an error of second order.
    return BoundEstimator(score_fn, graph, LogLinearSchedule(1e-5), seed, 0.05, num_times, batch_size)


@pytest.mark.parametrize("name", GRAPHS)
def test_exact_scores_give_the_exact_likelihood_of_every_sequence(name):
    bound = estimator(name, 400)(SEQUENCES, torch.zeros_like(SEQUENCES, dtype=torch.bool), range(len(SEQUENCES)))
    deviation = (bound.total - NATS) / bound.standard_error
    assert deviation.abs().max() < 5
    # Errors are estimated from skewed draws, and the uniform graph has the bias of its last step in it.
    assert 0.4 < deviation.square().mean() < 3, "the standard error is not the spread"
    # A wrong law is told apart: sequences differ by more than the errors.
    assert ((bound.total - NATS.flip(0)) / bound.standard_error).abs().max() > 8
    assert (bound.prior >= 0).all()
    assert (bound.reconstruction >= 0).all()


def test_given_positions_bound_the_conditional_likelihood():
    given = torch.tensor([False, True, False]).expand(len(SEQUENCES), -1)
    bound = estimator("absorb", 400)(SEQUENCES, given, range(len(SEQUENCES)))
    middle = LAW.sum((0, 2))[SEQUENCES[:, 1]]
    assert ((bound.total - (NATS + middle.log())) / bound.standard_error).abs().max() < 5


@pytest.mark.parametrize("name", GRAPHS)
def test_the_interval_covers_the_truth_in_95_of_100(name):
    """Units are sequences of the law itself, so that the truth is its entropy."""
    repetitions, units, generator = 400, 60, torch.Generator().manual_seed(0)
    covered = 0
    for repetition in range(repetitions):
        rows = torch.multinomial(PROBS, units, replacement=True, generator=generator)
        x_0 = SEQUENCES[rows]
        bound = estimator(name, 8, seed=repetition)(x_0, torch.zeros_like(x_0, dtype=torch.bool), range(units))
        interval = ratio_interval(bound.total.tolist(), [3] * units)
        covered += interval.low <= (PROBS * NATS).sum() / 3 <= interval.high
    assert 0.92 <= covered / repetitions <= 0.98


@pytest.mark.parametrize("name", GRAPHS)
def test_the_bound_does_not_depend_on_batches_and_rounds_are_independent(name):
    none = torch.zeros_like(SEQUENCES, dtype=torch.bool)
    whole = estimator(name, 6)(SEQUENCES, none, range(27))
    parts = [estimator(name, 6, batch_size=7)(SEQUENCES[part], none[part], range(27)[part])
             for part in (slice(0, 4), slice(4, 27))]  # fmt: skip
    for one, *two in zip(whole, *parts, strict=True):
        torch.testing.assert_close(one, torch.cat(two), rtol=1e-12, atol=0)
    later = estimator(name, 6)(SEQUENCES, none, range(27), first_time=6)
    assert (later.diffusion != whole.diffusion).all()


def test_the_prior_term_is_the_divergence_from_the_start():
    sigma = torch.tensor([0.3, 6.0], dtype=torch.float64)
    for graph in GRAPHS.values():
        law = graph.transition_probs(torch.zeros(2, 1, dtype=torch.long), sigma)[:, 0]
        start = torch.full_like(law, 1 / 3)
        if graph.mask_token_id is not None:
            survival = torch.exp(-sigma)[:, None]
            start = torch.cat([survival.expand(-1, 3) / 3, 1 - survival], dim=1)
        expected = torch.where(law > 0, law * (law / start).log(), 0.0).sum(-1)
        torch.testing.assert_close(prior_divergence(graph, sigma), expected)


def test_strata():
    times = stratified_times(torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.float64), 0.1)[0]
    torch.testing.assert_close(times, torch.tensor([0.1, 0.55, 1.0], dtype=torch.float64))
    # f = t with one draw in each half: the mean's variance is that of a uniform number of width 1/2, over 2.
    values = (torch.arange(2) + torch.rand(200_000, 2, generator=torch.Generator().manual_seed(0))) / 2
    mean, error = mean_of_strata(values.double())
    true_variance = (1 / 4) / 12 / 2
    assert abs(mean.var() / true_variance - 1) < 0.02
    # Collapsed strata add the square of the difference of their means, 1/2, over 4.
    assert math.isclose(error.square().mean(), true_variance + 1 / 16, rel_tol=0.02)
