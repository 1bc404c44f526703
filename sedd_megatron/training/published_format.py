"""Folders in the published format: config.json beside model.safetensors or pytorch_model.bin.

Reading one executes nothing of it.
"""

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sedd_megatron.arguments import check_diffusion, check_model_layout
from sedd_megatron.config import DiffusionOptions, ModelOptions, ParallelOptions
from sedd_megatron.diffusion.graph import make_graph
from sedd_megatron.errors import UserError, one_line
from sedd_megatron.model.published_weights import (
    ROTARY_FREQUENCIES,
    faults_of,
    own_part,
    published_name,
    published_shapes,
    published_tensor,
    rotary_frequencies,
)
from sedd_megatron.model.sedd_model import SEDDModel

CONFIG, SAFETENSORS, PICKLE = "config.json", "model.safetensors", "pytorch_model.bin"
# What a folder on a hub has for us: no code among it.
HUB_FILES = [CONFIG, SAFETENSORS, PICKLE, "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"]


@dataclass(frozen=True)
class PublishedFolder:
    """A folder whose configuration has been read, and none of its weights."""

    path: Path
    model_options: ModelOptions
    diffusion: DiffusionOptions
    num_tokens: int

    def open_weights(self) -> Callable[[SEDDModel], None]:
        """Read and check the weights; what it returns puts this rank's part of them into a network.

        Raises:
            UserError: weights that cannot be read, or do not fit the configuration; the first named.
        """
        weights = read_weights(self.path)
        num_states = make_graph(self.diffusion.graph, self.num_tokens).num_states
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        _refuse(self.path, faults_of(found, published_shapes(self.model_options, num_states)))

        def fill(network: SEDDModel) -> None:
            for sharded in network.sharded_tensors().values():
                name = published_name(sharded)
                part = own_part(weights[name], name, sharded, self.model_options.num_attention_heads)
                with torch.no_grad():
                    sharded.data.copy_(part.to(sharded.data.device))

        return fill


def is_published_folder(path: Path) -> bool:
    """Whether a folder looks like one in the published format."""
    return (path / CONFIG).is_file()


def read_published_folder(path: Path) -> PublishedFolder:
    """Read and check config.json.

    Raises:
        UserError: not a configuration of a SEDD model, or of one that ours cannot be.
    """
    where = path / CONFIG
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
        model, graph, noise = config["model"], config["graph"]["type"], config["noise"]
        options = ModelOptions(
            num_layers=int(model["n_blocks"]),
            hidden_size=int(model["hidden_size"]),
            num_attention_heads=int(model["n_heads"]),
            seq_length=int(model["length"]),
            cond_dim=int(model["cond_dim"]),
            hidden_dropout=float(model["dropout"]),
        )
        num_tokens, scales_by_sigma = int(config["tokens"]), bool(model["scale_by_sigma"])
        diffusion = DiffusionOptions(graph=graph, noise=noise["type"], **_noise_range(noise))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{where}: not the configuration of a published SEDD model ({reason}); use another copy"
        ) from error
    for name, value, known in (("graph.type", graph, ("absorb", "uniform")),
                               ("noise.type", noise["type"], ("loglinear", "geometric"))):  # fmt: skip
        if value not in known:
            raise UserError(f"{where}: {name} is {value!r}, must be one of {', '.join(known)}")
    if scales_by_sigma != (graph == "absorb"):
        raise UserError(
            f"{where}: model.scale_by_sigma is {scales_by_sigma} with graph {graph}; ours scales under the absorbing "
            "graph and there alone, so that this model cannot be converted"
        )
    check_model_layout(options, ParallelOptions())
    check_diffusion(diffusion)
    return PublishedFolder(path, options, diffusion, num_tokens)


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a published folder, by their published names, in float32.

    Raises:
        UserError: there is no file of weights, or it cannot be read.
    """
    safetensors, pickled = path / SAFETENSORS, path / PICKLE
    try:
        if safetensors.is_file():
            weights = load_file(safetensors)
        elif pickled.is_file():
            # Tensors and plain containers only: anything else in the pickle is refused and not run.
            weights = torch.load(pickled, map_location="cpu", weights_only=True)
        else:
            raise UserError(f"{path}: neither {SAFETENSORS} nor {PICKLE} there; download the model again")
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: its weights cannot be read ({one_line(error)}); use another copy") from error
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UserError(f"{pickled}: holds something else than named tensors; use another copy")
    return {name: tensor.float() for name, tensor in weights.items()}


def write_published_folder(path: Path, network: SEDDModel, config: dict[str, Any], num_heads: int) -> None:
    """Write config.json and model.safetensors from a network that is whole in this process.

    Raises:
        OSError: the disk is full, or the folder is gone.
    """
    weights = {ROTARY_FREQUENCIES: rotary_frequencies(config["model"]["hidden_size"] // num_heads)}
    num_states = network.graph.num_states
    for sharded in network.sharded_tensors().values():
        name, whole = published_name(sharded), sharded.data.detach().float().cpu()
        weights[name] = published_tensor(whole, name, num_heads, num_states)
    try:
        save_file(weights, path / SAFETENSORS)
    except SafetensorError as error:
        raise OSError(f"{path / SAFETENSORS}: {error}") from error
    (path / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def published_config(options: ModelOptions, diffusion: DiffusionOptions, num_tokens: int) -> dict[str, Any]:
    """The configuration as the published code reads it.

    Raises:
        UserError: an option that the published model does not have.
    """
    if options.mlp_hidden_size != 4 * options.hidden_size:
        raise UserError(
            f"--ffn-hidden-size {options.mlp_hidden_size}: the published model has 4 times its hidden size, "
            f"{4 * options.hidden_size}, so that this one cannot be written in its format"
        )
    if diffusion.noise == "loglinear" and diffusion.noise_eps != DiffusionOptions().noise_eps:
        raise UserError(
            f"--noise-eps {diffusion.noise_eps}: the published model has {DiffusionOptions().noise_eps}, so that this "
            "one cannot be written in its format"
        )
    return {
        "tokens": num_tokens,
        "graph": {"type": diffusion.graph},
        "noise": {"type": diffusion.noise, "sigma_min": diffusion.sigma_min, "sigma_max": diffusion.sigma_max},
        "model": {
            "name": "sedd_megatron",
            "type": "ddit",
            "hidden_size": options.hidden_size,
            "cond_dim": options.cond_dim,
            "length": options.seq_length,
            "n_blocks": options.num_layers,
            "n_heads": options.num_attention_heads,
            "scale_by_sigma": diffusion.graph == "absorb",
            "dropout": options.hidden_dropout,
        },
    }


def _noise_range(noise: dict[str, Any]) -> dict[str, float]:
    return {name: float(noise[name]) for name in ("sigma_min", "sigma_max") if name in noise}


def _refuse(path: Path, faults: list[str]) -> None:
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(f"{path}: {faults[0]}{more}; the weights do not fit {CONFIG}")
