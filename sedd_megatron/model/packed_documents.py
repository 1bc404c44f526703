"""Attention within documents: the windows of a micro-batch as Megatron's packed sequences, for either kind of layer.

No [S, S] mask is made: each document is attended to by itself, which is exact and costs the sum of the squared lengths
in place of the square of the sum. Under context parallelism a rank has a contiguous part of each window's queries, so
that a document may be in several ranks: keys and values are gathered, as BidirectionalAttention does, and cut to the
documents that the rank's queries are of. Transformer Engine's own exchange would need every document's length to be a
multiple of twice the number of ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from sedd_megatron.diffusion.transfers import to_device


@dataclass
class PackedDocuments(PackedSeqParams):
    """Megatron's description of packed sequences, with what the host needs to cut them without asking the device."""

    query_lengths: tuple[int, ...] = ()  # of this rank's part of each document that it has queries of
    key_lengths: tuple[int, ...] = ()  # of these documents, whole
    key_ranges: tuple[tuple[int, int], ...] = ()  # where they lie together in each window

    @classmethod
    def of(cls, ends: Tensor, batch_size: int, first: int, length: int, device: torch.device) -> "PackedDocuments":
        """Of a rank with `length` queries of each of `batch_size` windows, from the position `first` on.

        Args:
            ends: [D] int64 on the host (data/document_ends.py).
        """
        window = int(ends[-1]) // batch_size
        query_lengths, key_lengths, key_ranges = [], [], [[window, 0] for _ in range(batch_size)]
        begin = 0
        for end in ends.tolist():
            row, start = divmod(begin, window)
            stop, begin = start + end - begin, end
            own = min(stop, first + length) - max(start, first)
            if own > 0:
                query_lengths.append(own)
                key_lengths.append(stop - start)
                key_ranges[row] = [min(key_ranges[row][0], start), stop]
        return cls(
            qkv_format="thd",
            cu_seqlens_q=_cumulative(query_lengths, device),
            cu_seqlens_kv=_cumulative(key_lengths, device),
            # Of any micro-batch, so that kernels are chosen once.
            max_seqlen_q=length,
            max_seqlen_kv=window,
            # Keys and values have been gathered: Transformer Engine is to exchange nothing.
            local_cp_size=1,
            query_lengths=tuple(query_lengths),
            key_lengths=tuple(key_lengths),
            key_ranges=tuple((start, stop) for start, stop in key_ranges),
        )


def attend_within_documents(
    core_attention: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: PackedDocuments,
    cp_group: torch.distributed.ProcessGroup,
    **kwargs: object,
) -> Tensor:
    """query, key, value [S / CP, B, heads / TP, head size] -> [S / CP, B, H / TP].

    `core_attention` gets them as [tokens, heads / TP, head size], document after document.
    """
    length, batch_size = query.shape[:2]
    if cp_group.size() > 1:
        gathered = gather_from_sequence_parallel_region(torch.stack([key, value], dim=1), group=cp_group)
        key, value = gathered.unbind(1)
    key, value = (
        torch.cat([row[start:stop] for row, (start, stop) in zip(states.unbind(1), documents.key_ranges, strict=True)])
        for states in (key, value)
    )
    packed = core_attention(
        query.transpose(0, 1).flatten(0, 1), key, value, None, packed_seq_params=documents, **kwargs
    )
    return packed.view(batch_size, length, -1).transpose(0, 1).contiguous()


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32), device)
