"""What the optimizer updates: float32 values of each parameter, whole, or this replica's share of them.

Megatron keeps them in four places: the parameter itself (float32), its `main_param` (bf16), and with the distributed
optimizer flat ranges of either. The moving average and the checkpoints only see the list made here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from torch import Tensor, nn

from sedd_megatron.model.sedd_model import SEDDModel
from sedd_megatron.training.checkpoint_format import Shard


@dataclass(frozen=True)
class MainParameter:
    """One parameter as the optimizer sees it."""

    tensor: Tensor  # float32: the parameter's shape, or 1-D for a flat range
    sharded: ShardedTensor
    flat_range: tuple[int, int] | None  # of the flattened parameter; None: all of it

    def shard(self, prefix: str, data: Tensor) -> Shard:
        """`data`, which belongs to this parameter and has this tensor's shape, as a part of a whole tensor."""
        sharded = self.sharded
        if self.flat_range is not None:
            # Replicas hold different ranges: none of them is a copy of another's.
            sharded = replace(sharded, replica_id=(*sharded.replica_id[:-1], 0))
        return Shard.of(sharded, prefix + sharded.key, data, self.flat_range)


def main_parameters(model_chunks: Sequence[SEDDModel], optimizer: MegatronOptimizer) -> list[MainParameter]:
    """What this rank's optimizer updates, in the order of the model's parameters."""
    (inner,) = optimizer.chained_optimizers
    found = []
    for chunk in model_chunks:
        parameters = dict(chunk.named_parameters())
        for name, sharded in chunk.sharded_tensors().items():
            found += _main_parameter(parameters[name], sharded, inner)
    return found


def _main_parameter(
    parameter: nn.Parameter, sharded: ShardedTensor, optimizer: MegatronOptimizer
) -> list[MainParameter]:
    if not isinstance(optimizer, DistributedOptimizer):
        tensor = getattr(parameter, "main_param", parameter)
        return [MainParameter(tensor, sharded, None)]
    if parameter not in optimizer.model_param_group_index_map:
        return []
    group, position = optimizer.model_param_group_index_map[parameter]
    own = optimizer._get_model_param_range_map(parameter)["param"]
    tensor = optimizer.optimizer.param_groups[group]["params"][position]
    return [MainParameter(tensor, sharded, (own.start, own.end))]


def copy_main_parameters_to_model(optimizer: MegatronOptimizer, ddp_chunks: Sequence[DistributedDataParallel]) -> None:
    """Have the model compute with what the main parameters hold now, as after an optimizer step. Collective."""
    (inner,) = optimizer.chained_optimizers
    # A float32 optimizer without shards updates the model's parameters themselves.
    if isinstance(inner, MixedPrecisionOptimizer):
        inner._copy_main_params_to_model_params()
    gather_parameters(ddp_chunks)


def gather_parameters(ddp_chunks: Sequence[DistributedDataParallel]) -> None:
    """Bring to every replica, now, what the others updated; nothing to do without the distributed optimizer."""
    for chunk in ddp_chunks:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        chunk.start_param_sync(force_sync=True)
        quantized = [parameter for parameter in chunk.parameters() if is_float8tensor(parameter)]
        # Megatron leaves this to the overlapped gather, which now has nothing left to wait for.
        if quantized and chunk.ddp_config.overlap_param_gather:
            post_all_gather_processing(quantized)


def adam_moments(optimizer: MegatronOptimizer, main: MainParameter) -> dict[str, Tensor]:
    """Adam's two moments of one parameter, as they are; zeros before the first step."""
    inner = optimizer.chained_optimizers[0].optimizer
    state = inner.state[main.tensor]
    if not state:
        state.update({name: torch.zeros_like(main.tensor, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")})
        if isinstance(inner, torch.optim.AdamW):
            state["step"] = torch.tensor(0.0, device=main.tensor.device)
    return {name: state[name] for name in ("exp_avg", "exp_avg_sq")}


def set_adam_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Have Adam continue as after `step` steps. torch counts per parameter, Transformer Engine per group."""
    inner = optimizer.chained_optimizers[0].optimizer
    if isinstance(inner, torch.optim.AdamW):
        for parameter, state in inner.state.items():
            # A tensor of its own for each: they are incremented in place.
            state["step"] = torch.tensor(float(step), device=parameter.device)
    else:
        for group in inner.param_groups:
            group["step"] = step
