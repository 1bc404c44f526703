"""The job scripts under a real Slurm of this machine: which state a job comes to, and that its run loses nothing.

`held.py` holds a run where a test has something to do to it, so that no test hurries.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.campaign.runs import MODEL, metrics, result
from tests.distributed.launch import REPOSITORY
from tests.slurm.cluster import ENDED, Cluster

STEPS = 5
HELD = str(REPOSITORY / "tests" / "slurm" / "held.py")
# Two ranks that share an optimizer, on two promised cores.
TWO_RANKS = ("--ntasks=2", "--cpus-per-task=1", "--time=30")
ONE_RANK = ("--ntasks=1", "--time=30")


class Job:
    """A training job of which each start may be held."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        data: Path,
        script="train.sbatch",
        options=TWO_RANKS,
        flags=(),
        **environment,
    ) -> None:
        self.cluster, self.save, self.hold = cluster, folder / "run", folder / "hold"
        self.hold.mkdir()
        self.training = ["--data-path", str(data), "--save", str(self.save), *MODEL, "--train-iters", str(STEPS),
                         "--save-interval", "100", "--eval-interval", "2", "--use-distributed-optimizer"]  # fmt: skip
        self.script, self.options, self.flags = script, options, flags
        self.environment = {"PYTHON": HELD, "HOLD": str(self.hold), "OMP_NUM_THREADS": "1"} | environment
        self.number = ""

    def submit(self, *flags: str) -> None:
        """Submit it, with more flags of the script."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.number = self.cluster.submit(self.script, *self.flags, *self.training, *flags, options=self.options,
                                          PATH=path, **self.environment)  # fmt: skip

    def hold_at(self, place: str) -> None:
        """Hold starts there from now on."""
        (self.hold / place).touch()

    def wait_for_hold(self, place: str, start: int, ranks: int = 2, element: str = "") -> None:
        """Wait until all ranks of a start are held, of an array's element."""
        names = [self.hold / f"{element}{place}-{start}-{rank}" for rank in range(ranks)]
        self.cluster.wait(lambda: all(name.exists() for name in names), 240, f"start {start} at {place}", self.number)

    def let_go(self, place: str) -> None:
        """Hold nothing there any more."""
        (self.hold / place).unlink()

    def ends(self, state: str) -> str:
        """Wait for the job's end, which must be this: COMPLETED 2 is one after two restarts; what it has said."""
        self.cluster.wait_for(self.number, ENDED, 240)
        assert self.cluster.state(self.number) == state, self.log
        return self.log

    @property
    def log(self) -> str:
        """What all its starts have said."""
        return self.cluster.log(self.number)


@pytest.fixture
def job(cluster, tmp_path, byte_corpus):
    def make(name: str = "job", **options) -> Job:
        (tmp_path / name).mkdir()
        return Job(cluster, tmp_path / name, byte_corpus, **options)

    return make


@pytest.fixture(scope="module")
def unbroken(cluster, tmp_path_factory, byte_corpus) -> Job:
    job = Job(cluster, tmp_path_factory.mktemp("unbroken"), byte_corpus)
    job.submit()
    assert f"finished at iteration {STEPS} of {STEPS}, saved {job.save}/iter_000000{STEPS}\n" in job.ends("COMPLETED 0")
    return job


