"""Sampling on a GPU: scores and samples of published weights, and a table of its speed."""

import json
import subprocess
import sys

from tests.distributed.launch import REPOSITORY, launch
from tests.gpu.check import SAMPLING


def test_scores_are_the_dense_ones_and_samples_those_of_the_cpu(tmp_path):
    """float32 scores differ by rounding, so that a token may differ where a uniform number falls between them."""
    graphs = ("absorb", "uniform")
    for device in ("cpu", "cuda"):
        launch("run_sampling.py", 1, [[str(tmp_path), device, graph, 1, 1, 32, device] for graph in graphs])
    for graph in graphs:
        on_cpu, on_gpu = (json.loads((tmp_path / f"{name}-{graph}-0.json").read_text()) for name in ("cpu", "cuda"))
        same = [one == other for name in on_cpu for one, other in zip(on_cpu[name], on_gpu[name], strict=True)]
        assert sum(same) >= 0.9 * len(same)


def test_samples_of_captured_kernels_are_those_of_launched_ones(tmp_path):
    """Every sampler, several lengths and batches: shapes are met for the first time, and again after others."""
    graphs = ("absorb", "uniform")
    for name, captured in (("launched", False), ("captured", True)):
        launch("run_sampling.py", 1, [[str(tmp_path), name, graph, 1, 1, 32, "cuda", captured] for graph in graphs])
    for graph in graphs:
        launched, captured = (
            json.loads((tmp_path / f"{name}-{graph}-0.json").read_text()) for name in ("launched", "captured")
        )
        assert captured == launched


def test_sampling_table():
    output = REPOSITORY / "tests" / "benchmarks" / "results" / "sampling_gpu.md"
    command = [sys.executable, "-m", "tests.benchmarks.sampling", *SAMPLING, "--pairs", "2", "--output", str(output)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    print(output.read_text())
