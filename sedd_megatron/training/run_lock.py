"""The lock on a --save folder: one run at a time writes there.

DIR/training.lock says who: host, process, since when. It is made by a link, which one start alone can do (where there
are no links, by making the file), and lives as long as the first rank's process. A lock that a killed run left behind
is taken over once its owner is known to be dead:

- On the same machine: no process of that number is there, or it is one that began at another time, or nobody has yet
  asked for the exit status of it.
- An owner of an earlier start of this job of Slurm, which ends a job's processes before it requeues it (those on a
  node that it has lost look, as every owner does, before each checkpoint).
- On another machine, or in a container with process numbers of its own, a process cannot be looked for; nor can another
  user's be on a machine that hides them (hidepid), where it looks as one that is not there. A thread of the
  owner touches the file every BEAT_SECONDS; a start that finds the lock watches it for WATCH_SECONDS, whatever the
  clocks say, and takes it over if it was not touched. An owner that could not touch it for so long (a file system that
  hung, a stopped process) is taken for dead; so it looks before each checkpoint whether the lock is still its own.
- A lock that was copied with its folder, whose number is another's, is watched in the same way: its owner touches the
  one of its own folder.
- Of a lock that was not written to its end (where there are no links, or by a machine that lost its power) nobody knows
  the owner: it is watched in the same way.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from sedd_megatron.errors import UserError, one_line, say
from sedd_megatron.launcher import slurm_job, slurm_restarts
from sedd_megatron.training.checkpoint_format import write_synced
from sedd_megatron.training.processes import started_at, this_machine

FILE = "training.lock"
BEAT_SECONDS, WATCH_SECONDS, SECONDS_TO_WRITE = 10.0, 60.0, 2.0
# What os.link says on a file system without hard links.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    host: str
    machine: str  # tells processes that this one can look for: boot and process namespace
    process: int
    started: float  # seconds from the machine's boot to the process' start
    since: str
    token: str  # of this one start
    folder: int | None = None  # the inode of the folder where it was made; older locks lack it
    job: str | None = None  # of Slurm, and
    restarts: int = 0  # how often that was requeued before

    @classmethod
    def of_this_process(cls) -> "Owner":
        """This process, since now."""
        pid, now = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(
            socket.gethostname(), this_machine(), pid, started_at(psutil.Process(pid)), now, secrets.token_hex(8),
            job=slurm_job(os.environ), restarts=slurm_restarts(os.environ),
        )  # fmt: skip

    @classmethod
    def unknown(cls, inode: int) -> "Owner":
        """Whose lock, the file of this number, was not written to its end; the same for all who look at it."""
        return cls("", "", 0, 0.0, "", f"unknown-{inode}")

    def __str__(self) -> str:
        if not self.machine:
            return "an unknown process (the lock was not written to its end)"
        return f"process {self.process} on {self.host}, since {self.since}"


class RunLock:
    """The lock on `root`, held by this process from `acquire` to `release`."""

    def __init__(self, root: Path, beat_seconds: float = BEAT_SECONDS, watch_seconds: float = WATCH_SECONDS) -> None:
        self.path = root / FILE
        self.beat_seconds, self.watch_seconds = beat_seconds, watch_seconds
        self.owner = Owner.of_this_process()
        self._is_taken = False
        self._ended = threading.Event()

    def acquire(self) -> list[str]:
        """Take the lock, or take it over from a dead owner; what people are told.

        Raises:
            UserError: a live run holds it, named; or the folder cannot be written to.
        """
        try:
            self.owner = replace(self.owner, folder=self.path.parent.stat().st_ino)
            lines = self._make()
        except OSError as error:
            raise UserError(f"--save {self.path.parent}: cannot be locked ({one_line(error)}); name another") from error
        self._is_taken = True
        threading.Thread(target=self._beat, name="lock", daemon=True).start()
        return lines

    def check(self) -> None:
        """Check that no other run has taken the lock over; one that was removed is made again.

        Raises:
            UserError: another run has; what this process would write could meet what that one does.
            OSError: it cannot be made again.
        """
        owner = _read(self.path)
        if owner is None:
            for line in [f"{self.path}: was removed while its run goes on, and is made again", *self._make()]:
                say(line)
        elif owner != self.owner:
            raise UserError(
                f"{self.path}: was taken from this run and is held by {owner}; nothing more is saved: end one of the "
                "two runs, or save to another folder"
            )

    def release(self) -> None:
        """Give the lock back, if it was taken and is still this process'."""
        if not self._is_taken:
            return
        self._ended.set()
        # A lock that cannot be removed is one of a dead owner when this process has ended.
        with contextlib.suppress(OSError):
            if _read(self.path) == self.owner:
                self.path.unlink()

    def _make(self) -> list[str]:
        own = self.path.with_name(f".{FILE}.{self.owner.token}")
        try:
            write_synced(own, json.dumps(asdict(self.owner)) + "\n")
            return self._take(self.path, own)
        finally:
            with contextlib.suppress(OSError):
                own.unlink(missing_ok=True)

    def _take(self, path: Path, own: Path) -> list[str]:
        """Have `path` be this process' file. Whoever takes over from a dead owner first takes a lock on doing so, which
        is one for each dead owner: of two that find it dead one comes second, and finds a live one.
        """
        while True:
            try:
                _link(own, path)
                return []
            except FileExistsError:
                owner = _read(path)
            if owner == self.owner:
                return []  # a network file system may make a link and lose the answer, and is asked again
            if owner is None and path.is_symlink():
                raise UserError(f"{path}: is a link to nothing, and no lock; remove it if no run saves there")
            if owner is None:
                continue  # given back in between
            if self._is_alive(owner, path, own):
                raise UserError(
                    f"--save {self.path.parent}: another run saves there, {owner}; wait for it or end that process "
                    "(it may train on without its launcher), or save to another folder"
                )
            right = path.with_name(f".{FILE}.after-{owner.token}")
            self._take(right, own)
            try:
                if _read(path) == owner:
                    os.replace(own, path)
                    fate = "which is a copy of another folder's" if self._is_copy(owner) else "whose run is dead"
                    return [f"took over {path}, {fate}: {owner}"]
            finally:
                right.unlink(missing_ok=True)

    def _is_alive(self, owner: Owner, path: Path, own: Path) -> bool:
        if owner.job is not None and owner.job == self.owner.job and owner.restarts < self.owner.restarts:
            return False
        # Of a copy its run knows nothing. Watched all the same: some file systems number a folder anew.
        if owner.machine != self.owner.machine or self._is_copy(owner):
            return self._is_touched(owner, path)
        try:
            process = psutil.Process(owner.process)
            return process.status() != psutil.STATUS_ZOMBIE and abs(started_at(process) - owner.started) < 0.5
        except psutil.NoSuchProcess:
            # Another user's may be hidden.
            return not _have_one_user(path, own) and self._is_touched(owner, path)
        except psutil.AccessDenied:
            return True

    def _is_copy(self, owner: Owner) -> bool:
        return owner.folder is not None and owner.folder != self.owner.folder

    def _is_touched(self, owner: Owner, path: Path) -> bool:
        say(f"{path} is held by {owner}: watching it for {self.watch_seconds:.0f} s")
        before, deadline = _touched_at(path), time.monotonic() + self.watch_seconds
        while time.monotonic() < deadline:
            time.sleep(self.beat_seconds / 10)
            now = _touched_at(path)
            if now != before:
                return now is not None
        return False

    def _beat(self) -> None:
        while not self._ended.wait(self.beat_seconds):
            try:
                # Not another's, which would look alive.
                if _read(self.path) == self.owner:
                    os.utime(self.path)
            except (OSError, UserError):
                continue  # `check` says so, if the lock is gone


