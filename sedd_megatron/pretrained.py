"""A trained model in one process, for notebooks and the commands: load_pretrained."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sedd_megatron.config import ParallelOptions, PrecisionOptions, RecomputeOptions, model_options_from_dict
from sedd_megatron.diffusion import AbsorbingGraph, GeometricSchedule, LogLinearSchedule, UniformGraph
from sedd_megatron.diffusion.graph import make_graph
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import choose_device, groups_of_this_process

if TYPE_CHECKING:
    from sedd_megatron.data.tokenizers import Tokenizer
    from sedd_megatron.model.sedd_model import SEDDModel


@dataclass(frozen=True)
class PretrainedModel:
    """A trained score network with its EMA weights, and what is needed to use it."""

    network: "SEDDModel"
    graph: AbsorbingGraph | UniformGraph
    schedule: LogLinearSchedule | GeometricSchedule
    tokenizer: "Tokenizer"
    seq_length: int
    device: torch.device

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


def load_pretrained(directory: str | Path, device: str = "auto") -> PretrainedModel:
    """Load the EMA weights of a training run's checkpoint, saved in any layout, into this process.

    Args:
        directory: the folder that training saved to, or one iter_* folder in it.
        device: auto, cpu or cuda.

    Raises:
        UserError: no checkpoint there, or a damaged one.
    """
    if choose_device(device).type == "cpu":
        cpu_backend.install()
    from sedd_megatron.training.build import build_model, build_schedule
    from sedd_megatron.training.checkpoint import latest_checkpoint, load_saved_tokenizer
    from sedd_megatron.training.checkpoint_format import Shard, read_manifest, read_shards, verify_files
    from sedd_megatron.training.ema import KEY_PREFIX

    checkpoint = latest_checkpoint(Path(directory))
    body = read_manifest(checkpoint)
    model_options, diffusion = model_options_from_dict(body["state"]["options"], str(checkpoint))
    tokenizer = load_saved_tokenizer(checkpoint, body)
    parallel = ParallelOptions(device=device)
    groups = groups_of_this_process(parallel)
    verify_files(checkpoint, body)
    graph = make_graph(diffusion.graph, body["state"]["num_tokens"])
    (network,) = build_model(model_options, parallel, PrecisionOptions(), RecomputeOptions(), graph, groups)
    # One call: it opens each shard file once, not once per parameter.
    averages = [Shard.of(sharded, KEY_PREFIX + sharded.key) for sharded in network.sharded_tensors().values()]
    read_shards(checkpoint, body, averages)
    network.eval()
    return PretrainedModel(
        network, graph, build_schedule(diffusion), tokenizer, model_options.seq_length, groups.device
    )
