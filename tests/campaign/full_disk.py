"""R5: the disk is full: training goes on, what was there stays whole, the same command goes on when there is room."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.campaign import runs
from tests.campaign.attempts import Attempt, Row, expect, expect_right
from tests.campaign.checks import (
    expect_done,
    expect_no_traceback,
    expect_refused,
    expect_same_run,
    expect_same_tensors,
    expect_samples,
    metrics_of,
)
from tests.campaign.processes import run

PAGE = 4096


class Disk:
    """A folder with so much room: a small tmpfs where one may be mounted, else a limit on the size of each file."""

    def __init__(self, folder: Path, room: int) -> None:
        self.folder = folder
        self.room = max(room, PAGE)
        self.is_mounted = False

    @contextlib.contextmanager
    def there(self) -> Iterator["Disk"]:
        """Mount it, and unmount it at the end."""
        self.folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={self.room}", "tmpfs", str(self.folder)]
        self.is_mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
        try:
            yield self
        finally:
            if self.is_mounted:
                subprocess.run(["umount", "-l", str(self.folder)], check=True)

    def limit(self, rank: int) -> None:
        """For the processes that write there."""
        if not self.is_mounted:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, self.room))

    def make_room(self) -> None:
        """As much as anybody needs; without a mount a start without `limit` has it."""
        if self.is_mounted:
            subprocess.run(["mount", "-o", "remount,size=64m", str(self.folder)], check=True)


def fill(attempt: Attempt) -> None:
    """One command that writes to a disk that is full, or becomes so."""
    kinds = (saves, saves, room_again, metrics, prepared_data, samples, published)
    kinds[attempt.number % len(kinds)](attempt)


def saves(attempt: Attempt) -> None:
    """Room for some checkpoints and not for all."""
    base, checkpoint = attempt.base, size_of(attempt.base.run / f"iter_{runs.STEPS:07d}")
    room = attempt.random.uniform(0.2, 3.8) * checkpoint
    with Disk(attempt.folder / "disk", int(room)).there() as disk:
        save, log_dir = disk.folder / "run", attempt.folder / "log"
        # Lines of metrics.jsonl that the disk has no room for are lost; elsewhere each stands there once.
        flags = attempt.random.choice(([], ["--log-dir", str(log_dir)]))
        command = runs.train(save, base.data, "one", *flags)
        done = run(command, attempt.folder, before=disk.limit)
        expect_no_traceback(done)
        there = runs.saved_iterations(save) if save.is_dir() else []
        if done.code == 0:
            expect(there[-1:] == [runs.STEPS], f"exit code 0, and the last checkpoint is of {there[-1:]}")
        else:
            expect_refused(done)
        if there:
            # What is there is whole.
            output = attempt.folder / "samples.jsonl"
            done = run(runs.generate(save, output), attempt.folder)
            expect_samples(done, output, [base.samples[there[-1]]])
        disk.make_room()
        expect_done(run(command, attempt.folder))
        if flags:
            expect_same_run(base.references["one"], save, log_dir=log_dir)
        else:
            expect_same_tensors(base.references["one"], save)
            metrics_of(save)


def room_again(attempt: Attempt) -> None:
    """The first save finds no room, a later one does."""
    base, dice = attempt.base, attempt.random
    checkpoint = size_of(base.run / f"iter_{runs.STEPS:07d}")
    with Disk(attempt.folder / "disk", 5 * checkpoint).there() as disk:
        save, filler = disk.folder / "run", disk.folder / "filler"
        if disk.is_mounted:
            fill_up(filler, room=dice.randint(3 * PAGE, checkpoint // 2))
        freed = dice.choice((6, 9))
        before = _at_save(freed, filler)
        done = run(runs.train(save, base.data), attempt.folder, before=before)
        expect_done(done)
        expect_same_tensors(base.references["one"], save)


def _at_save(iteration: int, filler: Path) -> Callable[[int], None]:
    """A hook that removes `filler` when the save of this iteration begins."""

    def install(rank: int) -> None:
        def hook(event: str, arguments: tuple) -> None:
            if event == "os.mkdir" and f"iter_{iteration:07d}" in str(arguments[0]):
                filler.unlink(missing_ok=True)

        sys.addaudithook(hook)

    return install


def metrics(attempt: Attempt) -> None:
    """--log-dir on a full disk never ends training."""
    base, save = attempt.base, attempt.folder / "run"
    with Disk(attempt.folder / "disk", PAGE * 4).there() as disk:
        log_dir = disk.folder / "log"
        if disk.is_mounted:
            log_dir.mkdir()
            fill_up(disk.folder / "filler", room=attempt.random.choice((0, PAGE)))
        flags = ["--log-dir", str(log_dir)]
        expect_done(run(runs.train(save, base.data, "one", *flags), attempt.folder))
        expect_same_tensors(base.references["one"], save)


def prepared_data(attempt: Attempt) -> None:
    """prepare_data goes on from its last part."""
    text = attempt.folder / "text.txt"
    text.write_text("".join(f"{n} {n * n}\n" for n in range(attempt.random.randint(40_000, 90_000))))
    flags = ["prepare_data", "--input", str(text), "--tokenizer-type", "ByteTokenizer", "--output-prefix"]
    expect_done(run([*flags, str(attempt.folder / "unbroken")], attempt.folder))
    expected = (attempt.folder / "unbroken_text_document.bin").read_bytes()
    with Disk(attempt.folder / "disk", int(len(expected) * attempt.random.uniform(0.05, 0.95))).there() as disk:
        command = [*flags, str(disk.folder / "corpus")]
        expect_refused(run(command, attempt.folder, before=disk.limit))
        expect(not (disk.folder / "corpus_text_document.idx").exists(), "a corpus that is not whole is there")
        disk.make_room()
        expect_done(run(command, attempt.folder))
        expect_right((disk.folder / "corpus_text_document.bin").read_bytes() == expected, "other tokens")


def samples(attempt: Attempt) -> None:
    """generate --output and --trace."""
    with Disk(attempt.folder / "disk", PAGE).there() as disk:
        fill_up(disk.folder / "filler", room=0)
        flag, name = attempt.random.choice((("--output", "samples.jsonl"), ("--trace", "trace.html")))
        command = ["generate", "--load", str(attempt.base.run), *runs.SAMPLING, flag, str(disk.folder / name)]
        if disk.is_mounted:
            expect_refused(run(command, attempt.folder), name)


def published(attempt: Attempt) -> None:
    """convert --to-published is there whole or not at all."""
    with Disk(attempt.folder / "disk", attempt.random.randint(1, 6) * PAGE).there() as disk:
        command = ["convert", "--load", str(attempt.base.run), "--to-published", str(disk.folder / "model")]
        expect_refused(run(command, attempt.folder, before=disk.limit))
        expect(not (disk.folder / "model").exists(), "a folder that is not whole is there")
        disk.make_room()
        expect_done(run(command, attempt.folder))


def fill_up(path: Path, room: int) -> None:
    """A file that leaves so many bytes of its disk."""
    status = os.statvfs(path.parent)
    path.write_bytes(bytes(max(status.f_bavail * status.f_frsize - room, 0)))


def size_of(folder: Path) -> int:
    """Of the files in a folder, in whole pages."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())


ROWS = [Row("R5", "full disk: saves, metrics, data, samples, conversion", fill, attempts=70, short=7)]