def test_a_run_goes_on_over_time_limit_signal_requeue_and_drained_node(cluster, job, unbroken):
    """Four starts of one job, the last of which finishes; together they come to the numbers of one."""
    job = job(options=(*TWO_RANKS, "--signal=TERM@110"))
    job.hold_at("training")
    job.submit()
    job.wait_for_hold("training", 0)
    # Between one and two minutes from now, so that the 110 seconds before it have come.
    minutes = (time.time() - start_of(cluster, job.number)) // 60 + 2
    cluster.said("scontrol", "update", f"JobId={job.number}", f"TimeLimit={int(minutes)}")
    cluster.wait(lambda: cluster.state(job.number) == "PENDING 1", 120, "a requeue", job.number)
    cluster.said("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    job.wait_for_hold("training", 1)
    # A drained node lets its jobs end, and takes none.
    cluster.said("scontrol", "update", "NodeName=localhost", "State=DRAIN", "Reason=test")
    cluster.said("scancel", "--signal=TERM", job.number)
    cluster.wait(lambda: cluster.state(job.number) == "PENDING 2", 60, "a requeue", job.number)
    cluster.wait(lambda: "drained" in cluster.said("sinfo", "-h", "-o", "%T"), 30, "a drained node")
    cluster.said("scontrol", "update", "NodeName=localhost", "State=RESUME")
    job.wait_for_hold("training", 2)
    # By a person or for another job: the ranks are told, and then killed.
    cluster.said("scontrol", "requeue", job.number)
    job.let_go("training")
    said = job.ends("COMPLETED 3")
    assert result(job.save, STEPS) == ExactlyAs(result(unbroken.save, STEPS))
    for step in (1, 2):
        assert f"SIGTERM: stopped at iteration {step} of {STEPS}, saved {job.save}/iter_000000{step}\n" in said
        assert f"goes on: requeued (restart {step} of 100)\n" in said
    assert said.endswith(f"job {job.number}: {job.save} is finished\n")
    # The lock of a former start is known to be of one.
    assert "watching it" not in said


class ExactlyAs:
    """Equal to results that have the same numbers to the bit; what differs is the assertion's message."""

    def __init__(self, expected) -> None:
        self.expected = expected

    def __eq__(self, found) -> bool:
        self.difference = found.first_difference(self.expected)
        return self.difference is None

    def __repr__(self) -> str:
        return f"<{self.difference}>"


def start_of(cluster: Cluster, number: str) -> float:
    """When the job has started, by the clock."""
    return time.mktime(time.strptime(cluster.job(number)["StartTime"], "%Y-%m-%dT%H:%M:%S"))


def test_a_finished_run_finishes_again_at_once(unbroken):
    before = (unbroken.save / "finished").read_text(), metrics(unbroken.save)
    unbroken.submit()
    said = unbroken.ends("COMPLETED 0")
    assert f"nothing left to do: {unbroken.save} has its {STEPS} iterations" in said
    assert "layers" not in said, "a model was built"
    assert (
        json.loads(before[0])["iteration"] == json.loads((unbroken.save / "finished").read_text())["iteration"] == STEPS
    )
    assert metrics(unbroken.save) == before[1]


def test_a_killed_rank_fails_the_job_and_one_line_says_why(cluster, job):
    job = job()
    job.hold_at("training")
    job.submit()
    job.wait_for_hold("training", 0)
    cluster.processes_of(job.number)[1].send_signal(signal.SIGKILL)
    said = job.ends("FAILED 0")
    assert "error: rank 0 waited in " in said
    assert "is not requeued; its error is above" in said
    assert not (job.save / "finished").exists()


def test_a_stop_before_the_first_step_saves_nothing_and_is_not_repeated(cluster, job):
    """Before torch is imported; all ranks leave with 0, and the job with an error, since the next start would do no
    better.
    """
    job = job()
    job.hold_at("imports")
    job.submit()
    job.wait_for_hold("imports", 0)
    cluster.said("scancel", "--signal=TERM", job.number)
    said = job.ends("FAILED 0")
    assert said.count("SIGTERM: ended before the first step\n") == 1
    assert f"error: job {job.number}: no checkpoint came to {job.save} since this start" in said
    assert "srun: error" not in said


def test_a_cancelled_job_saves_and_stays_cancelled(cluster, job):
    job = job(options=ONE_RANK)
    job.hold_at("training")
    job.submit()
    job.wait_for_hold("training", 0, ranks=1)
    cluster.said("scancel", job.number)
    said = job.ends("CANCELLED 0")
    cluster.wait(lambda: not cluster.processes_of(job.number), 60, "the step's end", job.number)
    assert f"SIGTERM: stopped at iteration 1 of {STEPS}, saved {job.save}/iter_0000001\n" in job.log, said


def test_a_mistake_is_said_once_by_whichever_rank(cluster, job):
    job = job(flags=("--tensor-model-parallel-size", "5"))
    job.submit()
    said = job.ends("FAILED 0")
    assert said.count("error: --num-attention-heads 2 is not a multiple of --tensor-model-parallel-size 5") == 1
    assert "Traceback" not in said


# What each rank does, and whether srun ends the others.
SLOW_TO_END = "try:\n    raise UserError('a mistake')\nfinally:\n    time.sleep(0 if rank else 1)"
ONE_WITHOUT_THE_ERROR = "if rank == 0:\n    time.sleep(12)\nelse:\n    raise UserError('a mistake')"


@pytest.mark.parametrize("body", [SLOW_TO_END, ONE_WITHOUT_THE_ERROR], ids=["slow to end", "one without it"])
@pytest.mark.parametrize("flags", [["--kill-on-bad-exit=1"], []], ids=["killed", "alone"])
def test_srun_shows_the_line_once_whichever_rank_has_it_first(body, flags, cluster, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, time\nfrom sedd_megatron.errors import UserError, run_command\n"
        f"def main():\n    rank = int(os.environ['RANK'])\n{textwrap.indent(body, '    ')}\nrun_command(main)\n"
    )
    command = ["srun", "-n3", *flags, sys.executable, str(script)]
    environment = cluster.environment | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("error: a mistake\n") == 1, done.stderr


def test_torchrun_s_code_is_not_believed(cluster, job, unbroken):
    job = job(script="torchrun.sbatch", options=("--cpus-per-task=2", "--time=30"), RANKS_PER_NODE="2")
    job.hold_at("training")
    job.submit()
    job.wait_for_hold("training", 0)
    cluster.said("scancel", "--signal=TERM", job.number)
    cluster.wait(lambda: cluster.job(job.number)["Restarts"] == "1", 60, "a requeue", job.number)
    job.let_go("training")
    said = job.ends("COMPLETED 1")
    assert said.index("SIGTERM: stopped at iteration 1") < said.index("Traceback") < said.index("requeued (restart 1")
    assert result(job.save, STEPS) == ExactlyAs(result(unbroken.save, STEPS))


def test_a_sweep_requeues_the_run_that_was_stopped_and_no_other(cluster, job, tmp_path):
    (tmp_path / "sweep.txt").write_text("--lr 1e-3\n--lr '2e-3' --seed 7\n")
    job = job(script="sweep.sbatch", options=(*ONE_RANK, "--array=1-2"), flags=(str(tmp_path / "sweep.txt"),))
    job.hold_at("training")
    job.submit()
    for element in (1, 2):
        job.wait_for_hold("training", 0, 1, str(element))
    # The last element's own number is the whole array's.
    assert cluster.job(f"{job.number}_2")["JobId"] == job.number
    cluster.said("scancel", "--signal=TERM", f"{job.number}_2")
    job.wait_for_hold("training", 1, 1, "2")
    job.let_go("training")
    elements = [f"{job.number}_{element}" for element in (1, 2)]
    for element in elements:
        cluster.wait_for(element, ENDED, 240)
    assert [cluster.state(element) for element in elements] == ["COMPLETED 0", "COMPLETED 1"], job.log
    rates = [metrics(job.save / str(element))["training", STEPS]["learning_rate"] for element in (1, 2)]
    assert rates == [1e-3, 2e-3]


def test_each_element_of_an_array_evaluates_in_a_container(cluster, unbroken, tmp_path):
    """pyxis is not here: a srun before Slurm's own keeps the flags that are for it, and passes on the others."""
    (tmp_path / "srun").write_text(SRUN.format(srun=shutil.which("srun"), seen=tmp_path / "seen"))
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "list.txt").write_text(f"--load {unbroken.save}\n--load {unbroken.save} --mc-samples 4\n")
    number = cluster.submit(
        "eval_array.sbatch", str(tmp_path / "list.txt"), "--data", str(REPOSITORY / "LICENSE"), "--mc-samples", "2",
        "--device", "cpu", options=(*ONE_RANK, "--array=1-2"), PYTHON=sys.executable, CONTAINER_IMAGE="some/image",
        CONTAINER_MOUNTS="/data:/data", PATH=f"{tmp_path}:{os.environ['PATH']}",
    )  # fmt: skip
    for element in (1, 2):
        assert cluster.wait_for(f"{number}_{element}", ENDED, 240) == "COMPLETED 0", cluster.log(number)
        assert "perplexity at most" in (cluster.folder / f"{number}_{element}.out").read_text()
    flags = ["--container-image=some/image", f"--container-mounts={REPOSITORY}:{REPOSITORY},{REPOSITORY}:{REPOSITORY},"
             "/data:/data", f"--container-workdir={REPOSITORY}", "--no-container-mount-home"]  # fmt: skip
    assert (tmp_path / "seen").read_text().splitlines() == 2 * flags


SRUN = """#!/bin/bash
kept=()
for flag in "$@"; do
    case $flag in
        --container-*|--no-container-*) echo "$flag" >> {seen} ;;
        *) kept+=("$flag") ;;
    esac
done
exec {srun} "${{kept[@]}}"
"""
