"""How a command ends: its exit code and its one line."""

import subprocess
import sys
from pathlib import Path

from tests.commands import ENVIRONMENT

BUFFERED = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONUNBUFFERED"}


def ended(code: str, **options) -> tuple[int, str]:
    """Exit code and stderr of a process that runs this with what errors.py has."""
    options = {"stdout": subprocess.DEVNULL, **options}
    done = subprocess.run([sys.executable, "-c", f"from sedd_megatron.errors import *\n{code}"], env=BUFFERED,
                          stderr=subprocess.PIPE, text=True, timeout=60, **options)  # fmt: skip
    return done.returncode, done.stderr


def test_ctrl_c_ends_with_its_code_and_no_traceback():
    assert ended("run_command(lambda: signal.raise_signal(signal.SIGINT))") == (130, "interrupted\n")


def test_a_run_without_anywhere_to_speak_ends_well():
    speak = "say('a line'), say('another')"
    with Path("/dev/full").open("w") as full:
        assert ended(f"run_command(lambda: [{speak}, forget_unsaid()][-1])", stdout=full) == (0, "")
        # What makes the difference: any other command ends with what it could not print.
        code, said = ended(f"run_command(lambda: [{speak}][-1])", stdout=full)
        assert (code, said.startswith("error: standard output: cannot be written (No space left on device)")) == (
            2,
            True,
        )


def test_a_process_dies_with_a_parent_that_is_gone_already():
    assert ended("die_with_parent(os.getppid())") == (0, "")
    assert ended("die_with_parent(os.getppid() + 1)") == (-9, "")
