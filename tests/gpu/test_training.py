"""The real example on a GPU: NCCL, FP8 against bfloat16, the check of a layout."""

import subprocess
import sys

import pytest

from tests.distributed.compare import metrics
from tests.distributed.launch import REPOSITORY, free_ports, launch

WIDE = (
    "--num-layers 4 --hidden-size 1024 --num-attention-heads 16 --seq-length 256 --hidden-dropout 0 --bf16 "
    "--global-batch-size 32 --micro-batch-size 16 --lr-warmup-iters 20 --eval-interval 0 --split 100,0,0 "
    "--train-iters 100 --device cuda"
).split()
DIST_OPT = ["--use-distributed-optimizer"]


def example(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--master-port",
               str(free_ports(1)[0]), str(REPOSITORY / "examples" / "pretrain_sedd.py"), *arguments]  # fmt: skip
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=400)


def test_the_example_trains_over_nccl_and_resumes(tmp_path, byte_corpus):
    flags = ["--config", "examples/configs/tiny.yaml", "--data-path", str(byte_corpus), "--bf16", "--save",
             str(tmp_path), "--device", "cuda", *DIST_OPT, "--overlap-grad-reduce", "--overlap-param-gather",
             "--async-save", "--save-interval", "10"]  # fmt: skip
    done = example(*flags, "--train-iters", "60")
    assert done.returncode == 0, done.stderr
    assert "on cuda" in done.stdout
    assert "TFLOP/s per GPU" in done.stdout
    losses = metrics(tmp_path, "loss")
    assert losses[-10:].mean() < 0.9 * losses[:10].mean()
    done = example(*flags, "--train-iters", "65", "--load", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path, "loss")) == 65


def test_verify_layout_passes_on_one_gpu(byte_corpus):
    done = example("--config", "examples/configs/tiny.yaml", "--data-path", str(byte_corpus), "--bf16", "--device",
                   "cuda", *DIST_OPT, "--verify-layout")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED" in done.stdout


def test_nothing_is_compiled_after_the_first_step(byte_corpus):
    data = ["--data-path", str(byte_corpus)]
    recompute = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    kinds = (["--bf16"], ["--bf16", *recompute], ["--bf16", "--transformer-impl", "local"], [])
    launch("../gpu/run_no_compilation.py", 1, [[*data, *kind] for kind in kinds])


@pytest.fixture(scope="module")
def bf16_run(tmp_path_factory, byte_corpus):
    folder = tmp_path_factory.mktemp("bf16")
    launch("run_pretrain.py", 1, [[*WIDE, "--data-path", str(byte_corpus), "--log-dir", str(folder)]])
    return folder


@pytest.mark.transformer_engine
@pytest.mark.parametrize(
    "flags",
    [
        ["--fp8-recipe", "delayed"],
        ["--fp8-recipe", "tensorwise"],
        ["--fp8-recipe", "blockwise"],
        ["--fp8-recipe", "delayed", *DIST_OPT, "--fp8-param-gather"],
        ["--fp8-recipe", "tensorwise", *DIST_OPT, "--fp8-param-gather"],
        ["--fp8-recipe", "tensorwise", "--recompute-granularity", "full", "--recompute-method", "uniform",
         "--recompute-num-layers", "1"],
        ["--fp8-recipe", "tensorwise", "--recompute-granularity", "selective", "--recompute-modules", "mlp"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_fp8_trains_what_bf16_trains(flags, bf16_run, tmp_path, byte_corpus):
    job = [*WIDE, "--fp8-format", "hybrid", *flags, "--data-path", str(byte_corpus), "--log-dir", str(tmp_path)]
    launch("run_pretrain.py", 1, [job])
    expected, actual = metrics(bf16_run, "loss"), metrics(tmp_path, "loss")
    difference = (actual.unfold(0, 20, 20).mean(1) / expected.unfold(0, 20, 20).mean(1) - 1).abs()
    assert difference.max() < 0.01, difference


@pytest.mark.transformer_engine
def test_delayed_scaling_resumes_without_a_bump(bf16_run, tmp_path, byte_corpus):
    common = [*WIDE, "--fp8-format", "hybrid", "--data-path", str(byte_corpus), "--save", str(tmp_path)]
    launch("run_pretrain.py", 1, [[*common, "--train-iters", "80"], [*common, "--load", str(tmp_path)]])
    expected, actual = metrics(bf16_run, "loss")[80:], metrics(tmp_path, "loss")[80:]
    assert len(actual) == 20
    assert abs(actual.mean() / expected.mean() - 1) < 0.01
