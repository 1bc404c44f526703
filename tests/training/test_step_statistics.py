"""What a step tells beside its loss, against the same by other routes; and that telling it changes no bit."""

import json
import math
import time

import pytest
import torch

from sedd_megatron.arguments import parse_pretrain_options, weighted_corpora
from sedd_megatron.data.tokenizers import ByteTokenizer
from sedd_megatron.data.windows import open_windows
from sedd_megatron.errors import UserError
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import groups_of_this_process
from tests.distributed.launch import launch
from tests.distributed.layouts import GRAPHS, MODEL


def build(corpus, *flags: str):
    """A run of the tests' model whose head has learnt something, and its training batches."""
    cpu_backend.install()
    from sedd_megatron.training.build import build_run
    from sedd_megatron.training.iterators import training_iterators

    options = parse_pretrain_options(["--data-path", str(corpus), *MODEL, "--hidden-dropout", "0", *flags])
    run = build_run(options, ByteTokenizer(), groups_of_this_process(options.parallel))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.model_chunks[0].head.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    windows = open_windows(
        weighted_corpora(options.data), seq_length=options.model.seq_length, split="1,0,0", num_tokens=256, seed=0
    )
    return run, training_iterators(run, windows.train)


def expected(run, micro_batches) -> dict[str, float]:
    """By each sequence's own score entropy in float64, from whole log-scores."""
    bands: dict[int, list[float]] = {}
    moved, largest, model = [], [], run.model_chunks[0]
    for batch in (micro_batch.noisy for micro_batch in micro_batches):
        with torch.no_grad():
            log_score = model.log_score(batch.x_t, batch.sigma).double()
        entropy = run.graph.score_entropy(log_score, batch.sigma.double(), batch.x_t, batch.x_0)
        losses = batch.sigma_rate.double() * entropy.mean(1)
        for t, loss in zip(batch.t.tolist(), losses.tolist(), strict=True):
            bands.setdefault(min(math.floor(8 * t), 7), []).append(loss)
        moved.append((batch.x_t != batch.x_0).double().mean().item())
        counts = torch.ones_like(batch.x_t, dtype=torch.bool)
        if run.graph.mask_token_id is not None:
            counts = batch.x_t == run.graph.mask_token_id
        others = log_score.scatter(-1, batch.x_t[..., None], -torch.inf)
        largest.append(others[counts].max().item())
    name = "masked_share" if run.graph.mask_token_id is not None else "moved_share"
    found = {f"loss_band_{band}": sum(losses) / len(losses) for band, losses in bands.items()}
    return found | {name: sum(moved) / len(moved), "largest_log_score": max(largest)}


