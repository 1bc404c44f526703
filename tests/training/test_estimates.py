"""Costs by formula, counted another way: products by torch's counter, kept bytes by autograd's hooks."""

import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.diffusion import AbsorbingGraph, GeometricSchedule, LogLinearSchedule, UniformGraph
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import groups_of_this_process

NUM_TOKENS = 50
BATCH, LENGTH = 4, 64
SIZES = (
    f"--data-path x --hidden-size 128 --num-attention-heads 4 --seq-length {LENGTH} --micro-batch-size {BATCH} "
    f"--global-batch-size {BATCH} --hidden-dropout 0 --make-vocab-size-divisible-by 1 --device cpu"
).split()
RECOMPUTE = "--recompute-granularity selective --recompute-modules".split()


def model_of(options, groups):
    from sedd_megatron.training.build import build_model

    graph = AbsorbingGraph(NUM_TOKENS)
    (model,) = build_model(options.model, options.parallel, options.precision, options.recompute, graph, groups)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, NUM_TOKENS, (BATCH, LENGTH)), torch.rand(BATCH)


def test_flops_are_those_of_the_products():
    cpu_backend.install()
    from sedd_megatron.training.estimates import flops_per_token

    options = parse_pretrain_options([*SIZES, "--num-layers", "3"])
    model = model_of(options, groups_of_this_process(options.parallel))
    # The counter does not know the CPU's fused attention; unfused it is two products, and four backward.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs()).sum().backward()
    # The first sigma layer's input needs no gradient.
    expected = counter.get_total_flops() + 2 * BATCH * 256 * options.model.cond_dim
    actual = flops_per_token(options.model, NUM_TOKENS + 1, head_rows=1.0) * BATCH * LENGTH
    assert actual == pytest.approx(expected, rel=1e-12)


def kept_bytes(flags: list[str], num_layers: int) -> int:
    """Storage that autograd holds after a forward pass, parameters left out."""
    options = parse_pretrain_options([*SIZES, "--num-layers", str(num_layers), *flags])
    model = model_of(options, groups_of_this_process(options.parallel))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*inputs())
    # Asked afterwards: recompute empties storages that it will fill again.
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().size() for t in kept}
    return sum(size for pointer, size in sizes.items() if pointer not in parameters)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--bf16"],
        [*RECOMPUTE, "layernorm"],
        ["--bf16", *RECOMPUTE, "layernorm"],
        ["--bf16", *RECOMPUTE, "core_attn"],
        ["--bf16", *RECOMPUTE, "mlp"],
        ["--bf16", "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
        ["--bf16", "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "2"],
    ],
    ids=" ".join,
)
def test_activation_estimate_is_what_autograd_keeps(flags):
    cpu_backend.install()
    from sedd_megatron.training.estimates import activation_bytes

    measured = (kept_bytes(flags, 6) - kept_bytes(flags, 2)) / 4
    options = parse_pretrain_options([*SIZES, "--num-layers", "6", *flags])
    estimate = activation_bytes(options, NUM_TOKENS + 1, 1.0, pipeline_rank=0, num_microbatches=1, device="cpu")
    assert estimate.in_flight == 6
    assert abs(estimate.per_layer - measured) < 0.1 * measured, (estimate.per_layer, measured)


def test_fraction_of_head_rows_is_the_mean_mask_rate():
    from sedd_megatron.training.estimates import fraction_of_head_rows

    # Log-linear noise masks a token with probability (1 - eps) t.
    expected = (1 - 1e-3) * (1 + 1e-2) / 2
    assert abs(fraction_of_head_rows(AbsorbingGraph(7), LogLinearSchedule(eps=1e-3), 1e-2) - expected) < 1e-6
    assert fraction_of_head_rows(UniformGraph(7), LogLinearSchedule(eps=1e-3), 1e-2) == 1.0
    geometric = GeometricSchedule(sigma_min=1e-4, sigma_max=20.0)
    t = torch.rand(400_000, dtype=torch.float64)
    sampled = (1 - torch.exp(-geometric(t).sigma)).mean().item()
    assert abs(fraction_of_head_rows(AbsorbingGraph(7), geometric, 1e-9) - sampled) < 2e-3


def test_peaks_by_device_name():
    from sedd_megatron.training.estimates import peak_tflops

    assert peak_tflops("NVIDIA H100 80GB HBM3", fp8=False) == 989
    assert peak_tflops("NVIDIA H100 PCIe", fp8=True) == 1513
    assert peak_tflops("NVIDIA A100-SXM4-80GB", fp8=True) is None
    assert peak_tflops("A device of tomorrow", fp8=False) is None


def test_progress_line_gives_the_speed_of_a_device_and_its_share_of_the_peak(capsys):
    from sedd_megatron.training.metrics import MetricsWriter
    from sedd_megatron.training_config import LoggingOptions

    writer = MetricsWriter(LoggingOptions(log_interval=1), None, 10, tflop_per_token=0.5, peak_tflops=1e4)
    writer.train_step(
        {"iteration": 1, "loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0}, num_tokens=1000, tokens_left=9000
    )
    line = capsys.readouterr().out
    tokens, tflops, share = re.search(r"([\d,]+) tokens/s \| ([\d.]+) TFLOP/s per GPU \(([\d.]+)% MFU\)", line).groups()
    assert float(tflops) == pytest.approx(0.5 * float(tokens.replace(",", "")), rel=1e-3)
    assert float(share) == pytest.approx(float(tflops) / 1e4 * 100, rel=1e-3)
    MetricsWriter(LoggingOptions(log_interval=1), None, 10).train_step(
        {"iteration": 1, "loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0}, num_tokens=1000, tokens_left=9000
    )
    assert "TFLOP" not in capsys.readouterr().out


def test_the_time_left_is_that_of_the_tokens_left(capsys):
    from sedd_megatron.training.metrics import MetricsWriter
    from sedd_megatron.training_config import LoggingOptions

    writer = MetricsWriter(LoggingOptions(log_interval=1), None, 3)
    # In ten minutes 1000 tokens; the two steps that are left have 9000.
    writer.window_start -= 600
    writer.train_step({"iteration": 1, "loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0}, 1000, tokens_left=9000)
    assert re.search(r"iteration 1/3 .* 1:30:0\d left", capsys.readouterr().out)
