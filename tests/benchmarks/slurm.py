"""python -m tests.benchmarks.slurm: signals at random times to jobs of a real Slurm, under srun and under torchrun.

Each signal is sent to every process of a job's step at a random time between the step's start and the time that a
whole run takes. It must leave the run saved at its last step and the job requeued; or, before the first step, nothing,
and the job failed, which is then submitted again; or find the run finished. In the end each run must have the numbers
of an unbroken one to the bit. It takes about 30 minutes on two idle cores, most of it the starts.
"""

import argparse
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.campaign.runs import MODEL, last_iteration, result, saved_iterations
from tests.distributed.launch import REPOSITORY
from tests.slurm.cluster import ENDED, Cluster, running_cluster, why_not_here

SCRIPTS = {
    "srun": ("train.sbatch", ("--ntasks=2", "--time=60"), {}),
    "torchrun": ("torchrun.sbatch", ("--cpus-per-task=2", "--time=60"), {"RANKS_PER_NODE": "2"}),
}
STEPS, SIGNALS, PATIENCE = 150, 50, 400.0
COMMAND = "python -m tests.benchmarks.slurm --output tests/benchmarks/results/slurm.md"


@dataclass
class Score:
    """What the signals of one launcher came to."""

    launcher: str
    requeued: int = 0  # saved, and the job goes on
    before_the_first_step: int = 0  # nothing to save, and the job has failed
    finished: int = 0  # it came too late to stop the run
    runs: int = 0  # finished, with the numbers of the unbroken one
    faults: list[str] = field(default_factory=list)

    @property
    def signals(self) -> int:
        """How many were sent."""
        return self.requeued + self.before_the_first_step + self.finished + len(self.faults)


class Attack:
    """Runs of one launcher, one after the other, each over as many starts as signals make of it."""

    def __init__(self, cluster: Cluster, folder: Path, data: Path, launcher: str, seed: int) -> None:
        self.cluster, self.folder, self.data, self.launcher = cluster, folder, data, launcher
        self.random, self.score = random.Random(f"{seed} {launcher}"), Score(launcher)

    def submit(self, save: Path) -> str:
        """Submit the job of a run; its number."""
        script, options, environment = SCRIPTS[self.launcher]
        flags = ["--data-path", str(self.data), "--save", str(save), *MODEL, "--train-iters", str(STEPS),
                 "--save-interval", "1000", "--eval-interval", "0", "--use-distributed-optimizer"]  # fmt: skip
        environment = environment | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
        return self.cluster.submit(script, *flags, options=(*options, "--signal=TERM@10"), **environment)

    def whole_run(self, save: Path) -> float:
        """A run that nobody asks to stop; the seconds that its step takes."""
        number = self.submit(save)
        self.wait_for_step(number, 0)
        start = time.monotonic()
        state = self.cluster.wait_for(number, ENDED, PATIENCE)
        if state != "COMPLETED 0":
            raise RuntimeError(f"{state} without a signal: {self.cluster.log(number)[-3000:]}")
        return time.monotonic() - start

    def send(self, count: int, seconds: float, reference: Path) -> Score:
        """Send so many signals, each within so many seconds of a start, and let every run come to its end."""
        expected = result(reference, STEPS)
        while self.score.signals < count:
            save = self.folder / f"{self.launcher}-{self.score.runs}-{self.score.signals}"
            number, restarts = self.submit(save), 0
            while self.score.signals < count:
                state = self.signal(number, restarts, save, seconds)
                if state.startswith("COMPLETED"):
                    break
                is_new = state.startswith("FAILED")
                number, restarts = (self.submit(save), 0) if is_new else (number, restarts + 1)
            state = self.cluster.wait_for(number, ENDED, PATIENCE)
            difference = result(save, STEPS).first_difference(expected) if state.startswith("COMPLETED") else state
            if difference is None:
                self.score.runs += 1
            else:
                self.score.faults.append(f"{save.name}: {difference}")
        return self.score

    def signal(self, number: str, restarts: int, save: Path, seconds: float) -> str:
        """Send one signal to a start of a job; the state in which it leaves the job."""
        self.wait_for_step(number, restarts)
        time.sleep(self.random.uniform(0, seconds))
        before, ended = self.cluster.log(number), self.cluster.state(number).split()[0] in ENDED
        if not ended:
            self.cluster.said("scancel", "--signal=TERM", number)
        self.cluster.wait(lambda: self.has_left(number, restarts), PATIENCE, f"{number} to be left by its start")
        state, said = self.cluster.state(number), self.cluster.log(number)[len(before) :]
        saved, trained = saved_iterations(save)[-1:], last_iteration(save)
        if saved != [trained] and trained:
            self.score.faults.append(f"{save.name}: trained to {trained}, saved {saved}, {state}: {said[-500:]}")
        elif state.startswith("COMPLETED") and saved == [STEPS]:
            self.score.finished += 1
        elif (
            state == f"PENDING {restarts + 1}" and f"SIGTERM: stopped at iteration {trained} of {STEPS}, saved" in said
        ):
            self.score.requeued += 1
        elif state == f"FAILED {restarts}" and "stopped at" not in said:
            self.score.before_the_first_step += 1
        else:
            self.score.faults.append(f"{save.name}: {state}, saved {saved}: {said[-500:]}")
        return state

    def wait_for_step(self, number: str, restarts: int) -> None:
        """Wait until a start of the job has a process that trains."""
        self.cluster.wait(
            lambda: (
                self.cluster.state(number) == f"RUNNING {restarts}" and self.cluster.said("squeue", "-hs", "-j", number)
            )
            or self.cluster.state(number).split()[0] in ENDED,
            PATIENCE, f"start {restarts} of {number}",
        )  # fmt: skip

    def has_left(self, number: str, restarts: int) -> bool:
        """Whether a start of the job is over."""
        state, count = self.cluster.state(number).split()
        return state in ENDED or (state == "PENDING" and int(count) > restarts)


