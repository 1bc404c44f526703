"""Gradients that go straight into Megatron's main_grad, without a tensor of their own."""

import types

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def install_gradient_accumulation() -> None:
    """Let Megatron's linear layers (tensor_parallel/layers.py) add a weight's gradient to its main_grad in the product
    that makes it, where config.gradient_accumulation_fusion says so; in this process and for good.

    The product is in an extension of Apex, and ours takes its place where that is missing. Otherwise each weight's
    gradient is written by itself, in bf16 for bf16 weights, and then added: 10 bytes of traffic per parameter and
    micro-batch, and on a CPU memory that is new to the process every time.
    """
    # Imported here: importing Megatron looks at torch.cuda, which the CPU backend must have replaced before.
    from megatron.core.tensor_parallel import layers

    if layers._grad_accum_fusion_available:
        return

    def wgrad_gemm_accum(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        add_product(main_grad, grad_output.t(), inputs)

    # By main_grad's precision Megatron calls the one or the other (--grad-reduce-in-bf16).
    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(
        wgrad_gemm_accum_fp32=wgrad_gemm_accum, wgrad_gemm_accum_fp16=wgrad_gemm_accum
    )
    layers._grad_accum_fusion_available = True


def mark_added_to_main_grad(parameter: Tensor) -> None:
    """Tell Megatron's hook that this backward pass's gradient is in main_grad (distributed_data_parallel.py).

    The hook wants to see a gradient all the same, and drops it; this one takes no memory. Backward then returns None.
    """
    parameter.grad_added_to_main_grad = True
    parameter.grad = parameter.new_empty(1).expand(parameter.shape)


def embedding_into_main_grad(index: Tensor, weight: Tensor) -> Tensor:
    """F.embedding, whose backward pass adds to the rows of weight.main_grad that were read and touches no others.

    A dense gradient of the whole vocabulary costs a fifth of SEDD-small's step on a CPU. Not for GPUs: there many
    additions to one row have no fixed order.
    """
    return _EmbeddingIntoMainGrad.apply(index, weight)


class _EmbeddingIntoMainGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index, weight):
        ctx.save_for_backward(index)
        # The parameter itself and not a saved tensor: Megatron hangs main_grad on it.
        ctx.weight = weight
        return F.embedding(index, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (index,) = ctx.saved_tensors
        rows = grad_output.flatten(0, -2).to(ctx.weight.main_grad.dtype)
        # In bf16 as well: torch adds up a row's additions in float32 and rounds once.
        ctx.weight.main_grad.index_add_(0, index.flatten(), rows)
        mark_added_to_main_grad(ctx.weight)
        return None, None


def add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """total += scale * left @ right in place, where total may be float32 and the factors bf16."""
    if left.dtype == total.dtype:
        return total.addmm_(left, right, alpha=scale)
    if total.device.type == "cuda":
        return torch.addmm(total, left, right, alpha=scale, out_dtype=total.dtype, out=total)
    return total.addmm_(left.to(total.dtype), right.to(total.dtype), alpha=scale)
