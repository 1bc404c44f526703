"""examples/environment.sh: what makes .venv ends with one line that says what to do, and deletes nothing."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.distributed.launch import REPOSITORY

VERSION = "{}.{}".format(*sys.version_info)


@pytest.fixture
def checkout(tmp_path) -> Path:
    (tmp_path / "examples").mkdir()
    for name in ("examples/environment.sh", "setup.py"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    return tmp_path


def make_environment(checkout: Path, **variables: str) -> tuple[int, str]:
    script = "set -euo pipefail; source examples/environment.sh; make_environment ''; echo made"
    outside = {key: value for key, value in os.environ.items() if not key.startswith("PIP_") and key != "PYTHON"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = outside | variables | {"PATH": path}
    done = subprocess.run(["bash", "-c", script], cwd=checkout, env=environment, capture_output=True, text=True,
                          timeout=300)  # fmt: skip
    assert ("made" in done.stdout) == (done.returncode == 0)
    return done.returncode, done.stderr


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_an_interpreter_that_is_not_there_is_called_so(checkout):
    # A name that nobody has, and one that is a command as pyenv makes them.
    for python in ("/nowhere/python3.12", program(checkout / "python3.12", "echo not installed >&2; exit 127")):
        said = f"error: there is no {python} that runs; set PYTHON to a Python from 3.10 to 3.13\n"
        assert make_environment(checkout, PYTHON=python) == (2, said)
    old = program(checkout / "python3.8", "echo 3.8")
    said = f"error: {old} is older than Python 3.10; set PYTHON to a newer one\n"
    assert make_environment(checkout, PYTHON=old) == (2, said)
    assert not (checkout / ".venv").exists()


def test_an_environment_of_another_python_is_named_and_stays(checkout):
    venv.create(checkout / ".venv", with_pip=False, symlinks=True)
    other = program(checkout / "python9.9", "echo 9.9")
    code, said = make_environment(checkout, PYTHON=other)
    assert (code, said) == (
        2,
        f"error: {other} is Python 9.9, and the Python of .venv is {VERSION}; move .venv away (mv .venv .venv.old), or "
        "leave PYTHON out\n",
    )
    assert (checkout / ".venv" / "pyvenv.cfg").exists()
    # As after an upgrade of the system.
    (checkout / ".venv" / "bin" / "python").unlink()
    program(checkout / ".venv" / "bin" / "python", "exit 1")
    code, said = make_environment(checkout)
    assert code == 2
    assert said == (
        f"error: python3 is Python {VERSION}, and the Python of .venv is none that runs; move .venv away (mv .venv "
        ".venv.old)\n"
    )


def test_an_index_that_is_not_reached_ends_with_the_way_out(checkout):
    away = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    venv.create(checkout / ".venv", with_pip=True, symlinks=True)
    # What is installed already is not asked for again.
    code, said = make_environment(checkout, PYTHON=sys.executable, PIP_CONFIG_FILE="/dev/null", PIP_RETRIES="0", **away)
    assert code == 2
    assert said.splitlines()[-1] == (
        "error: pip could not install what is needed, for the reason above; where it reaches no package index, set "
        "PIP_INDEX_URL to one, or PIP_FIND_LINKS to a folder of wheels, and start again"
    )
    assert not list((checkout / ".venv").glob("installed*"))
