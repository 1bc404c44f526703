"""What lies in a run's folder: which checkpoint counts, what a dead run left, which checkpoints are kept.

    DIR/latest_checkpointed_iteration.txt      the newest, as in Megatron-LM: written for others, compared, not obeyed
    DIR/finished                               the run has done all that it was asked for (ending.py)
    DIR/iter_0000500/                          a checkpoint
    DIR/iter_0000600.set-aside/                one that was put away (going_back.py); .damaged for that reason
    DIR/.iter_0000700.partial.TOKEN/           one while a start writes it; .replaced, .removed while that is done to it

Only names as iter_0000500 are read as checkpoints.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sedd_megatron.data.preparation import Preparation
from sedd_megatron.errors import UserError, one_line
from sedd_megatron.parallel.groups import on_first_rank
from sedd_megatron.training.checkpoint_checks import DamagedCheckpointError
from sedd_megatron.training.checkpoint_format import (
    MANIFEST,
    read_manifest,
    replace_synced,
    verify_records,
)
from sedd_megatron.training_config import CheckpointOptions

LATEST, FINISHED = "latest_checkpointed_iteration.txt", "finished"
NAME = re.compile(r"iter_([0-9]{7,})")
# What a person calls one by mistake, too.
CALLED_ONE = re.compile(r"iter_([0-9]{1,18})")
SET_ASIDE = re.compile(r"iter_([0-9]{7,})\.(?:set-aside|damaged)(?:-[0-9]+)?")
HIDDEN_NAME = re.compile(r"\.(iter_[0-9]{7,})\.(partial|replaced|removed)(?:\.[0-9a-f]+)?")
# A folder that vanishes while it is read was replaced or deleted by its run: the next look finds what there is then.
LOOKS, SECONDS_BETWEEN_LOOKS = 5, 0.2


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint whose manifest and tokenizer are intact, and what to fall back to if its tensors are not."""

    folder: Path
    body: dict[str, Any]
    is_exact: bool  # this one or none
    older: tuple[Path, ...] = ()  # newest first
    damaged: tuple[Path, ...] = ()  # newer ones that it was found in place of
    lines: tuple[str, ...] = ()  # what people are told of how it was found

    @property
    def iteration(self) -> int:
        """The optimizer step after which it was saved."""
        return self.body["state"]["iteration"]

    @property
    def preparation(self) -> Preparation:
        """Of the data that the model was trained on; checkpoints of before 0.7 do not know.

        Raises:
            UserError: something else stands there.
        """
        try:
            return Preparation.of(self.body["state"].get("preparation", {}))
        except ValueError as error:
            raise UserError(f"{self.folder}: its preparation is {error}; use another checkpoint") from error


def checkpoint_name(iteration: int) -> str:
    """500 -> iter_0000500."""
    return f"iter_{iteration:07d}"


def named_to_load(checkpoint: CheckpointOptions) -> Path | None:
    """What --load and --ckpt-step name together: a folder of checkpoints, or one of them; None without --load."""
    if checkpoint.load is None:
        return None
    load = Path(checkpoint.load)
    return load if checkpoint.ckpt_step is None else load / checkpoint_name(checkpoint.ckpt_step)


def checkpoint_folders(root: Path) -> list[Path]:
    """The folders under `root` that are called as checkpoints are, newest first; whole or not."""
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=iteration_of, reverse=True)


def set_aside_folders(root: Path) -> list[Path]:
    """The checkpoints under `root` that were put away, newest first."""
    found = {path: SET_ASIDE.fullmatch(path.name) for path in root.iterdir() if path.is_dir()} if root.is_dir() else {}
    kept = [path for path, match in found.items() if match]
    return sorted(kept, key=lambda path: (int(found[path][1]), path.name), reverse=True)


def iteration_of(folder: Path) -> int:
    """iter_0000500 -> 500."""
    return int(folder.name.removeprefix("iter_"))


def find_checkpoint(root: Path, flag: str = "--load", exact: bool = False) -> FoundCheckpoint:
    """`root` itself if it is a checkpoint, else the newest one under it whose manifest and tokenizer are intact.

    Args:
        flag: what named `root`, for errors.
        exact: refuse what is damaged where the one before would do.

    Raises:
        UserError: there is none.
        DamagedCheckpointError: all are damaged, or the one that was named is.
    """
    try:
        if CALLED_ONE.match(root.name) and not os.path.lexists(root):
            raise _nothing_there(root, flag)
        if NAME.fullmatch(root.name) or (root / MANIFEST).is_file():
            return FoundCheckpoint(root, _read_description(root), is_exact=True)
        return _newest(root, flag, exact)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {str(root)[:200]!r}: cannot be read ({one_line(error)}); name a folder") from error


