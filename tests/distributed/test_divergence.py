"""A loss or a gradient norm that is not finite ends every rank at its step, and nothing is saved of that step."""

import pytest

from tests.distributed.compare import metrics, whole_tensors
from tests.distributed.launch import launch
from tests.distributed.layouts import DIST_OPT, MODEL, PP2, TP2

# The first step has a learning rate of 0, the second ruins the weights: a little, so that the loss is finite still and
# the squares of its gradients are not, or wholly.
CASES = {"gradient norm": "8", "loss": "1e3"}


@pytest.mark.parametrize("flags", [PP2, TP2, DIST_OPT], ids=" ".join)
def test_every_rank_ends_at_the_step_that_is_not_finite(flags, tmp_path, byte_corpus):
    def job(name: str, rate: str):
        arguments = [*MODEL, *flags, "--lr", rate, "--data-path", str(byte_corpus), "--save", str(tmp_path / name),
                     "--train-iters", "9", "--save-interval", "1", "--eval-interval", "0"]  # fmt: skip
        return arguments, f"^the {name} is (inf|nan) at iteration 3; nothing is saved from here on"

    launch("run_divergence.py", 2, [job(name, rate) for name, rate in CASES.items()])
    for name in CASES:
        assert metrics(tmp_path / name, "iteration").tolist() == [1, 2]
        assert sorted(path.name for path in (tmp_path / name).glob("iter_*")) == ["iter_0000001", "iter_0000002"]
        assert all(tensor.isfinite().all() for tensor in whole_tensors(tmp_path / name / "iter_0000002").values())