def _link(own: Path, path: Path) -> None:
    """Have `path` be a file as `own` is, which one process alone can do."""
    try:
        os.link(own, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with path.open("xb") as file:
            try:
                file.write(own.read_bytes())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                path.unlink()
                raise


def _read(path: Path) -> Owner | None:
    deadline = time.monotonic() + SECONDS_TO_WRITE
    while True:
        try:
            with path.open("rb") as file:
                content, inode = file.read(), os.fstat(file.fileno()).st_ino
            return Owner(**json.loads(content))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            # Without links its owner may not have written it to the end yet.
            if time.monotonic() > deadline:
                if _is_torn(content):
                    return Owner.unknown(inode)
                raise UserError(f"{path}: is not the lock of a run; remove it if no run saves there") from error
        time.sleep(SECONDS_TO_WRITE / 20)


def _is_torn(content: bytes) -> bool:
    """Whether it may be the beginning of a lock, and no file of somebody's own."""
    start = b'{"host": "'
    return content[: len(start)] == start[: len(content)]


def _have_one_user(path: Path, own: Path) -> bool:
    # By two files of the folder: a network file system may give files to another user than the process'.
    try:
        return path.stat().st_uid == own.stat().st_uid
    except FileNotFoundError:
        return True  # given back in between


def _touched_at(path: Path) -> int | None:
    # Opened, since a network file system may answer a mere question from memory.
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
