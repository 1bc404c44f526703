"""When a run is saved, and what becomes of it when the disk refuses."""

import contextlib
from pathlib import Path

from sedd_megatron.data.preparation import Preparation
from sedd_megatron.errors import UserError
from sedd_megatron.parallel.groups import tell
from sedd_megatron.training.build import TrainingRun
from sedd_megatron.training.checkpoint import CheckpointNotWrittenError, CheckpointWriter
from sedd_megatron.training.run_folder import FoundCheckpoint, checkpoint_name
from sedd_megatron.training.run_lock import RunLock
from sedd_megatron.training_config import CheckpointOptions


class RunSaver:
    """Saves a run at its intervals, and goes on without a checkpoint until `max_save_failures` in a row could not be
    written. Every method but `is_writing` is collective over all ranks.
    """

    def __init__(self, writer: CheckpointWriter, options: CheckpointOptions, saved_at: int | None) -> None:
        """`saved_at` is the iteration of the checkpoint in the save folder that the run starts from, if it does."""
        self._writer = writer
        self._options = options
        self._failures = 0
        self._saved_at = saved_at

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread still writes. Not collective."""
        return self._writer.is_writing

    def save(self, run: TrainingRun) -> None:
        """Save, or start to, after the checkpoint under way.

        Raises:
            UserError: the last of `max_save_failures` failures in a row, or a tensor that is not finite.
        """
        self.finish()
        self._make_room(run)
        try:
            self._writer.start(run)
            if not self._options.async_save:
                self._finish()
        except CheckpointNotWrittenError as error:
            self._count_failure(error)

    def finish(self) -> None:
        """Wait for the checkpoint under way.

        Raises:
            UserError: as for `save`.
        """
        try:
            self._finish()
        except CheckpointNotWrittenError as error:
            self._count_failure(error)

    def wait(self) -> None:
        """Wait for the checkpoint under way where the run ends anyway: that it failed is told, and no more."""
        try:
            self._finish()
        except CheckpointNotWrittenError as error:
            self._failures += 1
            tell([f"warning: {error}"], to_stderr=True)

    def save_last(self, run: TrainingRun) -> None:
        """Have the run as it is in a checkpoint when this returns.

        Raises:
            UserError: it cannot be written.
        """
        self.wait()
        if self._saved_at == run.iteration:
            return
        self._make_room(run)
        try:
            self._writer.start(run)
            self._finish()
        except CheckpointNotWrittenError as error:
            raise UserError(
                f"{error}; the checkpoints before are whole: make room and give the same command again"
            ) from error

    def _make_room(self, run: TrainingRun) -> None:
        """Before the next try of a save that failed, delete what --keep-last does not keep."""
        if self._failures:
            # What keeps it from that is told by the try.
            with contextlib.suppress(UserError):
                self._writer.remove_surplus(run)

    def _finish(self) -> None:
        iteration = self._writer.finish()
        if iteration is not None:
            self._saved_at, self._failures = iteration, 0

    def _count_failure(self, error: CheckpointNotWrittenError) -> None:
        self._failures += 1
        if self._failures == self._options.max_save_failures:
            raise UserError(
                f"{error}; it is failure {self._failures} in a row (--max-save-failures), the checkpoints before are "
                "whole: make room and give the same command again"
            ) from error
        line = (
            f"warning: {error}; training goes on and saves again at the next interval (failure {self._failures} of "
            f"{self._options.max_save_failures} in a row)"
        )
        tell([line], to_stderr=True)


def open_saver(
    run: TrainingRun, found: FoundCheckpoint | None, preparation: Preparation, lock: RunLock | None
) -> RunSaver | None:
    """What saves a run to --save, of data with this preparation; None without --save. `found` is the checkpoint that it
    goes on from, loaded whole. Collective over all ranks.

    Raises:
        UserError: as CheckpointWriter.remove_surplus.
    """
    options = run.options.checkpoint
    if not options.save:
        tell(["nothing of this run is saved: --save names a folder for it"])
        return None
    root = Path(options.save)
    # A run with no steps left still saves what it loaded from elsewhere: that is how to change its layout.
    is_saved = (
        found is not None
        and found.folder.parent.resolve() == root.resolve()
        and found.folder.name == checkpoint_name(run.iteration)
    )
    writer = CheckpointWriter(root, run.options, run.tokenizer.num_tokens, preparation, lock)
    if is_saved:
        # Now: a disk that is full has no room for the next one.
        writer.remove_surplus(run)
    return RunSaver(writer, options, run.iteration if is_saved else None)
