"""Two torchruns, as on two machines, each with its own view of the restarts and of the disk."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.commands import EXAMPLE
from tests.distributed.launch import child_environment, free_ports
from tests.distributed.layouts import DIST_OPT, MODEL


class Machines:
    """The example under two torchruns that meet over a port; killed at the end with all that they started."""

    def __init__(self, folder: Path, commands: list[list[str]], restarts: int = 0) -> None:
        meeting = f"localhost:{free_ports(1)[0]}"
        self.outputs = [folder / f"machine-{number}.txt" for number in range(len(commands))]
        self.torchruns = []
        for command, output in zip(commands, self.outputs, strict=True):
            flags = ["--nnodes", str(len(commands)), "--nproc-per-node", "1", "--rdzv-backend", "c10d",
                     "--rdzv-endpoint", meeting, "--max-restarts", str(restarts)]  # fmt: skip
            with output.open("w") as file:
                self.torchruns.append(subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", *flags, str(EXAMPLE), *command],
                    env=child_environment(OMP_NUM_THREADS="1"), stdout=file, stderr=subprocess.STDOUT,
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
               "--train-iters", "100000", "--eval-interval", "0", "--distributed-timeout-minutes", "0.5"]  # fmt: skip
    with Machines(tmp_path, [command, command], restarts=2) as machines:
        for machine in (1, 0):
            reached = len((save / "metrics.jsonl").read_text().splitlines()) if save.is_dir() else 0
            wait_for_iteration(machines, save / "metrics.jsonl", reached + 20)
            # After the first one machine says that it was restarted and the other that it was not.
            machines.kill_rank(machine)
        reached = len((save / "metrics.jsonl").read_text().splitlines())
        wait_for_iteration(machines, save / "metrics.jsonl", reached + 20)
