"""metrics.jsonl: one record a line, each iteration once, on a disk that may be full for a while."""

import contextlib
import json
import math
import os
import shutil
import time
from collections import deque
from pathlib import Path
from typing import Any

from sedd_megatron.errors import say

LOST = "metrics-lost.jsonl"
# Opening reads the whole file, which is too much for each step.
SECONDS_BETWEEN_TRIES = 10.0


class MetricsFile:
    """Appends records to a file of JSON lines. No fault of the disk is raised: the records wait in memory for their
    turn, with one line when that begins and one when it is over.
    """

    def __init__(self, path: Path, continued_at: int | None) -> None:
        """`continued_at` is the iteration from which this run goes on with the run that wrote the file; None to add to
        whatever is there.
        """
        self.path = path
        self._continued_at = continued_at
        self._waiting: deque[bytes] = deque()
        self._descriptor: int | None = None
        self._failed_at: float | None = None
        self._write_waiting()

    def write(self, record: dict[str, Any]) -> None:
        """Add a record; a number that is not finite, for which JSON has no word, becomes null."""
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self._waiting.append(json.dumps(finite, allow_nan=False).encode() + b"\n")
        if self._failed_at is None or time.monotonic() - self._failed_at > SECONDS_BETWEEN_TRIES:
            self._write_waiting()

    def close(self) -> None:
        """Write what waits, or say how much of it is lost."""
        self._write_waiting()
        if self._waiting:
            say(f"warning: {self.path}: {len(self._waiting)} records were not written", to_stderr=True)
        self._close()

    def _write_waiting(self) -> None:
        try:
            if self._descriptor is None:
                self._open()
            while self._waiting:
                _append_whole(self._descriptor, self._waiting[0])
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
        if target.is_file():
            _end_last_line(target)
            if self._continued_at is not None:
                _set_lost_aside(target, self._continued_at)
                self._continued_at = None
        self._descriptor = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _append_whole(descriptor: int, line: bytes) -> None:
    """All of a line or nothing of it: a full disk takes a part first."""
    size, left = os.fstat(descriptor).st_size, line
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError:
        if len(left) < len(line):
            os.ftruncate(descriptor, size)
        raise


def _end_last_line(path: Path) -> None:
    """Cut a last line that a kill has torn; give its end to one that lacks nothing else."""
    content = path.read_bytes()
    start = content.rfind(b"\n") + 1
    if start == len(content):
        return
    with path.open("r+b") as file:
        if _record(content[start:]) is None:
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
            _append_whole(file.fileno(), b"".join(lost))
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
