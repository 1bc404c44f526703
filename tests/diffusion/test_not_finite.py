"""Samplers and bounds end over scores that are not finite, and say where; an impossible token is no fault."""

import math

import pytest
import torch

from sedd_megatron.diffusion.integration import INTEGRATIONS, Process
from sedd_megatron.diffusion.likelihood import BoundEstimator
from sedd_megatron.diffusion.sampling import sample
from sedd_megatron.diffusion.score_reader import ScoresNotFiniteError, score_fn_of
from sedd_megatron.generation.greedy import greedy_gives
from tests.diffusion.toy import CASES, GRAPHS, LENGTH, SCHEDULES, TOKENS, exact_log_score_fn

STEPS = 8
FAULTS = {"NaN": math.nan, "+inf": math.inf, "overflow": 100.0}


def damaged(name: str, fault: float, below: float = math.inf):
    """The toy's log-scores, but for token 1 at every position of every sequence whose noise is below `below`."""
    exact = exact_log_score_fn(GRAPHS[name])

    def log_score(x, sigma):
        found = exact(x, sigma).float()
        found[..., 1] = torch.where((sigma < below)[:, None], fault, found[..., 1])
        return found

    return log_score


def samples(name: str, sampler: str, log_score_fn, num_samples: int = 6, **others) -> torch.Tensor:
    return sample(log_score_fn, GRAPHS[name], SCHEDULES[name], num_samples=num_samples, length=LENGTH, num_steps=STEPS,
                  sampler=sampler, seed=3, **others)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_no_sampler_goes_on(name, sampler, fault):
    with pytest.raises(ScoresNotFiniteError, match=r"scores of sequence \d are not finite at sigma"):
        samples(name, sampler, damaged(name, FAULTS[fault]))


@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_the_error_says_which_sequence_round_and_noise(name, sampler):
    """Damage below sigma at t = 1/2 is met in the first round that begins there, by a sequence that is asked there."""
    sigma_of = SCHEDULES[name]
    times = 1 - torch.arange(STEPS, dtype=torch.float64) / STEPS * (1 - 1e-5)
    half = sigma_of(times[STEPS // 2]).sigma.item() * (1 + 1e-6)
    with pytest.raises(ScoresNotFiniteError) as caught:
        samples(name, sampler, damaged(name, math.nan, below=half))
    error = caught.value
    if sampler != "predictor-corrector":  # whose corrector is at the round's end
        assert error.sigma <= half
    if sampler in ("euler", "analytic"):
        assert error.round == STEPS // 2 + 1
        assert math.isclose(error.sigma, half, rel_tol=1e-5)
    # Alone it ends alike, and the samples before it end well.
    seed_alone = {"first_sample": error.sequence, "num_samples": 1}
    with pytest.raises(ScoresNotFiniteError, match="sequence 0"):
        samples(name, sampler, damaged(name, math.nan, below=half), **seed_alone)


@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_an_impossible_token_is_none_and_is_never_drawn(name, sampler):
    found = samples(name, sampler, damaged(name, -math.inf), num_samples=60)
    assert found.max() < TOKENS
    if name == "absorb":
        assert set(found.flatten().tolist()) == {0, 2}


@pytest.mark.parametrize("sampler", ["ancestral", "event-driven", "analytic"])
def test_a_position_without_a_possible_token_ends_it(sampler):
    def nothing(x, sigma):
        return torch.full((*x.shape, TOKENS + 1), -math.inf)

    with pytest.raises(ScoresNotFiniteError):
        samples("absorb", sampler, nothing)


def bound_of(name: str, log_score_fn, x_0: torch.Tensor, integrate_over: str = "time"):
    process = Process(GRAPHS[name], SCHEDULES[name], 1e-3)
    score_fn = score_fn_of(log_score_fn, TOKENS)
    estimator = BoundEstimator(score_fn, process, 0, 16, 5, INTEGRATIONS[integrate_over])
    return estimator(x_0, torch.zeros_like(x_0, dtype=torch.bool), range(len(x_0)))


BOUNDS = [("absorb", "time"), ("absorb", "mask-count"), ("uniform", "time")]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("name", "integrate_over"), BOUNDS)
def test_no_bound_goes_on(name, integrate_over, fault):
    x_0 = torch.tensor([[0, 2, 0], [1, 1, 2]])
    below = SCHEDULES[name](torch.tensor(0.3, dtype=torch.float64)).sigma.item()
    with pytest.raises(ScoresNotFiniteError) as caught:
        bound_of(name, damaged(name, FAULTS[fault], below), x_0, integrate_over)
    assert (caught.value.sequence, caught.value.round) == (0, None)
    assert caught.value.sigma < below


@pytest.mark.parametrize(("name", "integrate_over"), BOUNDS[:2])
def test_a_bound_is_infinite_where_an_impossible_token_is_and_finite_elsewhere(name, integrate_over):
    x_0 = torch.tensor([[0, 2, 0], [1, 1, 2]])
    total = bound_of(name, damaged(name, -math.inf), x_0, integrate_over).total
    assert total[0].isfinite()
    assert total[1] == math.inf


@pytest.mark.parametrize("fault", ["NaN", "+inf"])
def test_greedy_decoding_does_not_go_on(fault):
    x_0 = torch.tensor([[0, 2, 0], [1, 1, 2]])
    given = torch.tensor([[True, True, True], [True, False, False]])
    score_fn = score_fn_of(damaged("absorb", FAULTS[fault]), TOKENS)
    with pytest.raises(ScoresNotFiniteError) as caught:
        greedy_gives(score_fn, GRAPHS["absorb"], SCHEDULES["absorb"], x_0, given)
    assert caught.value.sequence == 1
    whole = greedy_gives(score_fn, GRAPHS["absorb"], SCHEDULES["absorb"], x_0[:1], given[:1])
    assert whole.tolist() == [True]
