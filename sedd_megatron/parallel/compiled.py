"""Functions compiled for the GPU."""

import functools
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


def call_compiled(function: Callable, *arguments: Any, training: bool) -> Any:
    """function(*arguments), compiled when arguments of their kind first come: tensors, numbers or None.

    In training a kind is the very shapes: there are few, and kernels for known sizes are faster. Otherwise it leaves
    all sizes open but the last, for validation and sampling, whose shapes change from call to call. Whether gradients
    are on does not tell which: activation recompute runs its first pass without.

    Never runs the plain function in its place: torch.compile would do that, silently and for good, after
    torch._dynamo.config.recompile_limit (8) kinds of one code object. Here each kind has a code object of its own.
    """
    kind = tuple(_kind(argument, training) if isinstance(argument, Tensor) else argument for argument in arguments)
    return _compiled(function, (*kind, torch.is_grad_enabled()), training)(*arguments)


def _kind(tensor: Tensor, training: bool) -> Hashable:
    if training:
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad
    return tensor.shape[-1], tuple(size == 1 for size in tensor.shape), tensor.dtype


# Made when it is first asked for: importing the compiler takes seconds that a CPU run would spend for nothing.
@functools.cache
def _compiled(function: Callable, kind: tuple, training: bool) -> Callable:
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    # With fullgraph torch raises where it would otherwise fall back.
    return torch.compile(own, fullgraph=True, dynamic=False) if training else _OpenSizes(own)


class _OpenSizes:
    """A compiled function; its first call tells the compiler which sizes to leave open."""

    def __init__(self, function: Callable) -> None:
        self.compiled, self.is_marked = torch.compile(function, fullgraph=True), False

    def __call__(self, *arguments: Any) -> Any:
        if not self.is_marked:
            for tensor in arguments:
                # Sizes of 1 and the last, the width of a norm, are better known.
                for dim in range(tensor.ndim - 1) if isinstance(tensor, Tensor) else ():
                    if tensor.shape[dim] != 1:
                        torch._dynamo.maybe_mark_dynamic(tensor, dim)
            self.is_marked = True
        return self.compiled(*arguments)
