"""How a training run ends: stopped or finished, what it says then, and DIR/finished, by which scripts know.

    DIR/finished                               one line of JSON: the iteration that the run went to, and when

It is there when a run has trained, validated and saved all that it was asked for, and goes away as soon as a
run of more steps goes on. A start that finds nothing left to do writes it anew, so that whoever started it can tell by
the file alone what that start has come to.
"""

import contextlib
import json
import signal
import time
from pathlib import Path

from sedd_megatron.config import PretrainOptions
from sedd_megatron.errors import UserError, one_line
from sedd_megatron.launcher import is_first_rank
from sedd_megatron.options import flag_of
from sedd_megatron.parallel.groups import on_first_rank, tell
from sedd_megatron.training.build import TrainingRun
from sedd_megatron.training.checkpoint_checks import DamagedCheckpointError
from sedd_megatron.training.checkpoint_format import replace_synced, sync_file, verify_files
from sedd_megatron.training.run_folder import FINISHED, FoundCheckpoint, checkpoint_folders, checkpoint_name
from sedd_megatron.training.stop_requests import StopRequests
from sedd_megatron.training_config import TrainingOptions
from sedd_megatron.training_schedule import Progress, end_of, is_due

# What ends a run before its last step, beside the numbers of signals; any rank's greatest counts.
EXIT_DURATION, EXIT_INTERVAL = 1001, 1002


def asked_to_stop(run: TrainingRun, requests: StopRequests, end: int) -> int:
    """What this rank has heard before a step: a signal's number, EXIT_DURATION by the first rank's clock, or 0.

    `end` is the last iteration.
    """
    minutes = run.options.ending.exit_duration_in_mins
    if requests.requested or minutes is None or not is_first_rank() or run.iteration + 1 == end:
        return requests.requested
    return EXIT_DURATION if time.monotonic() - requests.began_at > 60 * minutes else 0


def at_exit_interval(run: TrainingRun, end: int) -> int:
    """EXIT_INTERVAL after a step that --exit-interval divides, but for the last; else 0."""
    is_asked = run.iteration < end and is_due(run.iteration, run.options.ending.exit_interval)
    return EXIT_INTERVAL if is_asked else 0


def nothing_left(options: PretrainOptions, found: FoundCheckpoint | None) -> bool:
    """Whether the run of --save has done all that is asked for, said so and is whole: no model need be built for that.
    If it has not, DIR/finished is removed. Collective over all ranks, of which the first holds the lock.

    A run that was killed between its last checkpoint and that file may have something left to do, as its validation.

    Raises:
        UserError: the folder refuses.
    """
    if options.checkpoint.save is None:
        return False
    save, keep_last = Path(options.checkpoint.save), options.checkpoint.keep_last

    def is_done() -> bool:
        # What --keep-last does not keep is for a start that builds the run.
        has_surplus = keep_last is not None and len(checkpoint_folders(save)) > keep_last
        return found is not None and _has_trained_all(options, found) and not has_surplus and _is_finished(save, found)

    if on_first_rank(is_done):
        # A damaged one is repaired by those before it, which takes a model.
        with contextlib.suppress(DamagedCheckpointError):
            verify_files(found.folder, found.body)
            on_first_rank(lambda: _write_finished(save, found.iteration))
            tell([_nothing_left(options.training, found.iteration, str(save))])
            return True
    on_first_rank(lambda: _remove_finished(save))
    return False


def end_run(run: TrainingRun, end: int, stopped_by: int, first_iteration: int) -> None:
    """Say how the run has ended, after its last checkpoint. Collective over all ranks.

    Args:
        end: the last iteration.
        stopped_by: a signal's number, EXIT_DURATION or EXIT_INTERVAL; 0 for a run that has trained all.
        first_iteration: where this start began.

    Raises:
        UserError: DIR/finished cannot be written.
    """
    save = run.options.checkpoint.save
    where = f", saved {Path(save) / checkpoint_name(run.iteration)}" if save else ""
    if stopped_by:
        tell([f"{_reason(run, stopped_by)}: stopped at iteration {run.iteration} of {end}{where}"])
        return
    if save:
        on_first_rank(lambda: _write_finished(Path(save), run.iteration))
    if run.iteration > first_iteration:
        tell([f"finished at iteration {run.iteration} of {end}{where}"])
    else:
        tell([_nothing_left(run.options.training, run.iteration, save or "the run")])


def _has_trained_all(options: PretrainOptions, found: FoundCheckpoint) -> bool:
    progress = Progress(found.iteration, found.body["state"]["consumed_samples"])
    return end_of(options.training, progress).iteration <= found.iteration


def _is_finished(save: Path, found: FoundCheckpoint) -> bool:
    try:
        finished_at = json.loads((save / FINISHED).read_text(encoding="utf-8"))["iteration"]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    # Not one that is gone back to.
    return finished_at == found.iteration and found.folder == save / checkpoint_name(found.iteration)


def _remove_finished(save: Path) -> None:
    try:
        if (save / FINISHED).exists():
            (save / FINISHED).unlink()
            sync_file(save)
    except OSError as error:
        raise UserError(
            f"{save / FINISHED}: cannot be removed ({one_line(error)}); remove it, for the run goes on"
        ) from error


def _write_finished(save: Path, iteration: int) -> None:
    record = {"iteration": iteration, "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        replace_synced(save / FINISHED, json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(
            f"{save / FINISHED}: cannot be written ({one_line(error)}); the last checkpoint is whole: make room and "
            "give the same command again"
        ) from error


def _nothing_left(training: TrainingOptions, iteration: int, whose: str) -> str:
    length = flag_of("train_iters" if training.train_samples is None else "train_samples")
    return f"nothing left to do: {whose} has its {iteration} iterations; a greater {length} goes on"


def _reason(run: TrainingRun, stopped_by: int) -> str:
    if stopped_by == EXIT_DURATION:
        return f"--exit-duration-in-mins {run.options.ending.exit_duration_in_mins}"
    if stopped_by == EXIT_INTERVAL:
        return f"--exit-interval {run.options.ending.exit_interval}"
    return signal.Signals(stopped_by).name
