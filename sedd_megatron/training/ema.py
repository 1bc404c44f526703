"""Exponential moving average of the weights, kept in float32 and sharded as the optimizer's state is."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from sedd_megatron.training.checkpoint_format import Shard
from sedd_megatron.training.main_parameters import MainParameter

KEY_PREFIX = "ema."


class ExponentialMovingAverage:
    """average <- decay * average + (1 - decay) * weights after each step.

    The decay warms up as (1 + n) / (10 + n) over the first n steps, as in the published training, so that the initial
    weights are forgotten. Costs one float32 copy of what this rank's optimizer updates and no communication: with the
    distributed optimizer a replica averages its share only.

    With an `interval` of N only every N-th step costs the pass over the weights. It takes the N steps together, as if
    the weights had been the same after each: the average is then ahead of the exact one by what the weights moved
    within the interval. In between it stays what it was, for whoever asks; `last_update` is the step that it has taken
    in last.
    """

    def __init__(
        self,
        main_parameters: Sequence[MainParameter],
        copy_to_model: Callable[[], None],
        decay: float,
        interval: int = 1,
    ) -> None:
        """`copy_to_model` brings the main parameters' values into the model that computes with them."""
        self.decay = decay
        self.interval = interval
        self.main_parameters = main_parameters
        self.copy_to_model = copy_to_model
        self.averages = [main.tensor.detach().clone() for main in main_parameters]
        self.last_update = 0

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Take in the weights after optimizer step number `num_updates` (from 1), if it ends an interval."""
        # By the step's number alone, so that a resumed run does what the unbroken one does.
        if num_updates % self.interval:
            return
        steps = range(self.last_update + 1, num_updates + 1)
        self.last_update = num_updates
        decay = math.prod(min(self.decay, (1 + step) / (10 + step)) for step in steps)
        weights = [main.tensor.detach() for main in self.main_parameters]
        # A replica's share of a small model may be empty.
        if weights:
            torch._foreach_lerp_(self.averages, weights, 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew with the weights that are there, as before the first step."""
        for main, average in zip(self.main_parameters, self.averages, strict=True):
            average.copy_(main.tensor)
        self.last_update = 0

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the averages into the model for the duration, and the training weights back afterwards, bitwise.

        The two change places one parameter at a time: no second copy of the model is made. Collective with the
        distributed optimizer, whose replicas gather what each averaged.
        """
        self._change_places()
        try:
            yield
        finally:
            self._change_places()

    def shards(self) -> Iterator[Shard]:
        """The averages under ema.<key of the parameter>, to be saved or filled."""
        for main, average in zip(self.main_parameters, self.averages, strict=True):
            yield main.shard(KEY_PREFIX, average)

    @torch.no_grad()
    def _change_places(self) -> None:
        for main, average in zip(self.main_parameters, self.averages, strict=True):
            weight = main.tensor.detach().clone()
            main.tensor.copy_(average)
            average.copy_(weight)
        self.copy_to_model()
