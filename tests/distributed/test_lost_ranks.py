"""Ranks whose neighbour or whose torchrun is gone end soon, and say in one line why."""

import re
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import sedd_megatron.training
from sedd_megatron.parallel.lost_ranks import Place, place_of
from tests.commands import ENVIRONMENT, train_command
from tests.distributed.launch import start
from tests.distributed.layouts import DIST_OPT, MODEL, PP2, TP2

RESET = r"(Connection reset by peer|Connection closed by peer \[[\d.:]+\]:\d+)"
# Layout and ranks, the signal and whose it is, the time-out, how long the others are waited for once one has
# ended, and what they say of whom.
GONE = "rank {}, which is gone or stands still: .*"
FAULTS = {
    "stopped": (DIST_OPT, 2, "SIGSTOP", 1, 0.2, 0, GONE.format(1) + "Timed out waiting 12000ms for recv operation"),
    "killed": ([*PP2, *DIST_OPT], 4, "SIGKILL", 2, 10, 30, GONE.format(2) + RESET),
    # It holds the store by which the ranks ask each other.
    "first": (TP2, 2, "SIGKILL", 0, 10, 30, "a rank that is gone or stands still, as the ranks' store is, .*" + RESET),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_others_end_with_one_line_that_names_the_rank(name, tmp_path, byte_corpus):
    layout, num_ranks, signal_name, lost, minutes, patience, reason = FAULTS[name]
    # A loader process has copies of its rank's connections.
    arguments = [*MODEL, *layout, "--data-path", str(byte_corpus), "--save", str(tmp_path), "--save-interval", "2",
                 "--train-iters", "9", "--eval-interval", "0", "--num-workers", "1"]  # fmt: skip
    job = (arguments, signal_name, lost, minutes)
    codes, outputs = start("run_lost_rank.py", num_ranks, [job], patience=patience)
    assert codes == [-signal.SIGKILL if rank == lost else 2 for rank in range(num_ranks)], outputs
    for rank, said in enumerate(outputs):
        if rank != lost:
            (line,) = [line for line in said.splitlines() if "error" in line.lower()]
            place = r"\w+( \(\w+ among ranks [\d, ]+\))?"
            assert re.match(f"error: rank {rank} waited in {place} for {reason}", line), line
            assert line.endswith("; look for the reason there, and start again")
        assert "Traceback" not in said
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text().strip() == "2"


def test_a_place_is_ours_whatever_the_folder_of_the_environment_is_called():
    def frame(file: str, name: str) -> SimpleNamespace:
        return SimpleNamespace(f_code=SimpleNamespace(co_filename=file, co_name=name), f_locals={})

    ours = frame(sedd_megatron.training.__file__, "train_step")
    torchs = frame("/home/me/sedd_megatron/.venv/lib/python3.11/site-packages/torch/utils/_contextlib.py", "decorated")
    assert place_of([ours, torchs]) == Place("train_step")


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
