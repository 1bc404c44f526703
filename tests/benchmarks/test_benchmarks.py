"""The benchmarks run, at a size that says nothing of speed."""

import subprocess
import sys

from tests.distributed.launch import REPOSITORY


def test_training_throughput_writes_its_table(tmp_path):
    output = tmp_path / "table.md"
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.training_throughput", "--shapes", "tiny", "--precisions", "float32",
         "bf16", "--steps", "2", "--flags=--device cpu", "--output", str(output)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = output.read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| tiny")]
    assert [row[1].strip() for row in rows] == ["float32", "bf16"]
    assert all(float(row[3].replace(",", "")) > 0 for row in rows)
    assert "python -m tests.benchmarks.training_throughput --shapes tiny" in text
