"""The loop from noise to text: which step each sequence makes next, with which draws, around given positions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_megatron.diffusion.draws import Key, Stream, device_key, philox_uniforms, philox_uniforms_at
from sedd_megatron.diffusion.graph import AbsorbingGraph, UniformGraph, find_for_graph
from sedd_megatron.diffusion.noise_schedule import GeometricSchedule, LogLinearSchedule, NoiseLevel
from sedd_megatron.diffusion.sampler import SAMPLERS, Step, StepFunction, denoise_step
from sedd_megatron.diffusion.score_reader import LogScoreFn, ScoreFn, ScoreReader, ScoresNotFiniteError, score_fn_of
from sedd_megatron.diffusion.time_grid import sampling_times
from sedd_megatron.diffusion.token_choice import TokenChoice
from sedd_megatron.diffusion.transfers import to_device, to_host


@dataclass(frozen=True)
class SamplingSettings:
    """How samples are drawn; the samples themselves are numbered."""

    sampler: str = "analytic"
    num_steps: int = 128
    time_grid: str = "uniform"
    denoise: bool = True
    choose: TokenChoice = field(default_factory=TokenChoice)
    corrector_strength: float = 1.0  # corrections of each position over a whole sample
    time_eps: float = 1e-5


class Draws(NamedTuple):
    """The key of each sequence's draws: a position's number in a step depends on nothing else."""

    seeds: Key  # [B]
    samples: Key  # [B], the numbers of the samples
    first_position: int = 0  # of a later block of a longer text
    device: torch.device | str = "cpu"  # where the numbers are made

    def on(self, device: torch.device | str) -> "Draws":
        """The same numbers, made on another device."""
        return Draws(device_key(self.seeds, device), device_key(self.samples, device), self.first_position, device)

    def at(self, stream: Stream, steps: int | Sequence[int], length: int) -> Tensor:
        """[B, length] float64 of one step for all, or of each sequence's own."""
        return philox_uniforms(
            self.seeds, stream, self.samples, length, steps, first=self.first_position, device=self.device
        )

    def at_each(self, stream: Stream, steps: Tensor) -> Tensor:
        """[B, S] float64 of a step of its own for each position, steps [B, S] int64."""
        position = torch.arange(steps.shape[1], device=self.device) + self.first_position
        seeds, samples = (device_key(key, self.device)[:, None] for key in (self.seeds, self.samples))
        return philox_uniforms_at(seeds, stream, samples, steps, position, self.device)


class SamplingProgress(NamedTuple):
    """What is there after a round, in which each sequence has made one step at most."""

    round: int  # from 1; 0 is what sampling starts from
    num_rounds: int
    steps: Tensor  # [B] int64, the step that each sequence was at: from 1, T + 1 is the denoising, 0 the start
    states: Tensor  # [B, S] int64, on the device: who looks at them makes the host wait
    calls: Tensor  # [B] int64, network calls so far; as `steps` on the host


class SamplingResult(NamedTuple):
    """Finished sequences."""

    states: Tensor  # [B, S] int64; tokens only, unless the denoising was left out
    calls: Tensor  # [B] int64 on the host, how often each went through the network


class _Round(NamedTuple):
    """One call of a step function: `steps` [B] int64 from 0, where T is the denoising; who may move there, by what."""

    step: StepFunction
    steps: Tensor
    free: Tensor  # [B, S] bool
    draw: Callable[[Stream], Tensor]  # [B, S] float64 on the device


@torch.no_grad()
def run_sampler(
    score_fn: ScoreFn,
    graph: AbsorbingGraph | UniformGraph,
    schedule: LogLinearSchedule | GeometricSchedule,
    settings: SamplingSettings,
    draws: Draws,
    fixed_tokens: Tensor,
    fixed_mask: Tensor,
    on_round: Callable[[SamplingProgress], None] | None = None,
) -> SamplingResult:
    """The reverse process from t = 1 to time_eps, and the denoising, of a batch of sequences of one length.

    Args:
        draws: sample k is the same whatever the batch that it is drawn in.
        fixed_tokens, fixed_mask: [B, S] int64 and bool on the device to compute on: where the mask is True the token is
            given, and stays at every step. Exact for the absorbing graph, where a clean token carries no noise.
        on_round: called after every round, and with round 0 before the first.

    Raises:
        ValueError: an unknown sampler or time grid, a sampler that the graph does not have, or fewer than one step.
        ScoresNotFiniteError: at the end of the batch, so that no round waits for it.
    """
    sampler = find_for_graph(SAMPLERS, settings.sampler, graph, "sampler")
    device, (num_sequences, length) = fixed_mask.device, fixed_mask.shape
    # Times, steps and who may move are made on the host, which then never waits for the device to learn them.
    times, free = sampling_times(settings.time_grid, settings.num_steps, settings.time_eps), ~to_host(fixed_mask)
    # Draws of step 0 make the prior, or the jump times; of step k + 1 the k-th step; of T + 1 the denoising.
    first_draws = draws.at(Stream.SAMPLING, 0, length)
    x = torch.where(fixed_mask, fixed_tokens, to_device(graph.prior(first_draws), device))
    if sampler.draws_jumps_first:
        # Of the absorbing graph, where all that is not given starts at the mask.
        jump_steps = draw_jump_steps(schedule(times).sigma, first_draws).masked_fill(~free, settings.num_steps + 1)
        num_rounds, rounds = _event_rounds(sampler.step, jump_steps, draws.on(device), settings)
    else:
        num_rounds, rounds = _step_rounds(sampler.step, free, draws.on(device), settings)
    network = ScoreReader(score_fn, num_sequences, device)
    network.know(free)
    sigmas: list[Tensor] = []
    if on_round is not None:
        on_round(SamplingProgress(0, num_rounds, torch.zeros(num_sequences, dtype=torch.long), x, network.calls))
    for number, (step_function, steps, may_move, draw) in enumerate(rounds, start=1):
        network.round = number
        begin, end = times[steps], times[(steps + 1).clamp_max(settings.num_steps)]
        noise = schedule(begin)
        sigmas.append(noise.sigma)
        # In one copy: each has a price, whatever its size.
        levels = to_device(torch.stack([*noise, *schedule(end), begin - end]), device)
        now, later, delta_t = NoiseLevel(*levels[:2]), NoiseLevel(*levels[2:4]), levels[4]
        step = Step(graph, now, later, delta_t, may_move, draw, settings.choose, settings.corrector_strength)
        x = step_function(network, x, step)
        if on_round is not None:
            on_round(SamplingProgress(number, num_rounds, steps + 1, x, network.calls))
    fault = network.first_fault()
    if fault is not None:
        first, sequence = fault
        raise ScoresNotFiniteError(sequence, sigmas[first - 1][sequence].item(), first)
    return SamplingResult(x, network.calls)


