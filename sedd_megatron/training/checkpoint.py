"""Checkpoints of a run: what is in them, where they lie, and that they appear whole or not at all.

    DIR/latest_checkpointed_iteration.txt      the newest whole checkpoint, as in Megatron-LM
    DIR/iter_0000500/                          manifest.json, shards-*.safetensors, tokenizer/

A checkpoint is written under a hidden name, brought to the disk, and renamed; only then does the text file name it.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sedd_megatron.config import PretrainOptions
from sedd_megatron.data.tokenizers import Tokenizer, load_tokenizer
from sedd_megatron.errors import UserError, say
from sedd_megatron.options import flag_of
from sedd_megatron.training.build import TrainingRun
from sedd_megatron.training.checkpoint_format import (
    MANIFEST,
    Shard,
    copy_own_shards,
    file_record,
    read_manifest,
    read_shards,
    sync_file,
    verify_files,
    verify_records,
    write_manifest,
    write_own_shards,
    write_synced,
)
from sedd_megatron.training.main_parameters import adam_moments, set_adam_step

MASTER_PREFIX = "optimizer.state.fp32_param."
LATEST = "latest_checkpointed_iteration.txt"


class SaveError(UserError):
    """A disk that refused a checkpoint; nothing is left of it, and those before it are whole."""


class CheckpointWriter:
    """Saves a run's checkpoints under `root`; with `is_async` their files are written by a thread of each rank.

    One checkpoint is under way at a time: a save waits for the one before. Every method is collective over all ranks.
    """

    def __init__(self, root: Path, is_async: bool) -> None:
        self.root = root
        self.is_async = is_async
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _PendingCheckpoint | None = None

    def save(self, run: TrainingRun) -> None:
        """Save model, optimizer, EMA, progress, options and tokenizer, or start to.

        Raises:
            SaveError: on every rank, if a rank could not write this checkpoint or the one before.
        """
        self.finish()
        final = self.root / f"iter_{run.iteration:07d}"
        partial = self.root / f".{final.name}.partial"
        tokenizer_files = _on_first_rank(lambda: _begin(partial, run.tokenizer), f"cannot write {partial}", partial)
        run.gather_parameters()
        own = copy_own_shards(run_shards(run))
        written = self._thread.submit(write_own_shards, partial, own)
        state = _state(run) | {"tokenizer_files": tokenizer_files}
        self._pending = _PendingCheckpoint(partial, final, run.iteration, own.entries, written, state)
        if not self.is_async:
            self.finish()

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread still writes. Not collective."""
        return self._pending is not None and not self._pending.written.done()

    def finish(self) -> None:
        """Wait for the checkpoint under way on every rank and publish it.

        Raises:
            SaveError: on every rank, if a rank could not write.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        own: tuple[list[dict[str, Any]], dict[str, Any], str | None]
        try:
            own = (pending.entries, pending.written.result(), None)
        except OSError as error:
            own = ([], {}, f"rank {torch.distributed.get_rank()} cannot write {pending.partial}: {error}")
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, own)
        _refuse_fault(next((fault for _, _, fault in gathered if fault), None), pending.partial)
        entries = [entry for entries, _, _ in gathered for entry in entries]
        files = {name: record for _, records, _ in gathered for name, record in records.items()}

        def publish() -> None:
            write_manifest(pending.partial, entries, files, pending.state)
            _publish(pending.partial, pending.final, self.root, pending.iteration)
            say(f"saved {pending.final}")

        _on_first_rank(publish, f"cannot finish {pending.final}", pending.partial)


def save_checkpoint(
    root: Path, shards: Iterable[Shard], state: dict[str, Any], tokenizer: Tokenizer, iteration: int = 0
) -> Path:
    """Write a checkpoint of one process's whole tensors, as CheckpointWriter does that of a run; returns its folder.

    Raises:
        UserError: it cannot be written; nothing is left of it then that could be taken for a checkpoint.
    """
    final = root / f"iter_{iteration:07d}"
    partial = root / f".{final.name}.partial"
    try:
        tokenizer_files = _begin(partial, tokenizer)
        own = copy_own_shards(shards)
        files = write_own_shards(partial, own)
        write_manifest(partial, own.entries, files, state | {"tokenizer_files": tokenizer_files})
        _publish(partial, final, root, iteration)
    except OSError as error:
        raise UserError(f"cannot write {final}: {error}; make room, or name another folder") from error
    return final


def _on_first_rank(action: Callable[[], Any], fault: str, partial: Path) -> Any:
    """What `action` gives on rank 0, to every rank; if the disk refuses, every rank raises the one line."""
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = action()
        except OSError as error:
            outcome[1] = f"{fault}: {error}"
    torch.distributed.broadcast_object_list(outcome, src=0)
    _refuse_fault(outcome[1], partial)
    return outcome[0]


def _refuse_fault(fault: str | None, partial: Path) -> None:
    if fault is None:
        return
    # No rank writes to it any more, and what a full disk needs is room.
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    raise SaveError(fault)


def _begin(partial: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Make the hidden folder with the tokenizer in it; returns the records of the tokenizer's files."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer.save(partial / "tokenizer")
    return {path.name: file_record(path) for path in sorted((partial / "tokenizer").iterdir())}


@dataclass(frozen=True)
class _PendingCheckpoint:
    """A checkpoint whose files are being written."""

    partial: Path
    final: Path
    iteration: int
    entries: list[dict[str, Any]]
    written: "Future[dict[str, Any]]"
    state: dict[str, Any]


def _state(run: TrainingRun) -> dict[str, Any]:
    """All of a run that is not a tensor."""
    return {
        "options": run.options.to_dict(),
        "num_tokens": run.graph.num_tokens,
        "iteration": run.iteration,
        "consumed_samples": run.consumed_samples,
        "scheduler_samples": run.scheduler.num_steps,
    }


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
    # A float32 run saves no master weights: its weights are that. Either kind of run takes the best there is.
    has_masters = any(key.startswith(MASTER_PREFIX) for key in body["tensors"])
    weights_prefix = MASTER_PREFIX if has_masters and not run.options.precision.bf16 else ""
    read_shards(directory, body, run_shards(run, weights_prefix, MASTER_PREFIX if has_masters else ""))
    state = body["state"]
    set_adam_step(run.optimizer, state["iteration"])
    run.iteration = state["iteration"]
    run.consumed_samples = state["consumed_samples"]
    # By the interval of the run that saved it, which need not be this one's; checkpoints of before 0.6 have none.
    run.ema.last_update = run.iteration - run.iteration % state["options"].get("ema_interval", 1)
    # The schedule depends on the number of samples alone, so that a resumed run may also change its options.
    run.scheduler.num_steps = 0
    run.scheduler.step(increment=state["scheduler_samples"])


def run_shards(run: TrainingRun, weights_prefix: str = "", master_prefix: str = MASTER_PREFIX) -> Iterator[Shard]:
    """All tensors of a checkpoint, the same for saving and for loading: weights, master weights where training is in
    bfloat16, Adam's moments, and the moving average.
    """
    for chunk in run.model_chunks:
        for sharded in chunk.sharded_tensors().values():
            yield Shard.of(sharded, weights_prefix + sharded.key)
    for main in run.main_parameters:
        if run.options.precision.bf16:
            yield main.shard(master_prefix, main.tensor)
        for name, moment in adam_moments(run.optimizer, main).items():
            yield main.shard(f"optimizer.state.{name}.", moment)
    yield from run.ema.shards()
