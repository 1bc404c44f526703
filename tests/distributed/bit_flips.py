"""Bits flipped in one rank's gradients, as broken hardware would: between the backward pass and the reduction."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from tests.distributed.signalled_step import before_each_step


class Flip(NamedTuple):
    """One bit of one element of one rank's gradient, in one step."""

    iteration: int
    rank: int
    parameter: float  # which of the rank's, and which of its elements, both from 0 to below 1
    element: float
    bit: int  # of a float32: 0 to 22 mantissa, 23 to 30 exponent, 31 sign


@contextlib.contextmanager
def flipped_gradients(flips: Sequence[Flip]) -> Iterator[None]:
    """Have these happen to runs inside, each once: a replay of its step does not meet it again."""

    def arm_those_of_this_step(run) -> None:
        for flip in flips:
            if (flip.iteration, flip.rank) == (run.iteration + 1, torch.distributed.get_rank()):
                arm(run, flip)

    with before_each_step(arm_those_of_this_step):
        yield


def arm(run, flip: Flip) -> None:
    """Flip the bit when the next reduction of its gradient begins."""
    owned = [(chunk, parameter) for chunk in run.ddp_chunks for parameter in chunk.parameters()]
    chunk, parameter = owned[int(flip.parameter * len(owned))]
    group = chunk.param_to_bucket_group[parameter]
    start = group.start_grad_sync

    def flipped_start(*arguments, **keywords):
        group.start_grad_sync = start
        flip_bit(parameter.main_grad, flip.element, flip.bit)
        start(*arguments, **keywords)

    group.start_grad_sync = flipped_start


def flip_bit(tensor: torch.Tensor, element: float, bit: int) -> None:
    """Of a contiguous float32 tensor, in place."""
    words = tensor.detach().view(-1).view(torch.int32)
    mask = torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32) if bit < 31 else torch.tensor(-(2**31)).int()
    words[int(element * len(words))] ^= mask
