"""A first signal is noted, a second one ends the process at once, whatever its main thread waits for."""

import signal
import subprocess
import sys

import pytest

from tests.commands import ENVIRONMENT, EXAMPLE

SCRIPT = """
import os, signal, sys, threading, time
from datetime import timedelta
from torch.distributed import HashStore
from sedd_megatron.training.stop_requests import SAME_REQUEST_SECONDS, StopRequests

number, state, pauses = int(sys.argv[1]), sys.argv[2], [float(pause) for pause in sys.argv[3:]]

def send():
    for pause in pauses:
        time.sleep(pause * SAME_REQUEST_SECONDS)
        os.kill(os.getpid(), number)

with StopRequests() as requests:
    requests.is_to_save = state != "computing"
    if state == "waiting":
        requests.start_waiting()
    sender = threading.Thread(target=send)
    sender.start()
    # In C++ and for good, as a collective waits for a rank that stands still.
    try:
        HashStore().wait(["never"], timedelta(seconds=2.5 * SAME_REQUEST_SECONDS))
    except RuntimeError:
        pass
    sender.join()
    print(requests.requested)
signal.raise_signal(number)
"""
CASES = {
    "before the first step": (signal.SIGUSR1, "starting", (0.1,), 0, "", "SIGUSR1: ended before the first step\n"),
    "a command with a result": (signal.SIGINT, "computing", (0.1,), 130, "", "SIGINT: ended without a result\n"),
    # The process ends by the signal itself, as it does where nobody listens.
    "once": (signal.SIGHUP, "waiting", (0.1,), -1, "1\n", ""),
    "twice at once, by torchrun and Slurm": (signal.SIGTERM, "waiting", (0.1, 0.0), -15, "15\n", ""),
    "again": (signal.SIGINT, "waiting", (0.1, 1.5), 130, "",
              "SIGINT: asked again, ended at once; the checkpoints of before are whole\n"),
}  # fmt: skip


def start(number: int, state: str, pauses: tuple[float, ...], *, ignored: bool = False) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(int(number)), state, *map(str, pauses)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=(lambda: signal.signal(number, signal.SIG_IGN)) if ignored else None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def outcomes() -> dict:
    """Of all cases, which wait beside each other: exit code, stdout, stderr."""
    processes = {name: start(number, state, pauses) for name, (number, state, pauses, *_) in CASES.items()}
    processes["nohup"] = start(signal.SIGHUP, "waiting", (0.1, 1.5), ignored=True)
    outputs = {name: process.communicate(timeout=240) for name, process in processes.items()}
    return {name: (processes[name].returncode, *output) for name, output in outputs.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_signal_is_noted_once_and_obeyed_the_second_time(name, outcomes):
    assert outcomes[name] == CASES[name][3:]


def test_a_run_under_nohup_stays_deaf_to_the_hangup(outcomes):
    assert outcomes["nohup"] == (0, "0\n", "")


@pytest.mark.parametrize(
    ("flags", "words", "code"),
    [([], "ended before the first step", 0), (["--verify-layout"], "ended without a result", 143)],
)
def test_the_command_hears_signals_before_it_imports_torch(flags, words, code, tmp_path):
    """Of all that is imported, torch takes longest; here it does not come at all."""
    (tmp_path / "torch.py").write_text("import time\nprint('torch', flush=True)\ntime.sleep(60)\n")
    environment = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}:{ENVIRONMENT['PYTHONPATH']}"}
    command = [sys.executable, str(EXAMPLE), "--data-path", "none", *flags]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "torch\n"
    process.terminate()
    assert process.communicate(timeout=60) == ("", f"SIGTERM: {words}\n")
    assert process.returncode == code


def test_a_command_that_has_done_its_work_ends_with_its_own_code():
    """Whatever comes while Python takes its modules down."""
    code = """
import atexit, os, signal
from sedd_megatron.errors import STOP_SIGNALS, run_command
from sedd_megatron.training.stop_requests import StopRequests, ignore_from_now_on
atexit.register(lambda: [os.kill(os.getpid(), number) for number in STOP_SIGNALS])
def main():
    with StopRequests():
        pass
    ignore_from_now_on()
run_command(main)
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
