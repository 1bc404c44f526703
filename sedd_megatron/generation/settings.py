"""How to sample, as options: flags of the command, arguments of a Python call, checked in one place."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from sedd_megatron.diffusion import AbsorbingGraph, SamplingSettings, TokenChoice, UniformGraph
from sedd_megatron.diffusion.graph import find_for_graph
from sedd_megatron.diffusion.sampler import SAMPLERS
from sedd_megatron.diffusion.time_grid import TIME_GRIDS
from sedd_megatron.errors import UserError
from sedd_megatron.generation.requests import MAX_KEY, MAX_SAMPLES
from sedd_megatron.options import check_rules, flag_of, option

MAX_STEPS = 1_000_000  # their times are made before the first


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling"""

    sampler: str = option("analytic", "how a step is made", choices=tuple(SAMPLERS))
    sampling_steps: int = option(128, "steps from noise to text; event-driven calls the network at most this often")
    time_grid: str = option("uniform", "steps of equal length in t, or short at first", choices=tuple(TIME_GRIDS))
    denoise: bool = option(True, "a final step that removes the last noise")
    temperature: float = option(1.0, "below 1 prefers probable tokens, 0 takes the most probable; jump times stay")
    top_k: int = option(0, "choose among this many most probable tokens; 0 for all")
    top_p: float = option(1.0, "choose among the most probable tokens that together have this share")
    corrector_strength: float = option(1.0, "predictor-corrector: how often each position is drawn again in all")
    stop_at_eod: bool = option(True, "cut a text at its first end of document after all given tokens")
    max_samples: int = option(MAX_SAMPLES, "refuse to make more than this in one call")
    first_sample: int = option(0, "number of the first sample; sample k of a seed is the same in any run")
    batch_size: int = option(8, "how many at a time; does not change the samples")


def settings_of(
    options: SamplingOptions,
    graph: AbsorbingGraph | UniformGraph,
    name_of: Callable[[str], str] = flag_of,
) -> SamplingSettings:
    """The options as the loop takes them; `name_of` says how an error names an option.

    Raises:
        UserError: a number outside its range, a choice that does not exist, a sampler that the graph does not have.
    """
    rules = (
        ("sampling_steps", options.sampling_steps >= 1, "must be at least 1"),
        ("sampling_steps", options.sampling_steps <= MAX_STEPS, f"must be at most {MAX_STEPS}"),
        ("max_samples", options.max_samples >= 1, "must be at least 1"),
        ("temperature", 0 <= options.temperature < math.inf, "must be at least 0 and finite"),
        ("top_k", options.top_k >= 0, "must be at least 0 (0 keeps all tokens)"),
        ("top_p", 0 < options.top_p <= 1, "must be above 0 and at most 1 (1 keeps all tokens)"),
        ("corrector_strength", 0 < options.corrector_strength < math.inf, "must be above 0 and finite"),
        ("first_sample", 0 <= options.first_sample <= MAX_KEY, f"must be from 0 to {MAX_KEY}"),
        ("batch_size", options.batch_size >= 1, "must be at least 1"),
        ("time_grid", options.time_grid in TIME_GRIDS, f"does not exist; choose one of {', '.join(TIME_GRIDS)}"),
    )
    check_rules(options, rules, name_of)
    try:
        find_for_graph(SAMPLERS, options.sampler, graph, name_of("sampler"))
    except ValueError as error:
        raise UserError(str(error)) from error
    return SamplingSettings(
        sampler=options.sampler,
        num_steps=options.sampling_steps,
        time_grid=options.time_grid,
        denoise=options.denoise,
        choose=TokenChoice(options.temperature, options.top_k, options.top_p),
        corrector_strength=options.corrector_strength,
    )
