"""Processes by what their numbers do not tell: on which machine they are, since when, and who starts them again."""

import os
import socket
from pathlib import Path

import psutil

from sedd_megatron.launcher import FROM_TORCHRUN


def this_machine() -> str:
    """The same for processes that can look for each other: boot and process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def started_at(process: psutil.Process) -> float:
    """Seconds from the machine's boot to the process' start."""
    # Of the two by themselves each moves when the clock is set.
    return round(process.create_time() - psutil.boot_time(), 2)


def launcher() -> str | None:
    """The torchrun that has started this process, in words that no other has; None without one.

    A restart is known by it. torchrun's own count is no help: each node counts the faults of its own ranks alone.
    """
    if FROM_TORCHRUN not in os.environ:
        return None
    try:
        # Not always the parent: torchrun may have been given a script that starts the rank.
        agent = next(parent for parent in psutil.Process().parents() if not _is_from_torchrun(parent))
        return f"{os.environ[FROM_TORCHRUN]} {this_machine()} {agent.pid} {started_at(agent)}"
    except (StopIteration, psutil.Error):
        return None


def _is_from_torchrun(process: psutil.Process) -> bool:
    try:
        return FROM_TORCHRUN in process.environ()
    except psutil.AccessDenied:
        return False  # another user's
