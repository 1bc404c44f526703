"""Megatron's optimizer step, with the norm of the gradients left on the device: the host waits for nothing.

ChainedOptimizer.step (megatron/core/optimizer/optimizer.py) reads the norm before it clips.
"""

from collections.abc import Callable, Sequence

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor


@torch.no_grad()
def squared_gradient_norm(optimizer: MegatronOptimizer, device: torch.device) -> Tensor:
    """The square of the norm of all gradients, which are then where the optimizer takes them: scalar float64 on the
    device, the same on every rank. Collective.
    """
    (inner,) = optimizer.chained_optimizers
    # Its answer is about the loss scaling of fp16, which there is none of.
    optimizer.prepare_grads()
    # Megatron's choice: each parameter once, however many ranks hold it.
    gradients = inner.get_main_grads_for_grad_norm()
    norm = NORM[device.type](gradients) if gradients else torch.zeros((), device=device)
    square = norm.float().square()
    torch.distributed.all_reduce(square, group=inner.get_grad_stats_parallel_group())
    return square.double()


@torch.no_grad()
def update_parameters(optimizer: MegatronOptimizer, squared_norm: Tensor) -> None:
    """Clip the gradients, whose norm's square this is, to the optimizer's clip_grad (0: leave them), and update the
    parameters. Collective. A norm that is not finite spoils them.
    """
    (inner,) = optimizer.chained_optimizers
    gradients = [parameter.grad for parameter in inner.get_parameters() if parameter.grad is not None]
    # A rank's share of the distributed optimizer may be empty.
    if gradients and inner.config.clip_grad > 0:
        CLIP[squared_norm.device.type](gradients, squared_norm.sqrt(), inner.config.clip_grad)
    optimizer.step_with_ready_grads()


def norm_by_blocks(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of float32 tensors together, scalar float64.

    On a CPU torch adds up a large tensor's squares in float32, which is off by 2e-6 and clips each layout differently;
    asked for float64 it first makes a copy of twice the size. Short blocks need neither.
    """
    return torch.linalg.vector_norm(torch.stack([_norm_of_one(tensor) for tensor in tensors]))


def _norm_of_one(tensor: Tensor) -> Tensor:
    flat, block = tensor.flatten(), 4096
    whole = len(flat) // block * block
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, block), dim=1).double()
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float64)
    return torch.linalg.vector_norm(torch.cat([blocks, rest[None]]))


def norm_in_one_kernel(tensors: Sequence[Tensor]) -> Tensor:
    """The same in a few launches; scalar float32."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))


def clip_if_above(tensors: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Multiply by max_norm / norm, in place, where that is below 1: on a CPU reading costs less than a pass."""
    factor = max_norm / (norm.item() + 1e-6)
    if factor < 1:
        torch._foreach_mul_(list(tensors), factor)


def clip_unread(tensors: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """The same without a look at the norm: by 1 if it is not above."""
    # Of the gradients' precision, or torch multiplies tensor by tensor.
    factor = (max_norm / (norm + 1e-6)).clamp(max=1).float()
    torch._foreach_mul_(list(tensors), factor)


NORM: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {"cpu": norm_by_blocks, "cuda": norm_in_one_kernel}
CLIP: dict[str, Callable[[Sequence[Tensor], Tensor, float], None]] = {"cpu": clip_if_above, "cuda": clip_unread}
