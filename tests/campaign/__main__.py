"""python -m tests.campaign: the scorecard (tests/campaign/__init__.py says how it is used)."""

import argparse
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from tests.campaign import (
    damage,
    data_files,
    flags,
    full_disk,
    kills,
    non_finite,
    order,
    payloads,
    repeats,
    saves,
    signals,
)
from tests.campaign.attempts import Attempt, FailedError, Row, SilentlyWrongError
from tests.campaign.processes import die_with, end_marked, import_everything
from tests.campaign.runs import Base, make_base

MODULES = (kills, saves, damage, full_disk, signals, order, repeats, non_finite, flags, data_files, payloads)
ROWS = sorted((row for module in MODULES for row in module.ROWS), key=lambda row: int(row.id[1:]))
GOAL = 0.999
WAITING = 4  # attempts that only wait, beside the others
MESSAGE = 1200  # characters of what a failure says
PASSED, FAILED, WRONG = 0, 1, 2


@dataclass
class Score:
    """A row as far as it has come."""

    row: Row
    tried: int = 0
    passed: int = 0
    wrong: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Running:
    """An attempt in its own process."""

    row: Row
    number: int
    folder: Path
    report: Path
    deadline: float


def main(argv: Sequence[str]) -> int:
    """Run the attempts and print the scorecard; 0 if all passed."""
    arguments = parse(argv)
    rows = [row for row in ROWS if arguments.rows is None or row.id in arguments.rows]
    begin = time.monotonic()
    import_everything()
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    try:
        (folder / "base").mkdir()
        base = make_base(folder / "base")
        scores = attack(rows, base, folder, arguments, begin)
    finally:
        end_marked(f"{folder}/")
        unmount_below(folder)
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    card = scorecard(scores, arguments.command, time.monotonic() - begin)
    print(card)
    if arguments.output:
        Path(arguments.output).write_text(card + "\n", encoding="utf-8")
    return 0 if all(score.passed == score.tried for score in scores) else 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description="Attack the commands; a scorecard.")
    parser.add_argument("--short", action="store_true", help="two minutes")
    parser.add_argument("--rows", nargs="+", choices=[row.id for row in ROWS], metavar="ROW", help="only these")
    parser.add_argument("--seed", type=int, default=0, help="of what the attempts do")
    parser.add_argument("--attempts", type=int, help="of each row, at most; each has a number of its own")
    parser.add_argument("--attempt", type=int, help="only the one of this number, as a failure names it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="attempts at a time; one per core by default")
    parser.add_argument("--budget", type=float, help="seconds after which no attempt is started")
    parser.add_argument("--output", help="Markdown file for the scorecard")
    parser.add_argument("--keep", action="store_true", help="leave the temporary folder, and name it")
    arguments = parser.parse_args(argv)
    arguments.command = " ".join(["python -m tests.campaign", *argv])
    return arguments


def attack(rows: Sequence[Row], base: Base, folder: Path, arguments: argparse.Namespace, begin: float) -> list[Score]:
    """Run every attempt, some at a time, rows in turn so that a budget is shared among them."""
    scores = {row.id: Score(row) for row in rows}
    cases = {row.id: row.cases(base) if row.cases else None for row in rows}
    waiting = planned(rows, cases, arguments)
    num_planned, num_done = len(waiting), 0
    running: dict[int, Running] = {}
    while waiting or running:
        is_over = arguments.budget is not None and time.monotonic() - begin > arguments.budget
        waiting = [] if is_over else waiting
        for row, number in list(waiting):
            same_kind = sum(one.row.only_waits == row.only_waits for one in running.values())
            if same_kind < (WAITING if row.only_waits else arguments.jobs):
                waiting.remove((row, number))
                case = None if cases[row.id] is None else cases[row.id][number]
                pid, one = start(row, number, case, base, folder, arguments.seed)
                running[pid] = one
        for pid, one in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended and time.monotonic() > one.deadline:
                os.killpg(pid, signal.SIGKILL)
                ended, status = os.waitpid(pid, 0)
            if ended:
                del running[pid]
                note(scores[one.row.id], one, os.waitstatus_to_exitcode(status), arguments)
                num_done += 1
                if num_done * 10 // num_planned > (num_done - 1) * 10 // num_planned:
                    print(f"{num_done} of {num_planned} attempts", file=sys.stderr, flush=True)
        time.sleep(0.005)
    return list(scores.values())


def planned(rows: Sequence[Row], cases: dict, arguments: argparse.Namespace) -> list[tuple[Row, int]]:
    """The attempts in the order of their share of their row."""
    plan = []
    for row in rows:
        there = len(cases[row.id]) if row.cases else row.attempts
        count = min(there, row.short if arguments.short else row.attempts, arguments.attempts or there)
        # Cases are listed in order: those of all kinds come early.
        dice = random.Random(f"{arguments.seed} {row.id}")
        numbers = dice.sample(range(there), count) if row.cases else range(count)
        if arguments.attempt is not None:
            numbers = [arguments.attempt]
        plan += [(i / max(count, 1), row, number) for i, number in enumerate(numbers)]
    plan.sort(key=lambda entry: entry[0])
    # What only waits first: it lasts longest, and costs the others nothing.
    plan.sort(key=lambda entry: not entry[1].only_waits)
    return [(row, number) for _, row, number in plan]


def start(row: Row, number: int, case: object, base: Base, folder: Path, seed: int) -> tuple[int, Running]:
    """Fork an attempt; its exit code is PASSED, FAILED or WRONG, and what was wrong is in its report."""
    own, report = folder / f"{row.id}-{number}", folder / f"{row.id}-{number}.report"
    own.mkdir()
    sys.stdout.flush()
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        code = FAILED
        try:
            os.setsid()
            die_with(parent)
            # Or all attempts would ask for the same ports.
            random.seed()
            row.run(Attempt(seed, row.id, number, base, own, case))
            code = PASSED
        except SilentlyWrongError as error:
            code = WRONG
            report.write_text(str(error), encoding="utf-8")
        except FailedError as error:
            report.write_text(str(error), encoding="utf-8")
        except BaseException:
            report.write_text(traceback.format_exc(), encoding="utf-8")
        finally:
            os._exit(code)
    return pid, Running(row, number, own, report, time.monotonic() + row.seconds)


def note(score: Score, one: Running, code: int, arguments: argparse.Namespace) -> None:
    """Count an attempt that has ended, say what failed, and take away what it left."""
    score.tried += 1
    score.passed += code == PASSED
    score.wrong += code == WRONG
    if code != PASSED:
        said = one.report.read_text(encoding="utf-8") if one.report.exists() else f"hung for {one.row.seconds} seconds"
        verdict = "SILENTLY WRONG" if code == WRONG else "failed"
        line = f"{one.row.id} attempt {one.number}: {verdict}: {said[-MESSAGE:]}"
        score.failures.append(line)
        repeat = f"--rows {one.row.id} --seed {arguments.seed} --attempt {one.number} --keep"
        where = f"\n    {one.folder}" if arguments.keep else ""
        print(f"{line}\n    python -m tests.campaign {repeat}{where}", flush=True)
    end_marked(f"{one.folder}/")
    unmount_below(one.folder)
    if not arguments.keep:
        shutil.rmtree(one.folder, ignore_errors=True)


def unmount_below(folder: Path) -> None:
    """Unmount what attempts that were killed left mounted."""
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        target = line.split(" ")[1]
        if target.startswith(f"{folder}/"):
            subprocess.run(["umount", "-l", target], check=False)


def scorecard(scores: Sequence[Score], command: str, seconds: float) -> str:
    """A Markdown table."""
    lines = ["| id | what | tried | passed | silently wrong |", "|---|---|---|---|---|"]
    lines += [f"| {s.row.id} | {s.row.what} | {s.tried:,} | {s.passed:,} | {s.wrong} |" for s in scores]
    tried, passed, wrong = (sum(getattr(s, name) for s in scores) for name in ("tried", "passed", "wrong"))
    share = passed / tried if tried else 0.0
    lines.append(f"| | all | {tried:,} | {passed:,} | {wrong} |")
    machine = (
        f"{os.cpu_count()} CPU cores ({platform.machine()}, {platform.system()}), Python {platform.python_version()}, "
        f"torch {version('torch')}, megatron-core {version('megatron-core')}"
    )
    lines += [
        "",
        f"{share:.2%} passed (goal {GOAL:.1%}), {wrong} silently wrong (goal 0), in {seconds / 60:.0f} minutes; "
        f"`{command}` on {machine}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
