"""Each fused operation is its plain form in value and derivative, on a CPU and as compiled for a GPU."""

from functools import partial

import pytest
import torch

from sedd_megatron.parallel import cpu_backend
from tests.compiler import needs_compiler

S, B, H, HEADS = 5, 3, 8, 2
STATES, PER_SEQUENCE, PER_FEATURE = (S, B, H), (1, B, H), (H,)
# A quarter of the elements.
DROPPED = (torch.arange(S * B * H) % 4 == 0).view(STATES)
ROTATED, ANGLES = (S, B, HEADS, H), (S, 1, 1, H)


def operations(training: bool = True) -> dict[str, tuple]:
    """Name -> the fused operation, its plain form, the shapes of its tensors, its further arguments."""
    if not torch.cuda.is_available():
        cpu_backend.install()
    from sedd_megatron.model import fused_operations as fused

    arguments = {
        "modulated_norm": ([STATES, PER_SEQUENCE, PER_SEQUENCE], [1e-5]),
        "add_gated": ([STATES, PER_SEQUENCE, STATES, PER_FEATURE], [DROPPED, 0.75]),
        "bias_gelu": ([STATES, PER_FEATURE], []),
        "rotate": ([ROTATED, ANGLES, ANGLES], []),
    }
    return {
        name: (partial(getattr(fused, name), training=training), getattr(fused, f"plain_{name}"), *of_name)
        for name, of_name in arguments.items()
    }


NAMES = ["modulated_norm", "add_gated", "bias_gelu", "rotate"]


def inputs(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Wide: gelu's tails are where its two forms could differ.
    tensors = [4 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    for tensor, shape in zip(tensors, shapes, strict=True):
        if shape == ANGLES:
            # Cosines and sines of angles that stand in both halves.
            tensor[..., H // 2 :] = tensor[..., : H // 2]
    return [tensor.to(dtype) for tensor in tensors]


def outcome(function, tensors: list[torch.Tensor], further: list, num_derivatives: int) -> list[torch.Tensor]:
    """The value, and the derivative with respect to each of the first tensors of a weighted sum of it."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors[:num_derivatives]]
    # The operations may write into their first argument, and a leaf cannot be written to.
    value = function(leaves[0] * 1, *leaves[1:], *tensors[num_derivatives:], *further)
    weights = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view(value.shape).to(value.dtype)
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), leaves)]


@pytest.mark.parametrize("compiler", [lambda function: None, needs_compiler(torch.compile)], ids=["cpu", "compiled"])
@pytest.mark.parametrize("name", NAMES)
def test_fused_is_plain(name, compiler):
    fused, plain, shapes, further = operations()[name]
    # The angles of a rotation are not learned.
    num_derivatives = 1 if name == "rotate" else len(shapes)
    actual = outcome(compiler(plain) or fused, inputs(shapes), further, num_derivatives)
    expected = outcome(plain, inputs(shapes), further, num_derivatives)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_float32_and_bf16_are_as_near_to_float64_as_the_plain_form(name):
    fused, plain, shapes, further = operations()[name]
    exact = outcome(plain, inputs(shapes), further, 1)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        for one, other in zip(outcome(fused, inputs(shapes, dtype), further, 1), exact, strict=True):
            assert one.dtype == dtype
            assert (one.double() - other).norm() < tolerance * other.norm(), (name, dtype)


def test_dropout_drops_and_scales():
    _, _, shapes, further = operations()["add_gated"]
    from sedd_megatron.model.fused_operations import add_gated

    residual, gate, output, bias = inputs(shapes)
    kept = (add_gated(residual, gate, output, bias, *further, training=True) - residual) / (gate * (output + bias))
    torch.testing.assert_close(kept, torch.where(DROPPED, 0.0, 1 / 0.75).double())


def test_the_norms_weight_meets_adalns_scale():
    """norm(x) * weight * (1 + scale) + shift, as the published model writes it."""
    operations()
    from types import SimpleNamespace

    from sedd_megatron.model.conditioning import NormScale
    from sedd_megatron.model.fused_operations import modulated_norm

    hidden, scale, shift, weight = inputs([STATES, PER_SEQUENCE, PER_SEQUENCE, PER_FEATURE], torch.float32)
    norm = NormScale(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), H, 1e-5, torch.device("cpu"))
    with torch.no_grad():
        norm.weight.copy_(weight)
    expected = torch.nn.functional.layer_norm(hidden, [H], eps=1e-5) * weight * (1 + scale) + shift
    torch.testing.assert_close(
        modulated_norm(hidden, norm(scale), shift, norm.eps, training=True), expected, rtol=1e-5, atol=1e-5
    )
