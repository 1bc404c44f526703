"""A trained model, for notebooks and the commands: load_pretrained."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sedd_megatron.config import ParallelOptions, PrecisionOptions
from sedd_megatron.data.batches import batches_of
from sedd_megatron.data.preparation import Preparation
from sedd_megatron.diffusion import AbsorbingGraph, GeometricSchedule, LogLinearSchedule, UniformGraph
from sedd_megatron.errors import UserError
from sedd_megatron.parallel.groups import ParallelGroups, groups_of_this_process

if TYPE_CHECKING:
    from sedd_megatron.data.tokenizers import Tokenizer
    from sedd_megatron.diffusion.likelihood import BoundEstimator
    from sedd_megatron.evaluation.bounds import UnitBound
    from sedd_megatron.generation.engine import GeneratedText, TextEngine
    from sedd_megatron.model.score_network import ScoreNetwork
    from sedd_megatron.model.sedd_model import SEDDModel


@dataclass(frozen=True)
class PretrainedModel:
    """A trained score network with its EMA weights, and what is needed to use it."""

    network: "SEDDModel"  # this rank's stage and shard, which in one process are all of it
    graph: AbsorbingGraph | UniformGraph
    schedule: LogLinearSchedule | GeometricSchedule
    tokenizer: "Tokenizer"
    seq_length: int
    groups: ParallelGroups
    preparation: Preparation = field(default_factory=Preparation)  # of the data that it was trained on

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.groups.device

    @torch.no_grad()
    def log_score(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Log of the estimated ratios p_t(y) / p_t(x_t) (arXiv 2310.16834, equation 4).

        Args:
            x_t: [B, S] int64, corrupted tokens; S up to the trained length.
            sigma: [B], total noise.

        Returns:
            [B, S, num_states] float32, 0 at x_t.
        """
        return self.network.log_score(x_t.to(self.device), sigma.to(self.device, torch.float32))

    @cached_property
    def score_fn(self) -> "ScoreNetwork":
        """Scores of chosen positions, in whatever layout the network is in."""
        from sedd_megatron.model.score_network import ScoreNetwork

        return ScoreNetwork(self.network, self.groups)

    @cached_property
    def engine(self) -> "TextEngine":
        """What makes texts with this network."""
        from sedd_megatron.generation.engine import TextEngine

        return TextEngine(self.score_fn, self.graph, self.schedule, self.tokenizer, self.seq_length, self.device)

    def bound_estimator(
        self, *, seed: int, num_draws: int, time_eps: float, batch_size: int, integrate_over: str = "time"
    ) -> "BoundEstimator":
        """The bound on the likelihood of token sequences, by Monte Carlo (diffusion/likelihood.py).

        Raises:
            UserError: an integration that does not exist, or is not for the graph.
        """
        from sedd_megatron.diffusion.graph import find_for_graph
        from sedd_megatron.diffusion.integration import INTEGRATIONS, Process
        from sedd_megatron.diffusion.likelihood import BoundEstimator

        try:
            integration = find_for_graph(INTEGRATIONS, integrate_over, self.graph, "integrate_over")
        except ValueError as error:
            raise UserError(str(error)) from error
        process = Process(self.graph, self.schedule, time_eps)
        return BoundEstimator(self.score_fn, process, seed, num_draws, batch_size, integration)

    def nll(
        self,
        texts: str | Sequence[str],
        *,
        mc_samples: int = 1000,
        windowing: str = "separate",
        integrate_over: str = "time",
        seed: int = 0,
        batch_size: int = 16,
        time_eps: float = 1e-3,
    ) -> "list[UnitBound]":
        """An upper bound on -log p of each text, in nats (`bound`), with its Monte Carlo `standard_error`.

        Args:
            mc_samples: draws for each window of the trained length; even.
            integrate_over: time, or mask-count (absorbing graph), whose error is smaller, by far for a few tokens.
            windowing: separate (windows without context), strided (with the half before as context), or concatenate
                (texts in a row: one bound for each window).

        Raises:
            UserError: a windowing or an integration that the graph does not allow, or no text.
        """
        from sedd_megatron.evaluation.bounds import bound_windows, unit_bounds
        from sedd_megatron.evaluation.windows import windows_of

        may_give = self.graph.mask_token_id is not None
        texts = [texts] if isinstance(texts, str) else texts
        ends_documents = self.preparation.ends_documents
        windows = windows_of(texts, self.tokenizer, self.seq_length, windowing, may_give, ends_documents)
        estimator = self.bound_estimator(
            seed=seed, num_draws=mc_samples, time_eps=time_eps, batch_size=batch_size, integrate_over=integrate_over
        )
        return unit_bounds(windows, bound_windows(estimator, windows, self.device))

    def generate(
        self,
        num_samples: int = 1,
        prompts: str | Sequence[str] = "",
        *,
        suffix: str = "",
        infill: str | None = None,
        length: int | None = None,
        sampler: str = "analytic",
        steps: int = 128,
        time_grid: str = "uniform",
        denoise: bool = True,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        corrector_strength: float = 1.0,
        seed: int = 0,
        first_sample: int = 0,
        batch_size: int = 8,
        stop_at_eod: bool = True,
        max_samples: int = 1_000_000,
    ) -> "list[GeneratedText]":
        """Draw texts: num_samples for each prompt, numbered on from first_sample.

        Sample k of a seed is the same whatever the batch. Arguments are those of `python -m sedd_megatron.generate`,
        whose --help explains each.

        Raises:
            UserError: an argument outside its range, a prompt longer than the length, text that the tokenizer does not
                know, a sampler that the graph does not have.
        """
        from sedd_megatron.generation.requests import AS_ARGUMENTS, TextRequest, frames_of
        from sedd_megatron.generation.settings import SamplingOptions, settings_of

        options = SamplingOptions(
            sampler=sampler,
            sampling_steps=steps,
            time_grid=time_grid,
            denoise=denoise,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            corrector_strength=corrector_strength,
            stop_at_eod=stop_at_eod,
            first_sample=first_sample,
            batch_size=batch_size,
            max_samples=max_samples,
        )
        settings = settings_of(options, self.graph, lambda name: {"sampling_steps": "steps"}.get(name, name))
        frames = []
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            request = TextRequest(prompt, suffix, infill, length, num_samples, seed)
            frames += frames_of(
                request,
                self.tokenizer,
                self.seq_length,
                first_sample + len(frames),
                AS_ARGUMENTS,
                max_samples=max_samples - len(frames),
            )
        batches = batches_of(frames, batch_size)
        texts = [text for batch in batches for text in self.engine.make(batch, settings, stop_at_eod)]
        return sorted(texts, key=lambda text: text.sample)


def load_pretrained(directory: str | Path, device: str = "auto") -> PretrainedModel:
    """Load a trained model into this process.

    Args:
        directory: the folder that training saved to, or one iter_* folder in it, in any layout: its EMA weights. Or a
            folder in the published format (config.json and model.safetensors), or a hub name of one (owner/name), where
            there is a network.
        device: auto, cpu or cuda.

    Raises:
        UserError: no model there, or a damaged one.
    """
    from sedd_megatron.saved_model import find_saved_model

    parallel = ParallelOptions(device=device)
    saved = find_saved_model(directory, device)
    return saved.load(parallel, PrecisionOptions(), lambda: groups_of_this_process(parallel))
