"""What becomes of a job by what its run has left: the shell's own rules, without a Slurm."""

import os
import shutil
import subprocess

import pytest

from tests.distributed.launch import REPOSITORY

SCRIPTS = REPOSITORY / "examples" / "slurm"
LATEST = "latest_checkpointed_iteration.txt"
SCRIPT = """
set -euo pipefail
source "$REPOSITORY/examples/slurm/common.sh"
scontrol() { echo "scontrol $*"; exit 0; }
read_arguments "$@"
remember_save
cd "$SAVE"
eval "$DO"
end_job $CODE
"""
SAVED = f"echo 6 > .new && mv .new {LATEST}"
FINISHED = f"{SAVED}; echo 6 > .new && mv .new finished"


def ended(folder, do: str, code: str = "0", *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a job whose run did this and ended with that code."""
    done = subprocess.run(
        ["bash", "-c", SCRIPT, "job", "--lr", "1", *(arguments or ["--save", str(folder)])],
        capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "REPOSITORY": str(REPOSITORY), "SLURM_JOB_ID": "7", "DO": do, "CODE": code}
        | environment,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


# What the run does, its code, what the job knows; then the job's code, and what it says of it.
CASES = {
    "stopped": (SAVED, "0", {}, 0, "goes on: requeued (restart 1 of 100)\nscontrol requeue 7\n"),
    "stopped again": (SAVED, "0", {"SLURM_RESTART_COUNT": "99"}, 0, "(restart 100 of 100)\nscontrol requeue 7\n"),
    "stopped too often": (SAVED, "0", {"SLURM_RESTART_COUNT": "100"}, 1, "was requeued 100 times (--max-restarts)"),
    "stopped in an array": (SAVED, "0", {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}, 0, "requeue 5_3\n"),
    "stopped before a step": (":", "0", {}, 1, "no checkpoint came to "),
    "finished": (FINISHED, "0", {}, 0, "is finished\n"),
    "failed": (SAVED, "137", {}, 137, "the run failed with code 137 and is not requeued"),
    "torchrun, stopped": (SAVED, "1 any-code", {}, 0, "scontrol requeue 7\n"),
    "torchrun, failed": (":", "1 any-code", {}, 1, "the run failed with code 1 and is not requeued"),
    "torchrun, finished": (FINISHED, "1 any-code", {}, 0, "is finished\n"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_job_ends_by_what_its_run_has_left(name, tmp_path):
    do, code, environment, expected, line = CASES[name]
    # Of a start before, and of a shorter run: neither is this start's work.
    (tmp_path / LATEST).write_text("5\n")
    (tmp_path / "finished").write_text("5\n")
    found, said, error = ended(tmp_path, do, code, **environment)
    assert (found, line in said + error) == (expected, True), said + error
    assert ("scontrol" in said) == ("requeue" in line and expected == 0)


@pytest.mark.parametrize("code", ["0", "143", "1 any-code"])
@pytest.mark.parametrize("flags", [["--skip-train", "--load", "x"], ["--save={}", "--verify-layout"]])
def test_a_job_that_saves_nothing_ends_as_its_command(flags, code, tmp_path):
    flags = [flag.format(tmp_path) for flag in flags]
    assert ended(tmp_path, ":", code, *flags) == (int(code.split()[0]), "", "")


def test_the_first_start_has_an_empty_folder(tmp_path):
    assert ended(tmp_path, SAVED)[0] == 0
    assert "no checkpoint came" in ended(tmp_path, ":")[2]


@pytest.mark.parametrize("form", ["--save {}", "--save={}", "--save elsewhere --save {}"])
def test_the_folder_is_the_last_that_the_flags_name(form, tmp_path):
    arguments = form.format(tmp_path).split()
    assert f"{tmp_path} is not finished" in ended(tmp_path, SAVED, "0", *arguments)[1]


def test_flags_of_the_script_are_its_own(tmp_path):
    do = f'{SAVED}; echo "${{ARGUMENTS[@]}}"'
    said = ended(tmp_path, do, "0", "--max-restarts", "3", "--save", str(tmp_path))[1]
    assert said.startswith(f"--lr 1 --save {tmp_path}\n")
    assert "restart 1 of 3" in said
    assert "of 4)" in ended(tmp_path, SAVED, "0", "--max-restarts=4", "--save", str(tmp_path))[1]


MISTAKES = {
    "no folder": (["--seed", "3"], {}, "--save DIR is missing on the command line"),
    "no number": (["--save", "x", "--max-restarts", "many"], {}, "--max-restarts many: must be a number"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, tmp_path):
    arguments, environment, line = MISTAKES[name]
    code, said, error = ended(tmp_path, ":", "0", *arguments, **environment)
    assert (code, said) == (2, "")
    assert error.startswith(f"error: {line}")


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS.glob("*.sbatch")])
def test_a_job_from_elsewhere_is_told_so(script, tmp_path):
    environment = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": "/nowhere"}
    done = subprocess.run(["bash", str(SCRIPTS / script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: submit from the root of the repository, or give REPOSITORY=DIR"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_scripts_are_clean():
    command = ["shellcheck", "-x", *map(str, sorted(SCRIPTS.iterdir()))]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
