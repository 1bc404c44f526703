"""Checkpoints of a run: what is in them, and that they appear whole or not at all.

    DIR/iter_0000500/                          manifest.json, shards-*.safetensors, tokenizer/

A checkpoint is written under a hidden name, brought to the disk, and renamed; only then does the tracker file name it.
Nothing that is not finite is saved, from whatever tensor.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sedd_megatron.config import PretrainOptions
from sedd_megatron.data.preparation import Preparation
from sedd_megatron.data.tokenizers import Tokenizer
from sedd_megatron.errors import UserError, one_line, say
from sedd_megatron.parallel.groups import on_first_rank, raise_on_every_rank, tell
from sedd_megatron.training.build import TrainingRun
from sedd_megatron.training.checkpoint_format import (
    OwnShards,
    Shard,
    copy_own_shards,
    first_not_finite,
    sync_file,
    verify_files,
    write_manifest,
    write_own_shards,
)
from sedd_megatron.training.checkpoint_reading import read_shards
from sedd_megatron.training.going_back import go_on_from, named_checkpoint
from sedd_megatron.training.main_parameters import adam_moments, set_adam_step
from sedd_megatron.training.part_to_load import Part, part_to_load
from sedd_megatron.training.processes import launcher
from sedd_megatron.training.recent_steps import RecentSteps
from sedd_megatron.training.run_folder import (
    FoundCheckpoint,
    checkpoint_name,
    iteration_of,
    load_first_whole,
    named_to_load,
    remove_folder,
    remove_old,
    write_tracker,
)
from sedd_megatron.training.run_lock import RunLock
from sedd_megatron.training.same_run import (
    check_same_run,
    describe_run,
    first_difference,
    has_no_run,
    save_tokenizer,
    tokenizer_records,
)

MASTER_PREFIX = "optimizer.state.fp32_param."


class CheckpointNotWrittenError(UserError):
    """The disk did not take a checkpoint; those before it are whole."""


class CheckpointWriter:
    """Writes a run's checkpoints under `root`, their files in a thread of each rank.

    One checkpoint is under way at a time, from `start` to `finish`. Both are collective over all ranks.
    """

    def __init__(
        self,
        root: Path,
        options: PretrainOptions,
        num_tokens: int,
        preparation: Preparation,
        lock: RunLock | None = None,
    ) -> None:
        """`num_tokens` is the tokenizer's; `preparation` the data's; `lock` is the first rank's, on `root`."""
        self.root = root
        self.options = options.checkpoint
        self.lock = lock
        # Now and not at each save: the data's files may be moved while a run has them open.
        self._description = {"preparation": asdict(preparation)}
        if torch.distributed.get_rank() == 0:
            self._description |= describe_run(options, num_tokens)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _PendingCheckpoint | None = None

    def start(self, run: TrainingRun) -> None:
        """Begin to save model, optimizer, EMA, progress, options and tokenizer as they are now.

        Raises:
            CheckpointNotWrittenError: on every rank, if the first could not begin this checkpoint.
            UserError: on every rank, if the folder's lock is lost.
        """
        assert self._pending is None, "the checkpoint before is not finished"
        final = self.root / checkpoint_name(run.iteration)
        partial, description = _written_on_first_rank(lambda: self._begin(final, run), _not_saved(final))
        run.gather_parameters()
        own = copy_own_shards(run_shards(run))
        written = self._thread.submit(_write, partial, own, run.iteration)
        self._pending = _PendingCheckpoint(
            partial, final, run.iteration, own.entries, written, description | _progress(run)
        )

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread still writes. Not collective."""
        return self._pending is not None and not self._pending.written.done()

    def finish(self) -> int | None:
        """Wait for the checkpoint under way on every rank and publish it; its iteration, None if there is none.

        Raises:
            CheckpointNotWrittenError: on every rank, if a rank could not write.
            UserError: on every rank, if a tensor is not finite, or the folder's lock is lost.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        files, fault = {}, None
        try:
            files = pending.written.result()
        except OSError as error:
            rank = torch.distributed.get_rank()
            fault = CheckpointNotWrittenError(f"rank {rank} {_not_saved(pending.final)}: {_reason(error)}")
        except UserError as error:
            fault = error
        # On the first rank alone: of many ranks and tensors it is much, and on a GPU it is gathered in its memory.
        gathered = [None] * torch.distributed.get_world_size() if torch.distributed.get_rank() == 0 else None
        torch.distributed.gather_object((pending.entries, files), gathered, dst=0)
        try:
            raise_on_every_rank(fault)
            _written_on_first_rank(lambda: self._publish(pending, gathered), _not_saved(pending.final))
        except UserError:
            # No rank writes to it any more; a disk that is full wants the room.
            if torch.distributed.get_rank() == 0:
                shutil.rmtree(pending.partial, ignore_errors=True)
            raise
        return pending.iteration

    def remove_surplus(self, run: TrainingRun) -> None:
        """Delete what --keep-last does not keep, without a new checkpoint: a disk that is full has no room for one.
        Collective over all ranks.

        Raises:
            UserError: on every rank, if the tokenizer cannot be described, or the folder's lock is lost.
        """

        def remove() -> None:
            if self.lock is not None:
                self.lock.check()
            own = self._description | {"tokenizer_files": tokenizer_records(run.tokenizer)}
            self._remove_old(run.iteration, own)

        if self.options.keep_last is not None:
            _written_on_first_rank(remove, f"cannot delete what --keep-last does not keep in {self.root}")

    def _begin(self, final: Path, run: TrainingRun) -> tuple[Path, dict[str, Any]]:
        name = f".{final.name}.partial"
        if self.lock is not None:
            self.lock.check()
            # Of this start alone: a rank that outlives a dead one cannot write into what the next one saves.
            name += f".{self.lock.owner.token}"
        partial = self.root / name
        records = _begin(partial, run.tokenizer)
        return partial, self._description | {"tokenizer_files": records}

    def _publish(self, pending: "_PendingCheckpoint", gathered: list[Any]) -> None:
        if self.lock is not None:
            self.lock.check()
        entries = [entry for own, _ in gathered for entry in own]
        files = {name: record for _, records in gathered for name, record in records.items()}
        write_manifest(pending.partial, entries, files, pending.state)
        _publish(pending.partial, pending.final, pending.iteration)
        say(f"saved {pending.final}")
        self._remove_old(pending.iteration, pending.state)

    def _remove_old(self, iteration: int, own: dict[str, Any]) -> None:
        keep_last, keep_every = self.options.keep_last, self.options.keep_every
        tell(remove_old(self.root, iteration, keep_last, keep_every, lambda body: _is_own(body["state"], own)))


