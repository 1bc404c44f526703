"""R3: a run dies at every step of a save; an old or a new whole checkpoint is there, and nothing else."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.campaign import boundaries, runs
from tests.campaign.attempts import Attempt, FailedError, Row, expect, expect_right
from tests.campaign.checks import expect_done, expect_refused, expect_samples, metrics_of
from tests.campaign.processes import run, start
from tests.campaign.runs import Base


@dataclass(frozen=True)
class Save:
    """A run that saves, and what may be there if it dies meanwhile."""

    name: str
    before: tuple[int, ...]  # iterations of the checkpoints that are there
    steps: int
    after: tuple[int, ...]  # of those that are there when the same command has ended well
    layout: str = "one"
    flags: tuple[str, ...] = ()
    load: int | None = None  # goes back to this iteration


@dataclass(frozen=True)
class Boundary:
    """Where it dies: before this operation of this rank."""

    save: Save
    rank: int
    number: int
    loses_power: bool


SAVES = [
    Save("first", (), 3, (3,)),
    Save("next", (3,), 6, (3, 6)),
    Save("async", (3,), 6, (3, 6), flags=("--async-save",)),
    Save("replaced", (3, 6), 6, (3, 6), load=3),
    Save("keep-last", (3, 6), 9, (9,), flags=("--keep-last", "1")),
    Save("keep-every", (3, 6), 9, (6, 9), flags=("--keep-last", "1", "--keep-every", "6")),
    Save("two ranks", (3,), 6, (3, 6), layout="dp2"),
]


def all_boundaries(base: Base) -> list[Boundary]:
    """Every operation of every kind of save, once as a kill and once as a loss of power."""
    found = []
    for save in SAVES:
        folder = base.folder / f"count {save.name}"
        folder.mkdir()
        ranks = runs.LAYOUTS[save.layout][0]
        prepare(base, save, folder / "run")
        done = run(command(base, save, folder / "run"), folder, ranks=ranks,
                   before=boundaries.count(folder / "run", folder / "log"))  # fmt: skip
        if done.code:
            # Its attempts fail, and say why.
            found.append(Boundary(save, 0, 0, False))
            continue
        for rank in range(ranks):
            log = folder / f"log-{rank}"
            operations = len(log.read_text().splitlines()) if log.exists() else 0
            found += [Boundary(save, rank, i, power) for i in range(operations) for power in (False, True)]
    return found


def die(attempt: Attempt) -> None:
    """Die there; sample; go on by the same command."""
    try:
        _die(attempt)
    except FailedError as error:
        case = attempt.case
        where = f"{case.save.name}, rank {case.rank}, operation {case.number}" + ", power lost" * case.loses_power
        raise type(error)(f"{where}: {error}") from error


def _die(attempt: Attempt) -> None:
    case, base, save = attempt.case, attempt.base, attempt.folder / "run"
    this, ranks = case.save, runs.LAYOUTS[case.save.layout][0]
    prepare(base, this, save)
    kill = boundaries.kill_at(save, case.rank, case.number, case.loses_power)
    job = start(command(base, this, save), attempt.folder, ranks=ranks, before=kill)
    codes = job.wait().codes
    if codes[case.rank] not in (boundaries.KILLED, 0):
        expect_done(job.wait())
    was_saved = this.steps in runs.saved_iterations(save) if save.is_dir() else False
    output = attempt.folder / "samples.jsonl"
    done = run(runs.generate(save, output), attempt.folder)
    whole = {this.steps, this.load, *this.before[-1:]} - {None}
    if done.code and not this.before:
        expect_refused(done, str(save))
    else:
        expect_samples(done, output, [base.samples[iteration] for iteration in whole])
    expect_done(run(command(base, this, save), attempt.folder, ranks=ranks))
    expected = runs.tensors(base.folder / this.layout / f"iter_{this.steps:07d}")
    found = runs.tensors(save / f"iter_{this.steps:07d}")
    difference = runs.Result({}, found).first_difference(runs.Result({}, expected))
    expect_right(difference is None, f"{difference}")
    there = runs.saved_iterations(save)
    # Where the last checkpoint was there already, nothing was saved since, and old ones go after a save.
    may_be = set(this.after) | (set(this.before) if was_saved else set())
    is_kept = set(this.after) <= set(there) <= may_be
    expect(is_kept, f"checkpoints {there}, must be {list(this.after)}")
    left = [path.name for path in save.iterdir() if path.name.endswith((".partial", ".replaced"))]
    expect(not left, f"{left} of the dead run is left")
    records = metrics_of(save)
    trained = sorted(iteration for kind, iteration in records if kind == "training")
    expect(trained == list(range(1, this.steps + 1)), f"metrics of iterations {trained}")


def prepare(base: Base, save: Save, root: Path) -> None:
    """The save folder as it is before."""
    if save.before:
        copy_run(base.folder / save.layout, root, save.before)


def copy_run(source: Path, root: Path, iterations: tuple[int, ...]) -> None:
    """A save folder with these checkpoints alone, as if the run had been killed after the last."""
    root.mkdir()
    for iteration in iterations:
        shutil.copytree(source / f"iter_{iteration:07d}", root / f"iter_{iteration:07d}")
    (root / "latest_checkpointed_iteration.txt").write_text(f"{iterations[-1]}\n")
    lines = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
    (root / "metrics.jsonl").write_text("".join(x for x in lines if json.loads(x)["iteration"] <= iterations[-1]))


def command(base: Base, save: Save, root: Path) -> list[str]:
    """The training command."""
    back = [] if save.load is None else ["--load", str(root / f"iter_{save.load:07d}")]
    return runs.train(root, base.data, save.layout, *save.flags, *back, steps=save.steps)


ROWS = [Row("R3", "death at every step of a save", die, attempts=2000, short=14, cases=all_boundaries)]
