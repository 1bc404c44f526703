"""Which samples a rank reads, in Megatron's order, and their batches."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import DataLoader, Sampler

from sedd_megatron.data.collator import NoisingCollator
from sedd_megatron.data.windows import WindowDataset
from sedd_megatron.diffusion.corruption import NoisyBatch


@dataclass(frozen=True)
class MicroBatchSampler(Sampler[list[int]]):
    """Positions n of this rank's micro-batches, from `consumed_samples` on.

    As in Megatron-LM the order is cut into pieces of one micro-batch per replica, of which replica r takes the r-th
    part. Every replica gets the same number of micro-batches; a last_sample that does not end a piece is rounded up.
    """

    consumed_samples: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int
    last_sample: int | None = None

    def __iter__(self) -> Iterator[list[int]]:
        """Micro-batches; without end unless last_sample is given."""
        first = self.consumed_samples
        while self.last_sample is None or first < self.last_sample:
            start = first + self.data_parallel_rank * self.micro_batch_size
            yield list(range(start, start + self.micro_batch_size))
            first += self.micro_batch_size * self.data_parallel_size


def training_batches(
    dataset: WindowDataset,
    collator: NoisingCollator,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int = 0,
) -> Iterator[NoisyBatch]:
    """This rank's micro-batches from `consumed_samples` on, without end."""
    sampler = MicroBatchSampler(consumed_samples, micro_batch_size, data_parallel_rank, data_parallel_size)
    return iter(DataLoader(dataset, batch_sampler=sampler, collate_fn=collator, num_workers=num_workers))


def validation_batches(
    dataset: WindowDataset,
    collator: NoisingCollator,
    *,
    num_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> Iterator[NoisyBatch]:
    """This rank's micro-batches of samples 0 to num_samples - 1, the same at every validation."""
    sampler = MicroBatchSampler(0, micro_batch_size, data_parallel_rank, data_parallel_size, num_samples)
    return iter(DataLoader(dataset, batch_sampler=sampler, collate_fn=collator))
