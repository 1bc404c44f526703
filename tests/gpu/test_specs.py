"""Transformer Engine's layers compute what the local ones compute, and read each other's checkpoints."""

import pytest
import torch

from tests.distributed.compare import metrics, relative_difference, whole_tensors
from tests.distributed.launch import launch

pytestmark = pytest.mark.transformer_engine

LOCAL = ["--transformer-impl", "local"]
ENGINE = ["--transformer-impl", "transformer_engine"]
BF16_ENGINE = ["--bf16", *ENGINE]
MODEL = (
    "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 128 --hidden-dropout 0 --lr 1e-3 "
    "--adam-eps 1e-4 --lr-warmup-iters 4 --global-batch-size 16 --micro-batch-size 8 --eval-interval 0 "
    "--split 100,0,0 --device cuda"
).split()


def test_only_bf16_training_takes_transformer_engine_by_itself():
    local, engine = "ColumnParallelLinear", "TEColumnParallelLinear"
    jobs = [[True, True, engine], [True, False, local], [False, True, local], [False, False, local]]
    launch("../gpu/run_layer_choice.py", 1, jobs)


def test_bf16_layers_agree():
    launch("../gpu/run_specs.py", 1, [[BF16_ENGINE, ["--bf16", *LOCAL], 2e-2, 5e-2]])


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize("fp8_format", ["hybrid", "e4m3"])
def test_fp8_is_near_bf16_forward_and_backward(recipe, fp8_format):
    flags = [*BF16_ENGINE, "--fp8-format", fp8_format, "--fp8-recipe", recipe]
    # e4m3 has 3 bits of mantissa and e5m2 2: an entry is off by up to 1/16 or 1/8, a product's sum by less.
    launch("../gpu/run_specs.py", 1, [[flags, BF16_ENGINE, 0.1, 0.2]])


@pytest.mark.parametrize(("saved", "loaded"), [(LOCAL, ENGINE), (ENGINE, LOCAL)], ids=["to-engine", "to-local"])
def test_a_checkpoint_is_the_same_model_in_the_other_layers(saved, loaded, tmp_path, byte_corpus):
    common = [*MODEL, "--bf16", "--data-path", str(byte_corpus)]
    first, same, other = (str(tmp_path / name) for name in ("first", "same", "other"))
    launch("run_pretrain.py", 1, [
        [*common, *saved, "--train-iters", "10", "--save", first],
        [*common, *saved, "--train-iters", "20", "--load", first, "--save", same],
        [*common, *loaded, "--train-iters", "20", "--load", first, "--save", other],
        [*common, *loaded, "--train-iters", "10", "--load", first, "--save", str(tmp_path / "copy")],
    ])  # fmt: skip
    losses = metrics(tmp_path / "same", "loss")
    torch.testing.assert_close(metrics(tmp_path / "other", "loss"), losses, rtol=1e-2, atol=0)
    kept, copied = (whole_tensors(tmp_path / name / "iter_0000010") for name in ("first", "copy"))
    assert copied.keys() == kept.keys()
    assert all(relative_difference(copied[name], tensor) == 0 for name, tensor in kept.items())
