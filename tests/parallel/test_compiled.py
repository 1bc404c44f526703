"""Compiled functions never fall back to the plain one, and are compiled once for sizes that change between calls."""

import pytest
import torch

from sedd_megatron.parallel.compiled import call_compiled
from tests.compiler import needs_compiler

SIZES = [(5, 3), (7, 4), (9, 2), (64, 64), (2, 100)]


def scaled(hidden: torch.Tensor, factor: torch.Tensor, bias: torch.Tensor | None, share: float) -> torch.Tensor:
    hidden = hidden if bias is None else hidden + bias
    return hidden * factor * share


def inputs(length: int, batch: int, width: int = 8) -> list[torch.Tensor]:
    return [torch.randn(shape) for shape in ((length, batch, width), (1, batch, width), (width,))]


@pytest.mark.parametrize("_", [needs_compiler(None)])
def test_each_kind_has_a_cache_of_its_own(_):
    """Far beyond the limit, after which torch.compile would run the plain function; here it would raise."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for size in SIZES:
            arguments = [tensor.requires_grad_() for tensor in inputs(*size)]
            for share in (0.5, 0.0):
                for with_gradient in (True, False):
                    # Without, as activation recompute has its first pass.
                    with torch.set_grad_enabled(with_gradient):
                        actual = call_compiled(scaled, *arguments, share, training=True)
                        torch.testing.assert_close(actual, scaled(*arguments, share))


@pytest.mark.parametrize("_", [needs_compiler(None)])
def test_outside_of_training_sizes_are_open(_):
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True, recompile_limit=1):
        for has_bias in (True, False):
            for size in SIZES:
                hidden, factor, bias = inputs(*size)
                arguments = hidden, factor, bias if has_bias else None, 0.5
                torch.testing.assert_close(call_compiled(scaled, *arguments, training=False), scaled(*arguments))
        # One sequence, one position, and another width: kinds of their own.
        for size in ((6, 1), (1, 5), (1, 1), (5, 3, 16)):
            arguments = *inputs(*size), 0.5
            torch.testing.assert_close(call_compiled(scaled, *arguments, training=False), scaled(*arguments))
