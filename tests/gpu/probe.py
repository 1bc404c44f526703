"""What the project asks of a GPU's libraries, by itself: python -m tests.gpu.probe engine|operations|speeds|profile

engine and operations compare with plain torch, and end with code 1 if one is off or fails; speeds and profile say where
the next gain is.
"""

import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sedd_megatron.parallel.groups import parallel_groups
from tests.benchmarks.pairs import seconds_of
from tests.benchmarks.training_throughput import SHAPES, options_of, seconds_of_each, sedd_run

DEVICE = "cuda"


class Probes:
    """Lines of a table, each printed as soon as it is known, and whether all were well."""

    def __init__(self) -> None:
        self.all_well = True
        print("| probe | error | at most |\n|---|---|---|", flush=True)

    def error(self, name: str, at_most: float, measure: Callable[[], Tensor]) -> None:
        """The relative error that `measure` finds; a failure ends this probe alone."""
        try:
            found = measure().item()
            # So that NaN is not well.
            is_well, said = found <= at_most, f"{found:.1e}"
        except Exception as failure:
            traceback.print_exc()
            is_well, said = False, f"{type(failure).__name__}: {str(failure).splitlines()[0][:200]}"
        self.all_well &= is_well
        print(f"| {name} | {said}{'' if is_well else ' WRONG'} | {at_most:.0e} |", flush=True)


def off(actual: Tensor, expected: Tensor) -> Tensor:
    """The distance relative to what is expected."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return (actual - expected).norm() / expected.norm()


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, requires_grad: bool = False) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(requires_grad)


def engine() -> bool:
    """Transformer Engine's linear layer in each precision, its attention and its Adam."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling, Format

    probes = Probes()
    recipes = (DelayedScaling(fp8_format=Format.HYBRID), Float8CurrentScaling(), Float8BlockScaling())
    probes.error("linear bf16", 1e-2, lambda: linear_error(te, None))
    for recipe in recipes:
        probes.error(f"linear {type(recipe).__name__}", 0.1, lambda recipe=recipe: linear_error(te, recipe))
    for mask in ("no_mask", "causal"):
        probes.error(f"attention {mask}", 2e-2, lambda mask=mask: attention_error(te, mask))
    probes.error("Adam", 1e-4, adam_error)
    return probes.all_well


def linear_error(te: Any, recipe: Any) -> Tensor:
    """Output and gradient of a linear layer, in FP8 with a recipe."""
    linear = te.Linear(1024, 2048, params_dtype=torch.bfloat16, device=DEVICE)
    x, grad_y = random(512, 1024, requires_grad=True), random(512, 2048)
    # Twice: delayed scaling takes its factors from the pass before.
    for _ in range(2):
        with te.autocast(enabled=recipe is not None, recipe=recipe):
            y = linear(x)
        (grad_x,) = torch.autograd.grad(y, x, grad_y)
    weight = linear.weight.double()
    exact = F.linear(x.double(), weight, linear.bias.double())
    return torch.maximum(off(y, exact), off(grad_x, grad_y.double() @ weight))


def attention_error(te: Any, mask: str) -> Tensor:
    """Output and gradients of queries [S, B, heads, head size] against torch's."""
    q, k, v = (random(512, 2, 8, 64, requires_grad=True) for _ in range(3))
    attention = te.DotProductAttention(8, 64, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type=mask)
    exact = F.scaled_dot_product_attention(*(t.permute(1, 2, 0, 3) for t in (q, k, v)), is_causal=mask == "causal")
    exact = exact.permute(2, 0, 1, 3).flatten(2)
    actual, weights = attention(q, k, v), random(*exact.shape)
    found = [actual, *torch.autograd.grad(actual, (q, k, v), weights)]
    expected = [exact, *torch.autograd.grad(exact, (q, k, v), weights)]
    return torch.stack([off(one, other) for one, other in zip(found, expected, strict=True)]).max()


