"""Ranks from the variables of launchers, for steps and hosts that no test machine has."""

import random
import shutil
import subprocess

import pytest

from sedd_megatron.launcher import (
    FIRST_PORT,
    NUM_PORTS,
    expand_counts,
    expand_hosts,
    has_gpus_of_its_own,
    rank_variables,
)

# As srun sets them for the second task on the second of two nodes, and the shell that the step was started from.
STEP = {"SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "4,3",
        "SLURM_STEP_NODELIST": "gpu[017-018]", "SLURM_NODEID": "1", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "7"}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-host-1524@1"}  # fmt: skip
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def test_a_step_s_ranks_are_its_tasks():
    found = rank_variables(STEP)
    port = int(found.pop("MASTER_PORT"))
    assert found == {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3",
                     "MASTER_ADDR": "gpu017"}  # fmt: skip
    assert FIRST_PORT <= port < FIRST_PORT + NUM_PORTS <= 32768


def test_every_step_and_every_start_of_a_job_has_a_port_of_its_own():
    changes = [{}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "72"}, {"SLURM_RESTART_COUNT": "1"}]
    ports = [rank_variables(STEP | change)["MASTER_PORT"] for change in changes]
    assert len(set(ports)) == len(ports)
    # And all its ranks have one.
    assert rank_variables(STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})[
        "MASTER_PORT"] == ports[0]  # fmt: skip


def test_one_machine_needs_no_name_that_a_network_knows():
    step = STEP | {"SLURM_STEP_TASKS_PER_NODE": "7", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "n7"}
    assert rank_variables(step)["MASTER_ADDR"] == "127.0.0.1"


def test_what_a_person_has_set_stays():
    own = {"MASTER_ADDR": "10.0.0.3", "MASTER_PORT": "29500"}
    assert not rank_variables(STEP | own).keys() & own.keys()
    assert rank_variables(STEP | {"RANK": "0"}) == {}
    assert rank_variables(STEP | {"RANK": "5", "WORLD_SIZE": "7", "SLURM_NODEID": "9"}) == {}


def test_what_a_container_s_hook_leaves_out_is_added():
    hook = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu017", "MASTER_PORT": "29500"}
    assert rank_variables(STEP | hook) == {"LOCAL_WORLD_SIZE": "3"}
    assert rank_variables(STEP | hook | {"TORCHELASTIC_RUN_ID": "1"}) == {}


def test_one_task_and_the_batch_shell_are_one_process():
    assert rank_variables({"SLURM_JOB_ID": "71", "SLURM_NTASKS": "7", "SLURM_PROCID": "0"}) == {}
    assert rank_variables(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) == {}


def test_mpirun_s_ranks_are_its_own_and_not_those_of_the_step_that_starts_its_daemons():
    found = rank_variables(STEP | OPEN_MPI)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["MASTER_ADDR"]) == (
        "1", "2", "1", "127.0.0.1")  # fmt: skip
    other = rank_variables(OPEN_MPI | {"PMIX_NAMESPACE": "prterun-host-1525@1"})
    assert found["MASTER_PORT"] != other["MASTER_PORT"]
    address = {"MASTER_ADDR": "host-1", "MASTER_PORT": "29500"}
    assert rank_variables(HYDRA | address) == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}  # fmt: skip
    # Slurm's own, by --mpi=pmi2.
    assert rank_variables(STEP | {"PMI_RANK": "5", "PMI_SIZE": "7"})["RANK"] == "5"


MISTAKES = {
    "mpirun on several machines": (HYDRA, "mpirun on several machines does not tell where the first rank is: give it "),
    "mpirun without a name": (HYDRA | {"PMI_SIZE": "2"}, "mpirun does not tell this run from others: give it MASTER_"),
    "a list of hosts": (
        STEP | {"SLURM_STEP_NODELIST": "gpu[017"},
        r"this step .* \(ValueError: 'gpu\[017' is no list ",
    ),
    "tasks": (STEP | {"SLURM_STEP_TASKS_PER_NODE": "4x3"}, r"this step of Slurm .*'4x3' are no numbers of tasks"),
    "a node": (
        STEP | {"SLURM_NODEID": "2"},
        r"this step of Slurm does not tell its ranks \(IndexError: .*\): start it ",
    ),
    "a variable": ({name: STEP[name] for name in STEP if name != "SLURM_LOCALID"}, ".*KeyError: 'SLURM_LOCALID'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_does_not_tell_its_ranks_is_one_line(name):
    environment, line = MISTAKES[name]
    with pytest.raises(ValueError, match=line):
        rank_variables(environment)


def test_counts_of_tasks_are_those_of_each_node():
    assert expand_counts("8(x4)") == [8] * 4
    assert expand_counts("2,3(x2),1") == [2, 3, 3, 1]


def test_hosts_are_those_of_brackets():
    hosts = ["gpu001", "gpu002", "gpu003", "gpu007", "login1"]
    assert expand_hosts("gpu[001-003,007],login1") == hosts
    assert expand_hosts("n[1-2]-ib,m3.example") == ["n1-ib", "n2-ib", "m3.example"]
    assert expand_hosts("n[098-101]") == ["n098", "n099", "n100", "n101"]


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="no scontrol: Slurm is not installed")
def test_hosts_are_those_that_slurm_says(tmp_path):
    """The same lists written by Slurm and expanded by both."""
    (tmp_path / "slurm.conf").write_text("ClusterName=x\nSlurmctldHost=localhost\n")
    environment = {"SLURM_CONF": str(tmp_path / "slurm.conf")}

    def scontrol(*arguments: str) -> list[str]:
        done = subprocess.run([shutil.which("scontrol"), "show", *arguments], env=environment, capture_output=True,
                              text=True, check=True)  # fmt: skip
        return done.stdout.split()

    draw = random.Random(5)
    forms = [
        (prefix, digits, suffix) for prefix in ("gpu", "rack2-n", "a") for digits in (1, 3) for suffix in ("", "-ib")
    ]
    names = [f"{prefix}{draw.randrange(10**digits):0{digits}}{suffix}" for prefix, digits, suffix in forms * 6]
    for count in (1, 2, 9, len(names)):
        (expression,) = scontrol("hostlist", ",".join(draw.sample(names, count)))
        assert expand_hosts(expression) == scontrol("hostnames", expression)


def test_gpus_are_numbered_anew_where_slurm_gives_each_task_its_own():
    ranks = STEP | rank_variables(STEP)
    assert has_gpus_of_its_own(ranks | {"SLURM_GPUS_PER_TASK": "1"})
    assert not has_gpus_of_its_own(ranks)
    assert not has_gpus_of_its_own(ranks | {"SLURM_GPUS_PER_TASK": "8", "TORCHELASTIC_RUN_ID": "none"})