def table(scores: list[Score], slurm: str, minutes: float) -> str:
    """What is committed."""
    lines = ["| launcher | signals | saved and requeued | before the first step | after the last | as they should be | "
             "resumed runs, bit for bit |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for score in scores:
        good = score.signals - len(score.faults)
        lines.append(f"| {score.launcher} | {score.signals} | {score.requeued} | {score.before_the_first_step} | "
                     f"{score.finished} | {good} (goal {score.signals}) | {score.runs} |")  # fmt: skip
    flags = "" if scores[0].signals == SIGNALS else f" --signals {scores[0].signals}"
    lines += ["", f"In {minutes:.0f} minutes; `{COMMAND}{flags}`, {slurm} on {os.cpu_count()} CPU cores "
              f"({platform.machine()}, {platform.system()}).", ""]  # fmt: skip
    return "\n".join(lines)


def prepare(folder: Path) -> Path:
    """A corpus; its --data-path."""
    text = folder / "corpus.txt"
    text.write_text("".join(f"{n}: the quick brown fox jumps over {n * n} lazy dogs.\n" for n in range(60)))
    command = [sys.executable, "-m", "sedd_megatron.prepare_data", "--input", str(text), "--output-prefix",
               str(folder / "corpus"), "--tokenizer-type", "ByteTokenizer"]  # fmt: skip
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    return folder / "corpus_text_document"


def main() -> int:
    """Send the signals, print the table, and write it; 1 if one did not end as it should."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.slurm", description=__doc__.splitlines()[0])
    parser.add_argument("--signals", type=int, default=SIGNALS, help=f"for each launcher (default: {SIGNALS})")
    parser.add_argument("--launchers", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    reason = why_not_here()
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    begin, scores = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name, running_cluster(Path(name)) as cluster:
        folder, slurm = Path(name), cluster.said("sbatch", "--version").strip()
        data = prepare(folder)
        for launcher in options.launchers:
            attack = Attack(cluster, folder, data, launcher, options.seed)
            seconds = attack.whole_run(folder / f"{launcher}-reference")
            scores.append(attack.send(options.signals, seconds, folder / f"{launcher}-reference"))
            for fault in scores[-1].faults:
                print(f"{launcher}: {fault}", flush=True)
    text = table(scores, slurm, (time.monotonic() - begin) / 60)
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
    return 1 if any(score.faults for score in scores) else 0


if __name__ == "__main__":
    sys.exit(main())
