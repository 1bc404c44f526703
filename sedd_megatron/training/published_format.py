"""Folders in the published format: config.json beside model.safetensors or pytorch_model.bin; and folders of runs of
the published training code, .hydra/config.yaml and checkpoints-meta/checkpoint.pth, which hold the moving average too.

Reading one executes nothing of it.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sedd_megatron.arguments import check_diffusion
from sedd_megatron.config import DiffusionOptions, ModelOptions, ParallelOptions
from sedd_megatron.data.preparation import Preparation
from sedd_megatron.data.tokenizer_folder import TOKENIZER_FILES
from sedd_megatron.diffusion.graph import make_graph
from sedd_megatron.errors import UserError, one_line
from sedd_megatron.layout_rules import check_model_layout
from sedd_megatron.model.published_weights import (
    ROTARY_FREQUENCIES,
    fault_of_tensor,
    faults_of,
    num_blocks,
    own_part,
    published_name,
    published_shapes,
    published_tensor,
    rotary_frequencies,
)
from sedd_megatron.model.sedd_model import SEDDModel
from sedd_megatron.options import in_short
from sedd_megatron.training_config import PARTED_DOCUMENTS

CONFIG, SAFETENSORS, PICKLE = "config.json", "model.safetensors", "pytorch_model.bin"
# Of a run: what its code calls them. Checkpoints of other steps are beside, in checkpoints/.
RUN_CONFIG, RUN_CHECKPOINT = Path(".hydra", "config.yaml"), Path("checkpoints-meta", "checkpoint.pth")
WRAPPER = "module."
# Of a configuration's counts, and of its sequences.
MOST, MOST_LENGTH = 2**31 - 1, 2**20
# What a folder on a hub has for us: no code among it.
HUB_FILES = [CONFIG, SAFETENSORS, PICKLE, "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
             *(f"tokenizer/{name}" for name in TOKENIZER_FILES)]  # fmt: skip


@dataclass(frozen=True)
class PublishedFolder:
    """A folder whose configuration has been read, and none of its weights."""

    path: Path
    model_options: ModelOptions
    diffusion: DiffusionOptions
    num_tokens: int
    preparation: Preparation  # of the data, where our own conversion wrote it down
    run_checkpoint: Path | None = None  # of a run of the published training code
    parted_documents: tuple[str, ...] = ()  # of training_config.PARTED_DOCUMENTS, written down as the preparation is

    def open_weights(self, trained: bool = False) -> Callable[[SEDDModel], None]:
        """Read and check the weights; what it returns puts this rank's part of them into a network.

        Args:
            trained: of a run, the weights that its optimizer had and not their moving average.

        Raises:
            UserError: weights that cannot be read, do not fit the configuration or are not finite; the first named.
        """
        if self.run_checkpoint is None:
            weights, average = read_weights(self.path), None
        else:
            weights, average = read_run_checkpoint(self.run_checkpoint)
        # Before as many shapes are listed as a configuration may ask for.
        blocks, layers = num_blocks(weights), self.model_options.num_layers
        _refuse(self.path, [] if blocks == layers else [f"has {blocks} blocks, the configuration needs {layers}"])
        num_states = make_graph(self.diffusion.graph, self.num_tokens).num_states
        expected = published_shapes(self.model_options, num_states)
        _refuse(self.path, _faults(weights, expected))
        if average is not None and not trained:
            if len(average) != len(expected):
                _refuse(self.path, [f"its average has {len(average)} tensors, the model has {len(expected)}"])
            weights = dict(zip(expected, average, strict=True))
            _refuse(self.path, [f"of its average, {fault}" for fault in _faults(weights, expected)])

        def fill(network: SEDDModel) -> None:
            for sharded in network.sharded_tensors().values():
                name = published_name(sharded)
                part = own_part(weights[name].float(), name, sharded, self.model_options.num_attention_heads)
                with torch.no_grad():
                    sharded.data.copy_(part.to(sharded.data.device))

        return fill


def is_published_folder(path: Path) -> bool:
    """Whether a folder looks like one in the published format, or of a run of the published training code; or a file
    like one of the latter's checkpoints.
    """
    return (path / CONFIG).is_file() or (_run_folder(path) / RUN_CONFIG).is_file()


def read_published_folder(path: Path) -> PublishedFolder:
    """Read and check the configuration.

    Raises:
        UserError: not a configuration of a SEDD model, or of one that ours cannot be.
    """
    run = None if (path / CONFIG).is_file() else _run_folder(path)
    where = path / CONFIG if run is None else run / RUN_CONFIG
    try:
        text = where.read_text(encoding="utf-8")
        config = json.loads(text) if run is None else yaml.safe_load(text)
        model, graph, noise = config["model"], config["graph"]["type"], config["noise"]
        options = ModelOptions(
            num_layers=_count(model, "n_blocks"),
            hidden_size=_count(model, "hidden_size"),
            num_attention_heads=_count(model, "n_heads"),
            seq_length=_count(model, "length", MOST_LENGTH),
            cond_dim=_count(model, "cond_dim"),
            hidden_dropout=_number(model, "dropout"),
        )
        preparation = Preparation.of(config.get("preparation", {}))
        parted = config.get("parted_documents", [])
        if not isinstance(parted, list) or any(name not in PARTED_DOCUMENTS for name in parted):
            raise ValueError(f"parted_documents is {in_short(parted)}, must be of {', '.join(PARTED_DOCUMENTS)}")
        num_tokens, scales_by_sigma = _count(config, "tokens"), model["scale_by_sigma"] is True
        noise_range = {name: _number(noise, name) for name in ("sigma_min", "sigma_max") if name in noise}
        diffusion = DiffusionOptions(graph=graph, noise=noise["type"], **noise_range)
        if not 0 <= options.hidden_dropout < 1:
            raise ValueError(f"dropout is {options.hidden_dropout}, must be at least 0 and below 1")
    except Exception as error:  # JSON's, YAML's, and what a value of another kind answers to being asked
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(
            f"{where}: not the configuration of a published SEDD model ({reason}); use another copy"
        ) from error
    for name, value, known in (("graph.type", graph, ("absorb", "uniform")),
                               ("noise.type", noise["type"], ("loglinear", "geometric"))):  # fmt: skip
        if value not in known:
            raise UserError(f"{where}: {name} is {in_short(value)}, must be one of {', '.join(known)}")
    if scales_by_sigma != (graph == "absorb"):
        raise UserError(
            f"{where}: model.scale_by_sigma is {scales_by_sigma} with graph {graph}; ours scales under the absorbing "
            "graph and there alone, so that this model cannot be converted"
        )
    check_model_layout(options, ParallelOptions())
    check_diffusion(diffusion)
    if run is None:
        return PublishedFolder(path, options, diffusion, num_tokens, preparation, parted_documents=tuple(parted))
    checkpoint = path if path.is_file() else run / RUN_CHECKPOINT
    return PublishedFolder(run, options, diffusion, num_tokens, preparation, checkpoint)


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a published folder, by their published names, as the file has them.

    Raises:
        UserError: there is no file of weights, or it cannot be read.
    """
    safetensors, pickled = path / SAFETENSORS, path / PICKLE
    if pickled.is_file() and not safetensors.is_file():
        return _named_tensors(pickled, _unpickled(pickled))
    try:
        return _named_tensors(safetensors, load_file(safetensors))
    except FileNotFoundError as error:
        raise UserError(f"{path}: neither {SAFETENSORS} nor {PICKLE} there; download the model again") from error
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{path}: its weights cannot be read ({one_line(error)}); use another copy") from error


