"""A trained model, for notebooks and the commands: load_pretrained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sedd_megatron.arguments import check_model_layout
from sedd_megatron.config import (
    DiffusionOptions,
    ModelOptions,
    ParallelOptions,
    PrecisionOptions,
    RecomputeOptions,
    model_options_from_dict,
)
from sedd_megatron.diffusion import AbsorbingGraph, GeometricSchedule, LogLinearSchedule, UniformGraph
from sedd_megatron.diffusion.graph import make_graph
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import ParallelGroups, choose_device, groups_of_this_process

if TYPE_CHECKING:
    from sedd_megatron.data.tokenizers import Tokenizer
    from sedd_megatron.generation.engine import GeneratedText, TextEngine
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
    def engine(self) -> "TextEngine":
        """What makes texts with this network, in whatever layout it is in."""
        from sedd_megatron.generation.engine import TextEngine
        from sedd_megatron.generation.score_network import ScoreNetwork

        score_fn = ScoreNetwork(self.network, self.groups)
        return TextEngine(score_fn, self.graph, self.schedule, self.tokenizer, self.seq_length, self.device)

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
    ) -> "list[GeneratedText]":
        """Draw texts: num_samples for each prompt, numbered on from first_sample.

        Sample k of a seed is the same whatever the batch. Arguments are those of `python -m sedd_megatron.generate`,
        whose --help explains each.

        Raises:
            UserError: an argument outside its range, a prompt longer than the length, text that the tokenizer does not
                know, a sampler that the graph does not have.
        """
        from sedd_megatron.generation.engine import batches_of
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
        )
        settings = settings_of(options, self.graph, lambda name: {"sampling_steps": "steps"}.get(name, name))
        frames = []
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            request = TextRequest(prompt, suffix, infill, length, num_samples, seed)
            number = first_sample + len(frames)
            frames += frames_of(request, self.tokenizer, self.seq_length, number, AS_ARGUMENTS)
        batches = batches_of(frames, batch_size)
        texts = [text for batch in batches for text in self.engine.make(batch, settings, stop_at_eod)]
        return sorted(texts, key=lambda text: text.sample)


@dataclass(frozen=True)
class SavedModel:
    """A checkpoint whose description has been read, and none of its weights."""

    path: Path
    body: dict[str, Any]
    model_options: ModelOptions
    diffusion: DiffusionOptions
    tokenizer: "Tokenizer"

    @property
    def graph(self) -> AbsorbingGraph | UniformGraph:
        """Its noising graph."""
        return make_graph(self.diffusion.graph, self.body["state"]["num_tokens"])

    def load(
        self, parallel: ParallelOptions, precision: PrecisionOptions, make_groups: Callable[[], ParallelGroups]
    ) -> PretrainedModel:
        """This rank's part of the EMA weights in the layout of `parallel`; groups are made once the layout fits.

        Raises:
            UserError: the layout does not fit the model, or a file is damaged.
        """
        from sedd_megatron.training.build import build_model, build_schedule
        from sedd_megatron.training.checkpoint_format import Shard, read_shards, verify_files
        from sedd_megatron.training.ema import KEY_PREFIX

        check_model_layout(self.model_options, parallel)
        groups = make_groups()
        verify_files(self.path, self.body)
        graph = self.graph
        (network,) = build_model(self.model_options, parallel, precision, RecomputeOptions(), graph, groups)
        # One call: it opens each shard file once, not once per parameter.
        averages = [Shard.of(sharded, KEY_PREFIX + sharded.key) for sharded in network.sharded_tensors().values()]
        read_shards(self.path, self.body, averages)
        network.eval()
        return PretrainedModel(
            network, graph, build_schedule(self.diffusion), self.tokenizer, self.model_options.seq_length, groups
        )


def find_saved_model(directory: str | Path, device: str = "auto") -> SavedModel:
    """Read what a training run's checkpoint says of itself.

    Raises:
        UserError: no checkpoint there, or a damaged one.
    """
    if choose_device(device).type == "cpu":
        cpu_backend.install()
    from sedd_megatron.training.checkpoint import latest_checkpoint, load_saved_tokenizer
    from sedd_megatron.training.checkpoint_format import read_manifest

    checkpoint = latest_checkpoint(Path(directory))
    body = read_manifest(checkpoint)
    model_options, diffusion = model_options_from_dict(body["state"]["options"], str(checkpoint))
    return SavedModel(checkpoint, body, model_options, diffusion, load_saved_tokenizer(checkpoint, body))


def load_pretrained(directory: str | Path, device: str = "auto") -> PretrainedModel:
    """Load the EMA weights of a training run's checkpoint, saved in any layout, into this process.

    Args:
        directory: the folder that training saved to, or one iter_* folder in it.
        device: auto, cpu or cuda.

    Raises:
        UserError: no checkpoint there, or a damaged one.
    """
    parallel = ParallelOptions(device=device)
    saved = find_saved_model(directory, device)
    return saved.load(parallel, PrecisionOptions(), lambda: groups_of_this_process(parallel))
