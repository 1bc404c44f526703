"""Functions compiled for the GPU."""

import functools
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


def call_compiled(function: Callable, *arguments: Any) -> Any:
    """function(*arguments), compiled when arguments of their kind first come: tensors, numbers or None.

    While gradients are on, as in training, a kind is the very shapes: there are few, and kernels for known sizes are
    faster. Otherwise it leaves all sizes open but the last, for validation and sampling, whose shapes change from call
    to call.

    Never runs the plain function in its place: torch.compile would do that, silently and for good, after
    torch._dynamo.config.recompile_limit (8) kinds of one code object. Here each kind has a code object of its own.
    """
    is_open = not torch.is_grad_enabled()
    kind = tuple(_kind(argument, is_open) if isinstance(argument, Tensor) else argument for argument in arguments)
    return _compiled(function, kind, is_open)(*arguments)


def _kind(tensor: Tensor, is_open: bool) -> Hashable:
    if not is_open:
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad
    return tensor.shape[-1], tuple(size == 1 for size in tensor.shape), tensor.dtype


# Made when it is first asked for: importing the compiler takes seconds that a CPU run would spend for nothing.
@functools.cache
def _compiled(function: Callable, kind: tuple, is_open: bool) -> Callable:
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    # With fullgraph torch raises where it would otherwise fall back.
    return _OpenSizes(own) if is_open else torch.compile(own, fullgraph=True, dynamic=False)


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