def _newest(root: Path, flag: str, exact: bool) -> FoundCheckpoint:
    for _ in range(LOOKS):
        folders = checkpoint_folders(root)
        if not folders:
            raise _nothing_there(root, flag)
        try:
            found = _first_intact(folders, exact)
        except DamagedCheckpointError:
            if all(folder.is_dir() for folder in folders):
                raise
        else:
            if folders[0].is_dir():
                line = tracker_line(root, found.folder, found.iteration)
                return replace(found, lines=(*found.lines, *line))
        time.sleep(SECONDS_BETWEEN_LOOKS)
    raise _vanishing(root)


def _nothing_there(root: Path, flag: str) -> UserError:
    if not os.path.exists(root):
        way_out = "give a folder that training saved to"
        number = CALLED_ONE.match(root.name)
        beside = [*checkpoint_folders(root.parent), *set_aside_folders(root.parent)] if number else []
        if beside:
            beside.sort(key=lambda folder: abs(int(CALLED_ONE.match(folder.name)[1]) - int(number[1])))
            way_out = f"beside it there are {in_words(beside)}; give one of them"
        return UserError(f"{flag} {root}: no such folder; {way_out}")
    aside = set_aside_folders(root)
    if aside:
        return UserError(
            f"{flag} {root}: only checkpoints that were set aside are here: {in_words(aside)}; give one of them by its "
            "name"
        )
    return UserError(f"{flag} {root}: no checkpoint there (no folder iter_*); give a folder that training saved to")


def check_is_no_checkpoint(root: Path) -> None:
    """Check that --save names a folder of checkpoints and none of these; by its name alone if it is not there.

    Raises:
        UserError: it is a checkpoint.
    """
    if NAME.fullmatch(root.name) or os.path.exists(root / MANIFEST):
        folder = Path(os.path.abspath(root)).parent
        raise UserError(f"--save {root}: that is a checkpoint; give its folder {folder}, and the checkpoint by --load")


def in_words(folders: Sequence[Path]) -> str:
    """The names of the first three folders."""
    names = [folder.name for folder in folders[:3]]
    return f"{', '.join(names)} and {len(folders) - 3} more" if len(folders) > 3 else ", ".join(names)


def load_first_whole(
    found: FoundCheckpoint,
    load: Callable[[FoundCheckpoint], None],
    check: Callable[[FoundCheckpoint], None],
    tell: Callable[[Iterable[str]], None],
) -> FoundCheckpoint:
    """Load the checkpoint or, where that finds it damaged, the newest before it that is whole; returns which it was.

    The first rank chooses for all, and `check` may refuse its choice there. `load` and this are collective over all
    ranks, and `tell` has the lines for people, on each.

    Raises:
        DamagedCheckpointError: of the newest, where nothing is left to fall back to.
    """
    for _ in range(LOOKS + len(found.older)):
        try:
            load(found)
            return found
        except DamagedCheckpointError as error:
            damage = error

        def choose_another(found: FoundCheckpoint = found, damage: DamagedCheckpointError = damage) -> FoundCheckpoint:
            if found.is_exact:
                raise damage
            if not found.folder.is_dir():
                # Its run has deleted it, and has a newer one.
                chosen = find_checkpoint(found.folder.parent)
            else:
                chosen = _first_intact(found.older, exact=False, damage=damage)
            check(chosen)
            damaged = (*found.damaged, found.folder, *chosen.damaged) if found.folder.is_dir() else ()
            return replace(chosen, damaged=damaged, lines=(_fallback_line(str(damage), chosen.folder), *chosen.lines))

        found = on_first_rank(choose_another)
        tell(found.lines)
    raise _vanishing(found.folder.parent)


def write_tracker(root: Path, iteration: int) -> None:
    """Have the tracker file name this iteration, in one step."""
    replace_synced(root / LATEST, f"{iteration}\n")


def tracker_line(root: Path, folder: Path, iteration: int) -> list[str]:
    """What people are told where the tracker file does not name the newest checkpoint; empty if it does."""
    marker = root / LATEST
    try:
        with marker.open("rb") as file:
            content = file.read(40).strip()
        says = f"says {content.decode('utf-8', 'backslashreplace')!r}"
        agrees = content.isdigit() and int(content) == iteration
    except OSError as error:
        says, agrees = f"cannot be read ({error.strerror})", False
    return [] if agrees else [f"{marker} {says}, and the newest whole checkpoint is {folder.name}, which is taken"]


