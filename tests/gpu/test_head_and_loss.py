"""Head, loss and fused operations on a GPU: the dense float64 loss in value and gradient, and a table of their cost."""

import itertools
import subprocess
import sys

import pytest
import torch

from sedd_megatron.parallel.keyed_dropout import dropout_keys, dropped_elements
from tests.benchmarks.goals import HEAD_MEMORY_MIB
from tests.distributed.launch import REPOSITORY, launch
from tests.distributed.test_fused_head import CASES
from tests.gpu.check import HEAD_AND_LOSS
from tests.model.test_fused_operations import NAMES, inputs, operations, outcome


def test_fused_head_is_the_dense_loss():
    launch("run_fused_head.py", 1, [[*case, "cuda"] for case in CASES])


def test_fused_head_in_many_chunks_and_tiles():
    """1,500 positions in chunks of 256, 1,000 tokens of 1,152 columns in tiles of 256."""
    shape, further = [1000, 1152, "some", 256, 256], ["cuda", 500, 5e-2]
    kinds = itertools.product(("absorb", "uniform"), ("float32", "bfloat16"))
    launch("../gpu/run_many_tiles.py", 1, [[graph, *shape, dtype, *further] for graph, dtype in kinds])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_compiled_operations_are_the_plain_ones(name, dtype, training):
    fused, plain, shapes, further = operations(training)[name]
    num_derivatives = 1 if name == "rotate" else len(shapes)
    exact = outcome(plain, inputs(shapes), further, num_derivatives)
    on_gpu = [one.cuda() if isinstance(one, torch.Tensor) else one for one in further]
    actual = outcome(fused, [tensor.cuda() for tensor in inputs(shapes, dtype)], on_gpu, num_derivatives)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-2
    for one, other in zip(actual, exact, strict=True):
        assert (one.double().cpu() - other).norm() < tolerance * other.norm()


def test_dropout_drops_what_it_drops_on_a_cpu():
    keys = dropout_keys(2**64 - 3, torch.tensor([0, 5, 2**62]))
    for branch, width in itertools.product((0, 1, 95), (40, 768)):
        expected = dropped_elements(keys, branch, 1024, 256, width, 0.1)
        assert torch.equal(dropped_elements(keys.cuda(), branch, 1024, 256, width, 0.1).cpu(), expected)


def test_head_and_loss_table():
    """SEDD-small: 16k positions against the dense path, which has no room for more, and 64k of ours alone."""
    output = REPOSITORY / "tests" / "benchmarks" / "results" / "loss_gpu.md"
    command = [sys.executable, "-m", "tests.benchmarks.loss", *HEAD_AND_LOSS, "--output", str(output)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    print(output.read_text())
    (absorb,) = (line for line in output.read_text().splitlines() if line.startswith("| absorb | 64 x 1024"))
    assert float(absorb.split("|")[7].split()[0]) < HEAD_MEMORY_MIB
