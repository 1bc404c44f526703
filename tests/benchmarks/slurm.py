"""python -m tests.benchmarks.slurm: signals at random times to jobs of a real Slurm, under srun and under torchrun.

Each signal is sent to every process of a job's step: one in five at a random time of the start, the others at a random
time after the first step of that start, within a tenth of what the steps of a whole run take. It must leave the run
saved at its last step and the job requeued; or, before the first step, nothing, and the job failed, which is then
submitted again; or find the run finished. In the end each run must have the numbers of an unbroken one to the bit. Both
launchers are attacked at once; it takes about 20 minutes on two idle cores, most of it the starts.
"""

import argparse
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.campaign.runs import MODEL, last_iteration, result, saved_iterations
from tests.distributed.launch import REPOSITORY
from tests.slurm.cluster import ENDED, Cluster, running_cluster, why_not_here

SCRIPTS = {
    "srun": ("train.sbatch", ("--ntasks=2", "--time=60"), {}),
    "torchrun": ("torchrun.sbatch", ("--cpus-per-task=2", "--time=60"), {"RANKS_PER_NODE": "2"}),
}
STEPS, SIGNALS, PATIENCE = 400, 50, 900.0
# Of the signals, those that come during a start; and in which part of the steps the others come after the first.
DURING_STARTS, PART = 0.2, 0.1


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

    def whole_run(self, save: Path) -> tuple[float, float]:
        """A run that nobody asks to stop; the seconds before its first step, and those of the steps."""
        number = self.submit(save)
        self.wait_for_step(number, 0)
        begin = time.monotonic()
        self.wait_for_training(number, save, 0)
        first_step = time.monotonic()
        state = self.cluster.wait_for(number, ENDED, PATIENCE)
        if state != "COMPLETED 0":
            raise RuntimeError(f"{state} without a signal: {self.cluster.log(number)[-3000:]}")
        return first_step - begin, time.monotonic() - first_step

    def send(self, count: int, deadline: float) -> Score:
        """Send so many signals, or those that can be sent until then, and let every run come to its end."""
        reference = self.folder / f"{self.launcher}-reference"
        seconds = self.whole_run(reference)
        expected = result(reference, STEPS)
        while self.score.signals < count and time.monotonic() < deadline:
            save = self.folder / f"{self.launcher}-{self.score.runs}-{self.score.signals}"
            number, restarts = self.submit(save), 0
            while self.score.signals < count and time.monotonic() < deadline:
                state = self.signal(number, restarts, save, *seconds)
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

    def signal(self, number: str, restarts: int, save: Path, starting: float, training: float) -> str:
        """Send one signal to a start of a job; the state in which it leaves the job.

        `starting` and `training` are the seconds that the start and the steps of a run take.
        """
        before, trained = self.cluster.log(number), last_iteration(save)
        self.wait_for_step(number, restarts)
        if self.random.random() < DURING_STARTS:
            time.sleep(self.random.uniform(0, starting))
        else:
            self.wait_for_training(number, save, trained)
            time.sleep(self.random.uniform(0, PART * training))
        if not self.has_ended(number):
            self.cluster.said("scancel", "--signal=TERM", number)
        self.cluster.wait(lambda: self.has_left(number, restarts), PATIENCE, f"{number} to be left by its start")
        state, said = self.cluster.state(number), self.cluster.log(number)[len(before) :]
        saved, trained = saved_iterations(save)[-1:], last_iteration(save)
        is_requeued = state in (f"PENDING {restarts + 1}", f"RUNNING {restarts + 1}")
        if saved != [trained] and trained:
            self.score.faults.append(f"{save.name}: trained to {trained}, saved {saved}, {state}: {said[-500:]}")
        elif state.startswith("COMPLETED") and saved == [STEPS]:
            self.score.finished += 1
        elif is_requeued and f"SIGTERM: stopped at iteration {trained} of {STEPS}, saved" in said:
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
            or self.has_ended(number),
            PATIENCE, f"start {restarts} of {number}",
        )  # fmt: skip

    def wait_for_training(self, number: str, save: Path, trained: int) -> None:
        """Wait until a run has gone further than that."""
        self.cluster.wait(
            lambda: last_iteration(save) > trained or self.has_ended(number), PATIENCE, f"a step after {trained}"
        )

    def has_ended(self, number: str) -> bool:
        """Whether the job is over."""
        return self.cluster.state(number).split()[0] in ENDED

    def has_left(self, number: str, restarts: int) -> bool:
        """Whether a start of the job is over."""
        state, count = self.cluster.state(number).split()
        return state in ENDED or (state in ("PENDING", "RUNNING") and int(count) > restarts)


def table(scores: list[Score], slurm: str, minutes: float) -> str:
    """What is committed."""
    lines = ["| launcher | signals | saved and requeued | before the first step | after the last | as they should be | "
             "resumed runs, bit for bit |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for score in scores:
        good = score.signals - len(score.faults)
        lines.append(f"| {score.launcher} | {score.signals} | {score.requeued} | {score.before_the_first_step} | "
                     f"{score.finished} | {good} (goal {score.signals}) | {score.runs} |")  # fmt: skip
    command = f"python -m tests.benchmarks.slurm {' '.join(sys.argv[1:])}".strip()
    lines += ["", f"In {minutes:.0f} minutes; `{command}`, {slurm} on {os.cpu_count()} CPU cores "
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
    parser.add_argument("--minutes", type=float, default=600.0, help="send no signal after so many (default: 600)")
    parser.add_argument("--launchers", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    reason = why_not_here()
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name, running_cluster(Path(name)) as cluster:
        folder, slurm = Path(name), cluster.said("sbatch", "--version").strip()
        data, deadline = prepare(folder), begin + 60 * options.minutes
        attacks = [Attack(cluster, folder, data, launcher, options.seed) for launcher in options.launchers]
        with ThreadPoolExecutor(len(attacks)) as pool:
            scores = list(pool.map(lambda attack: attack.send(options.signals, deadline), attacks))
    for score in scores:
        for fault in score.faults:
            print(f"{score.launcher}: {fault}", flush=True)
    text = table(scores, slurm, (time.monotonic() - begin) / 60)
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
    return 1 if any(score.faults for score in scores) else 0


if __name__ == "__main__":
    sys.exit(main())
