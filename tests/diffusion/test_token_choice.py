"""Temperature, top-k and top-p against brute force; none of them moves a jump in time."""

import itertools

import pytest
import torch

from sedd_megatron.diffusion import AbsorbingGraph, LogLinearSchedule, SamplingSettings, TokenChoice
from sedd_megatron.diffusion.sampling import Draws, run_sampler
from sedd_megatron.diffusion.score_reader import score_fn_of
from tests.diffusion.toy import GRAPHS, LENGTH, SCHEDULES, ExactScores, independent_scores

CHOICES = [
    TokenChoice(),
    TokenChoice(temperature=0.5),
    TokenChoice(temperature=3.0),
    TokenChoice(top_k=1),
    TokenChoice(top_k=3),
    TokenChoice(top_k=100),
    TokenChoice(top_p=0.6),
    TokenChoice(top_k=3, top_p=0.8),  # of what top-k leaves
    TokenChoice(top_p=1e-6),
    TokenChoice(temperature=0.7, top_k=4, top_p=0.8),
    TokenChoice(temperature=2.0, top_k=2, top_p=0.9),
    TokenChoice(temperature=1e-3),
    TokenChoice(temperature=0.0),
    TokenChoice(temperature=0.0, top_k=3, top_p=0.5),
]
WEIGHTS = torch.tensor(
    [
        [0.9, 3.1, 0.2, 0.55, 0.0, 1.7],
        [1e-9, 2e-9, 5e-9, 0.0, 3e-9, 4e-9],
        [0.0, 0.0, 7.0, 0.0, 0.0, 0.0],
        [2e20, 1e19, 0.0, 3e20, 6e20, 1e20],
    ],
    dtype=torch.float64,
)


def brute_force(weights: list[float], choice: TokenChoice) -> list[float]:
    """The law of the choice in plain numbers: sharpen, keep the k best, keep the best until they have the share p."""
    ranked = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    if choice.temperature == 0:
        return [float(i == ranked[0]) for i in range(len(weights))]
    sharpened = [(weight / max(weights)) ** (1 / choice.temperature) for weight in weights]
    kept = ranked[: choice.top_k] if choice.top_k else ranked
    total, reached, nucleus = sum(sharpened[i] for i in kept), 0.0, []
    for i in kept:
        nucleus.append(i)
        reached += sharpened[i]
        if choice.top_p < 1 and reached >= choice.top_p * total:
            break
    total = sum(sharpened[i] for i in nucleus)
    return [sharpened[i] / total if i in nucleus else 0.0 for i in range(len(weights))]


def law_of(choice: TokenChoice, weights: torch.Tensor, count: int = 20_000) -> torch.Tensor:
    """Shares of the tokens over evenly spaced uniform numbers: right to 1 / count."""
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = choice(weights.expand(count, -1), uniform)
    return torch.bincount(tokens, minlength=len(weights)) / count


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_choices_have_the_law_of_brute_force(choice):
    for weights in WEIGHTS:
        expected = torch.tensor(brute_force(weights.tolist(), choice))
        assert (law_of(choice, weights) - expected).abs().max() < 1.5 / 20_000
        assert (law_of(choice, weights)[expected == 0] == 0).all()


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_rows_do_not_see_each_other(choice):
    uniform = torch.tensor([0.1, 0.5, 0.7, 0.99], dtype=torch.float64)
    alone = [choice(WEIGHTS[row : row + 1], uniform[row : row + 1]) for row in range(len(WEIGHTS))]
    assert torch.equal(choice(WEIGHTS, uniform), torch.cat(alone))


