"""Which samples a rank reads, in Megatron's order, and their batches."""

import atexit
import functools
import multiprocessing
import os
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sedd_megatron.data.windows import WindowDataset
from sedd_megatron.errors import STOP_SIGNALS, UserError, die_with_parent

Batch = TypeVar("Batch")
Collator = Callable[[Sequence[tuple[int, Tensor]]], Batch]


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
    collator: Collator[Batch],
    *,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """This rank's micro-batches from `consumed_samples` on, without end.

    `num_workers` processes make them ahead; with 0 they are made when they are asked for. `pin_memory` puts them where
    a GPU copies from while the host goes on.
    """
    sampler = MicroBatchSampler(consumed_samples, micro_batch_size, data_parallel_rank, data_parallel_size)
    return _batches(dataset, collator, sampler, num_workers, pin_memory)


def validation_batches(
    dataset: WindowDataset,
    collator: Collator[Batch],
    *,
    num_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """This rank's micro-batches of samples 0 to num_samples - 1, the same at every validation; made as for training."""
    sampler = MicroBatchSampler(0, micro_batch_size, data_parallel_rank, data_parallel_size, num_samples)
    return _batches(dataset, collator, sampler, num_workers, pin_memory)


def _batches(
    dataset: WindowDataset, collator: Collator[Batch], sampler: MicroBatchSampler, num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    loader = DataLoader(
        _Numbers(),
        batch_sampler=sampler,
        collate_fn=functools.partial(_read, dataset, collator),
        num_workers=num_workers,
        pin_memory=pin_memory,
        # A worker holds copies of this rank's connections, by which the others would take a dead rank for alive.
        worker_init_fn=functools.partial(_die_with_rank, os.getpid()),
    )
    others = set(multiprocessing.active_children())
    # Terminals, Slurm and torchrun signal every process, and training has a step to finish before it ends: its workers
    # start with these signals blocked, and stay so.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _workers().update(set(multiprocessing.active_children()) - others)
    return _raise_errors(batches)


class _Numbers(Dataset):
    """Each sample's number; its window is read where an error becomes a value."""

    def __getitem__(self, n: int) -> int:
        return n


def _read(dataset: WindowDataset, collator: Collator[Batch], numbers: Sequence[int]) -> Batch | UserError:
    try:
        return collator([dataset[n] for n in numbers])
    except UserError as error:
        # torch would raise a worker's error with its traceback for a message.
        return error


def _raise_errors(batches: Iterator[Batch | UserError]) -> Iterator[Batch]:
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _die_with_rank(rank_pid: int, worker: int) -> None:
    die_with_parent(rank_pid)


@functools.cache
def _workers() -> weakref.WeakSet:
    """The loaders' processes, which are killed when this one ends in the middle of an iteration.

    multiprocessing would send them SIGTERM, which they do not hear, and wait.
    """
    workers = weakref.WeakSet()
    atexit.register(_kill, workers)
    return workers


def _kill(workers: weakref.WeakSet) -> None:
    # Or torch raises here when the first of them is gone.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