def set_aside(folder: Path, ending: str = "set-aside") -> Path:
    """Give a checkpoint's folder a name that is not read as one; returns its new place."""
    names = (f"{folder.name}.{ending}{suffix}" for suffix in ("", *(f"-{number}" for number in range(2, 10_000))))
    aside = next(path for name in names if not os.path.lexists(path := folder.with_name(name)))
    return folder.rename(aside)


def remove_leftovers(root: Path) -> list[str]:
    """Remove what dead runs left of checkpoints that they were writing, replacing or deleting; what people are told.

    Only for whoever holds the folder's lock. A replaced checkpoint is put back where the new one did not get there:
    it is then the only copy of its iteration.
    """
    lines = []
    for path in sorted(root.iterdir()):
        match = HIDDEN_NAME.fullmatch(path.name)
        if match is None:
            continue
        final = root / match[1]
        if match[2] == "replaced" and not _is_intact(final):
            if final.exists():
                set_aside(final)
            path.rename(final)
            lines.append(f"put {final} back: a run died while it replaced it")
        else:
            try:
                remove_folder(path)
                lines.append(f"removed {path}: a run that died left it unfinished")
            except OSError as error:
                lines.append(f"cannot remove {path}, which a run that died left: {one_line(error)}; remove it")
    partial = root / f".{LATEST}"
    try:
        partial.unlink(missing_ok=True)
    except OSError as error:
        # Of the tracker file, which no reader of ours obeys.
        lines.append(f"cannot remove {partial}: {one_line(error)}; remove it")
    return lines


def remove_folder(path: Path) -> None:
    """Remove a folder; of one that is a link, as to another disk, the link alone."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def remove_old(
    root: Path, iteration: int, keep_last: int | None, keep_every: int | None, is_own: Callable[[dict[str, Any]], bool]
) -> list[str]:
    """After iteration's checkpoint is there: delete older ones that are not to be kept; what people are told.

    Only whole checkpoints for whose manifest `is_own` holds are deleted, or count as kept. A failure to delete is told
    and no more.
    """
    if keep_last is None:
        return []
    lines, kept = [], 0
    try:
        folders = checkpoint_folders(root)
    except OSError as error:
        return [f"cannot look for what to delete in {root} (--keep-last {keep_last}): {one_line(error)}"]
    for folder in folders:
        is_milestone = keep_every is not None and iteration_of(folder) % keep_every == 0
        if iteration_of(folder) > iteration or (kept >= keep_last and is_milestone):
            continue
        try:
            if not is_own(read_manifest(folder)):
                continue
        except UserError:
            continue  # not whole: not ours to delete
        if kept < keep_last:
            kept += 1
            continue
        removed = root / f".{folder.name}.removed"
        try:
            # Renamed first: nobody finds half of it.
            folder.rename(removed)
            remove_folder(removed)
        except OSError as error:
            lines.append(f"cannot delete {folder} (--keep-last {keep_last}): {one_line(error)}; training goes on")
    return lines


def _first_intact(
    folders: Sequence[Path], exact: bool, damage: DamagedCheckpointError | None = None
) -> FoundCheckpoint:
    """The first of the folders that is intact but for its tensors; if none is, raises the damage of the first, or what
    is given.
    """
    damages = []
    for position, folder in enumerate(folders):
        try:
            body = _read_description(folder)
            if checkpoint_name(body["state"]["iteration"]) != folder.name:
                raise DamagedCheckpointError(
                    f"{folder}: holds iteration {body['state']['iteration']}; give the folder its name back"
                )
        except DamagedCheckpointError as error:
            if exact:
                raise
            damage = damage or error
            damages.append(str(error))
        else:
            lines = tuple(_fallback_line(text, folder) for text in damages)
            newer, older = tuple(folders[:position]), tuple(folders[position + 1 :])
            return FoundCheckpoint(folder, body, exact, older, newer, lines)
    raise damage


def _read_description(folder: Path) -> dict[str, Any]:
    body = read_manifest(folder)
    verify_records(folder / "tokenizer", body["state"]["tokenizer_files"])
    return body


def _fallback_line(damage: str, folder: Path) -> str:
    return f"{damage.split(';')[0]}; falls back to {folder.name}"


def _vanishing(root: Path) -> UserError:
    return UserError(f"{root}: its checkpoints vanish while they are read; load one by its name, or wait for its run")


def _is_intact(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except DamagedCheckpointError:
        return False
    return True
