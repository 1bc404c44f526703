"""Megatron's optimizer step, with the norm of the gradients left on the device: the host waits for nothing.

ChainedOptimizer.step (megatron/core/optimizer/optimizer.py) reads the norm before it clips.
"""

from collections.abc import Callable, Sequence

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor


@torch.no_grad()
def squared_gradient_norms(
    optimizer: MegatronOptimizer, device: torch.device, parts: Sequence[Sequence[Tensor]] = ()
) -> Tensor:
    """The squares of the norms of all gradients, which are then where the optimizer takes them, and of each part's.
    Collective, once.

    Args:
        parts: of what the optimizer updates, as many parts on every rank.

    Returns:
        [1 + number of parts] float64 on the device, the same on every rank.
    """
    (inner,) = optimizer.chained_optimizers
    # Its answer is about the loss scaling of fp16, which there is none of.
    optimizer.prepare_grads()
    # Megatron's choice: each parameter once, however many ranks hold it.
    gradients = inner.get_main_grads_for_grad_norm()
    norms = NORMS[device.type](gradients) if gradients else []
    by_gradient = {id(gradient): norm for gradient, norm in zip(gradients, norms, strict=True)}
    of_parts = [[by_gradient[id(p.grad)] for p in part if id(p.grad) in by_gradient] for part in parts]
    # Each tensor is read once, whatever is made of its norm.
    squares = torch.stack([_norm_together(found, device).float().square().double() for found in (norms, *of_parts)])
    torch.distributed.all_reduce(squares, group=inner.get_grad_stats_parallel_group())
    # As a float32 sum, by which gradients are clipped.
    return squares.float().double()


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


def _norm_together(norms: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(list(norms))) if norms else torch.zeros((), device=device)


def norms_by_blocks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Euclidean norm of each float32 tensor, scalars float64.

    On a CPU torch adds up a large tensor's squares in float32, which is off by 2e-6 and clips each layout differently;
    asked for float64 it first makes a copy of twice the size. Short blocks need neither.
    """
    return [_norm_of_one(tensor) for tensor in tensors]


def _norm_of_one(tensor: Tensor) -> Tensor:
    flat, block = tensor.flatten(), 4096
    whole = len(flat) // block * block
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, block), dim=1).double()
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float64)
    return torch.linalg.vector_norm(torch.cat([blocks, rest[None]]))


def norms_in_one_kernel(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same in a few launches; scalars float32."""
    return list(torch._foreach_norm(list(tensors)))


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


NORMS: dict[str, Callable[[Sequence[Tensor]], list[Tensor]]] = {"cpu": norms_by_blocks, "cuda": norms_in_one_kernel}
CLIP: dict[str, Callable[[Sequence[Tensor], Tensor, float], None]] = {"cpu": clip_if_above, "cuda": clip_unread}
