"""Every sampler, with exact scores of an enumerable toy: the law of few steps, its limit, and when positions jump."""

import pytest
import torch

from sedd_megatron.diffusion import SAMPLERS, AbsorbingGraph, GeometricSchedule, LogLinearSchedule, sample
from sedd_megatron.diffusion.draws import Stream, philox_uniforms
from sedd_megatron.diffusion.sampling import Draws, SamplingSettings, draw_jump_steps, run_sampler
from tests.diffusion.laws import chi_squared_p_value
from tests.diffusion.toy import (
    CASES,
    GRAPHS,
    LAW,
    LENGTH,
    SCHEDULES,
    ExactScores,
    exact_law,
    independent_scores,
    law_of_states,
    p_value_of,
    total_variation,
)

# Copies of the toy side by side in one sequence: one counter-based generator serves them all.
COPIES = 1000
STEPS_ON = {
    "uniform grid": {"num_steps": 5, "corrector_strength": 3.0},
    # delta_t is 0.26 and 0.64: one of the corrector's probabilities is cut at 1. Much is left to denoise.
    "cosine grid": {"num_steps": 2, "time_grid": "cosine", "time_eps": 0.1, "corrector_strength": 3.0},
    "no denoising": {"num_steps": 3, "denoise": False, "time_eps": 0.2, "corrector_strength": 2.0},
}


def draw(name: str, sampler: str, *, rows: int = 1000, copies: int = COPIES, **options) -> torch.Tensor:
    graph = GRAPHS[name]
    return sample(ExactScores(graph), graph, SCHEDULES[name], num_samples=rows, length=copies * LENGTH,
                  sampler=sampler, **{"seed": 11, **options})  # fmt: skip


@pytest.mark.parametrize(("name", "sampler"), CASES)
@pytest.mark.parametrize("options", STEPS_ON.values(), ids=STEPS_ON)
def test_draws_follow_the_exact_joint_law_of_few_steps(name, sampler, options):
    # A million draws of each sampler, and a fifth of that for its variants.
    rows = 1000 if options is STEPS_ON["uniform grid"] else 200
    samples = draw(name, sampler, rows=rows, **options)
    law = exact_law(GRAPHS[name], SCHEDULES[name], sampler, **options)
    assert p_value_of(samples, law, GRAPHS[name]) > 1e-3
    one_more = exact_law(GRAPHS[name], SCHEDULES[name], sampler, **{**options, "num_steps": options["num_steps"] + 1})
    assert p_value_of(samples, one_more, GRAPHS[name]) < 1e-9, "the test could not tell a wrong law"


@pytest.mark.parametrize("schedule", [GeometricSchedule(sigma_min=1e-3), LogLinearSchedule(eps=0.1)])
@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_the_law_holds_under_other_schedules(name, sampler, schedule):
    graph = GRAPHS[name]
    samples = sample(ExactScores(graph), graph, schedule, num_samples=100, length=COPIES * LENGTH, num_steps=6,
                     sampler=sampler, seed=3)  # fmt: skip
    assert p_value_of(samples, exact_law(graph, schedule, sampler, 6), graph) > 1e-3


@pytest.mark.parametrize("time_grid", ["uniform", "cosine"])
@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_the_exact_law_of_many_steps_converges_to_the_law(name, sampler, time_grid):
    graph, truth = GRAPHS[name], law_of_states(GRAPHS[name])
    distances = [
        total_variation(exact_law(graph, SCHEDULES[name], sampler, steps, time_grid=time_grid), truth)
        for steps in (64, 128, 256, 512, 1024)
    ]
    for more, fewer in zip(distances[1:], distances[:-1], strict=True):
        assert 0.45 < more / fewer < 0.55
    assert distances[-1] < {"uniform": 1e-3, "cosine": 1.5e-3}[time_grid]


def test_event_driven_draws_follow_the_law_itself():
    # The exact law of 4096 steps is 1.3e-4 away, which 2e5 draws cannot see.
    samples = draw("absorb", "event-driven", rows=200_000, copies=1, num_steps=4096)
    assert p_value_of(samples, law_of_states(GRAPHS["absorb"]), GRAPHS["absorb"]) > 1e-3
    marginals = [LAW.sum(tuple(j for j in range(LENGTH) if j != i)) for i in range(LENGTH)]
    independent = torch.einsum("a,b,c->abc", *marginals)
    assert p_value_of(samples, law_of_states(GRAPHS["absorb"], independent), GRAPHS["absorb"]) < 1e-9