def save_checkpoint(
    root: Path, shards: Iterable[Shard], state: dict[str, Any], tokenizer: Tokenizer, iteration: int = 0
) -> Path:
    """Write a checkpoint of one process's whole tensors, as CheckpointWriter does that of a run; returns its folder.

    Raises:
        UserError: it cannot be written, or a tensor is not finite; nothing is left of it then that could be taken for a
            checkpoint.
    """
    final = root / checkpoint_name(iteration)
    partial = root / f".{final.name}.partial"
    try:
        tokenizer_files = _begin(partial, tokenizer)
        own = copy_own_shards(shards)
        files = _write(partial, own, iteration)
        write_manifest(partial, own.entries, files, state | {"tokenizer_files": tokenizer_files})
        _publish(partial, final, iteration)
    except OSError as error:
        raise UserError(f"cannot write {final}: {_reason(error)}; make room, or name another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _written_on_first_rank(action: Callable[[], Any], fault: str) -> Any:
    """What `action` gives on rank 0, to every rank; if the disk refuses, every rank ends with the one line."""

    def told() -> Any:
        try:
            return action()
        except OSError as error:
            raise CheckpointNotWrittenError(f"rank 0 {fault}: {_reason(error)}") from error

    return on_first_rank(told)


def _not_saved(final: Path) -> str:
    return f"cannot save iteration {iteration_of(final)} to {final.parent}"


def _reason(error: OSError) -> str:
    text = error.strerror or one_line(error)
    return text[:1].lower() + text[1:]


def _begin(partial: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Make the hidden folder with the tokenizer in it; returns the records of the tokenizer's files."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    records = save_tokenizer(tokenizer, partial / "tokenizer")
    for name in records:
        sync_file(partial / "tokenizer" / name)
    sync_file(partial / "tokenizer")
    return records


def _write(partial: Path, own: OwnShards, iteration: int) -> dict[str, Any]:
    key = first_not_finite(own)
    if key is not None:
        raise UserError(
            f"the tensor {key} is not finite at iteration {iteration}, which is not saved; resume from the last "
            "checkpoint with a lower --lr or --clip-grad, and look at the data"
        )
    return write_own_shards(partial, own)


@dataclass(frozen=True)
class _PendingCheckpoint:
    """A checkpoint whose files are being written."""

    partial: Path
    final: Path
    iteration: int
    entries: list[dict[str, Any]]
    written: "Future[dict[str, Any]]"
    state: dict[str, Any]


def _progress(run: TrainingRun) -> dict[str, Any]:
    return {
        "iteration": run.iteration,
        "consumed_samples": run.consumed_samples,
        "scheduler_samples": run.scheduler.num_steps,
        "ema_last_update": run.ema.last_update,
        "skipped_steps": run.skipped_steps,
        "recent_steps": run.recent.state(run.groups.layout),
    }


def _publish(partial: Path, final: Path, iteration: int) -> None:
    """Give a checkpoint its name. Whatever fails after that is told and no more: the checkpoint is there."""
    root = final.parent
    replaced = root / f".{final.name}.replaced"
    sync_file(partial)
    is_replacing = os.path.lexists(final)
    if is_replacing:
        if os.path.lexists(replaced):
            remove_folder(replaced)
        final.rename(replaced)
    try:
        partial.rename(final)
    except OSError:
        if is_replacing:
            replaced.rename(final)
        raise
    try:
        sync_file(root)
        write_tracker(root, iteration)
        if os.path.lexists(replaced):
            remove_folder(replaced)
    except OSError as error:
        # The next start removes what is left of the old one, and no reader obeys the tracker file.
        say(f"warning: {final} is whole, and {one_line(error)}; nothing is lost by that", to_stderr=True)


def _is_own(saved: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether a checkpoint of the folder is of the run that saves there."""
    # A converted model is not of the run's own making.
    if has_no_run(saved) or saved["tokenizer_files"] != own["tokenizer_files"]:
        return False
    return first_difference(saved, own, own["options"]["allow_changed"]) is None


def resume(run: TrainingRun, found: FoundCheckpoint) -> FoundCheckpoint:
    """Resume `run` from the checkpoint that was found, of any layout, or where that is damaged from the newest whole
    one before it; returns which it was. Collective over all ranks.

    In the run's own --save folder other checkpoints from there on are set aside then: they are not of the run. Of what
    is elsewhere --finetune, --no-load-optim and --skip-train take a part.

    Raises:
        UserError: a damaged or missing file, named; a model of another shape.
    """
    save, load = run.options.checkpoint.save, named_to_load(run.options.checkpoint)
    part = part_to_load(run.options, found.folder)

    def check(older: FoundCheckpoint) -> None:
        own = describe_run(run.options, run.graph.num_tokens) | {"tokenizer_files": tokenizer_records(run.tokenizer)}
        check_same_run(older, own, f"{older.folder}: it", "name another folder", part.is_same_run)

    def go_on() -> tuple[FoundCheckpoint, list[str]]:
        is_named = load is not None and named_checkpoint(Path(save), load) == found.folder
        try:
            return go_on_from(found, is_named, {name for name in launchers if name is not None})
        except OSError as error:
            raise UserError(
                f"cannot set aside what is later than {found.folder}: {one_line(error)}; rename it, or save to another "
                "folder"
            ) from error

    named = found.folder
    found = load_first_whole(found, lambda found: load_checkpoint(run, found.folder, found.body, part), check, tell)
    if found.folder != named:
        tell([part.words.format(found.folder)])
    if part is Part.RUN and save and found.folder.parent.resolve() == Path(save).resolve():
        launchers: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(launchers, launcher())
        found, lines = on_first_rank(go_on)
        tell(lines)
    return found


def load_checkpoint(run: TrainingRun, directory: Path, body: dict[str, Any], part: Part = Part.RUN) -> None:
    """Resume `run` from one checkpoint, or take a part of it. Collective over all ranks.

    Raises:
        DamagedCheckpointError: a damaged or missing file, or a tensor that is not finite; named.
        UserError: a model of another shape.
    """
    verify_files(directory, body)
    # A float32 run saves no master weights: its weights are that. Either kind of run takes the best there is.
    has_masters = any(key.startswith(MASTER_PREFIX) for key in body["tensors"])
    weights_prefix = MASTER_PREFIX if has_masters and not run.options.precision.bf16 else ""
    read_shards(directory, body, run_shards(run, weights_prefix, MASTER_PREFIX if has_masters else "", part))
    state = body["state"]
    if part is Part.WEIGHTS:
        run.ema.restart()
        return
    run.iteration = state["iteration"]
    # Older checkpoints know neither.
    run.skipped_steps = state.get("skipped_steps", 0)
    run.recent = RecentSteps(state.get("recent_steps"), run.groups.layout)
    if part is Part.RUN:
        set_adam_step(run.optimizer, run.optimizer_steps)
    run.consumed_samples = state["consumed_samples"]
    # Older checkpoints tell the interval alone, which may have changed within one; those of before 0.6 not even that.
    last_update = run.optimizer_steps - run.optimizer_steps % state["options"].get("ema_interval", 1)
    run.ema.last_update = state.get("ema_last_update", last_update)
    # The schedule depends on the number of samples alone, so that a resumed run may also change its options.
    run.scheduler.num_steps = 0
    run.scheduler.step(increment=state["scheduler_samples"])


def run_shards(
    run: TrainingRun, weights_prefix: str = "", master_prefix: str = MASTER_PREFIX, part: Part = Part.RUN
) -> Iterator[Shard]:
    """All tensors of a checkpoint, the same for saving and for loading: weights, master weights where training is in
    bfloat16, Adam's moments, and the moving average; those of a part of it.
    """
    for chunk in run.model_chunks:
        for sharded in chunk.sharded_tensors().values():
            yield Shard.of(sharded, weights_prefix + sharded.key)
    for main in run.main_parameters:
        if run.options.precision.bf16:
            yield main.shard(master_prefix, main.tensor)
        # Asked for the moments, Adam makes them.
        moments = adam_moments(run.optimizer, main) if part is Part.RUN else {}
        for name, moment in moments.items():
            yield main.shard(f"optimizer.state.{name}.", moment)
    if part is not Part.WEIGHTS:
        yield from run.ema.shards()
