"""The published model's parameters (arXiv 2310.16834) under its names, to and from ours: one table, both ways."""

from collections.abc import Iterable, Mapping

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from sedd_megatron.config import ModelOptions
from sedd_megatron.model.conditioning import FREQUENCY_EMBEDDING_SIZE

# What our name ends with -> the published name, both without .weight and .bias.
NAMES = {
    "embedding.weight": "vocab_embed.embedding",
    "sigma_embedding.input": "sigma_map.mlp.0",
    "sigma_embedding.output": "sigma_map.mlp.2",
    "input_layernorm": "blocks.{layer}.norm1",
    "pre_mlp_layernorm": "blocks.{layer}.norm2",
    "self_attention.linear_qkv": "blocks.{layer}.attn_qkv",
    "self_attention.linear_proj": "blocks.{layer}.attn_out",
    "mlp.linear_fc1": "blocks.{layer}.mlp.0",
    "mlp.linear_fc2": "blocks.{layer}.mlp.2",
    "modulation.linear": "blocks.{layer}.adaLN_modulation",
    "head.norm": "output_layer.norm_final",
    "head.modulation.linear": "output_layer.adaLN_modulation",
    "head.linear": "output_layer.linear",
}
# Not a parameter: the rotary frequencies, which the published state has as a buffer.
ROTARY_FREQUENCIES = "rotary_emb.inv_freq"


def published_name(sharded: ShardedTensor) -> str:
    """The published name of one of our parameters."""
    name, kind = (sharded.key, "") if sharded.key == "embedding.weight" else sharded.key.rsplit(".", 1)
    ending = max((ending for ending in NAMES if name.endswith(ending)), key=len)
    published = NAMES[ending].format(layer=sharded.global_offset[0])
    return f"{published}.{kind}" if kind else published


def published_shapes(options: ModelOptions, num_states: int) -> dict[str, tuple[int, ...]]:
    """Every parameter of the published model, by name, in the order in which that model has them."""
    width, cond_dim = options.hidden_size, options.cond_dim
    shapes: dict[str, tuple[int, ...]] = {"vocab_embed.embedding": (num_states, width)}

    def add(name: str, rows: int, columns: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    add("sigma_map.mlp.0", cond_dim, FREQUENCY_EMBEDDING_SIZE)
    add("sigma_map.mlp.2", cond_dim, cond_dim)
    for layer in range(options.num_layers):
        block = f"blocks.{layer}"
        shapes[f"{block}.norm1.weight"] = (width,)
        add(f"{block}.attn_qkv", 3 * width, width, bias=False)
        add(f"{block}.attn_out", width, width, bias=False)
        shapes[f"{block}.norm2.weight"] = (width,)
        add(f"{block}.mlp.0", 4 * width, width)
        add(f"{block}.mlp.2", width, 4 * width)
        add(f"{block}.adaLN_modulation", 6 * width, cond_dim)
    shapes["output_layer.norm_final.weight"] = (width,)
    add("output_layer.linear", num_states, width)
    add("output_layer.adaLN_modulation", 2 * width, cond_dim)
    return shapes


def own_part(tensor: Tensor, name: str, sharded: ShardedTensor, num_heads: int) -> Tensor:
    """This rank's part of a published tensor: q, k, v per head in place of all q, all k, all v; vocabulary padded with
    zeros.
    """
    if _is_qkv(name):
        tensor = tensor.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2)
    whole = tensor.new_zeros(sharded.global_shape[sharded.prepend_axis_num :])
    whole[: len(tensor)] = tensor
    return whole[tuple(sharded.global_slice()[sharded.prepend_axis_num :])]


def published_tensor(whole: Tensor, name: str, num_heads: int, num_states: int) -> Tensor:
    """The published form of one of our parameters, whole: the way back."""
    if _is_qkv(name):
        return whole.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2).contiguous()
    return whole[:num_states].contiguous() if _is_by_state(name) else whole.contiguous()


def rotary_frequencies(head_size: int) -> Tensor:
    """[head_size / 2] float32, 10000^(-2i / head_size), as the published state has them."""
    return 1.0 / (10_000 ** (torch.arange(0, head_size, 2).float() / head_size))


def faults_of(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps tensors of the shapes `found` from being a model of the shapes `expected`, by name."""
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} is not of this model" for name in found if name not in expected and name != ROTARY_FREQUENCIES]
    return faults + [
        f"{name} has shape {tuple(found[name])}, the configuration needs {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]


def fault_of_tensor(tensor: Tensor) -> str | None:
    """What keeps a tensor of a file from being a parameter, found before memory for it is taken; None if nothing does.

    A file of a few bytes can ask for any size, with strides of 0.
    """
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
        return f"is not a dense tensor of floating-point numbers ({tensor.dtype}, {tensor.layout})"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"asks for {tensor.numel() * tensor.element_size():,} bytes and the file has fewer for it"
    # As float32, for the shorter types have no such test.
    return None if tensor.float().isfinite().all() else "has values that are not finite"


def num_blocks(names: Iterable[str]) -> int:
    """How many layers tensors of these names have."""
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})


def _is_qkv(name: str) -> bool:
    return name.endswith("attn_qkv.weight")


def _is_by_state(name: str) -> bool:
    return name == "vocab_embed.embedding" or name.startswith("output_layer.linear.")
