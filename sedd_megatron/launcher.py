"""What started this process beside others, and as which of them: the variables that torch knows, from those that other
launchers set.

Everything else of this package reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as
torchrun sets them. `run_command` adds them for the others, before anything else. No torch here: a command has to know
its ranks, and hear signals, while that is still imported.
"""

import contextlib
import os
import re
import zlib
from collections.abc import Mapping

# What torchrun gives to all that it starts.
FROM_TORCHRUN = "TORCHELASTIC_RUN_ID"
# Below those that Linux gives to connections (32768 and on), which gloo's own take many of.
FIRST_PORT, NUM_PORTS = 15_000, 17_000
# The variables of rank, number of ranks, and the same on one machine. Of Open MPI, and of MPICH and its like.
MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# Has each task of a Slurm step see the GPUs of its own alone.
BINDS_GPUS = ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_NTASKS_PER_GPU")


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What a process lacks of torchrun's variables, by mpirun's or those of a step of Slurm; none where one process was
    started, and where RANK is set none that would be of another rank.

    Raises:
        ValueError: they do not tell all of it. The message is one line for people.
    """
    if FROM_TORCHRUN in environment:
        return {}
    if "RANK" in environment:
        # Set by people's scripts, or by what starts containers (enroot's hook for PyTorch), which set some of them.
        with contextlib.suppress(ValueError):
            found = _ranks_of_mpi(environment) or _ranks_of_slurm(environment)
            if all(environment.get(name) == found.get(name) for name in ("RANK", "WORLD_SIZE")):
                return {name: value for name, value in found.items() if name not in environment}
        return {}
    # Before Slurm: in a job, Open MPI starts its daemons as a step, whose variables the ranks then have as well.
    found = _ranks_of_mpi(environment) or _ranks_of_slurm(environment)
    return {name: value for name, value in found.items() if name not in environment or name in RANK_VARIABLES}


def is_first_rank() -> bool:
    """Whether this process is the first of all, which speaks and writes for them; known before any group is made."""
    return os.environ.get("RANK", "0") == "0"


def ends_with_the_first(environment: Mapping[str, str]) -> bool:
    """Whether a launcher ends all ranks as soon as one has ended with an error; srun by --kill-on-bad-exit."""
    return environment.get("WORLD_SIZE", "1") != "1" and (
        FROM_TORCHRUN in environment or is_of_a_step(environment) or any(v[1] in environment for v in MPI_VARIABLES)
    )


def is_of_a_step(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks of a step of Slurm, by which its rank goes."""
    return (
        environment.get("SLURM_STEP_NUM_TASKS", "1") != "1"
        and environment.get("RANK") == environment.get("SLURM_PROCID")
        and FROM_TORCHRUN not in environment
    )


def slurm_job(environment: Mapping[str, str]) -> str | None:
    """The job of Slurm that this process belongs to, the same when it is requeued; None outside of one."""
    if "SLURM_JOB_ID" not in environment:
        return None
    return f"{environment.get('SLURM_CLUSTER_NAME', '')} {environment['SLURM_JOB_ID']}"


def slurm_restarts(environment: Mapping[str, str]) -> int:
    """How often the job was requeued before this start of it."""
    return int(environment.get("SLURM_RESTART_COUNT", "0"))


def has_gpus_of_its_own(environment: Mapping[str, str]) -> bool:
    """Whether Slurm shows each task of the step its own GPUs alone, so that they are numbered from 0 for each."""
    return is_of_a_step(environment) and any(name in environment for name in BINDS_GPUS)


def expand_hosts(expression: str) -> list[str]:
    """gpu[001-003,007],login1 -> gpu001 gpu002 gpu003 gpu007 login1. As `scontrol show hostnames`, which containers
    lack.

    Raises:
        ValueError: it is no list of hosts.
    """
    # Commas outside brackets part hosts.
    if not re.fullmatch(r"[^\[\],\s]*(\[[\d,-]+\][^\[\],\s]*|,[^\[\],\s]+)*", expression) or not expression:
        raise ValueError(f"{expression!r} is no list of hosts")
    hosts = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", expression):
        names = [""]
        for text, ranges in re.findall(r"([^\[]*)(?:\[([\d,-]+)\])?", part):
            numbers = [number for one in ranges.split(",") for number in _numbers(one)] if ranges else [""]
            names = [name + text + number for name in names for number in numbers]
        hosts += names
    return hosts


def expand_counts(expression: str) -> list[int]:
    """2(x3),1 -> 2 2 2 1: tasks of each node.

    Raises:
        ValueError: it is no such list.
    """
    counts = []
    for part in expression.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"{expression!r} are no numbers of tasks")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _ranks_of_mpi(environment: Mapping[str, str]) -> dict[str, str]:
    for names in MPI_VARIABLES:
        # All four: Slurm's own --mpi=pmi2 sets two.
        if any(name not in environment for name in names) or environment[names[1]] == "1":
            continue
        found = dict(zip(RANK_VARIABLES, (environment[name] for name in names), strict=True))
        is_one_machine = found["WORLD_SIZE"] == found["LOCAL_WORLD_SIZE"]
        if not is_one_machine and "MASTER_ADDR" not in environment:
            raise ValueError(
                "mpirun on several machines does not tell where the first rank is: give it MASTER_ADDR, the host of "
                "the first rank, and MASTER_PORT (mpirun -x MASTER_ADDR=... -x MASTER_PORT=...)"
            )
        # Open MPI's name for the run; without it all runs of one machine would meet at one port.
        name = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid")
        if name is None and "MASTER_PORT" not in environment:
            raise ValueError("mpirun does not tell this run from others: give it MASTER_PORT, a free one")
        return {**found, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port(name or "")}
    return {}


def _ranks_of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    # Not SLURM_NTASKS, which the batch shell has too.
    if environment.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return {}
    try:
        node = int(environment.get("SLURM_NODEID", "0"))
        counts = expand_counts(environment["SLURM_STEP_TASKS_PER_NODE"])
        # A step of one node needs no name that every network knows.
        address = "127.0.0.1" if len(counts) == 1 else expand_hosts(environment["SLURM_STEP_NODELIST"])[0]
        # Of a start that Slurm could not end, on a node that it has lost, no rank comes to the port of the next.
        step = (environment["SLURM_JOB_ID"], environment["SLURM_STEP_ID"], str(slurm_restarts(environment)))
        return {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(counts[node]),
            "MASTER_ADDR": address,
            "MASTER_PORT": _port(".".join(step)),
        }
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"this step of Slurm does not tell its ranks ({type(error).__name__}: {error}): start it by srun, or give "
            "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        ) from error


def _numbers(text: str) -> list[str]:
    first, _, last = text.partition("-")
    # Zeros at the front stay: 001-003.
    return [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]


def _port(name: str) -> str:
    return str(FIRST_PORT + zlib.crc32(name.encode()) % NUM_PORTS)
