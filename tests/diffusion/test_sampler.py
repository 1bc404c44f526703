"""Samplers with exact scores recover a law that can be written down; given positions stay."""

import itertools

import pytest
import torch

from sedd_megatron.diffusion import AbsorbingGraph, LogLinearSchedule, UniformGraph, sample
from tests.diffusion.laws import chi_squared_p_value

TOKENS, LENGTH = 3, 2
SEQUENCES = torch.tensor(list(itertools.product(range(TOKENS), repeat=LENGTH)))
# Strongly correlated positions: a sampler that gets only the marginals right fails.
LAW = torch.tensor([0.25, 0.02, 0.03, 0.05, 0.20, 0.05, 0.03, 0.07, 0.30], dtype=torch.float64)
NUM_SAMPLES = 6_000


def exact_log_score(graph):
    """log p_t(x with y at position i) / p_t(x), by summing over all clean sequences."""

    def log_score(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        # [N clean, S, states]: law of each position given the clean sequence; the noise is the same in the whole batch.
        law = graph.transition_probs(SEQUENCES, sigma[:1].double().expand(len(SEQUENCES)))
        at_x = torch.stack([law[:, i, x[:, i]] for i in range(LENGTH)], dim=-1)
        marginal = (LAW[:, None] * at_x.prod(-1)).sum(0)
        out = torch.empty(len(x), LENGTH, graph.num_states, dtype=torch.float64)
        for i in range(LENGTH):
            others = at_x[..., [j for j in range(LENGTH) if j != i]].prod(-1) * LAW[:, None]
            out[:, i] = (others.T @ law[:, i]) / marginal[:, None]
        return out.log().clamp_min(-80.0).scatter(-1, x[..., None], 0.0)

    return log_score


def draw(graph, sampler: str, steps: int, **options) -> torch.Tensor:
    return sample(exact_log_score(graph), graph, LogLinearSchedule(), num_samples=NUM_SAMPLES, length=LENGTH,
                  num_steps=steps, sampler=sampler, seed=11, **options)  # fmt: skip


def counts_of(samples: torch.Tensor) -> torch.Tensor:
    return torch.bincount(samples[:, 0] * TOKENS + samples[:, 1], minlength=len(LAW))


@pytest.mark.parametrize("graph", [AbsorbingGraph(TOKENS), UniformGraph(TOKENS)], ids=["absorb", "uniform"])
@pytest.mark.parametrize(("sampler", "steps"), [("euler", 200), ("analytic", 200)])
def test_exact_scores_give_the_exact_joint_law(graph, sampler, steps):
    counts = counts_of(draw(graph, sampler, steps))
    assert chi_squared_p_value(counts, LAW) > 1e-3
    marginals = LAW.view(TOKENS, TOKENS)
    independent = (marginals.sum(1)[:, None] * marginals.sum(0)).flatten()
    assert chi_squared_p_value(counts, independent) < 1e-9, "the test could not tell a wrong law"


@pytest.mark.parametrize("graph", [AbsorbingGraph(TOKENS), UniformGraph(TOKENS)], ids=["absorb", "uniform"])
@pytest.mark.parametrize("sampler", ["euler", "analytic"])
def test_a_given_position_stays_and_the_rest_follows_the_conditional_law(graph, sampler):
    seen = []

    def watched(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(bool((x[:, 0] == 2).all()))
        return exact_log_score(graph)(x, sigma)

    fixed_tokens = torch.tensor([[2, 0]]).expand(NUM_SAMPLES, -1)
    fixed_mask = torch.tensor([[True, False]]).expand(NUM_SAMPLES, -1)
    samples = sample(watched, graph, LogLinearSchedule(), num_samples=NUM_SAMPLES, length=LENGTH, num_steps=50,
                     sampler=sampler, seed=4, fixed_tokens=fixed_tokens, fixed_mask=fixed_mask)  # fmt: skip
    assert all(seen)
    assert len(seen) == 51
    assert (samples[:, 0] == 2).all()
    if graph.mask_token_id is not None:
        # Exact here, where a clean token carries no noise; for the uniform graph clamping is an approximation.
        conditional = LAW.view(TOKENS, TOKENS)[2] / LAW.view(TOKENS, TOKENS)[2].sum()
        assert chi_squared_p_value(torch.bincount(samples[:, 1], minlength=TOKENS), conditional) > 1e-3


@pytest.mark.parametrize("graph", [AbsorbingGraph(TOKENS), UniformGraph(TOKENS)], ids=["absorb", "uniform"])
def test_a_sample_does_not_depend_on_its_batch(graph):
    def some(first: int, count: int) -> torch.Tensor:
        return sample(exact_log_score(graph), graph, LogLinearSchedule(), num_samples=count, length=LENGTH,
                      num_steps=7, seed=3, first_sample=first)  # fmt: skip

    assert torch.equal(some(0, 12), torch.cat([some(0, 5), some(5, 1), some(6, 6)]))


def test_without_the_last_step_masks_may_stay():
    graph = AbsorbingGraph(TOKENS)
    options = dict(num_samples=500, length=LENGTH, num_steps=1, sampler="euler", time_eps=0.5)
    noisy = sample(exact_log_score(graph), graph, LogLinearSchedule(), denoise=False, **options)
    clean = sample(exact_log_score(graph), graph, LogLinearSchedule(), **options)
    assert (noisy == graph.mask_token_id).any()
    assert (clean < TOKENS).all()


@pytest.mark.parametrize(("change", "text"), [({"sampler": "heun"}, "choose one of euler, analytic"),
                                              ({"num_steps": 0}, "must be at least 1")])  # fmt: skip
def test_errors_name_the_rule(change, text):
    options = {"num_samples": 1, "length": 2, "num_steps": 1, **change}
    with pytest.raises(ValueError, match=text):
        sample(exact_log_score(AbsorbingGraph(TOKENS)), AbsorbingGraph(TOKENS), LogLinearSchedule(), **options)
