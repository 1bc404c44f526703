"""R8: the same command gives the same bytes, in whatever pieces it was done."""

import os
import shutil
import time
from pathlib import Path

from tests.campaign import runs
from tests.campaign.attempts import Attempt, Row, expect_right
from tests.campaign.checks import expect_done, kill_sessions
from tests.campaign.processes import run, start


def repeat(attempt: Attempt) -> None:
    """One command, twice."""
    (prepare_with_kills, train_twice, generate_in_other_batches)[attempt.number % 3](attempt)


def prepare_with_kills(attempt: Attempt) -> None:
    """prepare_data with other --workers and --part-megabytes, killed up to twice."""
    dice, folder = attempt.random, attempt.folder
    text = folder / "input.jsonl"
    lines = dice.randint(20_000, 60_000)
    text.write_text("".join(f'{{"text": "{n} {dice.random()} é {n * n}"}}\n' for n in range(lines)), encoding="utf-8")
    flags = ["prepare_data", "--input", str(text), "--tokenizer-type", dice.choice(("ByteTokenizer", "CharTokenizer"))]
    expect_done(run([*flags, "--output-prefix", str(folder / "once" / "corpus")], folder))
    workers = dice.choice((1, 1, 2, 3)) if flags[-1] == "ByteTokenizer" else 1
    again = [*flags, "--output-prefix", str(folder / "again" / "corpus"), "--workers", str(workers),
             "--part-megabytes", "1"]  # fmt: skip
    has_ended = False
    for _ in range(dice.randint(0, 2)):
        job = start(again, folder)
        time.sleep(dice.uniform(0, 0.4) if workers == 1 else dice.uniform(0, 4))
        kill_sessions(job)
        has_ended = job.wait().code == 0
    if not has_ended:
        expect_done(run(again, folder))
    same_folders(folder / "once", folder / "again")


def generate_in_other_batches(attempt: Attempt) -> None:
    """generate, at once and in batches of another size."""
    dice, folder = attempt.random, attempt.folder
    sampler = dice.choice(("euler", "analytic", "ancestral", "event-driven"))
    flags = ["--sampler", sampler, "--seed", str(dice.randrange(2**40)), "--num-samples", "5", "--sampling-steps",
             str(dice.randint(1, 12))]  # fmt: skip
    found = []
    for batch_size in (5, dice.randint(1, 4)):
        output = folder / f"{batch_size}.jsonl"
        expect_done(run(runs.generate(attempt.base.run, output, *flags, "--batch-size", str(batch_size)), folder))
        found.append([(one["sample"], one["tokens"], one["text"]) for one in runs.records(output)])
    expect_right(found[0] == found[1], f"{flags}: other samples in other batches")


def train_twice(attempt: Attempt) -> None:
    """Two runs into a folder of one name: every file of every checkpoint."""
    layout = attempt.random.choice(list(runs.LAYOUTS))
    save, flags = attempt.folder / "run", attempt.random.choice(([], ["--async-save"]))
    command = runs.train(save, attempt.base.data, layout, *flags)
    for kept in ("first", "second"):
        expect_done(run(command, attempt.folder, ranks=runs.LAYOUTS[layout][0]))
        (attempt.folder / kept).mkdir()
        for checkpoint in save.glob("iter_*"):
            checkpoint.rename(attempt.folder / kept / checkpoint.name)
        shutil.rmtree(save)
    same_folders(attempt.folder / "first", attempt.folder / "second")


def same_folders(first: Path, second: Path) -> None:
    """Equal names and equal bytes."""
    names = [sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file()) for one in (first, second)]
    expect_right(names[0] == names[1], f"other files: {set(names[0]) ^ set(names[1])}")
    for name in names[0]:
        same = (first / name).read_bytes() == (second / name).read_bytes()
        expect_right(same, f"{os.path.basename(name)} has other bytes the second time")


ROWS = [Row("R8", "the same bytes twice: data, samples, checkpoints", repeat, attempts=60, short=6)]
