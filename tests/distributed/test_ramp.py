"""A batch that grows: every layout trains what one process trains, step by step."""

import pytest
import torch

from tests.distributed.compare import metrics, relative_difference, whole_tensors
from tests.distributed.launch import launch
from tests.distributed.layouts import LAYOUTS, MODEL

# Of 4, 8, 12 and 16 samples.
RAMP = ("--micro-batch-size 1 --global-batch-size 16 --rampup-batch-size 4 4 60 --train-samples 140 "
        "--lr-decay-style WSD --lr-wsd-decay-samples 40 --lr-warmup-fraction 0.1 "
        "--eval-interval 6").split()  # fmt: skip
SIZES = [4, 4, 4, 4, 4, 8, 8, 8, 12, 12, 16, 16, 16, 16]
NAMES = ("accumulate-1", "TP2-PP2", "DP4-dist-opt", "VPP2-DP2-dist-opt-overlap")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, byte_corpus):
    root = tmp_path_factory.mktemp("ramp")
    at = MODEL.index("--lr-warmup-iters")
    model = [*MODEL[:at], *MODEL[at + 2 :], "--data-path", str(byte_corpus)]
    jobs = {name: (LAYOUTS[name][0], [*model, *RAMP, *LAYOUTS[name][1], "--save", str(root / name)]) for name in NAMES}
    # One process takes four samples at once, each rank of the others one.
    jobs["accumulate-1"][1][-3] = "4"
    for world_size in (1, 4):
        launch("run_pretrain.py", world_size, [command for ranks, command in jobs.values() if ranks == world_size])
    return root


def test_the_batch_grows_as_it_should(runs):
    consumed = metrics(runs / "accumulate-1", "consumed_samples")
    assert consumed.diff(prepend=torch.zeros(1)).tolist() == SIZES
    losses = metrics(runs / "accumulate-1", "loss")
    assert losses[-3:].mean() < losses[:3].mean(), "the reference learns nothing"
    # A mean over each batch, whatever its size: sums would grow with it.
    assert metrics(runs / "accumulate-1", "grad_norm").max() < 3 * metrics(runs / "accumulate-1", "grad_norm").min()


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_layout_trains_the_ramp_of_one_process(runs, name):
    for column in ("loss", "grad_norm", "validation_loss"):
        actual, expected = metrics(runs / name, column), metrics(runs / "accumulate-1", column)
        assert len(actual) == len(expected) > 1
        assert ((actual - expected).abs() <= 1e-6 * expected.abs()).all(), (column, actual, expected)
    for column in ("consumed_samples", "learning_rate"):
        assert torch.equal(metrics(runs / name, column), metrics(runs / "accumulate-1", column))
    actual, expected = (whole_tensors(runs / run / f"iter_{len(SIZES):07d}") for run in (name, "accumulate-1"))
    for key, tensor in expected.items():
        if not key.startswith("optimizer."):
            assert relative_difference(actual[key], tensor) < 2e-6, key
