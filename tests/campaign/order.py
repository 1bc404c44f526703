"""R7: whatever ends a run and in whatever layout it goes on, each sample is trained on once, in order."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests.campaign import runs
from tests.campaign.attempts import Attempt, Row, expect, expect_right
from tests.campaign.checks import expect_done, expect_same_run, wait_for_moment
from tests.campaign.processes import run, start

TOLERANCE = 1e-4


def change_layouts(attempt: Attempt) -> None:
    """Up to four launches, each in a layout of its own, killed or asked to end; then one that ends."""
    random, save, base = attempt.random, attempt.folder / "run", attempt.base
    logs = attempt.folder / "samples"
    logs.mkdir()
    launches = random.randint(1, 4)
    for launch in range(launches):
        layout = random.choice(list(runs.LAYOUTS))
        command, ranks = runs.train(save, base.data, layout), runs.LAYOUTS[layout][0]
        job = start(command, attempt.folder, ranks=ranks, before=log_samples(logs / f"{launch}-{layout}"))
        wait_for_moment(job, save, random, base.seconds[layout])
        random.choice(job.ranks).signal(random.choice((signal.SIGKILL, signal.SIGTERM)))
        job.wait()
    layout = random.choice(list(runs.LAYOUTS))
    last = log_samples(logs / f"{launches}-{layout}")
    done = run(runs.train(save, base.data, layout), attempt.folder, ranks=runs.LAYOUTS[layout][0], before=last)
    expect_done(done)
    expect_once_each(logs)
    expect_same_run(base.references["one"], save, TOLERANCE)


def log_samples(log: Path) -> Callable[[int], None]:
    """A hook that writes the number of every training sample that a rank reads to LOG-RANK."""

    def install(rank: int) -> None:
        from sedd_megatron.data.windows import CorpusWindows

        descriptor = os.open(f"{log}-{rank}", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        read = CorpusWindows.__getitem__

        def logged(windows: CorpusWindows, n: int):
            if windows.shuffle:
                os.write(descriptor, f"{n}\n".encode())
            return read(windows, n)

        CorpusWindows.__getitem__ = logged

    return install


def expect_once_each(logs: Path) -> None:
    """Launches together trained on samples 0 to N - 1: each from where a checkpoint of those before it ends."""
    position, end = 0, 0
    names = sorted({path.name.rsplit("-", 1)[0] for path in logs.iterdir()}, key=lambda name: int(name.split("-")[0]))
    for name in names:
        by_rank = [[int(n) for n in path.read_text().split()] for path in sorted(logs.glob(f"{name}-*"))]
        by_rank = [numbers for numbers in by_rank if numbers]
        if not by_rank:
            continue
        for numbers in by_rank:
            expect_right(numbers == sorted(set(numbers)), f"launch {name} read {numbers}")
        read = sorted({n for numbers in by_rank for n in numbers})
        if "dp2" in name:
            expect_right(len(read) == sum(map(len, by_rank)), f"launch {name}: two replicas read one sample")
        start = read[0]
        expect_right(start % runs.GLOBAL_BATCH == 0, f"launch {name} starts at sample {start}")
        expect(start >= position, f"launch {name} starts at sample {start}, one before it had gone on from {position}")
        expect_right(start <= end, f"launch {name} starts at sample {start}, those before it had read {end}")
        gaps = set(range(start, start + len(read))) - set(read)
        # A rank that was killed may have been a micro-batch behind its neighbours.
        expect_right(not gaps or min(gaps) >= read[-1] - 2 * runs.GLOBAL_BATCH, f"launch {name} left out {gaps}")
        position, end = start, read[-1] + 1
    if end:
        expect_right(end == runs.STEPS * runs.GLOBAL_BATCH, f"{end} samples were read in all")


ROWS = [Row("R7", "each sample once, over kills and changes of layout", change_layouts, attempts=48, short=5)]
