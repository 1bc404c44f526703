"""Invariants 1 and 2: every layout trains what one process trains, and a resumed run is the unbroken run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sedd_megatron.training.checkpoint_format import read_manifest
from tests.distributed.launch import launch

STEPS = 20
MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --cond-dim 16 --seq-length 16 --hidden-dropout 0 "
    "--global-batch-size 8 --micro-batch-size 2 --lr 3e-3 --lr-warmup-iters 4 --ema-decay 0.9 "
    "--eval-interval 10 --eval-iters 2 --split 80,20,0 --device cpu"
).split()
# The norm's float32 square sum is itself only good to a few 1e-6.
TOLERANCES = {"loss": 1e-6, "validation_loss": 1e-6, "grad_norm": 1e-5, "learning_rate": 1e-12}
LAYOUTS = {
    "TP2": (2, ["--tensor-model-parallel-size", "2"]),
    "PP2": (2, ["--pipeline-model-parallel-size", "2"]),
    "DP2": (2, []),
    "TP2xPP2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
    "TP2xDP2": (4, ["--tensor-model-parallel-size", "2"]),
    "PP2xDP2": (4, ["--pipeline-model-parallel-size", "2"]),
}
GRAPHS = {"absorb": ["--graph", "absorb"], "uniform": ["--graph", "uniform", "--noise", "geometric"]}

# Runs that are resumed in their own layout.
VARIANTS = {"halfway": [], "dropout": ["--hidden-dropout", "0.1"], "bf16": ["--bf16"]}


def whole_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, put together from its shards."""
    tensors = {}
    for key, entry in read_manifest(checkpoint)["tensors"].items():
        whole = torch.full(entry["global_shape"], torch.nan, dtype=getattr(torch, entry["dtype"]))
        for shard in entry["shards"]:
            with safe_open(checkpoint / shard["file"], framework="pt") as file:
                data = file.get_tensor(shard["name"]).view(shard["shape"])
            whole[tuple(slice(o, o + n) for o, n in zip(shard["offset"], shard["shape"], strict=True))] = data
        tensors[key] = whole
    return tensors


def metrics(folder: Path, name: str) -> torch.Tensor:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line[name] for line in lines if name in line], dtype=torch.float64)


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, byte_corpus) -> dict[str, Path]:
    """All the runs of this file, grouped by number of ranks: NAME.GRAPH -> its folder."""
    root = tmp_path_factory.mktemp("layouts")

    def job(folder: str, flags: list[str], steps: int = STEPS) -> list[str]:
        common = ["--data-path", str(byte_corpus), "--train-iters", str(steps), "--save", str(root / folder)]
        return [*MODEL, *common, *flags]

    reference_jobs = [job(f"one.{name}", flags) for name, flags in GRAPHS.items()]
    halfway = ["--save-interval", "12"]
    reference_jobs += [
        job("one.halfway", [*GRAPHS["absorb"], *halfway]),
        job("one.dropout", [*GRAPHS["absorb"], *halfway, *VARIANTS["dropout"]]),
        job("one.bf16", [*GRAPHS["absorb"], *halfway, *VARIANTS["bf16"]]),
    ]
    launch("run_pretrain.py", 1, reference_jobs)
    for world_size in (2, 4):
        jobs = []
        for layout, (ranks, flags) in LAYOUTS.items():
            if ranks == world_size:
                jobs += [job(f"{layout}.{name}", [*flags, *graph]) for name, graph in GRAPHS.items()]
        if world_size == 2:
            jobs.append(job("TP2.halfway", [*LAYOUTS["TP2"][1], *GRAPHS["absorb"], *halfway]))
        launch("run_pretrain.py", world_size, jobs)
    return {path.name: path for path in root.iterdir()}


def latest(folder: Path) -> Path:
    return folder / f"iter_{STEPS:07d}"


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_what_one_process_trains(runs, layout, graph):
    one, other = runs[f"one.{graph}"], runs[f"{layout}.{graph}"]
    losses = metrics(one, "loss")
    assert len(losses) == STEPS
    assert losses[-1] < losses[0], "the reference run learns nothing, so that comparing with it would show nothing"
    for name, tolerance in TOLERANCES.items():
        expected, actual = metrics(one, name), metrics(other, name)
        assert len(actual) == len(expected)
        assert ((actual - expected).abs() <= tolerance * expected.abs()).all(), (name, actual, expected)
    assert torch.equal(metrics(other, "consumed_samples"), metrics(one, "consumed_samples"))


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_ends_with_the_parameters_of_one_process(runs, layout, graph):
    expected, actual = whole_tensors(latest(runs[f"one.{graph}"])), whole_tensors(latest(runs[f"{layout}.{graph}"]))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert not tensor.isnan().any(), f"{name}: shards do not cover it"
        assert relative_difference(actual[name], tensor) < 1e-4, name


def resume(folder: Path, source: Path, iteration: int, world_size: int, corpus: Path, flags: list[str]) -> None:
    """Continue from a copy of `source` at `iteration` in another folder and layout."""
    job = [*MODEL, "--data-path", str(corpus), "--train-iters", str(STEPS), "--save", str(folder),
           "--load", str(source / f"iter_{iteration:07d}"), *flags]  # fmt: skip
    launch("run_pretrain.py", world_size, [job])


@pytest.mark.parametrize("kind", VARIANTS)
def test_resume_in_the_same_layout_is_bitwise(runs, kind, tmp_path, byte_corpus):
    unbroken = runs[f"one.{kind}"]
    resume(tmp_path / "resumed", unbroken, 12, 1, byte_corpus, [*GRAPHS["absorb"], *VARIANTS[kind]])
    assert torch.equal(metrics(tmp_path / "resumed", "loss"), metrics(unbroken, "loss")[12:])
    expected, actual = whole_tensors(latest(unbroken)), whole_tensors(latest(tmp_path / "resumed"))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_bfloat16_learns_what_float32_learns(runs):
    # Rounding of 2^-9 in weights and activations; the loss itself is computed in float32.
    torch.testing.assert_close(
        metrics(runs["one.bf16"], "loss"), metrics(runs["one.absorb"], "loss"), rtol=5e-3, atol=0
    )
    assert not torch.equal(metrics(runs["one.bf16"], "loss"), metrics(runs["one.absorb"], "loss"))


@pytest.mark.parametrize(
    ("saved", "loaded"), [("TP2", "one"), ("TP2", "PP2"), ("one", "TP2xPP2"), ("one", "DP2"), ("TP2", "TP2")]
)
def test_resume_across_layouts_continues_the_curve(runs, saved, loaded, tmp_path, byte_corpus):
    world_size, flags = LAYOUTS.get(loaded, (1, []))
    resume(tmp_path / "resumed", runs[f"{saved}.halfway"], 12, world_size, byte_corpus, [*flags, *GRAPHS["absorb"]])
    expected = metrics(runs["one.absorb"], "loss")[12:]
    torch.testing.assert_close(metrics(tmp_path / "resumed", "loss"), expected, rtol=1e-6, atol=0)