def draw_jump_steps(sigmas: Tensor, uniform: Tensor) -> Tensor:
    """The step in which each position leaves the mask: the law of ancestral steps, drawn at once.

    A position is still masked after step k with probability (1 - exp(-sigma_k+1)) / (1 - exp(-sigma_0)), whatever the
    network says.

    Args:
        sigmas: [T + 1] float64, noise at the grid's times, falling.
        uniform: [B, S] float64.

    Returns:
        [B, S] int64 from 0; T where a position is still masked at the end.
    """
    masked = torch.expm1(-sigmas) / torch.expm1(-sigmas[0])
    return torch.searchsorted(1 - masked[1:], uniform.contiguous(), right=True)


def _step_rounds(
    step: StepFunction, free: Tensor, draws: Draws, settings: SamplingSettings
) -> tuple[int, Iterator[_Round]]:
    """All sequences step by step; how many rounds, and these."""

    def rounds() -> Iterator[_Round]:
        for k in range(settings.num_steps + settings.denoise):
            draw = partial(draws.at, steps=k + 1, length=free.shape[1])
            yield _Round(step if k < settings.num_steps else denoise_step, torch.full(free.shape[:1], k), free, draw)

    return settings.num_steps + settings.denoise, rounds()


def _event_rounds(
    step: StepFunction, jump_steps: Tensor, draws: Draws, settings: SamplingSettings
) -> tuple[int, Iterator[_Round]]:
    """Each sequence from one of its own jumps to the next, so that every call of the network has a full batch.

    jump_steps [B, S]: T + 1 where a position never jumps. A sequence that has finished takes no part any more.
    """
    never = settings.num_steps + 1
    last_step = settings.num_steps if settings.denoise else settings.num_steps - 1
    ordered, _ = jump_steps.masked_fill(jump_steps > last_step, never).sort(dim=1)
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    num_rounds = int((is_new & (ordered < never)).sum(1).max())
    # A position needs one number, of the step in which it jumps: all are drawn at once.
    uniforms = draws.at_each(Stream.SAMPLING, to_device(jump_steps + 1, draws.device))

    def rounds() -> Iterator[_Round]:
        waiting = jump_steps.masked_fill(jump_steps > last_step, never)
        for _ in range(num_rounds):
            steps = waiting.amin(1)
            free = (waiting == steps[:, None]) & (steps < never)[:, None]
            yield _Round(step, steps.clamp_max(settings.num_steps), free, lambda stream: uniforms)
            waiting = waiting.masked_fill(free, never)

    return num_rounds, rounds()


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
    time_grid: str = "uniform",
    choose: TokenChoice | None = None,
    corrector_strength: float = 1.0,
    device: torch.device | str = "cpu",
    on_round: Callable[[SamplingProgress], None] | None = None,
) -> Tensor:
    """`run_sampler` over a plain log_score_fn: [num_samples, length] int64 states.

    Args:
        first_sample: number of the first sample.
        fixed_tokens, fixed_mask: [num_samples, length], as for run_sampler, on any device; or None.

    Raises:
        ValueError: as run_sampler.
    """
    shape = (num_samples, length)
    fixed_tokens = torch.zeros(shape, dtype=torch.long) if fixed_tokens is None else fixed_tokens
    fixed_mask = torch.zeros(shape, dtype=torch.bool) if fixed_mask is None else fixed_mask
    settings = SamplingSettings(
        sampler, num_steps, time_grid, denoise, choose or TokenChoice(), corrector_strength, time_eps
    )
    draws = Draws([seed] * num_samples, range(first_sample, first_sample + num_samples))
    score_fn = score_fn_of(log_score_fn, graph.num_tokens)
    return run_sampler(
        score_fn, graph, schedule, settings, draws, fixed_tokens.to(device), fixed_mask.to(device), on_round
    ).states