def jump_law(schedule, times: torch.Tensor) -> torch.Tensor:
    """Probability of each step to be a position's jump, and of none; [T + 1].

    A position is masked at t with probability 1 - exp(-sigma), and all are at t = 1.
    """
    masked = 1 - torch.exp(-schedule(times).sigma)
    masked = masked / masked[0]
    return torch.cat([masked[:-1] - masked[1:], masked[-1:]])


def test_jumps_of_the_loglinear_schedule_are_spread_like_the_steps():
    times = torch.tensor([1.0, 0.7, 0.65, 0.2, 0.05], dtype=torch.float64)
    expected = torch.tensor([0.3, 0.05, 0.45, 0.15, 0.05], dtype=torch.float64)
    torch.testing.assert_close(jump_law(LogLinearSchedule(), times), expected, rtol=1e-12, atol=0)
    jumps = draw_jump_steps(LogLinearSchedule()(times).sigma, philox_uniforms(1, Stream.SAMPLING, range(100), 5000))
    assert chi_squared_p_value(torch.bincount(jumps.flatten(), minlength=5), expected) > 1e-3


def test_jump_steps_at_the_ends_of_the_uniform_numbers():
    sigmas = LogLinearSchedule()(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)).sigma
    uniform = torch.tensor([[0.0, 0.499, 0.501, 1 - 2**-53]], dtype=torch.float64)
    # At t = 0 no mask is left: T, "still masked", does not come up.
    assert draw_jump_steps(sigmas, uniform).tolist() == [[0, 0, 1, 1]]


class Appearances:
    """An on_round that notes the step in which each position leaves the mask, 0 where it does not."""

    def __init__(self, mask_token_id: int) -> None:
        self.mask_token_id = mask_token_id

    def __call__(self, progress) -> None:
        if progress.round == 0:
            self.step = torch.zeros_like(progress.states)
        appeared = (progress.states != self.mask_token_id) & (self.step == 0)
        self.step = torch.where(appeared & (progress.steps > 0)[:, None], progress.steps[:, None], self.step)


@pytest.mark.parametrize("schedule", [LogLinearSchedule(), GeometricSchedule()], ids=["loglinear", "geometric"])
@pytest.mark.parametrize("sampler", ["ancestral", "event-driven"])
def test_both_exact_samplers_jump_by_the_same_law_and_ask_once_per_jump_step(sampler, schedule):
    rows, length, num_steps, time_eps = 4000, 30, 20, 0.02
    graph = AbsorbingGraph(7)
    settings = SamplingSettings(sampler, num_steps, "cosine", time_eps=time_eps)
    appearances = Appearances(graph.mask_token_id)
    nothing = torch.zeros(rows, length, dtype=torch.long)
    result = run_sampler(independent_scores(torch.full((7,), 1 / 7), 10**9), graph, schedule, settings,
                         Draws([5] * rows, range(rows)), nothing, nothing.bool(), appearances)  # fmt: skip
    k = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    law = jump_law(schedule, time_eps + (1 - time_eps) * torch.cos(k * torch.pi / 2))
    counts = torch.bincount(appearances.step.flatten() - 1, minlength=num_steps + 1)
    assert chi_squared_p_value(counts, law) > 1e-3
    distinct = torch.tensor([len(row.unique()) for row in appearances.step])
    assert torch.equal(result.calls, distinct)
    expected = (1 - (1 - law) ** length).sum()
    error = result.calls.double().std() / rows**0.5
    assert (result.calls.double().mean() - expected).abs() < 4 * error
    assert expected < 0.9 * num_steps, "there would be little to save"


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        (
            "absorb",
            {"sampler": "heun"},
            "'heun' does not exist; choose one of euler, analytic, ancestral, event-driven",
        ),
        ("uniform", {"sampler": "heun"}, "choose one of euler, analytic, predictor-corrector$"),
        ("uniform", {"sampler": "ancestral"}, "not for the UniformGraph; choose one of euler, analytic, predictor-c"),
        ("uniform", {"sampler": "event-driven"}, "not for the UniformGraph; choose one of euler, analytic, predictor"),
        ("absorb", {"num_steps": 0}, "num_steps 0 must be at least 1"),
        ("absorb", {"sampler": "event-driven", "num_steps": -3}, "num_steps -3 must be at least 1"),
        ("uniform", {"time_grid": "cosin"}, "'cosin' does not exist; choose one of uniform, cosine"),
    ],
)
def test_errors_name_the_rule(name, change, text):
    options = {"num_samples": 1, "length": LENGTH, "num_steps": 1, **change}
    with pytest.raises(ValueError, match=text):
        sample(ExactScores(GRAPHS[name]), GRAPHS[name], SCHEDULES[name], **options)
    assert set(SAMPLERS) == {sampler for _, sampler in CASES}
