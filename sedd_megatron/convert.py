"""python -m sedd_megatron.convert: models from the published format to a checkpoint, and back."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sedd_megatron.config import ParallelOptions, PrecisionOptions
from sedd_megatron.errors import UserError, print_output, run_command
from sedd_megatron.options import option, parse_options
from sedd_megatron.parallel.groups import groups_of_this_process

if TYPE_CHECKING:
    from torch import Tensor

    from sedd_megatron.model.sedd_model import SEDDModel
    from sedd_megatron.saved_model import SavedModel
    from sedd_megatron.training.checkpoint_format import Shard


@dataclass(frozen=True)
class ConvertOptions:
    """Conversion: --from-published with --save, or --load with --to-published"""

    from_published: str | None = option(
        None,
        "folder or hub name with config.json and model.safetensors; or a folder of a run of the published training "
        "code, or one .pth file in it",
    )
    save: str | None = option(None, "folder to write a checkpoint to: any layout loads it, to sample or to train on")
    load: str | None = option(None, "folder that training saved to, or one iter_* folder in it")
    to_published: str | None = option(None, "folder to write config.json, model.safetensors and the tokenizer to")


def check(argv: Sequence[str]) -> ConvertOptions:
    """The flags, which name one way.

    Raises:
        UserError: the first mistake.
    """
    (options,) = parse_options(
        (ConvertOptions,), argv, "sedd_megatron.convert", "Convert published models to checkpoints and back."
    )
    given = {name for name, value in asdict(options).items() if value is not None}
    if given not in ({"from_published", "save"}, {"load", "to_published"}):
        raise UserError("give --from-published with --save, or --load with --to-published, and nothing else")
    return options


def main() -> None:
    """Parse the flags and convert, one way or the other."""
    options = check(sys.argv[1:])
    if options.save is not None:
        print_output(f"saved {from_published(options.from_published, Path(options.save))}")
    else:
        to_published(options.load, Path(options.to_published))
        print_output(f"wrote {options.to_published}")


def from_published(source: str, root: Path) -> Path:
    """Write a checkpoint at iteration 0 with the published weights as weights and as moving average.

    A run of the published training code has both apart, and so has its checkpoint. Adam's moments are zeros: training
    continues as from a fresh start with these weights.

    Raises:
        UserError: no published model there, one that does not fit, or `root` has checkpoints already.
    """
    from sedd_megatron.saved_model import find_saved_model

    saved = find_saved_model(source, "cpu")
    from sedd_megatron.training.checkpoint import save_checkpoint
    from sedd_megatron.training.run_folder import checkpoint_folders

    if checkpoint_folders(root):
        raise UserError(f"--save {root}: has checkpoints already; name another folder")
    network = _whole_network(saved)
    averages = {name: sharded.data.detach().clone() for name, sharded in network.sharded_tensors().items()}
    if saved.open_trained_weights is not None:
        saved.open_trained_weights()(network)
    state = {
        "options": asdict(saved.model_options) | asdict(saved.diffusion) | dict.fromkeys(saved.parted_documents, True),
        "num_tokens": saved.num_tokens,
        "preparation": asdict(saved.preparation),
        "iteration": 0,
        "consumed_samples": 0,
        "scheduler_samples": 0,
    }
    return save_checkpoint(root, _fresh_shards(network, averages), state, saved.tokenizer)


def to_published(source: str, final: Path) -> None:
    """Write the EMA weights in the published format, whole or not at all.

    Raises:
        UserError: no checkpoint there, a model that the format cannot hold, or `final` is there already.
    """
    from sedd_megatron.saved_model import find_saved_model

    saved = find_saved_model(source, "cpu")
    from sedd_megatron.model.published_weights import published_name
    from sedd_megatron.training.published_format import published_config, write_published_folder

    if final.exists():
        raise UserError(f"--to-published {final}: is there already; name a new folder")
    config = published_config(saved.model_options, saved.diffusion, saved.num_tokens, saved.preparation)
    if saved.parted_documents:
        config["parted_documents"] = list(saved.parted_documents)
    network = _whole_network(saved)
    for sharded in network.sharded_tensors().values():
        if not sharded.data.isfinite().all():
            raise UserError(f"--load {source}: {published_name(sharded)} has values that are not finite; load another")
    partial = final.parent / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_published_folder(partial, network, config, saved.model_options.num_attention_heads)
        saved.tokenizer.save(partial / "tokenizer")
        partial.rename(final)
    except OSError as error:
        raise UserError(f"cannot write {final}: {error}; make room, or name another folder") from error


def _whole_network(saved: "SavedModel") -> "SEDDModel":
    parallel = ParallelOptions(device="cpu")
    return saved.load(parallel, PrecisionOptions(), lambda: groups_of_this_process(parallel)).network


def _fresh_shards(network: "SEDDModel", averages: "dict[str, Tensor]") -> Iterator["Shard"]:
    """The tensors of a run's checkpoint before its first step (training/checkpoint.py, run_shards)."""
    import torch

    from sedd_megatron.training.checkpoint_format import Shard
    from sedd_megatron.training.ema import KEY_PREFIX

    for name, sharded in network.sharded_tensors().items():
        yield Shard.of(sharded)
        yield Shard.of(sharded, KEY_PREFIX + sharded.key, averages[name])
        for moment in ("exp_avg", "exp_avg_sq"):
            yield Shard.of(sharded, f"optimizer.state.{moment}.{sharded.key}", torch.zeros_like(sharded.data))


if __name__ == "__main__":
    run_command(main)
