"""Samplers: step functions over log-scores, and the loop from noise to text."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sedd_megatron.diffusion.categorical import sample_categorical
from sedd_megatron.diffusion.draws import Stream, philox_uniforms
from sedd_megatron.diffusion.graph import AbsorbingGraph, UniformGraph
from sedd_megatron.diffusion.noise_schedule import GeometricSchedule, LogLinearSchedule, NoiseLevel

# (x_t [B, S] int64, sigma [B] float32) -> log_score [B, S, num_states]
LogScoreFn = Callable[[Tensor, Tensor], Tensor]


def euler_step(
    graph: AbsorbingGraph | UniformGraph,
    log_score: Tensor,
    x_t: Tensor,
    now: NoiseLevel,
    later: NoiseLevel,
    delta_t: float,
    uniform: Tensor,
) -> Tensor:
    """One Euler step of the reverse process (arXiv 2310.16834, section 4.2): stay, plus delta_t * sigma_rate *
    reverse rate.

    Args:
        log_score: [B, S, num_states] float64 at x_t.
        x_t: [B, S] int64.
        now, later: noise [B] at the step's beginning and at its end, which is nearer to the data.
        uniform: [B, S] float64, the step's draws.

    Returns:
        [B, S] int64.
    """
    rate = graph.reverse_rate(log_score, x_t) * (delta_t * now.sigma_rate)[:, None, None]
    # A step too long for its rate would leave less than nothing where it was.
    probs = (F.one_hot(x_t, graph.num_states) + rate).clamp_min(0)
    return sample_categorical(probs, uniform)


def analytic_step(
    graph: AbsorbingGraph | UniformGraph,
    log_score: Tensor,
    x_t: Tensor,
    now: NoiseLevel,
    later: NoiseLevel,
    delta_t: float,
    uniform: Tensor,
) -> Tensor:
    """One Tweedie tau-leaping step (theorem 4.2): exact per position while the score holds. Arguments as in
    euler_step.
    """
    probs = graph.analytic_step_probs(log_score, x_t, now.sigma - later.sigma).clamp_min(0)
    return sample_categorical(probs, uniform)


def denoise_step(
    graph: AbsorbingGraph | UniformGraph, log_score: Tensor, x_t: Tensor, now: NoiseLevel, uniform: Tensor
) -> Tensor:
    """The last step: all the noise that is left goes, and no position stays masked."""
    probs = graph.analytic_step_probs(log_score, x_t, now.sigma).clamp_min(0)
    return sample_categorical(probs[..., : graph.num_tokens], uniform)


SAMPLERS = {"euler": euler_step, "analytic": analytic_step}


@torch.no_grad()
def sample(
    log_score_fn: LogScoreFn,
    graph: AbsorbingGraph | UniformGraph,
    schedule: LogLinearSchedule | GeometricSchedule,
    *,
    num_samples: int,
    length: int,
    num_steps: int,
    sampler: str = "analytic",
    seed: int = 0,
    first_sample: int = 0,
    fixed_tokens: Tensor | None = None,
    fixed_mask: Tensor | None = None,
    denoise: bool = True,
    time_eps: float = 1e-5,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Run the reverse process from t = 1 to time_eps in equal steps, and denoise.

    Each position's draw in each step depends on (seed, sample number, step) alone: sample k is the same whatever the
    batch.

    Args:
        first_sample: number of the first sample.
        fixed_tokens, fixed_mask: [B, S] int64 and bool on any device: where the mask is True the token is given and
            stays.
        on_step: called with (steps done, steps in all).

    Returns:
        [B, S] int64 states; tokens only, if denoise.

    Raises:
        ValueError: an unknown sampler or fewer than one step.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} does not exist; choose one of {', '.join(SAMPLERS)}")
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps} must be at least 1")
    if fixed_mask is not None:
        fixed_tokens, fixed_mask = fixed_tokens.to(device), fixed_mask.to(device)
    indices = range(first_sample, first_sample + num_samples)
    times = torch.linspace(1.0, time_eps, num_steps + 1, dtype=torch.float64)
    delta_t = (1.0 - time_eps) / num_steps

    def draws(step: int) -> Tensor:
        return philox_uniforms(seed, Stream.SAMPLING, indices, length, step=step).to(device)

    def noise_at(step: int) -> NoiseLevel:
        return schedule(times[step].expand(num_samples).to(device))

    def log_score_at(x: Tensor, noise: NoiseLevel) -> Tensor:
        return log_score_fn(x, noise.sigma.float()).double()

    def keep_fixed(x: Tensor) -> Tensor:
        return x if fixed_mask is None else torch.where(fixed_mask, fixed_tokens, x)

    # Draws of step 0 make the prior, of step i + 1 the i-th step, of the last the denoising.
    x = keep_fixed(graph.prior(draws(0)).to(device))
    for step in range(num_steps):
        now, later = noise_at(step), noise_at(step + 1)
        x = keep_fixed(SAMPLERS[sampler](graph, log_score_at(x, now), x, now, later, delta_t, draws(step + 1)))
        if on_step is not None:
            on_step(step + 1, num_steps)
    if denoise:
        now = noise_at(num_steps)
        x = keep_fixed(denoise_step(graph, log_score_at(x, now), x, now, draws(num_steps + 1)))
    return x
