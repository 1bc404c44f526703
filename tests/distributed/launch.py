"""Starts real gloo ranks for the tests: run_X.py in this folder under N processes."""

import contextlib
import json
import multiprocessing
import os
import random
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
# Importing torch and Megatron takes five seconds, longer than most jobs: ranks are forked from a process that has.
RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(["tests.distributed.preload"])


def launch(script: str, world_size: int, jobs: list[Any], timeout: int = 400) -> None:
    """Run `script` once per rank with `jobs` as its JSON argument; each job gets a rendezvous port of its own.

    Fails with the ranks' output.
    """
    codes, outputs = start(script, world_size, jobs, timeout)
    said = "\n".join(text[-6000:] for text in outputs)
    assert codes == [0] * world_size, f"{script} ended with {codes}\n{said}"


def start(script: str, world_size: int, jobs: list[Any], timeout: int = 400) -> tuple[list[int], list[str]]:
    """As `launch`; returns the ranks' exit codes and what they said."""
    arguments = [str(HERE / script), json.dumps(jobs), json.dumps(free_ports(len(jobs)))]
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / str(rank) for rank in range(world_size)]
        for path in said:
            path.touch()
        processes = []
        for rank, path in enumerate(said):
            environment = dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                               LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1",
                               PYTHONPATH=str(REPOSITORY))  # fmt: skip
            processes.append(RANKS.Process(target=_run, args=(arguments, environment, str(path))))
            processes[-1].start()
        _wait(processes, timeout)
        return [process.exitcode for process in processes], [path.read_text(errors="replace") for path in said]


def own_jobs() -> Iterator[Any]:
    """In a rank that `start` started: its jobs, each with its rendezvous port in place."""
    for job, port in zip(json.loads(sys.argv[1]), json.loads(sys.argv[2]), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        yield job


def _run(arguments: list[str], environment: dict[str, str], said: str) -> None:
    """In the rank itself: `arguments` as a command line, what it says into a file."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(said, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def _wait(processes: list[multiprocessing.Process], timeout: int) -> None:
    """Until all have ended. When one has failed, the others wait for it in vain and are stopped."""
    deadline = time.monotonic() + timeout
    while any(process.exitcode is None for process in processes):
        if time.monotonic() > deadline or any(process.exitcode for process in processes):
            time.sleep(2)  # for the others' own last words
            for process in processes:
                process.kill()
            break
        time.sleep(0.05)
    for process in processes:
        process.join()


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
