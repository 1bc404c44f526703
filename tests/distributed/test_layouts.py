"""Invariants 1 and 2: every layout trains what one process trains, and a resumed run is the unbroken run."""

import json
from pathlib import Path

import pytest
import torch

from sedd_megatron.run_files import NETWORK_PARTS, NUM_BANDS
from tests.distributed.compare import metrics, relative_difference, whole_tensors
from tests.distributed.launch import launch
from tests.distributed.layouts import (
    GRAPHS,
    HALFWAY,
    LAYOUTS,
    MODEL,
    RESHARDED,
    RESUMED,
    STEPS,
    UNIFORM_LAYOUTS,
)

CASES = [(layout, "absorb") for layout in LAYOUTS] + [(layout, "uniform") for layout in UNIFORM_LAYOUTS]
ONE = {"one": (1, [])}
STEP_FIELDS = [*(f"loss_band_{band}" for band in range(NUM_BANDS)), *(f"grad_norm_{part}" for part in NETWORK_PARTS),
               "masked_share", "moved_share", "largest_log_score"]  # fmt: skip


def launch_by_ranks(jobs: list[tuple[int, list[str]]]) -> None:
    """Run jobs that may need different numbers of ranks: one start for all jobs of a number."""
    for world_size in sorted({ranks for ranks, _ in jobs}):
        launch("run_pretrain.py", world_size, [arguments for ranks, arguments in jobs if ranks == world_size])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, byte_corpus) -> dict[str, Path]:
    """All the runs of this file but the resumed ones: LAYOUT.GRAPH -> its folder."""
    root = tmp_path_factory.mktemp("layouts")

    def job(name: str, ranks: int, flags: list[str]) -> tuple[int, list[str]]:
        common = ["--data-path", str(byte_corpus), "--train-iters", str(STEPS), "--save-interval", str(HALFWAY)]
        return ranks, [*MODEL, *common, "--save", str(root / name), *flags]

    jobs = [job(f"one.{graph}", 1, flags) for graph, flags in GRAPHS.items()]
    jobs += [job(f"{layout}.{graph}", LAYOUTS[layout][0], [*LAYOUTS[layout][1], *GRAPHS[graph]])
             for layout, graph in CASES]  # fmt: skip
    jobs += [job(f"{name}.resumed", *ranks_and_flags) for name, ranks_and_flags in RESUMED.items()]
    launch_by_ranks(jobs)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def continued(runs, tmp_path_factory, byte_corpus) -> dict[str, Path]:
    """Runs continued from halfway: SAVED>LOADED, and NAME of RESUMED in its own layout -> its folder."""
    root = tmp_path_factory.mktemp("continued")

    def job(name: str, source: Path, ranks: int, flags: list[str]) -> tuple[int, list[str]]:
        return ranks, [*MODEL, "--data-path", str(byte_corpus), "--train-iters", str(STEPS), "--save", str(root / name),
                       "--load", str(source / f"iter_{HALFWAY:07d}"), *flags]  # fmt: skip

    layouts = LAYOUTS | ONE
    jobs = [job(f"{saved}>{loaded}", runs[f"{saved}.absorb"], *layouts[loaded]) for saved, loaded in RESHARDED]
    jobs += [job(name, runs[f"{name}.resumed"], *ranks_and_flags) for name, ranks_and_flags in RESUMED.items()]
    launch_by_ranks(jobs)
    return {path.name: path for path in root.iterdir()}


def last(folder: Path) -> dict[str, torch.Tensor]:
    return whole_tensors(folder / f"iter_{STEPS:07d}")


def assert_same_curve(actual: Path, expected: Path, first: int = 0) -> None:
    """Losses and gradient norms of every step from `first` on, and what they consist of."""
    for name in ("loss", "grad_norm"):
        a, b = metrics(actual, name), metrics(expected, name)[first:]
        assert len(a) == len(b) == STEPS - first
        assert ((a - b).abs() <= 1e-6 * b.abs()).all(), (name, a, b)
    loss = metrics(expected, "loss")[first:]
    for name in STEP_FIELDS:
        a, b = step_values(actual, name), step_values(expected, name)[first:]
        assert torch.equal(a.isnan(), b.isnan()), name
        # Of fewer numbers than the loss, whose rounding counts for more. At much noise a band's loss is next to 0, the
        # sum of terms that cancel.
        small = 5e-6 * loss if name.startswith("loss") else 1e-6
        assert ((a - b).abs() <= 3e-6 * b.abs() + small)[~b.isnan()].all(), (name, a, b)


