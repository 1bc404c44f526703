"""Rare tokens come as often as they should: Zipf's law over 50257 tokens, on grids of 4096 steps.

A position leaves the mask in the first step with probability 1/4096, and for a token with p <= 1e-5 with 2.4e-9 at
most: float32 uniforms, all multiples of 2^-24 = 6e-8, do not resolve it.
"""

import pytest
import torch

from sedd_megatron.diffusion import AbsorbingGraph, LogLinearSchedule, SamplingSettings, TokenChoice, UniformGraph
from sedd_megatron.diffusion.categorical import sample_categorical
from sedd_megatron.diffusion.draws import philox_uniforms
from sedd_megatron.diffusion.sampler import SAMPLERS, Step
from sedd_megatron.diffusion.sampling import Draws, run_sampler
from sedd_megatron.diffusion.score_reader import ScoreReader, Scores, answers
from sedd_megatron.diffusion.time_grid import sampling_times
from tests.diffusion.toy import independent_scores

NUM_TOKENS, NUM_STEPS = 50257, 4096
ZIPF = 1 / torch.arange(1, NUM_TOKENS + 1, dtype=torch.float64)
ZIPF /= ZIPF.sum()
RARE = ZIPF <= 1e-5
RARE_SHARE = ZIPF[RARE].sum().item()
SCHEDULE = LogLinearSchedule()


def standard_errors(count: float, trials: float, probability: float) -> float:
    """How far count is from a binomial's mean, in its standard deviations."""
    return (count - trials * probability) / (trials * probability * (1 - probability)) ** 0.5


def test_the_bucket_is_most_of_the_vocabulary_and_a_seventh_of_the_text():
    assert RARE.sum() > 0.8 * NUM_TOKENS
    assert 0.14 < RARE_SHARE < 0.16


@pytest.mark.parametrize(
    ("sampler", "rows", "length"), [("event-driven", 20, 1000), ("ancestral", 1, 20_000), ("euler", 1, 400),
                                    ("analytic", 1, 400), ("predictor-corrector", 1, 100)]
)  # fmt: skip
def test_rare_tokens_have_their_share_after_4096_steps(sampler, rows, length):
    nothing = torch.zeros(rows, length, dtype=torch.long)
    result = run_sampler(independent_scores(ZIPF.float()), AbsorbingGraph(NUM_TOKENS), SCHEDULE,
                         SamplingSettings(sampler, NUM_STEPS), Draws([12] * rows, range(rows)), nothing,
                         nothing.bool())  # fmt: skip
    assert abs(standard_errors(RARE[result.states].sum().item(), rows * length, RARE_SHARE)) < 3


def equal_scores(row: torch.Tensor, chunk_rows: int = 64):
    """A ScoreFn that answers with the same scores [V] for all positions."""

    def score_fn(x_t, sigma, asked, *laws):
        given = torch.empty_like(asked.index)
        return answers(lambda part: Scores(row.expand(len(given[part]), -1)), given, chunk_rows, *laws)

    return score_fn


def step_at(graph, number: int, length: int, uniform: torch.Tensor | None = None) -> Step:
    """The step of this number, from 0, of 4096 of one sequence."""
    now, later = sampling_times("uniform", NUM_STEPS, 1e-5)[number : number + 2, None]
    free = torch.ones(1, length, dtype=torch.bool)

    def draw(stream) -> torch.Tensor:
        return philox_uniforms(4, stream, 0, length, number + 1) if uniform is None else uniform[None]

    return Step(graph, SCHEDULE(now), SCHEDULE(later), now - later, free, draw, TokenChoice(), 1.0)


def leave_probability(step: Step) -> float:
    """Of a masked position: 1 less the share of masks that are still masks later."""
    now, later = (1 - torch.exp(-level.sigma) for level in (step.now, step.later))
    return (1 - later / now).item()


def move(sampler: str, step: Step, length: int) -> torch.Tensor:
    """Where masked positions [length] are after the step."""
    x = torch.full((1, length), step.graph.mask_token_id)
    return SAMPLERS[sampler].step(ScoreReader(independent_scores(ZIPF.float()), 1, "cpu"), x, step)[0]


