"""The bound with exact scores is the likelihood itself, and its interval covers the truth as often as it says."""

import itertools
import math

import pytest
import torch

from sedd_megatron.diffusion import LogLinearSchedule
from sedd_megatron.diffusion.graph import find_for_graph
from sedd_megatron.diffusion.integration import INTEGRATIONS, Process
from sedd_megatron.diffusion.likelihood import BoundEstimator, mean_of_strata, prior_divergence, stratified
from sedd_megatron.diffusion.score_reader import score_fn_of
from sedd_megatron.evaluation.intervals import ratio_interval
from tests.diffusion.toy import GRAPHS, LAW, exact_log_score_fn

SEQUENCES = torch.tensor(list(itertools.product(range(3), repeat=3)))
PROBS = LAW.flatten()
NATS = -PROBS.log()


# Graph and what is integrated over.
CASES = [("absorb", "time"), ("absorb", "mask-count"), ("uniform", "time")]


def estimator(case: tuple[str, str], num_draws: int, seed: int = 0, batch_size: int = 5000) -> BoundEstimator:
    name, integration = case
    graph = GRAPHS[name]
    score_fn = score_fn_of(exact_log_score_fn(graph), graph.num_tokens)
    # A masked position weighs 1 / t and there is one in 1 / t draws: for small t that makes long tails. What is
    # left at this time the reconstruction has, with an error of second order.
    process = Process(graph, LogLinearSchedule(1e-5), 0.05)
    return BoundEstimator(score_fn, process, seed, num_draws, batch_size, INTEGRATIONS[integration])


@pytest.mark.parametrize("case", CASES)
def test_exact_scores_give_the_exact_likelihood_of_every_sequence(case):
    bound = estimator(case, 400)(SEQUENCES, torch.zeros_like(SEQUENCES, dtype=torch.bool), range(len(SEQUENCES)))
    deviation = (bound.total - NATS) / bound.standard_error
    assert deviation.abs().max() < 5
    # Errors are estimated from skewed draws, and the uniform graph has the bias of its last step in it.
    assert 0.4 < deviation.square().mean() < 3, "the standard error is not the spread"
    # A wrong law is told apart: sequences differ by more than the errors.
    assert ((bound.total - NATS.flip(0)) / bound.standard_error).abs().max() > 8
    assert (bound.prior >= 0).all()
    assert (bound.reconstruction >= 0).all()


@pytest.mark.parametrize("case", CASES[:2])
def test_given_positions_bound_the_conditional_likelihood(case):
    given = torch.tensor([False, True, False]).expand(len(SEQUENCES), -1)
    bound = estimator(case, 400)(SEQUENCES, given, range(len(SEQUENCES)))
    middle = LAW.sum((0, 2))[SEQUENCES[:, 1]]
    assert ((bound.total - (NATS + middle.log())) / bound.standard_error).abs().max() < 5


@pytest.mark.parametrize("case", CASES)
def test_the_interval_covers_the_truth_in_95_of_100(case):
    """Units are sequences of the law itself, so that the truth is its entropy."""
    repetitions, units, generator = 400, 60, torch.Generator().manual_seed(0)
    covered = 0
    for repetition in range(repetitions):
        rows = torch.multinomial(PROBS, units, replacement=True, generator=generator)
        x_0 = SEQUENCES[rows]
        bound = estimator(case, 8, seed=repetition)(x_0, torch.zeros_like(x_0, dtype=torch.bool), range(units))
        interval = ratio_interval(bound.total.tolist(), [3] * units)
        covered += interval.low <= (PROBS * NATS).sum() / 3 <= interval.high
    assert 0.92 <= covered / repetitions <= 0.98


@pytest.mark.parametrize("case", CASES)
def test_the_bound_does_not_depend_on_batches_and_rounds_are_independent(case):
    none = torch.zeros_like(SEQUENCES, dtype=torch.bool)
    whole = estimator(case, 6)(SEQUENCES, none, range(27))
    parts = [estimator(case, 6, batch_size=7)(SEQUENCES[part], none[part], range(27)[part])
             for part in (slice(0, 4), slice(4, 27))]  # fmt: skip
    for one, *two in zip(whole, *parts, strict=True):
        torch.testing.assert_close(one, torch.cat(two), rtol=1e-12, atol=0)
    later = estimator(case, 6)(SEQUENCES, none, range(27), first_draw=6)
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


