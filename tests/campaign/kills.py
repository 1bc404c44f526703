"""R1, R2: ranks and torchrun are killed; the same command goes on to the same bits."""

import os
import signal
import time

from tests.campaign import runs
from tests.campaign.attempts import Attempt, Row, expect
from tests.campaign.checks import expect_done, expect_same_run, wait_for_moment, wait_for_training
from tests.campaign.processes import RealProcess, run, start


def kill_ranks(attempt: Attempt) -> None:
    """Kill a random rank up to three times."""
    random, save = attempt.random, attempt.folder / "run"
    if attempt.number % 12 == 11:
        _kill_a_rank_under_torchrun(attempt)
        return
    layout = random.choice(list(runs.LAYOUTS))
    ranks, base = runs.LAYOUTS[layout][0], attempt.base
    command = runs.train(save, base.data, layout, *random.choice(([], ["--async-save"])))
    for _ in range(random.randint(1, 3)):
        job = start(command, attempt.folder, ranks=ranks)
        wait_for_moment(job, save, random, base.seconds[layout])
        random.choice(job.ranks).signal(signal.SIGKILL)
        if job.wait().code == 0:
            break
    expect_done(run(command, attempt.folder, ranks=ranks))
    expect_same_run(base.references[layout], save)


def _kill_a_rank_under_torchrun(attempt: Attempt) -> None:
    """torchrun starts the ranks again by itself."""
    random, save = attempt.random, attempt.folder / "run"
    layout = random.choice([name for name, (ranks, _) in runs.LAYOUTS.items() if ranks == 2])
    command = runs.train(save, attempt.base.data, layout)
    process = RealProcess(command, attempt.folder, 2, ["--max-restarts", "2"])
    try:
        wait_for_training(process, save, random.randint(1, runs.STEPS - 1))
        ranks = process.ranks()
        if ranks:
            os.kill(random.choice(ranks), signal.SIGKILL)
        done = process.wait(100)
    finally:
        process.end()
    expect(done.code == 0, f"torchrun --max-restarts 2 ended with {done.codes}: {done.said[-700:]}")
    expect_same_run(attempt.base.references[layout], save)


def kill_torchrun(attempt: Attempt) -> None:
    """Kill torchrun: its ranks go with it."""
    random, save = attempt.random, attempt.folder / "run"
    layout = random.choice([name for name, (ranks, _) in runs.LAYOUTS.items() if ranks == 2])
    number = random.choice((signal.SIGKILL, signal.SIGUSR1))
    command = runs.train(save, attempt.base.data, layout, *random.choice(([], ["--async-save"])))
    # Long enough to be killed in the middle, whatever the signal's way takes.
    longer = [*command, "--train-iters", "100000"]
    process = RealProcess(longer, attempt.folder, 2)
    try:
        wait_for_training(process, save, random.randint(1, runs.STEPS - runs.SAVE_INTERVAL))
        expect(process.process.poll() is None, f"ended by itself: {process.said[-700:]}")
        os.kill(process.pid, number)
        deadline = time.monotonic() + 15
        while left := process.ranks():
            expect(time.monotonic() < deadline, f"{len(left)} ranks outlive torchrun by 15 seconds")
            time.sleep(0.05)
    finally:
        process.end()
    reached = runs.saved_iterations(save)
    if not reached or reached[-1] <= runs.STEPS:
        expect_done(run(command, attempt.folder, ranks=2))
        expect_same_run(attempt.base.references[layout], save)
    else:
        # It was past the reference's end by then: go back into it.
        back = [*command, "--load", str(save / f"iter_{runs.SAVE_INTERVAL:07d}")]
        expect_done(run(back, attempt.folder, ranks=2))
        expect_same_run(attempt.base.references[layout], save)


ROWS = [
    Row("R1", "kills of ranks, SIGKILL at a random time", kill_ranks, attempts=72, short=10, seconds=240),
    Row("R2", "kills of torchrun, KILL and USR1", kill_torchrun, attempts=16, short=1, seconds=240),
]
