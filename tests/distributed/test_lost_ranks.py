"""Ranks whose neighbour or whose torchrun is gone end soon, and say in one line why."""

import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.commands import ENVIRONMENT, train_command
from tests.distributed.launch import start
from tests.distributed.layouts import DIST_OPT, MODEL

# The time-out, how long the other rank is waited for once one has ended, and what that one says.
FAULTS = {
    "SIGSTOP": (0.2, 0, "Timed out waiting 12000ms for recv operation to complete"),
    "SIGKILL": (10, 20, r".*(Connection reset by peer|Connection closed by peer \[[\d.:]+\]:\d+)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_rank_ends_with_one_line_when_another_is_lost(name, tmp_path, byte_corpus):
    minutes, patience, reason = FAULTS[name]
    # A loader process has copies of its rank's connections.
    arguments = [*MODEL, *DIST_OPT, "--data-path", str(byte_corpus), "--save", str(tmp_path), "--save-interval", "2",
                 "--train-iters", "9", "--eval-interval", "0", "--num-workers", "1"]  # fmt: skip
    codes, (said, _) = start("run_lost_rank.py", 2, [(arguments, name, minutes)], patience=patience)
    assert codes == [2, -signal.SIGKILL], said
    (line,) = [line for line in said.splitlines() if "error" in line.lower()]
    pattern = rf"error: rank 0 waited in \w+ for a rank that is gone or stands still: {reason}; look for the reason on"
    assert re.match(pattern, line), line
    assert "Traceback" not in said
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text().strip() == "2"


def test_no_process_outlives_its_torchrun(tmp_path, byte_corpus):
    command = train_command("--data-path", str(byte_corpus), "--save", str(tmp_path), "--train-iters", "100000",
                            "--eval-interval", "0", "--num-workers", "1")  # fmt: skip
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_steps(process, tmp_path / "metrics.jsonl")
    family = psutil.Process(process.pid).children(recursive=True)
    # Two ranks with a loader process each.
    assert len(family) == 4
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=10) == -signal.SIGUSR1
    _, alive = psutil.wait_procs(family, timeout=3)
    for survivor in alive:
        survivor.kill()
    assert not alive


def wait_for_steps(process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None, "the run ended by itself"
        time.sleep(0.2)