def read_run_checkpoint(path: Path) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Weights of a .pth file of the published training code, by name, and their moving average, in the order of the
    model's parameters (its utils.py, save_checkpoint, and model/ema.py).

    Raises:
        UserError: there is none, or it holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: not there; name one of the run's checkpoints, as checkpoints/checkpoint_1.pth")
    state = _unpickled(path)
    average = state.get("ema") if isinstance(state, Mapping) else None
    average = average.get("shadow_params") if isinstance(average, Mapping) else None
    if not isinstance(average, list) or not all(isinstance(tensor, Tensor) for tensor in average):
        raise UserError(f"{path}: has no moving average (ema, shadow_params); use another copy")
    return _named_tensors(path, state.get("model")), average


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


def published_config(
    options: ModelOptions, diffusion: DiffusionOptions, num_tokens: int, preparation: Preparation
) -> dict[str, Any]:
    """The configuration as the published code reads it, which passes over the preparation.

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
        **({} if preparation == Preparation() else {"preparation": asdict(preparation)}),
    }


def _run_folder(path: Path) -> Path:
    """The folder of the run that a .pth file belongs to; a folder is one itself."""
    return path.parent.parent if path.suffix == ".pth" and path.is_file() else path


def _count(values: dict[str, Any], name: str, most: int = MOST) -> int:
    value = values[name]
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{name} is {in_short(value)}, must be a whole number from 1 to {most}")
    return value


def _number(values: dict[str, Any], name: str) -> float:
    # YAML reads 1e-4 as a string.
    value = values[name]
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError(f"{name} is {in_short(value)}, must be a finite number")
    return float(value)


def _unpickled(path: Path) -> Any:
    try:
        # Tensors and plain containers only: anything else in the pickle is refused and not run.
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in as many ways as it has instructions
        reason = one_line(error) or type(error).__name__
        raise UserError(f"{path.parent}: its weights cannot be read ({reason}); use another copy") from error


def _named_tensors(path: Path, found: Any) -> dict[str, Tensor]:
    """By their names without the `module.` of DistributedDataParallel."""
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
    ):
        raise UserError(f"{path}: holds something else than named tensors; use another copy")
    wrapped = all(name.startswith(WRAPPER) for name in found)
    return {name.removeprefix(WRAPPER) if wrapped else name: tensor for name, tensor in found.items()}


def _faults(weights: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps them from being a model's, by name; shapes first, which says how much there is to look at."""
    faults = faults_of({name: tuple(tensor.shape) for name, tensor in weights.items()}, expected)
    if faults:
        return faults
    found = {name: fault_of_tensor(weights[name]) for name in expected}
    return [f"{name} {fault}" for name, fault in found.items() if fault is not None]


def _refuse(path: Path, faults: list[str]) -> None:
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(f"{path}: {faults[0]}{more}; these are not the weights of its configuration")
