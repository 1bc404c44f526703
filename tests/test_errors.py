"""How a command ends: its exit code and its one line."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.commands import ENVIRONMENT, run, torchrun

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


def test_a_log_that_takes_no_utf_8_has_escapes():
    code = "run_command(lambda: say('saved \\xfc') or print('Ω'))"
    done = subprocess.run([sys.executable, "-c", f"from sedd_megatron.errors import *\n{code}"], capture_output=True,
                          env=BUFFERED | {"PYTHONIOENCODING": "ascii"}, timeout=60)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"saved \\xfc\n\\u03a9\n", b"")


def test_a_process_dies_with_a_parent_that_is_gone_already():
    assert ended("die_with_parent(os.getppid())") == (0, "")
    assert ended("die_with_parent(os.getppid() + 1)") == (-9, "")


# What each rank does under torchrun, which ends all ranks a moment after one has ended.
SLOW_TO_END = """
try:
    raise UserError("a mistake")
finally:
    time.sleep(0 if rank else 2)
"""
ONE_WITHOUT_THE_ERROR = """
if rank == 0:
    time.sleep(60)
raise UserError("a mistake")
"""


@pytest.mark.parametrize("body", [SLOW_TO_END, ONE_WITHOUT_THE_ERROR], ids=["slow to end", "one without it"])
def test_torchrun_shows_the_line_once_whichever_rank_has_it_first(body, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, time\nfrom sedd_megatron.errors import UserError, run_command\nrank = int(os.environ['RANK'])\n"
        f"def main():\n{textwrap.indent(body, '    ')}\nrun_command(main)\n"
    )
    done = run([*torchrun(3), str(script)])
    assert done.returncode == 1
    assert done.stderr.splitlines().count("error: a mistake") == 1, done.stderr