@pytest.mark.parametrize("sampler", ["euler", "analytic", "ancestral"])
def test_each_rare_token_has_uniform_numbers_of_its_own_in_the_first_step(sampler):
    graph = AbsorbingGraph(NUM_TOKENS)
    tokens = RARE.nonzero()[:, 0][::20]
    # The middle of a token's share of the numbers below the probability to leave; all else stays.
    share = ZIPF.cumsum(0)[tokens] - ZIPF[tokens] / 2
    leave = leave_probability(step_at(graph, 0, 1))
    step = step_at(graph, 0, len(tokens), leave * share)
    assert torch.equal(move(sampler, step, len(tokens)), tokens)
    stays = step_at(graph, 0, 1, torch.tensor([leave * (1 + 1e-5)], dtype=torch.float64))
    assert move(sampler, stays, 1) == graph.mask_token_id


def test_the_categorical_draw_resolves_probabilities_far_below_float32():
    # A float32 sum next to 1 has no place for the two, and no float32 number below 1 leads to the first of them.
    probs = torch.tensor([1.0, 3e-12, 0.0, 5e-12])
    uniform = 1 - torch.tensor([9e-12, 7e-12, 4e-12, 1e-12], dtype=torch.float64)
    assert sample_categorical(probs.expand(4, -1), uniform).tolist() == [0, 1, 3, 3]


@pytest.mark.parametrize("number", [0, NUM_STEPS - 128])
@pytest.mark.parametrize("sampler", ["euler", "analytic", "ancestral"])
def test_one_step_lets_the_right_share_leave_and_for_the_right_tokens(sampler, number):
    graph, length = AbsorbingGraph(NUM_TOKENS), 300_000
    step = step_at(graph, number, length)
    states = move(sampler, step, length)
    left = states[states != graph.mask_token_id]
    assert abs(standard_errors(len(left), length, leave_probability(step))) < 3
    assert abs(standard_errors(RARE[left].sum().item(), len(left), RARE_SHARE)) < 3


@pytest.mark.parametrize("sampler", ["euler", "analytic"])
def test_one_step_of_the_uniform_graph_follows_the_dense_formula(sampler):
    graph, length, token = UniformGraph(NUM_TOKENS), 150_000, NUM_TOKENS - 1
    step = step_at(graph, NUM_STEPS - 64, length)
    keep = torch.exp(-step.now.sigma)
    law = keep * ZIPF + (1 - keep) / NUM_TOKENS
    score = law / law[token]
    states = SAMPLERS[sampler].step(
        ScoreReader(equal_scores(score.float().index_fill(0, torch.tensor([token]), 0.0)), 1, "cpu"),
        torch.full((1, length), token),
        step,
    )
    log_score, one = score.log()[None, None], torch.tensor([[token]])
    if sampler == "analytic":
        dense = graph.analytic_step_probs(log_score, one, step.now.sigma - step.later.sigma)[0, 0]
    else:
        dense = step.delta_t * step.now.sigma_rate * graph.reverse_rate(log_score, one)[0, 0]
        dense[token] += 1
    dense = dense.clamp_min(0) / dense.clamp_min(0).sum()
    left = states[states != token]
    assert len(left) > 300
    assert abs(standard_errors(len(left), length, 1 - dense[token].item())) < 3
    dense[token] = 0
    share = (dense[RARE].sum() / dense.sum()).item()
    assert abs(standard_errors(RARE[left].sum().item(), len(left), share)) < 3


def published_draw(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The published code's categorical draw, by its formula: float32 exponentials race."""
    return (probs / (1e-10 - (uniform + 1e-10).log())).argmax(-1)


def test_the_published_float32_draw_starves_rare_tokens():
    # 128 steps from the end: at first, where a position leaves 32 times as seldom, nothing rare would come at all.
    length, leave = 24_000, 1 / 128
    probs = torch.cat([leave * ZIPF, torch.tensor([1 - leave])]).float()
    generator = torch.Generator().manual_seed(0)
    states = torch.cat([
        published_draw(probs, torch.rand(50, NUM_TOKENS + 1, generator=generator)) for _ in range(length // 50)
    ])  # fmt: skip
    rare = RARE[states[states < NUM_TOKENS]].sum().item()
    assert standard_errors(rare, length, leave * RARE_SHARE) < -3
