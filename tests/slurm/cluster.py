"""A Slurm of one machine that lives as long as the tests: munged, slurmctld and slurmd on ports of their own."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from tests.distributed.launch import REPOSITORY, free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
MIN_JOB_AGE = 3600  # seconds for which slurmctld remembers a job that has ended
CONFIGURATION = """
ClusterName=tests
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={requeue_seconds}
CredType=cred/munge
SlurmctldPort={controller_port}
SlurmdPort={daemon_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=15
MinJobAge={min_job_age}
OverTimeLimit=0
PropagateResourceLimits=NONE
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=tests Nodes=localhost Default=YES MaxTime=60 State=UP
"""


def why_not_here() -> str | None:
    """Why no Slurm can be started here; None where one can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"Slurm is not installed: no {', '.join(missing)} (apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "slurmctld, slurmd and munged are started as root here"
    return None


class Cluster:
    """One node and one partition; `submit` starts a script of examples/slurm."""

    def __init__(self, folder: Path, requeue_seconds: int = 6, cpus: int = 8) -> None:
        """`requeue_seconds` after which a requeued job may start again: the life of a job's credential, in Slurm 120 by
        default and 6 at least. `cpus` are promised, whatever the machine has.
        """
        self.folder = folder
        self.configuration = folder / "slurm.conf"
        controller_port, daemon_port = free_ports(2)
        self.configuration.write_text(
            CONFIGURATION.format(
                folder=folder, requeue_seconds=requeue_seconds, controller_port=controller_port,
                daemon_port=daemon_port, host=socket.gethostname(), cpus=cpus, min_job_age=MIN_JOB_AGE,
            )
        )  # fmt: skip
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environment |= {"SLURM_CONF": str(self.configuration)}

    def start(self) -> None:
        """Start the daemons, and return when the node is idle."""
        for name in ("spool", "state", "munge"):
            (self.folder / name).mkdir()
        munge, key = self.folder / "munge", self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        # As root it takes files of root alone, and folders that no one else writes to.
        self._run(["munged", "--force", f"--socket={munge}/socket", f"--key-file={key}", f"--pid-file={munge}/pid",
                   f"--log-file={munge}/log", f"--seed-file={munge}/seed"])  # fmt: skip
        self._run(["slurmctld"])
        self._run(["slurmd", "-N", "localhost"])
        self.wait(lambda: "idle" in self.said("sinfo", "-h", "-o", "%T"), 60, "an idle node")

    def stop(self) -> None:
        """End every job, and then the daemons by their numbers."""
        with contextlib.suppress(subprocess.CalledProcessError):
            jobs = self.said("squeue", "-h", "-o", "%A").split()
            if jobs:
                self._run(["scancel", "--full", "--signal=KILL", *jobs])
                self._run(["scancel", *jobs])
                with contextlib.suppress(TimeoutError):
                    self.wait(lambda: not self.said("squeue", "-h"), 30, "no jobs")
        for name in ("slurmd.pid", "slurmctld.pid", "munge/pid"):
            with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess, psutil.TimeoutExpired):
                daemon = psutil.Process(int((self.folder / name).read_text()))
                daemon.send_signal(signal.SIGTERM)
                daemon.wait(30)

    def submit(self, script: str, *arguments: str, options: Sequence[str] = (), **environment: str) -> str:
        """Submit a script of examples/slurm with its arguments and sbatch's options; the job's number."""
        said = self._run(
            ["sbatch", "--parsable", f"--output={self.folder}/%A_%a.out", *options,
             str(REPOSITORY / "examples" / "slurm" / script), *arguments],
            cwd=REPOSITORY, environment=environment,
        )  # fmt: skip
        return said.strip()

    def said(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        return self._run(list(command))

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, by name."""
        return dict(re.findall(r"(?:^|\s)([\w:/]+)=(\S*)", self.said("scontrol", "show", "job", "-o", number)))

    def state(self, number: str) -> str:
        """A job's state and how often it was requeued: COMPLETED 2."""
        job = self.job(number)
        return f"{job['JobState']} {job['Restarts']}"

    def log(self, number: str) -> str:
        """What a job has said, all its starts after one another."""
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{number}_*.out")))

    def wait_for(self, number: str, states: Sequence[str], seconds: float = 120) -> str:
        """Wait until a job is in one of these states; the state."""
        self.wait(lambda: self.job(number)["JobState"] in states, seconds, f"{number} in {states}", number)
        return self.state(number)

    def wait(self, holds, seconds: float, what: str, number: str | None = None) -> None:
        """Wait until something holds.

        Raises:
            TimeoutError: it does not, or a job that was to bring it about has ended; with what that has said.
        """
        deadline = time.monotonic() + seconds
        while not holds():
            has_ended = number is not None and self.job(number)["JobState"] in ENDED and not holds()
            if has_ended or time.monotonic() > deadline:
                said = "" if number is None else f": {self.state(number)}\n{self.log(number)[-3000:]}"
                raise TimeoutError(f"waited {seconds} s for {what}{said}")
            time.sleep(0.1)

    def processes_of(self, number: str) -> list[psutil.Process]:
        """The job's tasks on this machine that train, by rank."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment, is_of_job = process.environ(), "pretrain_sedd.py" in " ".join(process.cmdline())
                is_task = "SLURM_PROCID" in environment and process.parent().name() == "slurmstepd"
                if is_of_job and is_task and environment.get("SLURM_JOB_ID") == number:
                    found.append((int(environment["SLURM_PROCID"]), process))
        return [process for _, process in sorted(found, key=lambda pair: pair[0])]

    def _run(self, command: list[str], cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            command, env=self.environment | (environment or {}), cwd=cwd, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout


@contextlib.contextmanager
def running_cluster(folder: Path, requeue_seconds: int = 6) -> Iterator[Cluster]:
    """A cluster in this folder, for as long as the `with` lasts."""
    cluster = Cluster(folder, requeue_seconds)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
