"""Initial parameters that do not depend on the layout: each is drawn whole from (seed, name) and then cut."""

import hashlib
import math

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor

from sedd_megatron.model.sedd_model import SEDDModel


@torch.no_grad()
def initialize_parameters(model: SEDDModel, seed: int) -> None:
    """Fill this rank's shards with the published initialisation (torch's defaults for linear layers; zeros where
    adaLN-zero asks).

    The sharded state dict already says which part of which tensor this rank holds, for checkpoints; the same
    description cuts the draws. Costs one whole tensor of host memory at a time.
    """
    # Read by name: a bias is drawn by its weight's fan-in.
    shards = model.sharded_tensors()
    for name, shard in shards.items():
        shape = shard.global_shape[shard.prepend_axis_num :]
        whole = _initial_values(name, shard, shards, shape, seed)
        if name.startswith("embedding."):
            whole[model.graph.num_states :] = 0
        local = tuple(shard.global_slice()[shard.prepend_axis_num :])
        shard.data.copy_(whole[local].to(shard.data.device))
        if is_float8tensor(shard.data):
            # From here the optimizer takes its float32 copy, and not from the quantised values.
            shard.data.get_high_precision_init_val().copy_(whole[local])


def _initial_values(
    name: str, shard: ShardedTensor, shards: dict[str, ShardedTensor], shape: tuple[int, ...], seed: int
) -> Tensor:
    if "modulation." in name or name.startswith("head.linear."):
        return torch.zeros(shape)
    if "norm." in name or "layernorm." in name:
        return torch.ones(shape)
    weight = shards[name.removesuffix("bias") + "weight"] if name.endswith("bias") else shard
    # torch.nn.Linear and kaiming_uniform_(a=sqrt(5)) both give U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
    bound = 1 / math.sqrt(weight.global_shape[-1])
    layer = shard.global_offset[: shard.prepend_axis_num]
    digest = hashlib.sha256(f"{seed} {shard.key} {layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