@pytest.mark.parametrize("chunk_rows", ["0", "7"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_bands_share_and_largest_score_are_those_of_whole_log_scores(graph, chunk_rows, byte_corpus):
    flags = [*GRAPHS[graph], "--loss-chunk-rows", chunk_rows, "--time-sampling", "independent"]
    run, (batches,) = build(byte_corpus, *flags)
    from sedd_megatron.training.step import train_step

    for _ in range(2):
        micro_batches = [next(batches) for _ in range(run.num_microbatches)]
        wanted = expected(run, micro_batches)
        metrics, _ = train_step(run, [iter(micro_batches)])
        told = {name: value for name, value in metrics.items() if name.startswith(("loss_", "m", "largest"))}
        del told["memory_bytes"]
        assert told.keys() == wanted.keys()
        assert 3 < len(wanted) < 10, "some band is to have no sequence"
        for name, value in wanted.items():
            assert told[name] == pytest.approx(value, rel=1e-5, abs=1e-4), name
        assert told["largest_log_score"] == pytest.approx(wanted["largest_log_score"], rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("flags", [[], ["--bf16"], ["--use-distributed-optimizer"]], ids=" ".join)
def test_norms_of_parts_are_those_of_their_gradients_and_make_up_the_whole(flags, byte_corpus):
    run, batches = build(byte_corpus, *flags, "--clip-grad", "0")
    from sedd_megatron.run_files import NETWORK_PARTS
    from sedd_megatron.training.step import train_step

    metrics, _ = train_step(run, batches)
    squares: dict[str, float] = dict.fromkeys(NETWORK_PARTS, 0.0)
    for name, parameter in run.model_chunks[0].named_parameters():
        words = {"self_attention": "attention", "input_layernorm": "norm", "pre_mlp_layernorm": "norm"}
        part = name.split(".")[3] if name.startswith("decoder.") else name.split(".")[0]
        squares[words.get(part, part)] += parameter.main_grad.double().square().sum().item()
    for part in NETWORK_PARTS:
        assert metrics[f"grad_norm_{part}"] == pytest.approx(squares[part] ** 0.5, rel=1e-6), part
    assert metrics["grad_norm"] == pytest.approx(sum(squares.values()) ** 0.5, rel=1e-6)


def test_the_wait_for_data_is_the_loaders_and_memory_the_processes(byte_corpus):
    run, (batches,) = build(byte_corpus)
    from sedd_megatron.training.step import train_step

    def slow():
        for batch in batches:
            time.sleep(0.05)
            yield batch

    metrics, _ = train_step(run, [slow()])
    assert run.num_microbatches == 4
    assert 0.2 <= metrics["data_wait_seconds"] < 2
    assert 50e6 < metrics["memory_bytes"] < 50e9


def test_samples_take_nothing_from_training_and_repeat_their_draws(byte_corpus, tmp_path):
    sampling = ["--sample-interval", "2", "--num-samples", "2", "--sampling-steps", "5"]
    job = ["--data-path", str(byte_corpus), *MODEL, "--train-iters", "5", "--save"]
    jobs = [[*job, str(tmp_path / "with"), *sampling], [*job, str(tmp_path / "without")]]
    launch("run_pretrain.py", 1, jobs)
    told = {}
    for name in ("with", "without"):
        folder = tmp_path / name
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        moving = ("tokens_per_second", "memory_bytes", "data_wait_seconds", "started")
        told[name] = [{key: value for key, value in line.items() if key not in moving} for line in lines]
    assert told["with"] == told["without"]
    manifests = [(tmp_path / name / "iter_0000005" / "shards-00000.safetensors").read_bytes() for name in told]
    assert manifests[0] == manifests[1]
    assert not (tmp_path / "without" / "samples.jsonl").exists()
    samples = [json.loads(line) for line in (tmp_path / "with" / "samples.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["sample"]) for line in samples] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    assert all(line["text"] for line in samples)


def test_a_disk_that_refuses_samples_is_one_line(tmp_path, capsys):
    cpu_backend.install()
    from sedd_megatron.training.samples import write_samples

    (tmp_path / "samples.jsonl").mkdir()
    write_samples(tmp_path, 3, ["text"])
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/samples.jsonl: Is a directory; training goes on without the samples of this step\n"
    )


def test_a_line_of_samples_that_a_kill_has_torn_spoils_no_other(tmp_path):
    cpu_backend.install()
    from sedd_megatron.training.samples import write_samples

    path = tmp_path / "samples.jsonl"
    write_samples(tmp_path, 3, ["first", "second"])
    path.write_bytes(path.read_bytes()[:-5])
    write_samples(tmp_path, 6, ["third"])
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["first", "third"]


def test_samples_need_a_folder_and_a_sampler_of_the_graph():
    for flags, words in (
        (["--sample-interval", "5"], "--sample-interval 5 has no folder for its samples; add --save or --log-dir"),
        (["--graph", "uniform", "--sampler", "ancestral"], "--sampler 'ancestral' is not for the UniformGraph"),
    ):
        with pytest.raises(UserError, match=words):
            parse_pretrain_options(["--data-path", "x", *MODEL, *flags])
