"""Starts the commands as a person does, in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tests.distributed.launch import REPOSITORY, child_environment, free_ports
from tests.distributed.layouts import MODEL

EXAMPLE = REPOSITORY / "examples" / "pretrain_sedd.py"
ENVIRONMENT = child_environment(OMP_NUM_THREADS="1")


class Done(NamedTuple):
    """A command that has ended; what it said as it was written, a model's carriage returns included."""

    returncode: int
    stdout: str
    stderr: str


def run(command: list[str], environment: dict[str, str] = ENVIRONMENT) -> Done:
    done = subprocess.run(command, env=environment, capture_output=True, timeout=200)
    return Done(done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8"))


def torchrun(num_ranks: int) -> list[str]:
    port = str(free_ports(1)[0])
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "--master-port", port]


def train_command(*arguments: str) -> list[str]:
    """The example with the tests' model, under two ranks."""
    return [*torchrun(2), str(EXAMPLE), *MODEL, *arguments]


def generate(load: Path, *arguments: str, num_ranks: int = 1) -> Done:
    start = [sys.executable] if num_ranks == 1 else torchrun(num_ranks)
    return run([*start, "-m", "sedd_megatron.generate", "--load", str(load), *arguments, "--device", "cpu"])


def read_records(path: Path) -> list[dict[str, Any]]:
    """What --output wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
