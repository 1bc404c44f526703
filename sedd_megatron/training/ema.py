"""Exponential moving average of the weights, kept in float32 and sharded as the parameters are."""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from sedd_megatron.model.sedd_model import SEDDModel

KEY_PREFIX = "ema."


class ExponentialMovingAverage:
    """average <- decay * average + (1 - decay) * weights after each step.

    The decay warms up as (1 + n) / (10 + n) over the first n steps, as in the published training, so that the initial
    weights are forgotten. Costs one float32 copy of this rank's parameters and no communication.
    """

    def __init__(self, model: SEDDModel, decay: float) -> None:
        self.decay = decay
        self.model = model
        self.averages = {name: weight.detach().float().clone() for name, weight in _weights(model).items()}

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Take in the weights after optimizer step number `num_updates` (from 1)."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        weights = [weight.detach() for weight in _weights(self.model).values()]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the averages into the model for the duration, and the training weights back afterwards, bitwise."""
        kept = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self._copy_into_model(self.averages)
        try:
            yield
        finally:
            self._copy_into_model(kept)

    def sharded_state(self) -> list[ShardedTensor]:
        """The averages as shards named ema.<key of the parameter>, to be saved or filled."""
        return [
            dataclasses.replace(tensor, key=KEY_PREFIX + tensor.key, data=self.averages[name], dtype=torch.float32)
            for name, tensor in self.model.sharded_tensors().items()
        ]

    @torch.no_grad()
    def _copy_into_model(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(values[name])


def _weights(model: SEDDModel) -> dict[str, Tensor]:
    """The weights in the best precision there is: Megatron's float32 main copy where training is in bfloat16."""
    in_bf16 = model.config.bf16
    return {
        name: getattr(parameter, "main_param", parameter) if in_bf16 else parameter
        for name, parameter in model.named_parameters()
    }
