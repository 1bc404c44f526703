"""A run that goes on from a checkpoint of its own folder which is not the newest: what is later is put away.

    DIR/went_back.txt                          to which checkpoint a run went back, and under which launchers
    DIR/iter_0000600.set-aside/                a checkpoint that was put away
    DIR/iter_0000500 -> best                   of one that --load named by a name of a person's own

A launcher that gives a command again by itself does not mean to undo what has been trained since.
"""

import contextlib
import json
import os
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from sedd_megatron.errors import UserError, one_line
from sedd_megatron.launcher import slurm_job, slurm_restarts
from sedd_megatron.training.checkpoint_format import sync_file, write_synced
from sedd_megatron.training.processes import launcher
from sedd_megatron.training.run_folder import (
    NAME,
    SET_ASIDE,
    FoundCheckpoint,
    checkpoint_folders,
    checkpoint_name,
    in_words,
    iteration_of,
    set_aside,
    set_aside_folders,
    tracker_line,
    write_tracker,
)
from sedd_megatron.training_config import TrainingOptions
from sedd_megatron.training_schedule import Progress, end_of

WENT_BACK = "went_back.txt"
# Names that runs give; any other is a person's, and stays.
OWN_NAME = re.compile(rf"{NAME.pattern}|{SET_ASIDE.pattern}")


def named_checkpoint(root: Path, load: Path) -> Path | None:
    """The folder of `root` that --load names, by itself or through links; None if it names none."""
    if load.resolve().parent == root.resolve():
        return root / load.resolve().name
    # A checkpoint may itself be a link, to another disk.
    is_own_link = OWN_NAME.fullmatch(load.name) and load.parent.resolve() == root.resolve()
    return root / load.name if is_own_link else None


def goes_back(root: Path, load: Path | None) -> Path | None:
    """The folder of `root` to go back to because --load names it; None where that has been done, and this is a restart
    of the same launcher or of the same job of Slurm. Only on the first rank, which holds the lock.
    """
    folder = None if load is None else named_checkpoint(root, load)
    if folder is None:
        return None
    mark = root / WENT_BACK
    # A checkpoint that was set aside gets its name back after the mark is written.
    has_its_name = not (SET_ASIDE.fullmatch(folder.name) and folder.exists())
    return None if has_its_name and _is_done(mark, folder.name) else folder


def broken_off(root: Path) -> Path | None:
    """Where going back to a checkpoint that was set aside was broken off before it had its name again: that checkpoint.
    None where nothing of that kind is there.

    Raises:
        UserError: there are checkpoints that were set aside and no others, and nothing tells which one is meant.
    """
    aside = set_aside_folders(root)
    if not aside or checkpoint_folders(root):
        return None
    chosen = root / str(_content(root / WENT_BACK).get("to"))
    if chosen in aside:
        return chosen
    raise UserError(
        f"--save {root}: only checkpoints that were set aside are here: {in_words(aside)}; name one of them by --load, "
        "or save to another folder"
    )


def check_is_gone_on_from(found: FoundCheckpoint, training: TrainingOptions) -> None:
    """Check that a run which goes back has something to train: others are set aside for that.

    Raises:
        UserError: it has not.
    """
    trained = found.body["state"]["consumed_samples"]
    if end_of(training, Progress(found.iteration, trained)).iteration > found.iteration:
        return
    length, reached = f"--train-iters {training.train_iters}", f"the iteration {found.iteration}"
    if training.train_samples is not None:
        length, reached = f"--train-samples {training.train_samples}", f"a batch above the {trained} samples"
    raise UserError(
        f"{length} is not above {reached} of {found.folder}, to which the run would go back, and counts what that has "
        "trained; give a greater one, or leave --load out"
    )


def go_on_from(found: FoundCheckpoint, is_named: bool, launchers: Collection[str]) -> tuple[FoundCheckpoint, list[str]]:
    """Have a checkpoint be its folder's newest and called by its iteration; where it is then, and what people are told.

    Args:
        is_named: whether --load names it; that the run has gone back to it is then written down.
        launchers: of all ranks. After a restart the first rank may be on another node.

    Raises:
        OSError: the folder refuses.
    """
    root, final = found.folder.parent, found.folder.with_name(checkpoint_name(found.iteration))
    if is_named and (root / WENT_BACK).exists():
        # Of another time: not to be believed if this one is killed before its own is written.
        (root / WENT_BACK).unlink()
        sync_file(root)
    lines = set_aside_later(root, found.iteration, found.folder, found.damaged)
    is_called_otherwise = not _is_same(final, found.folder)
    is_own_name = OWN_NAME.fullmatch(found.folder.name) is not None
    if is_called_otherwise and not is_own_name:
        final.symlink_to(found.folder.name)
        sync_file(root)
    if is_named:
        mark = {"to": found.folder.name, "launchers": sorted(launchers), "job": slurm_job(os.environ)}
        write_synced(root / WENT_BACK, json.dumps(mark) + "\n")
        sync_file(root)
    # After the mark, which tells by the name whether this was done.
    if is_called_otherwise and is_own_name:
        found.folder.rename(final)
        sync_file(root)
    if is_called_otherwise:
        lines.append(f"{found.folder} is {final.name} from here on")
    return replace(found, folder=final), lines


def set_aside_later(root: Path, iteration: int, chosen: Path, damaged: Collection[Path] = ()) -> list[str]:
    """Rename the checkpoints from `iteration` on, but for the chosen one, so that nothing takes them for a part of this
    run, and have the tracker file name this iteration; what people are told of it.
    """
    lines = []
    for folder in checkpoint_folders(root):
        is_chosen = folder == chosen or (iteration_of(folder) == iteration and _is_same(folder, chosen))
        if iteration_of(folder) < iteration or is_chosen:
            continue
        aside = set_aside(folder, "damaged" if folder in damaged else "set-aside")
        lines.append(f"set aside {folder} as {aside.name}: the run goes on from iteration {iteration}")
    if tracker_line(root, root / checkpoint_name(iteration), iteration):
        try:
            write_tracker(root, iteration)
        except OSError as error:
            lines.append(f"{root}: its tracker file, which is for others, still names another one: {one_line(error)}")
    return lines


def _is_done(mark: Path, name: str) -> bool:
    content = _content(mark)
    try:
        if content["to"] != name:
            return False
        # A job that Slurm starts again has another torchrun, or none.
        job = slurm_job(os.environ)
        same_job = job is not None and slurm_restarts(os.environ) > 0 and content["job"] == job
        return same_job or launcher() in content["launchers"]
    except (KeyError, TypeError):
        return False


def _content(mark: Path) -> dict[str, Any]:
    try:
        content = json.loads(mark.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_same(path: Path, other: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.samefile(other)
    return False
