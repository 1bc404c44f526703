"""Rare tokens come as often as they should: Zipf's law over 50257 tokens, on grids of 4096 steps.

A position leaves the mask in one step with probability 1/4096 at first, and for one of the tokens with p <= 1e-5 with a
4e-9th of that at most: what float32 uniforms, all multiples of 2^-24, cannot resolve.
"""

import time

import pytest
import torch

from sedd_megatron.diffusion import AbsorbingGraph, LogLinearSchedule, SamplingSettings, TokenChoice, UniformGraph
from sedd_megatron.diffusion.draws import philox_uniforms
from sedd_megatron.diffusion.sampler import SAMPLERS, Step
from sedd_megatron.diffusion.sampling import Draws, run_sampler
from sedd_megatron.diffusion.score_reader import ScoreReader, Scores
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
    ("sampler", "rows", "length"), [("event-driven", 20, 1000), ("ancestral", 1, 20_000), ("euler", 1, 600),
                                    ("analytic", 1, 600), ("predictor-corrector", 1, 100)]
)  # fmt: skip
def test_rare_tokens_have_their_share_after_4096_steps(sampler, rows, length):
    nothing = torch.zeros(rows, length, dtype=torch.long)
    result = run_sampler(independent_scores(ZIPF.float()), AbsorbingGraph(NUM_TOKENS), SCHEDULE,
                         SamplingSettings(sampler, NUM_STEPS), Draws([12] * rows, range(rows)), nothing,
                         nothing.bool())  # fmt: skip
    print(sampler, standard_errors(RARE[result.states].sum().item(), rows * length, RARE_SHARE))
    assert abs(standard_errors(RARE[result.states].sum().item(), rows * length, RARE_SHARE)) < 3


def equal_scores(row: torch.Tensor, chunk_rows: int = 64):
    """A ScoreFn that answers with the same scores [V] for all positions."""

    def score_fn(x_t, sigma, index, law):
        parts = [slice(start, start + chunk_rows) for start in range(0, len(index), chunk_rows)]
        return torch.cat([law(Scores(row.expand(len(index[part]), -1)), part) for part in parts])

    return score_fn


def step_at(graph, number: int, length: int, sequences: int = 1) -> Step:
    """The step of this number, from 0, of 4096."""
    now, later = sampling_times("uniform", NUM_STEPS, 1e-5)[number : number + 2].repeat(sequences, 1).unbind(1)
    free = torch.ones(sequences, length, dtype=torch.bool)

    def draw(stream) -> torch.Tensor:
        return philox_uniforms(4, stream, range(sequences), length, number + 1)

    return Step(graph, SCHEDULE(now), SCHEDULE(later), now - later, free, draw, TokenChoice(), 1.0)


@pytest.mark.parametrize("number", [0, NUM_STEPS - 128])
@pytest.mark.parametrize("sampler", ["euler", "analytic", "ancestral"])
def test_one_step_lets_the_right_share_leave_and_for_the_right_tokens(sampler, number):
    graph, length = AbsorbingGraph(NUM_TOKENS), 600_000
    step = step_at(graph, number, length)
    x = torch.full((1, length), graph.mask_token_id)
    states = SAMPLERS[sampler].step(ScoreReader(independent_scores(ZIPF.float()), 1, "cpu"), x, step)
    left = states[states != graph.mask_token_id]
    now, later = (1 - torch.exp(-level.sigma) for level in (step.now, step.later))
    leave = (1 - later / now).item()
    print(sampler, number, len(left), leave * length, standard_errors(len(left), length, leave))
    assert abs(standard_errors(len(left), length, leave)) < 3
    print(standard_errors(RARE[left].sum().item(), len(left), RARE_SHARE), RARE[left].sum().item())
    assert abs(standard_errors(RARE[left].sum().item(), len(left), RARE_SHARE)) < 3


@pytest.mark.parametrize("sampler", ["euler", "analytic"])
def test_one_step_of_the_uniform_graph_follows_the_dense_formula(sampler):
    graph, length, token = UniformGraph(NUM_TOKENS), 200_000, NUM_TOKENS - 1
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
    print(len(left),standard_errors(len(left), length, 1 - dense[token].item()))
    assert abs(standard_errors(len(left), length, 1 - dense[token].item())) < 3
    dense[token] = 0
    share = (dense[RARE].sum() / dense.sum()).item()
    print(share, RARE[left].sum(), standard_errors(RARE[left].sum().item(), len(left), share))
    assert abs(standard_errors(RARE[left].sum().item(), len(left), share)) < 3


def published_draw(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The published code's categorical draw, by its formula: float32 exponentials race."""
    return (probs / (1e-10 - (uniform + 1e-10).log())).argmax(-1)


def test_the_published_float32_draw_starves_rare_tokens():
    # 128 steps from the end: at first, where a position leaves 32 times as seldom, nothing rare would come at all.
    length, leave = 20_000, 1 / 128
    probs = torch.cat([leave * ZIPF, torch.tensor([1 - leave])]).float()
    generator = torch.Generator().manual_seed(0)
    states = torch.cat([
        published_draw(probs, torch.rand(50, NUM_TOKENS + 1, generator=generator)) for _ in range(length // 50)
    ])  # fmt: skip
    rare = RARE[states[states < NUM_TOKENS]].sum().item()
    print((states < NUM_TOKENS).sum(), rare, standard_errors(rare, length, leave * RARE_SHARE))
    assert standard_errors(rare, length, leave * RARE_SHARE) < -3
