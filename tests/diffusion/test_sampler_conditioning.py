"""Given tokens: they never change, and the rest follows the law that they leave, or as near to it as is claimed."""

import itertools

import pytest
import torch

from sedd_megatron.diffusion import sample
from tests.diffusion.toy import (
    CASES,
    GRAPHS,
    LENGTH,
    SCHEDULES,
    TOKENS,
    ExactScores,
    conditional_law,
    exact_law,
    law_of_states,
    p_value_of,
    total_variation,
)

GIVEN = [{1: 2}, {0: 1, 2: 0}]
ABSORBING = [sampler for name, sampler in CASES if name == "absorb"]


def draw_around(name: str, sampler: str, fixed_tokens, fixed_mask, num_steps: int, **options) -> torch.Tensor:
    graph = GRAPHS[name]
    return sample(ExactScores(graph), graph, SCHEDULES[name], num_samples=len(fixed_mask), num_steps=num_steps,
                  length=fixed_mask.shape[1], sampler=sampler, fixed_tokens=fixed_tokens, fixed_mask=fixed_mask,
                  **options)  # fmt: skip


def tiled(fixed: dict[int, int], rows: int, copies: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask [rows, copies * LENGTH] of the same given tokens in each copy of the toy."""
    tokens = torch.tensor([fixed.get(position, 0) for position in range(LENGTH)])
    mask = torch.tensor([position in fixed for position in range(LENGTH)])
    return tokens.repeat(rows, copies), mask.repeat(rows, copies)


@pytest.mark.parametrize(("name", "sampler"), CASES)
@pytest.mark.parametrize("denoise", [True, False])
def test_given_positions_never_change_and_all_others_do(name, sampler, denoise):
    generator = torch.Generator().manual_seed(0)
    masks = torch.tensor(list(itertools.product([False, True], repeat=2 * LENGTH)))
    tokens = torch.randint(0, TOKENS, masks.shape, generator=generator)
    seen = []
    samples = draw_around(name, sampler, tokens, masks, 12, denoise=denoise, corrector_strength=4.0,
                          on_round=seen.append)  # fmt: skip
    assert len(seen) > 2
    for progress in seen:
        assert torch.equal(progress.states[masks], tokens[masks])
    assert torch.equal(seen[-1].states, samples)
    free_share = (samples[~masks] == tokens[~masks]).double().mean()
    assert 0.1 < free_share < 0.6, "free positions have to follow their law, not the tokens under the mask"
    if denoise:
        assert (samples < TOKENS).all()


@pytest.mark.parametrize("fixed", GIVEN, ids=str)
@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_the_rest_follows_the_exact_conditional_law_of_few_steps(name, sampler, fixed):
    options = {"num_steps": 5, "corrector_strength": 3.0}
    samples = draw_around(name, sampler, *tiled(fixed, 200, 1000), **options)
    law = exact_law(GRAPHS[name], SCHEDULES[name], sampler, fixed=fixed, **options)
    assert p_value_of(samples, law, GRAPHS[name]) > 1e-3
    unconditional = exact_law(GRAPHS[name], SCHEDULES[name], sampler, **options)
    assert total_variation(law, unconditional) > 0.1


@pytest.mark.parametrize("fixed", GIVEN, ids=str)
@pytest.mark.parametrize("sampler", ABSORBING)
def test_absorbing_samplers_converge_to_the_conditional_law(sampler, fixed):
    graph, truth = GRAPHS["absorb"], law_of_states(GRAPHS["absorb"], conditional_law(fixed))
    distances = [
        total_variation(exact_law(graph, SCHEDULES["absorb"], sampler, steps, fixed=fixed), truth)
        for steps in (128, 256, 512)
    ]
    if len(fixed) == LENGTH - 1:
        # One position alone: nothing that jumps at the same time to be wrong about.
        assert max(distances) < 1e-9
    else:
        assert all(0.45 < more / fewer < 0.55 for more, fewer in zip(distances[1:], distances[:-1], strict=True))
        assert distances[-1] < 2e-3


@pytest.mark.parametrize("fixed", GIVEN, ids=str)
def test_event_driven_draws_follow_the_conditional_law_itself(fixed):
    samples = draw_around("absorb", "event-driven", *tiled(fixed, 50_000, 1), num_steps=4096)
    assert p_value_of(samples, law_of_states(GRAPHS["absorb"], conditional_law(fixed)), GRAPHS["absorb"]) > 1e-3


# Total variation of 512 steps from LAW given the tokens. The network takes a given token for a noisy one, so its scores
# trust it less than they should until the noise is gone; more steps do not help.
CLAMPING_ERROR = {"euler": (0.098, 0.169), "analytic": (0.099, 0.169), "predictor-corrector": (0.076, 0.145)}


@pytest.mark.parametrize(("sampler", "errors"), CLAMPING_ERROR.items())
def test_clamping_under_the_uniform_graph_is_an_approximation_of_known_size(sampler, errors):
    graph = GRAPHS["uniform"]
    for fixed, error in zip(GIVEN, errors, strict=True):
        truth = law_of_states(graph, conditional_law(fixed))
        fewer, more = (
            total_variation(exact_law(graph, SCHEDULES["uniform"], sampler, steps, fixed=fixed), truth)
            for steps in (256, 512)
        )
        assert 0.99 * error < more < 1.01 * error
        assert 0.98 < more / fewer < 1
        unconditional = law_of_states(graph)
        assert more < total_variation(unconditional, truth) / 2, "it is still much nearer than not knowing the tokens"
