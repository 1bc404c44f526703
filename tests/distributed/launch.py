"""Starts real gloo ranks for the tests: run_X.py in this folder under N processes."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent


def launch(script: str, world_size: int, jobs: list[Any], timeout: int = 400) -> None:
    """Run `script` once per rank with `jobs` as its JSON argument; each job gets a rendezvous port of its own.

    Importing torch and Megatron costs more than these jobs do, so that several share one start. Fails with the ranks'
    output.
    """
    codes, outputs = start(script, world_size, jobs, timeout)
    said = "\n".join(text[-6000:] for text in outputs)
    assert codes == [0] * world_size, f"{script} ended with {codes}\n{said}"


def start(
    script: str, world_size: int, jobs: list[Any], timeout: int = 400, patience: float = 2
) -> tuple[list[int], list[str]]:
    """As `launch`; returns the ranks' exit codes and what they said. When one has failed, the others wait for it in
    vain and are stopped after `patience` seconds, which are for their own last words.
    """
    ports = free_ports(len(jobs))
    processes = []
    for rank in range(world_size):
        environment = child_environment(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1",
        )  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, str(HERE / script), json.dumps(jobs), json.dumps(ports)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = _outputs(processes, timeout, patience)
    return [process.returncode for process in processes], outputs


def child_environment(**variables: str) -> dict[str, str]:
    """This process's environment for a process of this repository's code: the repository comes first on the path, then
    what the caller has there, where Megatron itself may lie.
    """
    path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **variables}


def own_jobs() -> Iterator[Any]:
    """In a rank that `start` started: its jobs, each with its rendezvous port in place."""
    for job, port in zip(json.loads(sys.argv[1]), json.loads(sys.argv[2]), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        yield job


def _outputs(processes: list[subprocess.Popen], timeout: int, patience: float) -> list[str]:
    with ThreadPoolExecutor(len(processes)) as pool:
        outputs = [pool.submit(lambda p: p.communicate()[0], process) for process in processes]
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                deadline = min(deadline, time.monotonic() + patience)
            if time.monotonic() > deadline:
                for process in processes:
                    process.kill()
                break
            time.sleep(0.05)
        return [output.result() for output in outputs]


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, below those that the system gives away: a job's own connections take many of
    them before the next job starts.
    """
    ports: list[int] = []
    for port in random.sample(range(10_000, 32_000), 2_000):
        if len(ports) == count:
            break
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            ports.append(port)
    return ports
