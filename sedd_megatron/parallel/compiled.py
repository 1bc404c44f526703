"""Functions compiled for the GPU."""

import functools
from collections.abc import Callable

import torch


@functools.cache
def compiled(function: Callable) -> Callable:
    """torch.compile's version of `function`, made when it is first asked for: importing the compiler takes seconds that
    a CPU run would spend for nothing.
    """
    return torch.compile(function)
