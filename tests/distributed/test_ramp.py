"""A batch that grows: every layout trains what one process trains, step by step. And --finetune between layouts."""

import pytest
import torch

from tests.distributed.compare import metrics, relative_difference, whole_tensors
from tests.distributed.launch import launch
from tests.distributed.layouts import DIST_OPT, LAYOUTS, MODEL, OVERLAP

# Of 4, 8, 12 and 16 samples.
LENGTH = ("--train-samples 140 --lr-decay-style WSD --lr-wsd-decay-samples 40 --lr-warmup-fraction 0.1 "
          "--eval-interval 6").split()  # fmt: skip
RAMP = ["--micro-batch-size", "1", "--global-batch-size", "16", "--rampup-batch-size", "4", "4", "60", *LENGTH]
SIZES = [4, 4, 4, 4, 4, 8, 8, 8, 12, 12, 16, 16, 16, 16]
NAMES = ("accumulate-1", "SP2", "VPP2", "DP2-dist-opt-overlap")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, byte_corpus):
    root = tmp_path_factory.mktemp("ramp")
    at = MODEL.index("--lr-warmup-iters")
    model = [*MODEL[:at], *MODEL[at + 2 :], "--data-path", str(byte_corpus)]
    jobs = {name: (LAYOUTS[name][0], [*model, *RAMP, *LAYOUTS[name][1], "--save", str(root / name)]) for name in NAMES}
    # One process takes four samples at once, each rank of the others one.
    jobs["accumulate-1"][1][-3] = "4"
    # Of what one process saved.
    tuned = [
        *model,
        "--load",
        str(root / "accumulate-1"),
        "--finetune",
        "--train-iters",
        "0",
        "--save",
        str(root / "tuned"),
    ]
    jobs["tuned"] = (2, [*tuned, "--bf16", *DIST_OPT, *OVERLAP])
    small = ["--micro-batch-size", "4", "--global-batch-size", "4"]
    jobs["small"] = (1, [*model, *LENGTH, *small, "--save", str(root / "small")])
    for world_size in (1, 2):
        launch("run_pretrain.py", world_size, [command for ranks, command in jobs.values() if ranks == world_size])
    return root


def test_the_batch_grows_as_it_should(runs):
    consumed = metrics(runs / "accumulate-1", "consumed_samples")
    assert consumed.diff(prepend=torch.zeros(1)).tolist() == SIZES
    losses = metrics(runs / "accumulate-1", "loss")
    assert losses[-3:].mean() < losses[:3].mean(), "the reference learns nothing"
    # Until the first growth it is the run of a small batch: a mean over the step's own micro-batches, to the bit.
    for name in ("loss", "grad_norm", "learning_rate"):
        assert torch.equal(metrics(runs / "accumulate-1", name)[:5], metrics(runs / "small", name)[:5])
    before = torch.cat([torch.zeros(1, dtype=torch.float64), consumed[:-1]])
    wsd = 2 * 0.5 ** ((before - 100).clamp_min(0) / 40) - 1
    torch.testing.assert_close(metrics(runs / "accumulate-1", "learning_rate"), 1e-3 * wsd * (before / 14).clamp_max(1))


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


def test_the_weights_alone_come_into_another_layout_and_precision(runs):
    source = whole_tensors(runs / "accumulate-1" / f"iter_{len(SIZES):07d}")
    tuned = whole_tensors(runs / "tuned" / "iter_0000000")
    weights = {key: tensor for key, tensor in source.items() if not key.startswith(("ema.", "optimizer."))}
    for key, tensor in weights.items():
        assert torch.equal(tuned[f"optimizer.state.fp32_param.{key}"], tensor), key
        assert torch.equal(tuned[f"ema.{key}"], tensor), key
        assert torch.equal(tuned[key], tensor.bfloat16()), key
        assert not torch.equal(source[f"ema.{key}"], tensor), key
    moments = [tensor for key, tensor in tuned.items() if "exp_avg" in key]
    assert len(moments) == 2 * len(weights)
    assert not any(tensor.any() for tensor in moments)
