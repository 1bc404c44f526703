"""What a layer does between its matrix products, each as one operation that reads and writes the activations once.

On a GPU torch.compile makes a kernel of the plain form, forward and backward. On a CPU, where a compiler may be missing
and a new tensor costs more than the arithmetic on it, they are autograd functions that write in place. The plain forms
are what both are compared with. `training` tells the compiler that shapes stay the same.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sedd_megatron.parallel.compiled import call_compiled


def modulated_norm(hidden: Tensor, factor: Tensor, shift: Tensor, eps: float, training: bool) -> Tensor:
    """adaLN: normalized(hidden) * factor + shift, for hidden [S, B, H], factor and shift [1, B, H].

    Returns:
        [S, B, H] in the dtype of `hidden`, computed in float32 at least. Costs no memory but its answer: the normalized
        states are computed again in the backward pass.
    """
    if hidden.device.type == "cuda":
        return call_compiled(plain_modulated_norm, hidden, factor, shift, eps, training=training)
    return _ModulatedNorm.apply(hidden, factor, shift, eps)


def plain_modulated_norm(hidden: Tensor, factor: Tensor, shift: Tensor, eps: float) -> Tensor:
    """`modulated_norm` as written."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    normalized = F.layer_norm(hidden.to(wide), hidden.shape[-1:], None, None, eps)
    return torch.addcmul(shift.to(wide), normalized, factor).to(hidden.dtype)


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, factor, shift, eps):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        normalized, *statistics = torch.native_layer_norm(hidden.to(wide), hidden.shape[-1:], None, None, eps)
        ctx.save_for_backward(hidden, factor, *statistics)
        ctx.eps, ctx.shift_dtype = eps, shift.dtype
        return torch.addcmul(shift.to(wide), normalized, factor, out=normalized).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        narrow, factor, mean, inverse_deviation = ctx.saved_tensors
        wide = torch.promote_types(narrow.dtype, torch.float32)
        hidden, grad, shape = narrow.to(wide), grad_output.to(wide), narrow.shape[-1:]
        normalized, _, _ = torch.native_layer_norm(hidden, shape, None, None, ctx.eps)
        grad_factor = normalized.mul_(grad).sum(0, keepdim=True)
        grad_normalized = torch.mul(grad, factor, out=normalized)
        grad_hidden, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad_normalized, hidden, shape, mean, inverse_deviation, None, None, [True, False, False]
        )
        return grad_hidden.to(narrow.dtype), grad_factor, grad.sum(0, keepdim=True).to(ctx.shift_dtype), None


def add_gated(
    residual: Tensor,
    gate: Tensor,
    output: Tensor,
    bias: Tensor | None,
    dropped: Tensor | None,
    kept_share: float,
    training: bool,
) -> Tensor:
    """residual + gate * dropout(output + bias), for residual, output [S, B, H], gate [1, B, H] and bias [H].

    Args:
        dropped: bool [S, B, H], what dropout sets to 0 (parallel/keyed_dropout.py); None for no dropout.
        kept_share: of the elements, by which those that are kept are divided.
    """
    if output.device.type == "cuda":
        return call_compiled(plain_add_gated, residual, gate, output, bias, dropped, kept_share, training=training)
    return plain_add_gated(residual, gate, output, bias, dropped, kept_share)


def plain_add_gated(
    residual: Tensor, gate: Tensor, output: Tensor, bias: Tensor | None, dropped: Tensor | None, kept_share: float
) -> Tensor:
    """`add_gated` as written."""
    if bias is not None:
        output = output + bias
    if dropped is not None:
        # One number for each sequence and channel, where the output has one for each position as well.
        output, gate = output.masked_fill(dropped, 0), gate / kept_share
    return torch.addcmul(residual, gate, output)


def bias_gelu(hidden: Tensor, bias: Tensor, training: bool) -> Tensor:
    """GELU's tanh form of hidden + bias, for hidden [S, B, F] and bias [F]; on a CPU it overwrites `hidden`."""
    if hidden.device.type == "cuda":
        return call_compiled(plain_bias_gelu, hidden, bias, training=training)
    return _BiasGelu.apply(hidden, bias)


def plain_bias_gelu(hidden: Tensor, bias: Tensor) -> Tensor:
    """`bias_gelu` as written."""
    return F.gelu(hidden + bias, approximate="tanh")


class _BiasGelu(torch.autograd.Function):
    """(1 + tanh(u)) / 2 is sigmoid(2 u), which torch computes several times as fast on a CPU."""

    LINEAR, CUBIC = (2 * math.sqrt(2 / math.pi) * factor for factor in (1.0, 0.044715))

    @staticmethod
    def forward(ctx, hidden, bias):
        x = hidden.add_(bias)
        ctx.save_for_backward(x)
        if x.dtype == torch.bfloat16:
            # Every step below would round.
            return F.gelu(x, approximate="tanh")
        gate = x * x
        torch.add(x.new_tensor(_BiasGelu.LINEAR), gate, alpha=_BiasGelu.CUBIC, out=gate)
        return gate.mul_(x).sigmoid_().mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        grad = torch.ops.aten.gelu_backward(grad_output, x, approximate="tanh")
        return grad, grad.flatten(0, -2).sum(0)


def rotate(states: Tensor, cos: Tensor, sin: Tensor, training: bool) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of states [S, B, heads, head size] by angles of cos and sin, each
    [S, 1 or B, 1, head size].

    Element i turns with element i + head size / 2, by the same angle, which stands in both places.
    """
    if states.device.type == "cuda":
        return call_compiled(plain_rotate, states, cos, sin, training=training)
    return _Rotate.apply(states, cos, sin)


def plain_rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` as written."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(states, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        cos, sin = ctx.saved_tensors
        # A rotation's transpose turns back.
        return _rotated(grad_output, cos, -sin), None, None


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    rotated = states * cos
    rotated[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return rotated