def test_ties_keep_the_lower_ids_and_the_share_counts_the_token_that_reaches_it():
    equal = torch.ones(8, dtype=torch.float64)
    assert law_of(TokenChoice(top_k=2), equal).tolist() == [0.5, 0.5, 0, 0, 0, 0, 0, 0]
    assert law_of(TokenChoice(top_p=0.25), equal).tolist() == [0.5, 0.5, 0, 0, 0, 0, 0, 0]
    assert law_of(TokenChoice(top_p=0.26), equal).count_nonzero() == 3
    assert law_of(TokenChoice(temperature=0.0), equal).tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    eighths = torch.tensor([1.0, 4.0, 1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(law_of(TokenChoice(top_p=0.75), eighths), torch.tensor([0, 2 / 3, 0, 1 / 3]), atol=1e-4,
                               rtol=0)  # fmt: skip


def test_temperature_0_is_the_limit_and_takes_the_most_probable():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(200, 40, dtype=torch.float64, generator=generator)
    uniform = torch.rand(200, dtype=torch.float64, generator=generator)
    assert torch.equal(TokenChoice(temperature=0.0)(weights, uniform), weights.argmax(-1))
    assert torch.equal(TokenChoice(top_k=1)(weights, uniform), weights.argmax(-1))
    assert TokenChoice(temperature=1e-5)(weights, uniform).eq(weights.argmax(-1)).double().mean() > 0.95


class Progress(list):
    """An on_round that keeps step and states of all rounds."""

    def __call__(self, progress) -> None:
        self.append((progress.steps.clone(), progress.states.clone()))

    def appearance_steps(self, mask_token_id: int) -> torch.Tensor:
        """[B, S], the step in which each position leaves the mask."""
        found = torch.zeros_like(self[0][1])
        for (_, before), (steps, after) in itertools.pairwise(self):
            left = (before == mask_token_id) & (after != mask_token_id)
            found = torch.where(left, steps[:, None], found)
        return found


@pytest.mark.parametrize("sampler", ["euler", "analytic", "ancestral", "event-driven"])
def test_jumps_are_at_the_same_steps_whatever_the_choice(sampler):
    # With exact scores the sum over the tokens is 1 / expm1(sigma) in every state, which Euler and analytic steps need.
    graph, length = GRAPHS["absorb"], 20 * LENGTH
    nothing = torch.zeros(20, length, dtype=torch.long)
    steps, states = [], []
    for choice in CHOICES:
        progress = Progress()
        result = run_sampler(score_fn_of(ExactScores(graph), graph.num_tokens), graph, SCHEDULES["absorb"],
                             SamplingSettings(sampler, 16, choose=choice), Draws([8] * 20, range(20)), nothing,
                             nothing.bool(), progress)  # fmt: skip
        steps.append(progress.appearance_steps(graph.mask_token_id))
        states.append(result.states)
    assert (steps[0] > 0).all()
    assert len(steps[0].unique()) == 16
    assert all(torch.equal(steps[0], other) for other in steps[1:])
    changed = [not torch.equal(states[0], other) for other in states[1:]]
    # With three tokens, to keep three or more is to keep all.
    assert changed == [choice not in (TokenChoice(top_k=3), TokenChoice(top_k=100)) for choice in CHOICES[1:]]


@pytest.mark.parametrize("sampler", ["analytic", "event-driven"])
def test_a_sampler_draws_by_the_sharpened_law(sampler):
    probs = WEIGHTS[0] / WEIGHTS[0].sum()
    graph, nothing = AbsorbingGraph(len(probs)), torch.zeros(1, 40_000, dtype=torch.long)
    for choice in CHOICES[1:10]:
        states = run_sampler(independent_scores(probs, 10**6), graph, LogLinearSchedule(),
                             SamplingSettings(sampler, 8, choose=choice), Draws([3], [0]), nothing,
                             nothing.bool()).states  # fmt: skip
        expected = torch.tensor(brute_force(probs.tolist(), choice), dtype=torch.float64)
        share = torch.bincount(states.flatten(), minlength=len(probs)) / 40_000
        error = (expected * (1 - expected) / 40_000).sqrt()
        assert ((share - expected).abs() <= 4 * error).all()
