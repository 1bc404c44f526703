"""When a run is saved, and what becomes of it when the disk refuses."""

from sedd_megatron.config import CheckpointOptions
from sedd_megatron.errors import UserError
from sedd_megatron.parallel.groups import tell
from sedd_megatron.training.build import TrainingRun
from sedd_megatron.training.checkpoint import CheckpointNotWrittenError, CheckpointWriter


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
            tell([f"warning: {error}"], to_stderr=True)

    def save_last(self, run: TrainingRun) -> None:
        """Have the run as it is in a checkpoint when this returns.

        Raises:
            UserError: it cannot be written.
        """
        self.wait()
        if self._saved_at == run.iteration:
            return
        try:
            self._writer.start(run)
            self._finish()
        except CheckpointNotWrittenError as error:
            raise UserError(
                f"{error}; iteration {run.iteration} is not saved, the checkpoints before are whole: make room and "
                "give the same command again"
            ) from error

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
