"""Two torchruns, as on two machines, each with its own view of the restarts and of the disk."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.commands import EXAMPLE, run
from tests.distributed.launch import child_environment, free_ports
from tests.distributed.layouts import DIST_OPT, MODEL


class Machines:
    """The example under two torchruns that meet over a port; killed at the end with all that they started."""

    def __init__(
        self, folder: Path, commands: list[list[str]], restarts: int = 0, paths: tuple[str, ...] = ("", "")
    ) -> None:
        """`paths` is what comes first on each machine's PYTHONPATH."""
        meeting = f"localhost:{free_ports(1)[0]}"
        self.outputs = [folder / f"machine-{number}.txt" for number in range(len(commands))]
        self.torchruns = []
        for command, output, path in zip(commands, self.outputs, paths, strict=True):
            flags = ["--nnodes", str(len(commands)), "--nproc-per-node", "1", "--rdzv-backend", "c10d",
                     "--rdzv-endpoint", meeting, "--max-restarts", str(restarts)]  # fmt: skip
            environment = child_environment(OMP_NUM_THREADS="1")
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path, environment["PYTHONPATH"]]))
            with output.open("w") as file:
                self.torchruns.append(subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", *flags, str(EXAMPLE), *command],
                    env=environment, stdout=file, stderr=subprocess.STDOUT,
                ))  # fmt: skip

    def __enter__(self) -> "Machines":
        return self

    def __exit__(self, *_: object) -> None:
        # Ranks die with their torchrun.
        for torchrun in self.torchruns:
            torchrun.kill()
            torchrun.wait()

    def wait(self, seconds: float) -> tuple[list[int], list[str]]:
        """Exit codes, and what was said."""
        deadline = time.monotonic() + seconds
        codes = [torchrun.wait(max(0.1, deadline - time.monotonic())) for torchrun in self.torchruns]
        return codes, [output.read_text() for output in self.outputs]

    def kill_rank(self, machine: int) -> None:
        """Kill the rank of a machine."""
        (rank,) = psutil.Process(self.torchruns[machine].pid).children()
        os.kill(rank.pid, signal.SIGKILL)


def wait_for_iteration(machines: Machines, log: Path, iteration: int) -> None:
    deadline = time.monotonic() + 120
    while not (log.is_file() and f'"iteration": {iteration},' in log.read_text()):
        said = "\n".join(output.read_text()[-2000:] for output in machines.outputs)
        assert time.monotonic() < deadline, said
        assert all(torchrun.poll() is None for torchrun in machines.torchruns), said
        time.sleep(0.1)


def test_ranks_of_two_machines_join_again_at_each_restart(tmp_path, byte_corpus):
    save = tmp_path / "run"
    command = [*MODEL, *DIST_OPT, "--data-path", str(byte_corpus), "--save", str(save), "--save-interval", "2",
               "--train-iters", "100000", "--eval-interval", "0", "--distributed-timeout-minutes", "1.5"]  # fmt: skip
    with Machines(tmp_path, [command, command], restarts=2) as machines:
        for machine in (1, 0):
            reached = len((save / "metrics.jsonl").read_text().splitlines()) if save.is_dir() else 0
            wait_for_iteration(machines, save / "metrics.jsonl", reached + 20)
            # After the first one machine says that it was restarted and the other that it was not.
            machines.kill_rank(machine)
        reached = len((save / "metrics.jsonl").read_text().splitlines())
        wait_for_iteration(machines, save / "metrics.jsonl", reached + 20)


