#!/usr/bin/env python
"""Runs a command as python does, and holds its training where a test has something to do meanwhile.

HOLD names a folder. While it has a file `imports`, a start holds before it imports torch; while it has a file
`training`, before its first step, until it is asked to stop. A rank that holds makes the file
PLACE-RESTART-RANK there, with its number in an array before it. A job script takes this file as its PYTHON.
"""

import os
import runpy
import sys
import time
from pathlib import Path

from sedd_megatron.training.stop_requests import StopRequests

HOLD = Path(os.environ["HOLD"])
NAMES = (("SLURM_ARRAY_TASK_ID", ""), ("SLURM_RESTART_COUNT", "0"), ("RANK", "0"))


def hold(place: str, requests: StopRequests) -> None:
    if (HOLD / place).exists():
        element, restart, rank = (os.environ.get(name, default) for name, default in NAMES)
        (HOLD / f"{element}{place}-{restart}-{rank}").touch()
    while (HOLD / place).exists() and not requests.requested:
        time.sleep(0.02)


def enter_and_hold(requests: StopRequests) -> StopRequests:
    entered = enter(requests)
    hold("imports", requests)
    return entered


def start_waiting_and_hold(requests: StopRequests) -> None:
    start_waiting(requests)
    hold("training", requests)


if __name__ == "__main__":
    # torchrun starts its ranks by this.
    os.environ["PYTHON_EXEC"] = __file__
    enter, start_waiting = StopRequests.__enter__, StopRequests.start_waiting
    StopRequests.__enter__, StopRequests.start_waiting = enter_and_hold, start_waiting_and_hold
    while sys.argv[1] == "-u":
        del sys.argv[1]
    if sys.argv[1] == "-m":
        sys.argv = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