def adam_error() -> Tensor:
    """Three steps of the optimizer that Megatron takes where it is, against torch's."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    start = random(1000, dtype=torch.float32)
    parameters = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = [FusedAdam([parameters[0]], **settings), torch.optim.AdamW([parameters[1]], **settings)]
    for _ in range(3):
        gradient = random(1000, dtype=torch.float32)
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    return off(parameters[0] - start, parameters[1] - start)


def operations() -> bool:
    """What the head asks of torch's matrix products, and what a step asks of the device."""
    from sedd_megatron.parallel.main_grad import add_product

    probes = Probes()
    hidden, weight, grad = random(512, 768), random(1024, 768), random(512, 1024)

    def product_error(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        expected = total.double() + scale * (left.double() @ right.double())
        return off(add_product(total, left, right, scale), expected)

    wide = {"dtype": torch.float32}
    probes.error("logits in float32", 1e-5, lambda: off(torch.mm(hidden, weight.t(), out_dtype=torch.float32),
                                                         hidden.double() @ weight.double().t()))  # fmt: skip
    probes.error("product added", 1e-5, lambda: product_error(random(512, 768, **wide), grad, weight))
    probes.error("added to a slice, transposed, scaled", 1e-5, lambda: product_error(
        random(4096, 768, **wide)[1024:2048], grad.t(), hidden, 0.25))  # fmt: skip
    probes.error("odd sizes", 1e-5, lambda: product_error(random(511, 769, **wide), random(511, 333), random(333, 769)))
    probes.error("few rows, transposed", 1e-5, lambda: product_error(
        random(1024, 37, **wide), weight, random(37, 768).t()))  # fmt: skip
    probes.error("assert on the device", 0.0, lambda: (
        torch._assert_async(torch.ones((), device=DEVICE) > 0, "never"), torch.zeros(()))[1])  # fmt: skip
    probes.error("pinned copy", 0.0, pinned_copy_error)
    probes.error("captured graph", 1e-2, graph_error)
    return probes.all_well


def pinned_copy_error() -> Tensor:
    host = torch.arange(1.0, 100_000.0).pin_memory()
    return off(host.to(DEVICE, non_blocking=True).cpu(), host)


def graph_error() -> Tensor:
    """A replayed product of new inputs."""
    left, right, graph = random(256, 256), random(256, 256), torch.cuda.CUDAGraph()
    left @ right
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        product = left @ right
    left.copy_(random(256, 256))
    graph.replay()
    return off(product, left.double() @ right.double())


def speeds() -> bool:
    """TFLOP/s of the head's products by the width of a tile, and of attention's two ways."""
    print("| columns of a tile | logits, TFLOP/s | d hidden | d weight |\n|---|---|---|---|", flush=True)
    for columns in (1024, 2048, 4096, 4228, 8192, 16384, 50257, 50304):
        print(f"| {columns} | {' | '.join(f'{speed:.0f}' for speed in tile_speeds(8192, 768, columns))} |", flush=True)
    attention_speeds()
    return True


def tile_speeds(rows: int, width: int, columns: int) -> list[float]:
    """TFLOP/s of a tile's three products, those of the gradients added to float32."""
    from sedd_megatron.parallel.main_grad import add_product

    hidden, weight, grad = random(rows, width), random(columns, width), random(rows, columns)
    grad_hidden, grad_weight = (random(size, width, dtype=torch.float32) for size in (rows, columns))
    products = (
        lambda: torch.mm(hidden, weight.t(), out_dtype=torch.float32),
        lambda: add_product(grad_hidden, grad, weight),
        lambda: add_product(grad_weight, grad.t(), hidden),
    )
    return [2 * rows * width * columns / seconds_of_each(product, 10) / 1e12 for product in products]


def attention_speeds() -> None:
    """Forward and backward, 3.5 times the forward pass's operations."""
    import transformer_engine.pytorch as te

    print("| S x B x heads x head size | Transformer Engine, TFLOP/s | torch |\n|---|---|---|", flush=True)
    for sizes in ((1024, 64, 12, 64), (4096, 2, 16, 128), (4096, 2, 32, 128)):
        length, batch, heads, size = sizes
        q, k, v = (random(*sizes, requires_grad=True) for _ in range(3))
        of_engine = te.DotProductAttention(heads, size, attention_dropout=0.0, qkv_format="sbhd",
                                           attn_mask_type="no_mask")  # fmt: skip

        def of_torch(*states: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*(state.permute(1, 2, 0, 3) for state in states))

        cells = []
        for attention in (of_engine, of_torch):

            def both_ways(attention=attention, inputs=(q, k, v)) -> None:
                output = attention(*inputs)
                torch.autograd.grad(output, inputs, torch.ones_like(output))

            operations_done = 3.5 * 4 * length**2 * batch * heads * size
            cells.append(f"{operations_done / seconds_of_each(both_ways, 10) / 1e12:.0f}")
        print(f"| {' x '.join(map(str, sizes))} | {' | '.join(cells)} |", flush=True)


def profile() -> bool:
    """Where a step of SEDD-small spends the device's time, and how much of the step the device is idle."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    shape = SHAPES["SEDD-small"]
    options = options_of(shape, "bf16", micro_batches=1, flags="")
    with parallel_groups(options.parallel) as groups:
        _, step = sedd_run(options, shape.num_tokens, groups)
        seconds = seconds_of_each(step, 5)
        with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            seconds_of(step)
    events = profiler.key_averages()
    # An operation's row has its kernels' time as well.
    kernels = sorted((event for event in events if event.device_type == DeviceType.CUDA), key=device_ms, reverse=True)
    counts = [sum(event.count for event in events if word in event.key) for word in ("LaunchKernel", "Synchronize")]
    print("| step, ms | device busy, ms | launches | host waits, the measurement's own included |\n|---|---|---|---|")
    print(f"| {seconds * 1e3:.1f} | {sum(map(device_ms, kernels)):.1f} | {counts[0]} | {counts[1]} |")
    print("| ms | calls | kernel |\n|---|---|---|")
    for event in kernels[:40]:
        print(f"| {device_ms(event):.2f} | {event.count} | {event.key[:100].replace('|', '/')} |")
    return True


def device_ms(event: Any) -> float:
    return event.self_device_time_total / 1e3


PROBES = (engine, operations, speeds, profile)

if __name__ == "__main__":
    torch.manual_seed(0)
    (probe,) = (probe for probe in PROBES if probe.__name__ == sys.argv[1])
    sys.exit(0 if probe() else 1)
