"""The throughput table of this machine, into tests/benchmarks/results, to be committed."""

import subprocess
import sys

import pytest

from tests.distributed.launch import REPOSITORY


@pytest.mark.transformer_engine
def test_throughput_table():
    output = REPOSITORY / "tests" / "benchmarks" / "results" / "training_throughput.md"
    command = [sys.executable, "-m", "tests.benchmarks.training_throughput", "--output", str(output)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    print(output.read_text())
    rows = [line for line in output.read_text().splitlines() if line.startswith(("| SEDD", "| 1.7B", "| 7B"))]
    assert len(rows) == 8
    # The ratio to the GPT, which a row without either speed has not.
    assert all(float(row.split("|")[10]) > 0 for row in rows)
