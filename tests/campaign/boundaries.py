"""Counts what a process does to the files of a folder, and ends it between any two of these operations."""

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
KILLED = 137


def count(root: Path, log: Path) -> Callable[[int], None]:
    """A hook that writes a line to LOG-RANK for each operation on files below `root`."""

    def install(rank: int) -> None:
        descriptor = os.open(f"{log}-{rank}", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        _install(root, lambda name: os.write(descriptor, f"{name}\n".encode()))

    return install


def kill_at(root: Path, killed_rank: int, number: int, loses_power: bool) -> Callable[[int], None]:
    """A hook that ends a rank before its operation of this number (from 0), without any last words.

    With `loses_power` every file that was written since the start and not brought to the disk is cut at a random length
    (metrics.jsonl is not: a line of it is nobody's promise).
    """

    # What each rank has brought there.
    synced = root.parent / "synced"

    def install(rank: int) -> None:
        state, begin = {"seen": 0}, time.time()

        def before(name: str) -> None:
            if rank == killed_rank and state["seen"] == number:
                if loses_power:
                    _cut_unsynced(root, begin, set(synced.read_text().split()) if synced.exists() else set(), number)
                os._exit(KILLED)
            state["seen"] += 1

        _install(root, before, synced)

    return install


def _install(root: Path, before: Callable[[str], object], synced: Path | None = None) -> None:
    prefix, own = f"{root}", {"busy": False}

    def hook(event: str, arguments: tuple) -> None:
        if own["busy"] or not (event in CHANGES or event == "open"):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
            return
        # Relative to a folder's descriptor, as shutil.rmtree has it: always below what it was called with.
        is_below = str(arguments[0]).startswith(prefix) or (event in ("os.remove", "os.rmdir") and arguments[1] != -1)
        if is_below:
            own["busy"] = True
            before(f"{event} {arguments[0]}")
            own["busy"] = False

    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(prefix):
            own["busy"] = True
            before(f"fsync {os.readlink(f'/proc/self/fd/{descriptor}')}")
            own["busy"] = False
        plain_fsync(descriptor)
        if synced is not None:
            with synced.open("a") as file:
                file.write(f"{os.fstat(descriptor).st_ino}\n")

    plain_fsync, os.fsync = os.fsync, fsync
    sys.addaudithook(hook)


def _cut_unsynced(root: Path, begin: float, synced: set[str], seed: int) -> None:
    lengths = random.Random(seed)
    for path in sorted(root.rglob("*")):
        if not path.is_file() or path.name == "metrics.jsonl":
            continue
        status = path.stat()
        if status.st_mtime >= begin and str(status.st_ino) not in synced:
            with path.open("r+b") as file:
                file.truncate(lengths.randint(0, status.st_size))
