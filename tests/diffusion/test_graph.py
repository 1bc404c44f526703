"""Laws of the graphs: transitions, the loss's minimum, its affine form, and finiteness in float32."""

import pytest
import torch

from sedd_megatron.diffusion import (
    AbsorbingGraph,
    GeometricSchedule,
    LogLinearSchedule,
    UniformGraph,
    make_graph,
    make_schedule,
    score_sums,
)

GRAPHS = [AbsorbingGraph(6), UniformGraph(6)]
SCHEDULES = [LogLinearSchedule(), GeometricSchedule()]
SIGMAS = torch.tensor([1e-6, 0.01, 0.7, 3.0, 20.0], dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sigma_rate_is_the_derivative_of_sigma(schedule):
    t = torch.linspace(1e-3, 1, 50, dtype=torch.float64, requires_grad=True)
    level = schedule(t)
    (derivative,) = torch.autograd.grad(level.sigma.sum(), t)
    torch.testing.assert_close(level.sigma_rate.detach(), derivative, rtol=1e-12, atol=0)


@pytest.mark.parametrize("graph", GRAPHS)
def test_transition_is_the_matrix_exponential_of_the_rates(graph):
    rates = graph.rate_matrix()
    assert rates.sum(0).abs().max() < 1e-15
    states = torch.arange(graph.num_states)[None].expand(len(SIGMAS), -1)
    transition = graph.transition_probs(states, SIGMAS)
    for probs, sigma in zip(transition, SIGMAS, strict=True):
        # Row i of probs is the law of state i; column i of the exponential.
        torch.testing.assert_close(probs.T, torch.matrix_exp(sigma * rates), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("graph", GRAPHS)
def test_analytic_step_is_the_matrix_exponential_on_both_sides(graph):
    generator = torch.Generator().manual_seed(0)
    x_t = torch.arange(graph.num_states)[None]
    log_score = torch.randn(1, graph.num_states, graph.num_states, dtype=torch.float64, generator=generator)
    log_score = log_score.scatter(-1, x_t[..., None], 0.0)
    delta = torch.tensor([0.4], dtype=torch.float64)
    rates = graph.rate_matrix()
    backward, forward = torch.matrix_exp(-delta * rates), torch.matrix_exp(delta * rates)
    expected = (log_score.exp() @ backward.T) * forward[x_t]
    torch.testing.assert_close(graph.analytic_step_probs(log_score, x_t, delta), expected, rtol=1e-12, atol=1e-14)


def random_rows(graph, spread: float, rows: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """States [R] that can change and their log-scores [R, N], exp of normal numbers of this standard deviation."""
    generator = torch.Generator().manual_seed(4)
    x_t = torch.randint(0, graph.num_tokens, (rows,), generator=generator)
    if graph.mask_token_id is not None:
        x_t.fill_(graph.mask_token_id)
    log_score = spread * torch.randn(rows, graph.num_states, dtype=torch.float64, generator=generator)
    return x_t, log_score.scatter(-1, x_t[:, None], 0.0)


def check_step_law(graph, law, log_score: torch.Tensor, x_t: torch.Tensor, dense: torch.Tensor) -> None:
    """The weights that law describes are `dense` [R, N], cut at 0."""
    weights = log_score.exp() - (0 if law.floor is None else law.floor[:, None])
    weights = law.scale.expand(len(x_t))[:, None] * weights.clamp_min(0)
    weights = weights.scatter(-1, x_t[:, None], law.stay[:, None])
    largest = dense.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(weights / largest, dense.clamp_min(0) / largest, rtol=1e-9, atol=1e-13)


def score_sum(log_score: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    return log_score.exp().scatter(-1, x_t[:, None], 0.0).sum(-1)


DELTAS = [1e-6, 1e-3, 0.1, 0.7, 2.0, 7.0]


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("delta_sigma", DELTAS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_the_analytic_law_is_the_dense_formula_cut_at_0(graph, delta_sigma, spread):
    x_t, log_score = random_rows(graph, spread)
    delta = torch.full((len(x_t),), delta_sigma, dtype=torch.float64)
    dense = graph.analytic_step_probs(log_score[:, None], x_t[:, None], delta)[:, 0]
    check_step_law(graph, graph.analytic_law(score_sum(log_score, x_t), delta), log_score, x_t, dense)


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("rate_time", DELTAS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_the_euler_law_is_the_dense_formula_cut_at_0(graph, rate_time, spread):
    x_t, log_score = random_rows(graph, spread)
    rates = torch.full((len(x_t),), rate_time, dtype=torch.float64)
    dense = rate_time * graph.reverse_rate(log_score[:, None], x_t[:, None])[:, 0]
    dense = dense.scatter_add(-1, x_t[:, None], torch.ones_like(dense))
    check_step_law(graph, graph.euler_law(score_sum(log_score, x_t), rates), log_score, x_t, dense)


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_cases_above_cut_both_tokens_and_stays(graph):
    cut_stay, cut_token = False, False
    for delta_sigma in DELTAS:
        x_t, log_score = random_rows(graph, 3.0)
        delta = torch.full((len(x_t),), delta_sigma, dtype=torch.float64)
        dense = graph.analytic_step_probs(log_score[:, None], x_t[:, None], delta)[:, 0]
        negative = dense < 0
        at_x_t = torch.zeros_like(negative).scatter(-1, x_t[:, None], True)
        cut_stay |= bool((negative & at_x_t).any())
        cut_token |= bool((negative & ~at_x_t).any())
    assert cut_stay
    assert cut_token == (graph.mask_token_id is None), "only the uniform graph has a floor"


def test_laws_of_rows_with_noise_of_their_own():
    for graph in GRAPHS:
        x_t, log_score = random_rows(graph, 1.0, rows=len(DELTAS))
        delta = torch.tensor(DELTAS, dtype=torch.float64)
        together = graph.analytic_law(score_sum(log_score, x_t), delta)
        for row in range(len(DELTAS)):
            one = slice(row, row + 1)
            alone = graph.analytic_law(score_sum(log_score, x_t)[one], delta[one])
            assert all(a is None or torch.equal(a[one], b) for a, b in zip(together, alone, strict=True))


def true_log_score(graph, x_0: torch.Tensor, x_t: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """log p_t(y | x_0) / p_t(x_t | x_0) for every y."""
    probs = graph.transition_probs(x_0, sigma)
    return (probs / probs.gather(-1, x_t[..., None])).log()


@pytest.mark.parametrize("graph", GRAPHS)
def test_score_entropy_is_zero_and_stationary_at_the_true_ratios(graph):
    generator = torch.Generator().manual_seed(1)
    sigma = torch.tensor([0.05, 0.9, 4.0], dtype=torch.float64)
    x_0 = torch.randint(0, graph.num_tokens, (3, 40), generator=generator)
    uniforms = torch.rand(3, 2, 40, dtype=torch.float64, generator=generator)
    x_t = graph.corrupt_tokens(x_0, sigma, uniforms)
    truth = true_log_score(graph, x_0, x_t, sigma)
    # Where the absorbing graph's ratio is 0, exp reaches it at -inf: at -60 it is 0 to 1e-26.
    log_score = truth.clamp_min(-60.0).requires_grad_()
    loss = graph.score_entropy(log_score, sigma, x_t, x_0)
    assert loss.abs().max() < 1e-9
    (gradient,) = torch.autograd.grad(loss.sum(), log_score)
    assert gradient.abs().max() < 1e-9
    moved = truth.clamp_min(-60.0) + 0.3 * torch.randn(truth.shape, dtype=torch.float64, generator=generator)
    away = graph.score_entropy(moved, sigma, x_t, x_0)
    affected = x_t == graph.mask_token_id if graph.mask_token_id is not None else torch.ones_like(x_t, dtype=torch.bool)
    assert (away[affected] > 0).all()
    assert affected.any()


@pytest.mark.parametrize("graph", GRAPHS)
def test_sums_over_shards_add_up_and_skip_padding(graph):
    generator = torch.Generator().manual_seed(2)
    width = 12
    log_score = torch.randn(2, 30, width, dtype=torch.float64, generator=generator)
    x_0 = torch.randint(0, graph.num_tokens, (2, 30), generator=generator)
    x_t = torch.randint(0, graph.num_states, (2, 30), generator=generator)
    dense = score_sums(log_score[..., : graph.num_states], x_t, x_0)
    for shards in (2, 3, 6, 12):
        parts = [
            score_sums(part, x_t, x_0, first_state=i * width // shards, num_states=graph.num_states)
            for i, part in enumerate(log_score.chunk(shards, dim=-1))
        ]
        for expected, *pieces in zip(dense, *parts, strict=True):
            torch.testing.assert_close(sum(pieces), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_tokens", [27, 32000, 50257, 50304, 131072])
@pytest.mark.parametrize("noise", ["loglinear", "geometric"])
@pytest.mark.parametrize("name", ["absorb", "uniform"])
def test_float32_loss_is_finite_and_near_float64(name, noise, num_tokens):
    graph, schedule = make_graph(name, num_tokens), make_schedule(noise)
    t = torch.tensor([1e-3, 0.03, 0.5, 0.97, 1.0], dtype=torch.float64)
    sigma = schedule(t).sigma
    x_0 = torch.full((5, 2), 3)
    moved = num_tokens - 1 if graph.mask_token_id is None else graph.mask_token_id
    x_t = torch.tensor([[3, moved]]).expand(5, 2)
    exact = graph.coefficients(sigma, x_t, x_0)
    rounded = graph.coefficients(sigma.float(), x_t, x_0)
    for expected, actual in zip(exact, rounded, strict=True):
        assert actual.dtype == torch.float32
        assert actual.isfinite().all()
        # exp multiplies the rounding of sigma (6e-8) by sigma, at most 20.
        torch.testing.assert_close(actual.double(), expected, rtol=3e-6, atol=1e-12)


@pytest.mark.parametrize("make", [lambda: make_graph("abosrb", 3), lambda: make_schedule("linear")])
def test_unknown_names_list_the_choices(make):
    with pytest.raises(ValueError, match=r"does not exist; choose one of (absorb, uniform|loglinear, geometric)"):
        make()
