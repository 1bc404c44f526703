"""Starts real gloo ranks for the tests: run_X.py in this folder under N processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent


def launch(script: str, world_size: int, jobs: list[Any], timeout: int = 400) -> None:
    """Run `script` once per rank with `jobs` as its JSON argument; each job gets a rendezvous port of its own.

    Importing torch and Megatron costs more than these jobs do, so that several share one start. Fails with the ranks'
    output.
    """
    ports = free_ports(len(jobs))
    processes = []
    for rank in range(world_size):
        environment = dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                           LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1",
                           PYTHONPATH=str(REPOSITORY))  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, str(HERE / script), json.dumps(jobs), json.dumps(ports)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0] * world_size, f"{script} ended with {codes}\n" + "\n".join(text[-6000:] for text in outputs)


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
