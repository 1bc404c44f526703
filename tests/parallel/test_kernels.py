"""The Triton kernels, without a GPU: by Triton's interpreter, and compiled ahead of time."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import child_environment

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which is not installed"
)


def run(script: str, tmp_path: Path, **environment: str) -> str:
    """Triton reads its environment when it is imported: a process of its own."""
    environment = child_environment(TRITON_CACHE_DIR=str(tmp_path), OMP_NUM_THREADS="1", **environment)
    command = [sys.executable, str(Path(__file__).with_name(script))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_tiles_kernel_is_the_tile_by_index(tmp_path):
    run("run_score_tile_kernel.py", tmp_path, TRITON_INTERPRET="1")


def test_the_tiles_kernel_compiles_for_sm_90_and_moves_16_bytes_at_once(tmp_path):
    """Without spills: its registers are all that a column's numbers live in. And once for all tiles."""
    said = run("compile_score_tile_kernel.py", tmp_path)
    print(said)
    lines = [line for line in said.splitlines() if line.startswith("kernel")]
    assert len(lines) == 4
    for line in lines:
        found = dict(re.findall(r"(\w+)=(\d+)", line))
        assert int(found["compilations"]) == 1, line
        assert int(found["spilled"]) == 0, line
        assert int(found["registers"]) <= 128, line
        assert int(found["wide_loads"]) > 0, line
        assert int(found["wide_stores"]) > 0 or "gradient=0" in line, line


def test_dropouts_kernel_gives_numpys_numbers(tmp_path):
    run("run_dropout_kernel.py", tmp_path, TRITON_INTERPRET="1")


def test_dropouts_kernel_compiles_for_sm_90_once_for_all_layers(tmp_path):
    said = run("compile_dropout_kernel.py", tmp_path)
    print(said)
    found = dict(re.findall(r"(\w+)=(\d+)", said))
    assert int(found["compilations"]) == 1
    assert int(found["spilled"]) == 0
