"""The maths meets the published code's values."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sedd_megatron.diffusion import make_graph, make_schedule, weighted_loss

GOLDEN = load_file(Path(__file__).resolve().parent.parent / "fixtures" / "diffusion_math.safetensors")
CASES = [(graph, noise) for graph in ("absorb", "uniform") for noise in ("loglinear", "geometric")]
# The published code holds this constant in float32.
UNIFORM_RATE = torch.tensor(1 / 20).double()


def golden(graph: str, noise: str, quantity: str) -> torch.Tensor:
    return GOLDEN[f"{graph}.{noise}.{quantity}"]


def check_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> None:
    scale = expected.abs().max()
    assert (actual - expected).abs().max() <= tolerance * scale


@pytest.mark.parametrize(("graph", "noise"), CASES)
def test_noise_schedule(graph, noise):
    schedule = make_schedule(noise, eps=1e-3, sigma_min=1e-3, sigma_max=20.0)
    level = schedule(golden(graph, noise, "t"))
    # The published geometric schedule computes in float32: every golden sigma is a float32 number.
    tolerance = 3e-7 if noise == "geometric" else 1e-9
    check_close(level.sigma, golden(graph, noise, "sigma"), tolerance)
    check_close(level.sigma_rate, golden(graph, noise, "dsigma"), tolerance)


@pytest.mark.parametrize(("graph", "noise"), CASES)
def test_score_entropy_and_its_gradient(graph, noise):
    log_score = golden(graph, noise, "log_score").clone().requires_grad_()
    x_t, x_0 = golden(graph, noise, "x"), golden(graph, noise, "x0")
    score_entropy = make_graph(graph, 20).score_entropy(log_score, golden(graph, noise, "sigma"), x_t, x_0)
    expected = golden(graph, noise, "score_entropy")
    # The absorbing graph's published loss collects its terms in a float32 buffer.
    check_close(score_entropy.detach(), expected.double(), 1e-9 if expected.dtype == torch.float64 else 2e-7)
    weighted_loss(score_entropy, golden(graph, noise, "dsigma")).sum().backward()
    expected_grad = golden(graph, noise, "grad_log_score").scatter(-1, x_t[..., None], 0.0)
    check_close(log_score.grad, expected_grad, 1e-9 if expected.dtype == torch.float64 else 2e-7)


@pytest.mark.parametrize(("graph", "noise"), CASES)
def test_reverse_rate(graph, noise):
    rate = make_graph(graph, 20).reverse_rate(golden(graph, noise, "log_score"), golden(graph, noise, "x"))
    expected = golden(graph, noise, "reverse_rate")
    check_close(rate, expected / UNIFORM_RATE / 20 if graph == "uniform" else expected)
    assert rate.sum(-1).abs().max() < 1e-9 * rate.abs().max()


@pytest.mark.parametrize(("graph", "noise"), CASES)
def test_analytic_step_probabilities(graph, noise):
    probs = make_graph(graph, 20).analytic_step_probs(
        golden(graph, noise, "log_score"), golden(graph, noise, "x"), golden(graph, noise, "dsigma_step")[:, 0]
    )
    check_close(probs, golden(graph, noise, "analytic_probs"))
