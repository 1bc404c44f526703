"""The throughput table of this machine, into tests/benchmarks/results, to be committed."""

import subprocess
import sys

import pytest

from tests.distributed.launch import REPOSITORY


@pytest.mark.transformer_engine
def test_throughput_table():
    output = REPOSITORY / "tests" / "benchmarks" / "results" / "training_throughput.md"
    command = [sys.executable, "-m", "tests.benchmarks.training_throughput", "--output", str(output)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    print(output.read_text())
    rows = [line for line in output.read_text().splitlines() if line.startswith(("| SEDD", "| 1.3B"))]
    assert len(rows) == 15
    assert not any("out of memory" in row for row in rows if row.startswith("| SEDD"))
