"""What a rank computes on, made where samples are read, so that the device never waits for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sedd_megatron.data.collator import NoisingCollator
from sedd_megatron.diffusion.corruption import NoisyBatch
from sedd_megatron.diffusion.graph import AbsorbingGraph, UniformGraph
from sedd_megatron.parallel.keyed_dropout import dropout_keys


class MicroBatch(NamedTuple):
    """A rank's part of a batch on the host, and which of its positions have a loss."""

    noisy: NoisyBatch  # x_0 and x_t [B, S / CP]
    position: Tensor  # [R] int64 and num_rows: see positions_that_count
    num_rows: int
    dropout_keys: Tensor  # [B, 2] int64, see parallel/keyed_dropout.py


@dataclass(frozen=True)
class MicroBatchCollator:
    """A collate_fn for one rank: noise, this rank's part, and a count that on the device would make the host wait."""

    noising: NoisingCollator
    context_rank: int
    context_size: int
    row_multiple: int

    def __call__(self, samples: Sequence[tuple[int, Tensor]]) -> MicroBatch:
        """(sample index n, x_0 [S] int64) pairs -> the MicroBatch of this rank."""
        own = own_part_of_sequence(self.noising(samples), self.context_rank, self.context_size)
        counting = positions_that_count(own.x_t, self.noising.graph, self.row_multiple)
        return MicroBatch(own, *counting, dropout_keys(self.noising.seed, own.sample_index))


def own_part_of_sequence(batch: NoisyBatch, context_rank: int, context_size: int) -> NoisyBatch:
    """The contiguous part [B, S / CP] of a whole batch that a context-parallel rank computes."""
    if context_size == 1:
        return batch
    length = batch.x_t.shape[1] // context_size
    own = slice(context_rank * length, (context_rank + 1) * length)
    # Copied: what has gaps is gathered first on its way to the device, in memory that is not pinned.
    return batch._replace(x_0=batch.x_0[:, own].contiguous(), x_t=batch.x_t[:, own].contiguous())


def positions_that_count(x_t: Tensor, graph: AbsorbingGraph | UniformGraph, multiple: int) -> tuple[Tensor, int]:
    """Positions of x_t [B, S] with a loss, as indices [R] into the flattened [S, B], and how many there are.

    Under the absorbing graph the masked ones. Filled up to a multiple of `multiple` by repeating position 0.
    """
    if graph.mask_token_id is None:
        position = torch.arange(x_t.numel())
    else:
        position = (x_t.t().flatten() == graph.mask_token_id).nonzero()[:, 0]
    num_rows = len(position)
    return F.pad(position, (0, -num_rows % multiple)) if num_rows % multiple else position, num_rows