def test_one_token_has_no_variance_by_count():
    """Its exact score given the others does not depend on sigma, so that each draw is the answer itself."""
    given = torch.tensor([True, True, False]).expand(len(SEQUENCES), -1)
    conditional = LAW / LAW.sum(-1, keepdim=True)
    expected = -conditional.flatten().log()
    bounds = {how: estimator(("absorb", how), 64)(SEQUENCES, given, range(27)) for how in ("time", "mask-count")}
    by_count = bounds["mask-count"]
    # Of 64 draws about 3 lie below time_eps: that part is the reconstruction's, which has no variance either.
    share = by_count.diffusion / expected
    assert (share - 0.95).abs().max() < 0.15
    share_masked = 0.05 * (1 - 1e-5)  # at time_eps
    torch.testing.assert_close(by_count.reconstruction, share_masked * expected, rtol=1e-12, atol=0)
    assert (bounds["time"].standard_error / by_count.standard_error).min() > 2


def test_mask_counts_are_stratified_and_their_weights_make_the_integral():
    """Of 1 by count: integral d sigma P(m masks) summed over m, which is sigma's range less that without a mask."""
    process = Process(GRAPHS["absorb"], LogLinearSchedule(1e-5), 0.05)
    num_draws, length = 60_000, 4
    x_0 = torch.ones(num_draws, length + 1, dtype=torch.long)
    given = (torch.arange(length + 1) == 2).expand(num_draws, -1)
    stratum = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    uniforms = torch.rand(num_draws, 2, length + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = INTEGRATIONS["mask-count"].diffusion(process, x_0, given, stratum, uniforms)
    num_masked = drawn.counts.sum(1)
    assert num_masked.bincount().tolist() == [0, *[num_draws // length] * length]
    assert (drawn.counts == (drawn.x_t == GRAPHS["absorb"].mask_token_id)).all()
    assert not drawn.counts[:, 2].any()
    low, high = process.schedule(torch.tensor([0.05, 1.0], dtype=torch.float64)).sigma
    for m in range(1, length):
        # m masks have in the integral 1/m less what lies outside of the range, which for m = 1 is a fifth.
        share = torch.linspace(0, 1, 20_001, dtype=torch.float64)[1:-1]
        inside = (-torch.expm1(-low) <= share) & (share <= -torch.expm1(-high))
        integrand = math.comb(length, m) * share**m * (1 - share) ** (length - m - 1)
        expected = (integrand * inside).sum() / 20_000
        found = drawn.weight[num_masked == m].sum() / num_draws
        assert math.isclose(found, expected, rel_tol=0.05), m


def test_integrations_by_name():
    with pytest.raises(ValueError, match=r"^--over 'mask-count' is not for the UniformGraph; choose one of time$"):
        find_for_graph(INTEGRATIONS, "mask-count", GRAPHS["uniform"], "--over")
    with pytest.raises(ValueError, match=r"^--over 'masks' does not exist; choose one of time, mask-count$"):
        find_for_graph(INTEGRATIONS, "masks", GRAPHS["absorb"], "--over")


def test_strata():
    strata = stratified(torch.tensor([[0.0, 0.5, 0.75]], dtype=torch.float64))[0]
    torch.testing.assert_close(strata, torch.tensor([0.0, 0.5, 2.75 / 3], dtype=torch.float64))
    # f = t with one draw in each half: the mean's variance is that of a uniform number of width 1/2, over 2.
    values = (torch.arange(2) + torch.rand(200_000, 2, generator=torch.Generator().manual_seed(0))) / 2
    mean, error = mean_of_strata(values.double())
    true_variance = (1 / 4) / 12 / 2
    assert abs(mean.var() / true_variance - 1) < 0.02
    # Collapsed strata add the square of the difference of their means, 1/2, over 4.
    assert math.isclose(error.square().mean(), true_variance + 1 / 16, rel_tol=0.02)
