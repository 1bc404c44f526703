"""mpirun's processes are the ranks of one run, and not runs beside each other."""

import shutil
import sys

import pytest

from tests.commands import EXAMPLE, run
from tests.distributed.compare import metrics
from tests.distributed.launch import child_environment
from tests.distributed.layouts import DIST_OPT, MODEL


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun")
def test_mpirun_starts_the_ranks_of_one_run(tmp_path, byte_corpus):
    # In a container one is root.
    environment = child_environment(OMP_NUM_THREADS="1", OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    flags = ["--data-path", str(byte_corpus), "--save", str(tmp_path / "run"), "--train-iters", "2",
             "--eval-interval", "0"]  # fmt: skip
    command = ["mpirun", "-n", "2", "--oversubscribe", sys.executable, str(EXAMPLE), *MODEL, *DIST_OPT, *flags]
    done = run(command, environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("data 2 on cpu") == 1
    assert metrics(tmp_path / "run", "iteration").tolist() == [1, 2]
    mistake = run([*command, "--lr", "-1"], environment)
    assert mistake.returncode == 2
    assert mistake.stderr.count("error: --lr -1.0 must be at least 0\n") == 1