def step_values(folder: Path, name: str) -> torch.Tensor:
    """A field of every step's line, NaN where it has none."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line.get(name, torch.nan) for line in lines if "loss" in line], dtype=torch.float64)


@pytest.mark.parametrize(("layout", "graph"), CASES)
def test_layout_trains_what_one_process_trains(runs, layout, graph):
    one, other = runs[f"one.{graph}"], runs[f"{layout}.{graph}"]
    losses = metrics(one, "loss")
    assert losses[-5:].mean() < 0.95 * losses[:5].mean(), (
        "the reference learns nothing, so that comparing with it would show nothing"
    )
    assert_same_curve(other, one)
    torch.testing.assert_close(metrics(other, "validation_loss"), metrics(one, "validation_loss"), rtol=1e-6, atol=0)
    for name in ("consumed_samples", "learning_rate"):
        assert torch.equal(metrics(other, name), metrics(one, name))


@pytest.mark.parametrize(("layout", "graph"), CASES)
def test_layout_ends_with_the_parameters_of_one_process(runs, layout, graph):
    expected, actual = last(runs[f"one.{graph}"]), last(runs[f"{layout}.{graph}"])
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert not tensor.isnan().any(), f"{name}: shards do not cover it"
        if not name.startswith("optimizer."):
            assert relative_difference(actual[name], tensor) < 2e-6, name


@pytest.mark.parametrize(("layout", "graph"), CASES)
def test_gradients_of_every_parameter_are_those_of_one_process(runs, layout, graph):
    # Adam's first moment is a weighted sum of the run's gradients: a gradient that was wrong once shows, under its
    # parameter's name.
    prefix = "optimizer.state.exp_avg."
    expected, actual = last(runs[f"one.{graph}"]), last(runs[f"{layout}.{graph}"])
    gradients = [name for name in expected if name.startswith(prefix)]
    conditioning = [name for name in gradients if "modulation" in name or "sigma_embedding" in name]
    assert len(conditioning) == 8, conditioning
    for name in gradients:
        assert expected[name].norm() > 0, name
        assert relative_difference(actual[name], expected[name]) < 3e-6, name


@pytest.mark.parametrize(("saved", "loaded"), RESHARDED)
def test_a_checkpoint_continues_in_another_layout(runs, continued, saved, loaded):
    folder, unbroken = continued[f"{saved}>{loaded}"], runs["one.absorb"]
    assert_same_curve(folder, unbroken, first=HALFWAY)
    expected, actual = last(unbroken), last(folder)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative_difference(actual[name], tensor) < (3e-6 if name.startswith("optimizer.") else 1e-6), name


@pytest.mark.parametrize("name", RESUMED)
def test_resume_in_the_same_layout_is_bitwise(runs, continued, name):
    unbroken = runs[f"{name}.resumed"]
    assert torch.equal(metrics(continued[name], "loss"), metrics(unbroken, "loss")[HALFWAY:])
    expected, actual = last(unbroken), last(continued[name])
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key


def test_loader_processes_change_no_bit(runs, continued):
    for name in ("loss", "grad_norm", "validation_loss"):
        assert torch.equal(metrics(runs["workers.resumed"], name), metrics(runs["plain.resumed"], name))
    expected, actual = last(runs["plain.resumed"]), last(continued["workers"])
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())


def test_an_ema_interval_changes_the_average_alone(runs):
    expected, actual = last(runs["plain.resumed"]), last(runs["ema-interval.resumed"])
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor) != key.startswith("ema."), key


def test_resharding_without_training_changes_no_bit(runs, tmp_path, byte_corpus):
    # In bfloat16, where weights, master weights and average are three things.
    source = runs["bf16.resumed"] / f"iter_{HALFWAY:07d}"
    expected = whole_tensors(source)
    assert any(name.startswith("optimizer.state.fp32_param.") for name in expected)
    for layout in ("VPP2-DP2-dist-opt-overlap", "SP2", "DP2-dist-opt", "one"):
        ranks, flags = (LAYOUTS | ONE)[layout]
        job = [*MODEL, *flags, "--bf16", "--data-path", str(byte_corpus), "--train-iters", str(HALFWAY), "--load",
               str(source), "--save", str(tmp_path / layout)]  # fmt: skip
        launch("run_pretrain.py", ranks, [job])
        source = tmp_path / layout / f"iter_{HALFWAY:07d}"
        actual = whole_tensors(source)
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), (layout, name)


def test_distributed_optimizer_shares_state_and_average_in_equal_parts(runs):
    from sedd_megatron.training.checkpoint_format import read_manifest

    tensors = read_manifest(runs["DP4-dist-opt.absorb"] / f"iter_{STEPS:07d}")["tensors"]
    held = {}
    for key, entry in tensors.items():
        if key.startswith(("ema.", "optimizer.state.exp_avg.")):
            for shard in entry["shards"]:
                first, stop = shard["flat_range"]
                held.setdefault((key.split(".")[0], shard["file"]), []).append(stop - first)
    sizes = [sum(pieces) for pieces in held.values()]
    assert len(sizes) == 8
    # Megatron pads each parameter to 64 and each bucket to 128 elements: the parts are equal but for that.
    assert max(sizes) < 1.1 * min(sizes), sizes
