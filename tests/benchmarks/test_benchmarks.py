"""The benchmarks run, at a size that says nothing of speed, and their opponent is the published model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sedd_megatron.parallel import cpu_backend
from tests.distributed.launch import REPOSITORY


def table_of(module: str, tmp_path: Path, *arguments: str) -> str:
    """What `python -m tests.benchmarks.MODULE` writes."""
    output = tmp_path / "table.md"
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", *arguments, "--output", str(output)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    text = output.read_text()
    assert f"python -m tests.benchmarks.{module} {arguments[0]}" in text
    return text


def cells(text: str, first: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith(f"| {first} ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_training_throughput_writes_its_table(tmp_path):
    text = table_of("training_throughput", tmp_path, "--shapes", "tiny", "--precisions", "float32", "bf16", "--steps",
                    "2", "--flags=--device cpu")  # fmt: skip
    rows = cells(text, "tiny")
    assert [row[1] for row in rows] == ["float32", "bf16"]
    assert all(float(row[3].replace(",", "")) > 0 for row in rows)


def test_train_compares_with_the_published_step_and_with_bare_products(tmp_path):
    # The two losses are compared before anything is timed.
    rows = cells(table_of("train", tmp_path, "--vs", "published", "--cases", "tiny", "--pairs", "1"), "tiny")
    assert [row[2] for row in rows] == ["forward, backward", "whole step"]
    assert all(row[5].endswith("x") and float(row[5][:-1]) > 0 for row in rows)
    (row,) = cells(table_of("train", tmp_path, "--vs", "bare", "--cases", "tiny", "--pairs", "1"), "tiny")
    assert float(row[3][:-1]) > 0


def test_loss_writes_time_bound_and_memory(tmp_path):
    text = table_of("loss", tmp_path, "--num-tokens", "3000", "--width", "32", "--batch", "4", "--length", "128",
                    "--pairs", "1", "--rows", "256", "512", "--chunk-rows", "128")  # fmt: skip
    for graph, counted in (("absorb", 0.5), ("uniform", 1.0)):
        compared, bound, *memory = cells(text, graph)
        assert abs(int(compared[4]) / 512 - counted) < 0.2
        assert float(bound[3][:-1]) > 0
        assert len(memory) == 2
        # Memory does not depend on how many rows there are, and dense logits alone would take 6 MB here.
        one, two = (float(row[2].split()[0]) for row in memory)
        assert two < 1.2 * one


def test_sampling_compares_with_the_published_sampler(tmp_path):
    text = table_of("sampling", tmp_path, "--cases", "tiny", "--pairs", "1", "--published-steps", "1")
    euler, event_driven = cells(text, "tiny")
    assert [row[2] for row in (euler, event_driven)] == ["euler", "event-driven"]
    assert all(float(row[5][:-1]) > 0 for row in (euler, event_driven))
    # 32 positions in 8 steps leave hardly a step without a jump.
    assert 7 <= float(event_driven[6].split()[0]) <= 8


def test_sampler_law_writes_its_table(tmp_path):
    text = table_of("sampler_law", tmp_path, "--draws", "3000", "--steps", "8", "--samplers", "euler", "event-driven")
    assert [row[1] for row in cells(text, "euler")] == ["absorb", "uniform"]
    assert len(cells(text, "event-driven")) == 1


@pytest.mark.parametrize("absorbing", [True, False])
def test_the_opponent_samples_by_the_reverse_rates(absorbing):
    from sedd_megatron.diffusion import AbsorbingGraph, UniformGraph
    from tests.benchmarks.published_sampling import euler_probs, gumbel_draw

    graph = AbsorbingGraph(5) if absorbing else UniformGraph(5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, graph.num_states, (2, 4), generator=generator)
    log_score = torch.randn(2, 4, graph.num_states, generator=generator).scatter(-1, x[..., None], 0.0)
    rate_time = torch.tensor([0.01, 0.1])
    expected = graph.reverse_rate(log_score, x) * rate_time[:, None, None]
    expected += torch.nn.functional.one_hot(x, graph.num_states)
    probs = euler_probs(log_score.exp(), x, rate_time, absorbing)
    torch.testing.assert_close(probs, expected, rtol=1e-5, atol=1e-6)
    drawn = gumbel_draw(probs[:1, :1].expand(20_000, 1, -1).clamp_min(0))
    found = torch.bincount(drawn[:, 0], minlength=graph.num_states) / len(drawn)
    assert (found - probs[0, 0] / probs[0, 0].sum()).abs().max() < 0.02


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_the_opponent_is_the_published_model(graph):
    cpu_backend.install()
    from tests.benchmarks.published import PublishedModel, published_loss

    path = REPOSITORY / "tests" / "fixtures" / f"model_{graph}.safetensors"
    golden = load_file(path)
    with safe_open(path, framework="pt") as file:
        published = json.loads(file.metadata()["config"])
    shape, absorbing = published["model"], graph == "absorb"
    model = PublishedModel(
        shape["n_blocks"], shape["hidden_size"], shape["n_heads"], published["tokens"] + absorbing, absorbing,
        shape["cond_dim"],
    )  # fmt: skip
    weights = {name.removeprefix("param."): t for name, t in golden.items() if name.startswith("param.")}
    del weights["rotary_emb.inv_freq"]
    model.load_state_dict(weights)
    log_score = model(golden["x"], golden["sigma"])
    assert (log_score - golden["log_score"]).abs().max() < 2e-5 * golden["log_score"].abs().max()
    loss = published_loss(log_score, golden["sigma"], golden["dsigma"], golden["x"], golden["x0"], absorbing)
    torch.testing.assert_close(loss, golden["loss"].mean(), rtol=1e-5, atol=0)
    loss.backward()
    for name, parameter in model.named_parameters():
        expected = golden[f"grad.{name}"]
        assert (parameter.grad - expected).norm() < 1e-4 * expected.norm().clamp_min(1e-12), name
