"""The benchmarks run, at a size that says nothing of speed, and their opponent is the published model."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


def test_document_masks_write_their_table(tmp_path):
    text = table_of("document_masks", tmp_path, "--lengths", "4", "16", "--width", "16", "--layers", "1", "--batch",
                    "1", "--seq-length", "16", "--pairs", "1")  # fmt: skip
    assert [cells(text, length)[0][0] for length in ("4", "16")] == ["4", "16"]


def test_training_throughput_writes_its_table(tmp_path):
    text = table_of("training_throughput", tmp_path, "--shapes", "tiny", "--precisions", "float32", "bf16", "--steps",
                    "2", "--flags=--device cpu")  # fmt: skip
    rows = cells(text, "tiny")
    assert [row[:3] for row in rows] == [["tiny", "float32", "512"], ["tiny", "bf16", "512"]]
    for _, precision, _, speed, work, goal, share, memory, gpt_speed, ratio in rows:
        speed, gpt_speed = (float(cell.replace(",", "")) for cell in (speed, gpt_speed))
        assert speed > 0
        # The share is of the work, and the work that of the tokens: 2 layers of 64, 256 tokens, S 32.
        rate, product = share.split(" of ")[1].split(", ")
        assert product == f"torch.mm {'bfloat16' if precision == 'bf16' else 'float32'}"
        assert float(share.split("%")[0]) == pytest.approx(float(work) / float(rate) * 100, abs=1)
        assert 6 * 24 * 64**2 < float(work) * 1e12 / speed < 1.4 * 6 * 26 * 64**2 + 6 * 64 * 257
        assert float(ratio) == pytest.approx(gpt_speed / speed, rel=1e-2)
        assert (goal, memory) == ("", "not measured")


def test_a_row_that_fails_says_so_and_the_others_go_on(tmp_path):
    from tests.benchmarks.training_throughput import row_of

    output = tmp_path / "table.md"
    command = [sys.executable, "-m", "tests.benchmarks.training_throughput", "--shapes", "tiny", "--precisions",
               "fp8-delayed", "bf16", "--steps", "1", "--no-gpt", "--output", str(output)]  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "--fp8-format hybrid needs a GPU and Transformer Engine, and there is no GPU" in done.stderr
    failed, fine = cells(output.read_text(), "tiny")
    assert failed[3] == "failed with code 1"
    assert float(fine[3].replace(",", "")) > 0
    found = {"tokens": 8192, "device": "NVIDIA H200", "note": "does not fit", "gpt_tokens_per_second": 100.0,
             "gpt_note": " in micro-batches of 1"}  # fmt: skip
    row = row_of("7B-slice", "fp8-delayed", found)
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "7B-slice", "fp8-delayed", "8,192", "does not fit", "", "780 TFLOP/s", "", "", "100 in micro-batches of 1", ""
    ]  # fmt: skip


def test_train_compares_with_the_published_step_and_with_bare_products(tmp_path):
    # The two losses are compared before anything is timed.
    rows = cells(table_of("train", tmp_path, "--vs", "published", "--cases", "tiny", "--pairs", "1"), "tiny")
    assert [row[2] for row in rows] == ["forward, backward", "whole step"]
    assert all(row[5].endswith("x") and float(row[5][:-1]) > 0 for row in rows)
    (row,) = cells(table_of("train", tmp_path, "--vs", "bare", "--cases", "tiny", "--pairs", "1"), "tiny")
    assert float(row[3][:-1]) > 0


def test_loss_writes_time_bound_and_memory(tmp_path):
    text = table_of("loss", tmp_path, "--num-tokens", "3000", "--width", "32", "--batch", "4", "--length", "128",
                    "--pairs", "1", "--rows", "512", "1024", "--chunk-rows", "128", "--alone-batch", "8")  # fmt: skip
    for graph, counted in (("absorb", 0.5), ("uniform", 1.0)):
        compared, bound, alone, *memory = cells(text, graph)
        assert abs(int(compared[4]) / 512 - counted) < 0.2
        assert float(bound[3][:-1]) > 0
        assert abs(int(alone[2]) / 1024 - counted) < 0.2
        assert float(alone[3]) > 0
        assert (alone[1], alone[4], alone[7]) == ("8 x 128", "", "yes")
        assert len(memory) == 2
        # Chunks have one size, the nearer to 128 the more rows there are. But for that memory does not depend on their
        # number, and dense logits alone would take 6 and 12 MB here.
        one, two = (float(row[2].split()[0]) for row in memory)
        assert two < 1.2 * one


def test_sampling_compares_with_the_published_sampler(tmp_path):
    text = table_of("sampling", tmp_path, "--cases", "tiny", "--pairs", "1", "--published-steps", "1")
    euler, event_driven = cells(text, "tiny")
    assert [row[2] for row in (euler, event_driven)] == ["euler", "event-driven"]
    assert all(float(row[5][:-1]) > 0 for row in (euler, event_driven))
    # 32 positions in 8 steps leave hardly a step without a jump.
    assert 7 <= float(event_driven[6].split()[0]) <= 8
    text = table_of("sampling", tmp_path, "--cases", "tiny-bf16", "--pairs", "1", "--samplers", "event-driven")
    (alone,) = cells(text, "tiny-bf16")
    assert alone[4:6] + alone[7:8] == [""] * 3
    assert 7 <= float(alone[6].split()[0]) <= 8
    assert float(alone[8]) >= 0


def test_draws_writes_its_tables(tmp_path):
    text = table_of("draws", tmp_path, "--repeats", "2")
    (row,) = cells(text, "philox_uniforms,")
    assert float(row[1]) > 0
    # Both choices come up, each where it is named.
    assert cells(text, "16")[0][1].startswith("**")
    assert cells(text, "1000")[0][1].endswith("**")


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


def test_bits_per_character_has_a_row_for_each_model(tmp_path):
    (tmp_path / "text.txt").write_text("The cat sat on the mat and the dog ran 7 miles.\n" * 250)
    text = table_of("bits_per_character", tmp_path, "--baseline-gpt", "--graph", "absorb", "uniform", "--input",
                    str(tmp_path / "text.txt"), "--train-iters", "150", "--num-layers", "1", "--hidden-size", "32",
                    "--num-attention-heads", "2", "--seq-length", "32", "--batch-size", "8", "--lr", "0.003", "0.01",
                    "--search-iters", "30", "--num-times", "8", "--cond-dim", "16")  # fmt: skip
    (unigram,), (bigram,) = cells(text, "unigram"), cells(text, "bigram")
    unigram, bigram = float(unigram[5]), float(bigram[5])
    (gpt,) = cells(text, "causal GPT")
    # 28 symbols in embedding and head; the matrices of a layer, with biases; weight and bias of three norms.
    assert int(gpt[1].replace(",", "")) == 2 * 28 * 32 + 12 * 32**2 + (4 + 5) * 32 + 3 * 2 * 32
    # The text repeats itself after more characters than one.
    assert float(gpt[5]) < 0.5 * bigram < bigram < unigram
    rows = cells(text, "SEDD,")
    assert [row[0] for row in rows] == ["SEDD, absorb", "SEDD, uniform"]
    for row in rows:
        _, bound, low, high = row[5].replace("[", "").replace("]", "").replace(",", "").split()
        assert float(gpt[5]) < float(low) < float(bound) < float(high) < unigram + 1
        assert 0 < int(row[2].replace(",", "")) < int(row[1].replace(",", ""))
    assert float(rows[0][5].split()[1]) < unigram
    assert all(row[3] in ("0.003", "0.01") and row[4] == "38,400" for row in (gpt, *rows))


def test_the_error_of_the_bound_by_mask_count_is_smaller(trained, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 3)
    text = table_of("likelihood", tmp_path, "--load", str(trained), "--data", str(tmp_path / "text.txt"), "--windows",
                    "2", "--counts", "2", "8", "--mc-samples", "32")  # fmt: skip
    rows = [cells(text, count)[0] for count in ("2", "8", "16")]
    for row in rows:
        by_time, by_count, time_error, count_error, more = (float(cell.removesuffix("x")) for cell in row[1:6])
        errors = (time_error**2 + count_error**2) ** 0.5
        assert abs(by_time - by_count) * int(row[0]) < 4 * errors
        assert more > 2
        assert more == pytest.approx((time_error / count_error) ** 2, rel=0.2)


def test_text8_has_letters_and_single_blanks():
    from tests.benchmarks.bits_per_character import text8_of

    assert text8_of("It's 42 %, says\n\nÉmile.") == "it s four two says mile "


def tiny_gpt_options(*flags: str):
    from sedd_megatron.arguments import parse_pretrain_options

    return parse_pretrain_options(
        "--data-path unused --num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 3 --cond-dim 8 "
        "--micro-batch-size 2 --global-batch-size 2 --train-iters 6 --lr-warmup-iters 2 --lr-decay-style cosine "
        "--device cpu".split()
        + [*flags]
    )


def test_the_gpt_is_causal_and_a_distribution_over_windows():
    cpu_backend.install()
    from sedd_megatron.parallel.groups import groups_of_this_process
    from tests.benchmarks.causal_gpt import build_gpt, log_probabilities

    options = tiny_gpt_options()
    model = build_gpt(options, 3, groups_of_this_process(options.parallel)).eval()
    # Far from the uniform law that Megatron's initialisation gives.
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    windows = torch.tensor(list(itertools.product(range(3), repeat=3)))
    with torch.no_grad():
        log_p = log_probabilities(model, windows, 3)
        prefixes = [log_probabilities(model, windows[:, :length], 3) for length in (1, 2)]
    assert abs(log_p.double().sum(1).exp().sum() - 1) < 1e-5
    first, second, third = log_p.view(3, 3, 3, 3).unbind(-1)
    # A later character changes nothing before it; an earlier one changes what follows.
    assert (first - first[:, :1, :1]).abs().max() < 1e-6
    assert (second - second[..., :1]).abs().max() < 1e-6
    assert min(second.std(0).min(), third.std((0, 1)).min()) > 0.05
    # The chain rule: each factor is what the model says of the prefix alone.
    for length, prefix in enumerate(prefixes, start=1):
        torch.testing.assert_close(prefix, log_p[:, :length])


def test_the_gpt_is_trained_as_sedd_is():
    cpu_backend.install()
    from sedd_megatron.data.loader import MicroBatchSampler
    from sedd_megatron.parallel.groups import groups_of_this_process
    from sedd_megatron.training.build import build_run
    from tests.benchmarks.causal_gpt import build_causal_run, log_probabilities, nats_of_windows, train_gpt

    options = tiny_gpt_options("--weight-decay", "0.02", "--adam-beta2", "0.99", "--min-lr", "1e-4", "--clip-grad", "2")
    groups = groups_of_this_process(options.parallel)
    gpt, sedd = build_causal_run(options, 3, groups), build_run(options, SimpleNamespace(num_tokens=3), groups)
    assert gpt.optimizer.chained_optimizers[0].config == sedd.optimizer.chained_optimizers[0].config
    assert gpt.ema.decay == sedd.ema.decay
    first = [parameter.detach().clone() for parameter in gpt.model.parameters()]
    seen = []

    class Windows:
        def __len__(self) -> int:
            return 5

        def __getitem__(self, n: int) -> tuple[int, torch.Tensor]:
            seen.append((n, settings(gpt)))
            return n, torch.tensor([n % 3, 1, 2])

    def settings(run) -> set:
        names = ("lr", "betas", "eps", "weight_decay", "fused")
        return {tuple(group.get(name) for name in names) for group in run.optimizer.param_groups}

    train_gpt(gpt, Windows())
    expected = []
    for numbers in itertools.islice(MicroBatchSampler(0, 2, 0, 1), 6):
        expected += [(n, settings(sedd)) for n in numbers]
        sedd.scheduler.step(increment=2)
    assert seen == expected
    # Evaluated is the moving average of the weights, on every window once.
    nats = nats_of_windows(gpt, Windows())
    for parameter, average, initial in zip(gpt.model.parameters(), gpt.ema.averages, first, strict=True):
        assert min((average - other).abs().max() for other in (parameter, initial)) > 0
        parameter.data.copy_(average)
    x_0 = torch.stack([Windows()[n][1] for n in range(5)])
    assert abs(nats + log_probabilities(gpt.model, x_0, 3).sum().item()) < 1e-4


@pytest.mark.parametrize(("precision", "tolerance"), [([], 1e-5), (["--bf16"], 2e-2)])
def test_the_gpt_adds_up_micro_batches_and_in_bf16_takes_megatrons_cross_entropy(precision, tolerance):
    cpu_backend.install()
    from sedd_megatron.parallel.groups import groups_of_this_process
    from tests.benchmarks.causal_gpt import build_causal_run, shifted, train_gpt_step

    x_0 = torch.tensor(list(itertools.product(range(3), repeat=3)))[:24:3]
    found = []
    for size in ("8", "2"):
        options = tiny_gpt_options("--hidden-dropout", "0", "--global-batch-size", "8", "--micro-batch-size", size,
                                   *precision)  # fmt: skip
        run = build_causal_run(options, 3, groups_of_this_process(options.parallel))
        with torch.no_grad():
            logits = run.model(shifted(x_0, 3), position_ids=None, attention_mask=None).float()
        # In float32 what is normalised are the three tokens; Megatron's own normalises all columns.
        logits = logits if precision else logits[..., :3]
        dense = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x_0.flatten()).item()
        assert train_gpt_step(run, x_0, 1) == pytest.approx(dense, rel=tolerance)
        assert all(average.dtype == torch.float32 for average in run.ema.averages)
        found.append([parameter.main_grad.clone() for parameter in run.model.parameters()])
    for whole, parts in zip(*found, strict=True):
        assert (parts - whole).norm() <= tolerance * whole.norm()
