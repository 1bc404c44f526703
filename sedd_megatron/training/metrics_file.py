"""metrics.jsonl: one record a line, each iteration once, on a disk that may be full for a while."""

import contextlib
import json
import math
import os
import secrets
import shutil
import time
from collections import deque
from pathlib import Path
from typing import Any

from sedd_megatron.errors import say
from sedd_megatron.run_files import LOST
from sedd_megatron.training.checkpoint_format import write_synced

# Beside a file that several runs may write: one line for each that has.
WRITERS = "metrics-writers.txt"
# In a run's own folder, where it goes with it: in the checkpoints it would make of two equal runs two others.
RUN_ID = "run_id.txt"
# How every record begins; a person's note does not.
RECORD_START = b'{"iteration"'
# Opening reads the whole file, which is too much for each step.
SECONDS_BETWEEN_TRIES = 10.0


class MetricsFile:
    """Appends records to a file of JSON lines. No fault of the disk is raised: the records wait in memory for their
    turn, with one line when that begins and one when it is over.
    """

    def __init__(self, path: Path, continued_at: int | None, writer: str | None = None) -> None:
        """
        Args:
            continued_at: the iteration from which this run goes on with the run that wrote the file; None to add to
                whatever is there.
            writer: the run's name, where others may write to the same file: records are moved aside only if no other
                ever has. None where the run's lock keeps others out.
        """
        self.path = path
        self._continued_at = continued_at
        self._writer = writer
        self._waiting: deque[bytes] = deque()
        self._descriptor: int | None = None
        self._is_of_one_run = False
        self._failed_at: float | None = None
        self._write_waiting()

    def write(self, record: dict[str, Any]) -> None:
        """Add a record; a number that is not finite, for which JSON has no word, becomes null."""
        finite = {
            name: value if isinstance(value, str) or math.isfinite(value) else None for name, value in record.items()
        }
        self._waiting.append(json.dumps(finite, allow_nan=False).encode() + b"\n")
        if self._failed_at is None or time.monotonic() - self._failed_at > SECONDS_BETWEEN_TRIES:
            self._write_waiting()

    def lacks_validation(self, iteration: int) -> bool:
        """Whether there is a record of this iteration and none of its validation; False of what cannot be read."""
        return {"validation_loss" in record for record in self._records_of(iteration)} == {False}

    def has_step(self, iteration: int) -> bool:
        """Whether there is a record of this iteration."""
        return bool(self._records_of(iteration))

    def has_test_loss(self, iteration: int) -> bool:
        """Whether there is a test loss of this iteration; False where it may be another run's."""
        return self._is_of_one_run and any("test_loss" in record for record in self._records_of(iteration))

    def close(self) -> None:
        """Write what waits, or say how much of it is lost."""
        self._write_waiting()
        if self._waiting:
            say(f"warning: {self.path}: {len(self._waiting)} records were not written", to_stderr=True)
        self._close()

    def _records_of(self, iteration: int) -> list[dict[str, Any]]:
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError:
            return []
        # By its beginning, so that not every record of a long run is parsed.
        records = (_record(line) for line in lines if line.startswith(b"%s: %d," % (RECORD_START, iteration)))
        return [record for record in records if record is not None]

    def _write_waiting(self) -> None:
        try:
            if self._descriptor is not None and not self._is_in_place():
                self._close()
            if self._descriptor is None:
                self._open()
            while self._waiting:
                append_whole(self._descriptor, self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if self._failed_at is None:
                say(f"warning: {self.path}: {error.strerror}; training goes on and its records wait", to_stderr=True)
            self._failed_at = time.monotonic()
            self._close()
        else:
            if self._failed_at is not None:
                say(f"{self.path}: is written again", to_stderr=True)
            self._failed_at = None

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A link stays a link, and what is no file (/dev/null) is written to as it is.
        target = self.path.resolve()
        is_alone = self._writer is None or _is_only_writer(target, self._writer)
        # Not where runs that do not save add to each other's records.
        self._is_of_one_run = self._is_of_one_run or (is_alone and self._continued_at is not None)
        if target.is_file():
            end_last_line(target)
            if self._continued_at is not None and is_alone:
                _set_lost_aside(target, self._continued_at)
        self._descriptor = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        # Once, and where there was no file as well: what is found there after a fault of the disk is this run's own.
        self._continued_at = None

    def _is_in_place(self) -> bool:
        """Whether the open file is still the one of that name: another may have taken its place."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def append_whole(descriptor: int, line: bytes) -> None:
    """All of a line or nothing of it: a full disk takes a part first."""
    size, left = os.fstat(descriptor).st_size, line
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError:
        if len(left) < len(line):
            os.ftruncate(descriptor, size)
        raise


def writer_name(root: Path) -> str:
    """The name of the run that saves to this folder: a new one where nobody has asked for it before."""
    run_id = run_id_of(root)
    # Its number too: folders of one name on two machines are two.
    return json.dumps([str(root), root.stat().st_ino, *([] if run_id is None else [run_id])])


def run_id_of(root: Path) -> str | None:
    """The id of the run that saves to this folder; None on a disk that refuses one: it is then known by its folder
    alone.
    """
    path = root / RUN_ID
    with contextlib.suppress(OSError, ValueError):
        if not path.exists():
            write_synced(path, f"{secrets.token_hex(8)}\n")
        return path.read_text(encoding="ascii").strip()
    return None


def _is_only_writer(path: Path, writer: str) -> bool:
    """Whether no other run has written to the file since it was begun; it is written down that this one does."""
    writers = path.with_name(WRITERS)
    if path.exists() and not writers.exists():
        return False  # begun by nobody knows whom, or no file
    with writers.open("a+", encoding="utf-8") as file:
        file.seek(0)
        names = set(file.read().splitlines())
        if writer not in names:
            file.write(f"{writer}\n")
    return all(_is_same_run(name, writer) for name in names)


def _is_same_run(name: str, writer: str) -> bool:
    """Whether two names are of one run. Moved, a run leaves no folder behind; beside a copy there is the original."""
    (folder, inode, run), (own_folder, own_inode, own_run) = _parts(name), _parts(writer)
    is_same_folder = folder is not None and (folder, inode) == (own_folder, own_inode)
    is_moved = run is not None and run == own_run and not _is_there(folder, inode)
    return name == writer or is_same_folder or is_moved


def _parts(name: str) -> tuple[str | None, int, str | None]:
    """Of a name as [folder, its number, the run's id]; an older run has no id, one that does not save no folder."""
    with contextlib.suppress(ValueError, TypeError):
        folder, inode, *run = json.loads(name)
        if isinstance(folder, str):
            return folder, inode, run[0] if run else None
    return None, 0, None


def _is_there(folder: str, inode: int) -> bool:
    try:
        return os.stat(folder).st_ino == inode
    except (OSError, ValueError):
        return False


def end_last_line(path: Path) -> None:
    """Cut a last record that a kill has torn; give its end to any other line that lacks it."""
    content = path.read_bytes()
    start = content.rfind(b"\n") + 1
    if start == len(content):
        return
    with path.open("r+b") as file:
        last = content[start:]
        is_torn = last.startswith(RECORD_START) or RECORD_START.startswith(last) or not last.strip(b"\0")
        if is_torn and _record(last) is None:
            file.truncate(start)
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")


def _set_lost_aside(path: Path, continued_at: int) -> None:
    """Move the records of later iterations, which are about to come a second time, to a file beside this one."""
    kept, lost, unknown = [], [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        record = _record(line)
        unknown += record is None
        is_lost = record is not None and isinstance(record.get("iteration"), int) and record["iteration"] > continued_at
        (lost if is_lost else kept).append(line)
    if unknown:
        say(f"warning: {path}: {unknown} lines are no records and stay as they are", to_stderr=True)
    if not lost:
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        _write_as(path, partial, b"".join(kept))
        with (path.parent / LOST).open("ab", buffering=0) as file:
            append_whole(file.fileno(), b"".join(lost))
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)
    say(f"{path}: {len(lost)} records after iteration {continued_at} moved to {LOST}")


def _write_as(path: Path, partial: Path, content: bytes) -> None:
    """Write a file that is to take the place of `path`, with its mode and owner."""
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    shutil.copymode(path, partial)
    with contextlib.suppress(PermissionError):
        # Only root may give a file away; anybody else has to do with a file of their own.
        os.chown(partial, path.stat().st_uid, path.stat().st_gid)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
