"""What a rank computes on, made where samples are read, so that the device never waits for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sedd_megatron.data.collator import NoisingCollator
from sedd_megatron.data.document_ends import DocumentRules, document_ends, position_ids
from sedd_megatron.diffusion.corruption import NoisyBatch
from sedd_megatron.diffusion.graph import AbsorbingGraph, UniformGraph
from sedd_megatron.parallel.keyed_dropout import dropout_keys


class MicroBatch(NamedTuple):
    """A rank's part of a batch on the host, and which of its positions have a loss."""

    noisy: NoisyBatch  # x_0 and x_t [B, S / CP]
    position: Tensor  # [R] int64 and num_rows: see positions_that_count
    num_rows: int
    dropout_keys: Tensor  # [B, 2] int64, see parallel/keyed_dropout.py
    document_ends: Tensor | None = None  # [D] int64 of the whole windows, if their documents do not see each other
    position_ids: Tensor | None = None  # [B, S / CP] int64, if positions begin anew with each document


@dataclass(frozen=True)
class MicroBatchCollator:
    """A collate_fn for one rank: noise, this rank's part, and a count that on the device would make the host wait."""

    noising: NoisingCollator
    context_rank: int
    context_size: int
    row_multiple: int
    documents: DocumentRules | None = None

    def __call__(self, samples: Sequence[tuple[int, Tensor]]) -> MicroBatch:
        """(sample index n, x_0 [S] int64) pairs -> the MicroBatch of this rank."""
        whole = self.noising(samples)
        own = own_part_of_sequence(whole, self.context_rank, self.context_size)
        counting = positions_that_count(own.x_t, self.noising.graph, self.row_multiple)
        batch = MicroBatch(own, *counting, dropout_keys(self.noising.seed, own.sample_index))
        if self.documents is None:
            return batch
        # Of x_0: noise makes and hides ends of documents.
        ends = document_ends(whole.x_0, self.documents.eod_id)
        if self.documents.reset_attention_mask:
            batch = batch._replace(document_ends=ends)
        if self.documents.reset_position_ids:
            own_positions = position_ids(ends, len(whole.x_0)).chunk(self.context_size, dim=1)[self.context_rank]
            batch = batch._replace(position_ids=own_positions.contiguous())
        return batch


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
