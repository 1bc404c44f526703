"""R6, R15: signals that ask a run to end, and a rank that is stopped."""

import os
import signal
import time

from tests.campaign import runs
from tests.campaign.attempts import Attempt, Row, expect
from tests.campaign.checks import (
    expect_done,
    expect_no_traceback,
    expect_same_run,
    wait_for_moment,
    wait_for_training,
    wait_until,
)
from tests.campaign.processes import Done, RealProcess, run, start

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def signal_ranks(attempt: Attempt) -> None:
    """One signal, or two, to one rank or to all; every tenth by way of torchrun."""
    if attempt.number % 10 == 9:
        _signal_torchrun(attempt)
        return
    random, save, base = attempt.random, attempt.folder / "run", attempt.base
    layout, number = random.choice(list(runs.LAYOUTS)), random.choice(SIGNALS)
    ranks = runs.LAYOUTS[layout][0]
    command = runs.train(save, base.data, layout, *random.choice(([], ["--async-save"])))
    job = start(command, attempt.folder, ranks=ranks)
    wait_for_moment(job, save, random, base.seconds[layout])
    was_training = runs.last_iteration(save) > 0
    targets = job.ranks if random.random() < 0.5 else [random.choice(job.ranks)]
    for rank in targets:
        rank.signal(number)
    is_twice = random.random() < 0.25
    if is_twice:
        time.sleep(random.uniform(0, 0.05))
        for rank in targets:
            rank.signal(random.choice(SIGNALS))
    done = job.wait()
    expect_no_traceback(done)
    if was_training and not is_twice:
        _expect_saved(done, save, number)
    elif not is_twice:
        # Of another rank the launcher's SIGTERM.
        allowed = {0, 2, -number, 128 + number, -signal.SIGTERM, 128 + signal.SIGTERM}
        expect(set(done.codes) <= allowed, f"exit codes {done.codes} after {number.name}")
    expect_done(run(command, attempt.folder, ranks=ranks))
    expect_same_run(base.references[layout], save)


def _expect_saved(done: Done, save, number: signal.Signals) -> None:
    saved, trained = runs.saved_iterations(save), runs.last_iteration(save)
    # A signal may find a run that has done all its work and is on its way out.
    is_good = done.code == 0 or (saved[-1:] == [runs.STEPS] and done.code in (-number, 128 + number))
    expect(is_good, f"exit codes {done.codes} after {number.name}: {done.said[-500:]}")
    expect(saved[-1:] == [trained], f"{number.name}: trained to {trained}, saved {saved}")
    is_told = number.name in done.said or trained == runs.STEPS
    expect(is_told, f"not a word of {number.name}: {done.said[-500:]}")


def _signal_torchrun(attempt: Attempt) -> None:
    random, save = attempt.random, attempt.folder / "run"
    layout = random.choice([name for name, (ranks, _) in runs.LAYOUTS.items() if ranks == 2])
    number = random.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    command = runs.train(save, attempt.base.data, layout)
    process = RealProcess(command, attempt.folder, 2)
    try:
        wait_for_training(process, save, random.randint(1, runs.STEPS - 1))
        if process.process.poll() is None:
            os.kill(process.pid, number)
        done = process.wait(60)
    finally:
        process.end()
    expect_no_traceback(done)
    saved, trained = runs.saved_iterations(save), runs.last_iteration(save)
    expect(saved[-1:] == [trained], f"{number.name} to torchrun: trained to {trained}, saved {saved}")
    expect_done(run(command, attempt.folder, ranks=2))
    expect_same_run(attempt.base.references[layout], save)


def stop_a_rank(attempt: Attempt) -> None:
    """SIGSTOP: the others end with a line when --distributed-timeout-minutes 1.5 are over."""
    random, save, base = attempt.random, attempt.folder / "run", attempt.base
    layout = random.choice([name for name, (ranks, _) in runs.LAYOUTS.items() if ranks == 2])
    command = runs.train(save, base.data, layout)
    job = start(command, attempt.folder, ranks=2)
    iteration = random.randint(1, runs.STEPS - 2)
    wait_until(lambda: runs.last_iteration(save) >= iteration, job.is_running)
    stopped = random.choice(job.ranks)
    (other,) = [rank for rank in job.ranks if rank is not stopped]
    stopped.signal(signal.SIGSTOP)
    try:
        deadline = time.monotonic() + 130
        while other.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        ended_itself = other.poll() is not None
    finally:
        job.signal(signal.SIGKILL)
        job.wait()
    if other.returncode != 0:
        expect(ended_itself, "the other rank still waits after 130 seconds")
        expect_no_traceback(Done([other.returncode], other.said))
        expect("error: " in other.said, f"the other rank ended without a line: {other.said[-500:]}")
    expect_done(run(command, attempt.folder, ranks=2))
    expect_same_run(base.references[layout], save)


ROWS = [
    Row("R6", "signals TERM, INT, HUP, USR1 at a random time, once and twice", signal_ranks, attempts=60, short=8),
    Row("R15", "a stopped rank (SIGSTOP)", stop_a_rank, attempts=8, short=1, seconds=200, only_waits=True),
]
