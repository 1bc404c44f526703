"""Checkpoints of a run: what is in them, where they lie, and that they appear whole or not at all.

    DIR/latest_checkpointed_iteration.txt      the newest whole checkpoint, as in Megatron-LM
    DIR/iter_0000500/                          manifest.json, shards-*.safetensors, tokenizer/

A checkpoint is written under a hidden name, brought to the disk, and renamed; only then does the text file name it.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor

from sedd_megatron.config import PretrainOptions
from sedd_megatron.data.tokenizers import Tokenizer, load_tokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.options import flag_of
from sedd_megatron.training.build import TrainingRun
from sedd_megatron.training.checkpoint_format import (
    MANIFEST,
    file_record,
    read_manifest,
    read_shards,
    sync_file,
    verify_files,
    verify_records,
    write_shards,
    write_synced,
)

LATEST = "latest_checkpointed_iteration.txt"


def save_checkpoint(run: TrainingRun, root: Path) -> Path:
    """Save model, optimizer, EMA, progress, options and tokenizer. Collective over all ranks; returns the folder."""
    final = root / f"iter_{run.iteration:07d}"
    partial = root / f".iter_{run.iteration:07d}.partial"
    is_first_rank = torch.distributed.get_rank() == 0
    if is_first_rank:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        run.tokenizer.save(partial / "tokenizer")
    torch.distributed.barrier()
    optimizer_state, step = _optimizer_state(run, is_loading=False)
    state = {
        "options": run.options.to_dict(),
        "num_tokens": run.graph.num_tokens,
        "iteration": run.iteration,
        "consumed_samples": run.consumed_samples,
        "optimizer_step": step,
        "scheduler_samples": run.scheduler.num_steps,
        "tokenizer_files": {
            path.name: file_record(path) for path in sorted((partial / "tokenizer").iterdir())
        } if is_first_rank else {},
    }  # fmt: skip
    write_shards(partial, _all_tensors(run, optimizer_state), state)
    torch.distributed.barrier()
    if is_first_rank:
        _publish(partial, final, root, run.iteration)
    torch.distributed.barrier()
    return final


def _publish(partial: Path, final: Path, root: Path, iteration: int) -> None:
    replaced = root / f".{final.name}.replaced"
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    sync_file(partial)
    partial.rename(final)
    sync_file(root)
    write_synced(root / f".{LATEST}", f"{iteration}\n")
    os.replace(root / f".{LATEST}", root / LATEST)
    sync_file(root)
    shutil.rmtree(replaced, ignore_errors=True)


def latest_checkpoint(root: Path) -> Path:
    """The newest whole checkpoint under `root`, or `root` itself if it is one.

    Raises:
        UserError: there is none.
    """
    if (root / MANIFEST).is_file():
        return root
    marker = root / LATEST
    if not marker.is_file():
        raise UserError(f"--load {root}: no checkpoint there (no {LATEST}); give a folder that training saved to")
    text = marker.read_text(encoding="utf-8").strip()
    if not text.isdigit():
        raise UserError(
            f"{marker}: holds {text[:40]!r}, must hold an iteration number; write the newest iter_* into it"
        )
    return root / f"iter_{int(text):07d}"


def load_saved_tokenizer(directory: Path, body: dict[str, Any]) -> Tokenizer:
    """The tokenizer kept in a checkpoint.

    Raises:
        UserError: one of its files is missing or damaged.
    """
    verify_records(directory / "tokenizer", body["state"]["tokenizer_files"])
    return load_tokenizer(directory / "tokenizer")


def check_same_model(body: dict[str, Any], options: PretrainOptions, num_tokens: int, where: Path) -> None:
    """Refuse a checkpoint of another model, naming the first option that differs.

    Raises:
        UserError: before anything is allocated.
    """
    saved = body["state"]
    if saved["num_tokens"] != num_tokens:
        raise UserError(
            f"--load {where}: its vocabulary has {saved['num_tokens']} tokens, the data's {num_tokens}; "
            "use data of the same tokenizer"
        )
    now = options.to_dict()
    names = (
        "num_layers hidden_size num_attention_heads ffn_hidden_size cond_dim make_vocab_size_divisible_by graph noise "
        "noise_eps sigma_min sigma_max"
    ).split()
    for name in names:
        if saved["options"][name] != now[name]:
            raise UserError(
                f"--load {where}: it was trained with {flag_of(name)} {saved['options'][name]}, this run has "
                f"{now[name]}; give the same value, or leave --load out to start anew"
            )


def load_checkpoint(run: TrainingRun, directory: Path) -> None:
    """Resume `run` from a checkpoint of any layout. Collective over all ranks.

    Raises:
        UserError: a damaged or missing file, named; a model of another shape.
    """
    body = read_manifest(directory)
    verify_files(directory, body)
    optimizer_state, _ = _optimizer_state(run, is_loading=True)
    read_shards(directory, body, _all_tensors(run, optimizer_state))
    state = body["state"]
    _load_optimizer(run, optimizer_state, state["optimizer_step"])
    run.iteration = state["iteration"]
    run.consumed_samples = state["consumed_samples"]
    # The schedule depends on the number of samples alone, so that a resumed run may also change its options.
    run.scheduler.num_steps = 0
    run.scheduler.step(increment=state["scheduler_samples"])


def _all_tensors(run: TrainingRun, optimizer_state: dict[str, Any]) -> list[ShardedTensor]:
    """What a checkpoint holds, the same for saving and for loading."""
    return [*run.model.sharded_tensors().values(), *run.ema.sharded_state(), *_sharded_tensors(optimizer_state)]


def _optimizer_state(run: TrainingRun, is_loading: bool) -> tuple[dict[str, Any], float]:
    """Megatron's sharded optimizer state, and the number of steps taken, which Megatron keeps apart from the shards."""
    state = run.optimizer.sharded_state_dict(run.model.sharded_state_dict(), is_loading=is_loading)
    torch_state = state.get("optimizer", state)
    return state, float(torch_state["state"].pop("common_step", 0))


def _load_optimizer(run: TrainingRun, state: dict[str, Any], step: float) -> None:
    filled = _map_tensors(state)
    if step:
        filled.get("optimizer", filled)["state"]["common_step"] = torch.tensor(step)
        run.optimizer.load_state_dict(filled)


def _sharded_tensors(state: Any) -> Iterator[ShardedTensor]:
    if isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, dict | list):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _sharded_tensors(value)


def _map_tensors(state: Any) -> Any:
    """The same structure with plain values in place of Megatron's wrappers."""
    if isinstance(state, ShardedTensor):
        return state.data
    if isinstance(state, LocalNonpersistentObject):
        return state.unwrap()
    if isinstance(state, dict):
        return {key: _map_tensors(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_map_tensors(value) for value in state]
    return state