NO_DATA = ["--data-path", "/no/such/corpus"]
MISTAKES = {
    "no data": (NO_DATA, r"--data-path /no/such/corpus: no file .*"),
    "no data to verify with": ([*NO_DATA, "--verify-layout"], r"--data-path /no/such/corpus: no file .*"),
    "no TensorBoard": (["--tensorboard-dir", "board"], r"--tensorboard-dir \S+ needs TensorBoard; pip install .*"),
    "no such tokens": ([], r"\S+/strange_text_document.bin: has tokens \d+ to 300, the tokenizer's vocabulary has .*"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_one_machine_ends_both_at_once_with_one_line(name, tmp_path, byte_corpus):
    # The default time-out is minutes.
    flags, line = MISTAKES[name]
    flags = [str(tmp_path / flag) if flag == "board" else flag for flag in flags]
    common = [*MODEL, *DIST_OPT, "--data-path", str(byte_corpus), "--save", str(tmp_path / "run"), "--train-iters", "6"]
    mistaken, sound, path = [*common, *flags], list(common), ""
    if name == "no TensorBoard":
        # What torch takes for a TensorBoard that is too old.
        (tmp_path / "packages" / "tensorboard").mkdir(parents=True)
        (tmp_path / "packages" / "tensorboard" / "__init__.py").touch()
        sound, path = mistaken, str(tmp_path / "packages")
    elif name == "no data to verify with":
        sound.append("--verify-layout")
    elif name == "no such tokens":
        # Both machines have it, and the second rank reads the second corpus.
        strange = tmp_path / "strange_text_document"
        shutil.copytree(f"{byte_corpus}_tokenizer", f"{strange}_tokenizer")
        shutil.copy(f"{byte_corpus}.idx", f"{strange}.idx")
        tokens = np.fromfile(f"{byte_corpus}.bin", dtype=np.uint16)
        tokens[-1] = 300
        tokens.tofile(f"{strange}.bin")
        mistaken += ["--data-path", "0.5", str(byte_corpus), "0.5", str(strange)]
        sound = mistaken
    with Machines(tmp_path, [sound, mistaken], paths=("", path)) as machines:
        codes, outputs = machines.wait(90)
    said = "\n".join(outputs)
    assert codes == [1, 1], said
    # The last is of torchrun's own making.
    lines = [[one for one in output.splitlines() if one.startswith("error:")] for output in outputs]
    assert lines[0] == lines[1], said
    assert len(lines[0]) == 1, said
    assert re.fullmatch(f"error: {line}", lines[0][0]), said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_rank_that_waits_in_vain_for_the_others_to_join_ends_with_one_line(tmp_path, byte_corpus):
    environment = child_environment(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_ports(1)[0]), OMP_NUM_THREADS="1",
    )  # fmt: skip
    command = [sys.executable, str(EXAMPLE), *MODEL, "--data-path", str(byte_corpus), "--train-iters", "6",
               "--distributed-timeout-minutes", "0.05"]  # fmt: skip
    done = run(command, environment)
    (line,) = [line for line in done.stderr.splitlines() if "rror" in line]
    assert done.returncode == 2
    assert re.match(r"error: rank 0 waited in _join_ranks for a rank that is gone or stands still: .*; look for", line)
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = child_environment(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        done = run([sys.executable, "-c", JOINING], environment)
    assert done.stderr.splitlines()[-1] == (
        f"error: MASTER_PORT {port}: another program of this machine listens there; give every rank another one by "
        "MASTER_PORT=..."
    )


JOINING = """
from sedd_megatron.config import ParallelOptions
from sedd_megatron.errors import run_command
from sedd_megatron.parallel.groups import parallel_groups
run_command(lambda: parallel_groups(ParallelOptions(device="cpu")).__enter__())
"""
# As torch 2.13 says it.
GLOO = "Gloo connectFullMesh failed with [/pytorch/gloo/transport/tcp/pair.cc:152] timed out connecting: refused"
FAILING = """
import sys, torch
from sedd_megatron.config import ParallelOptions
from sedd_megatron.errors import LostRankError
from sedd_megatron.parallel.groups import parallel_groups
try:
    with parallel_groups(ParallelOptions(device="cpu")):
        raise RuntimeError(sys.argv[1])
except LostRankError as error:
    print(error, torch.distributed.is_initialized())
"""


def test_gloo_s_error_of_a_rank_that_is_gone_while_they_join_is_one_line():
    # In a process of its own, since other tests here leave a group behind.
    done = run([sys.executable, "-c", FAILING, GLOO])
    assert re.search(r"gone or stands still: timed out connecting: refused; look .* False\n$", done.stdout), done.stderr
