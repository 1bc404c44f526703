"""Windows of a token stream, or of several in proportion, in an order that is a function of (seed, n) alone."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sedd_megatron.data.blend import Assignment
from sedd_megatron.data.corpus import open_tokens
from sedd_megatron.data.object_storage import RemoteTokens
from sedd_megatron.data.sample_order import SampleOrder, is_keyed
from sedd_megatron.data.token_range import check_range, range_of_blocks
from sedd_megatron.errors import UserError
from sedd_megatron.training_config import WeightedCorpus
from sedd_megatron.wording import counted


class WindowDataset(torch.utils.data.Dataset, ABC):
    """Windows of seq_length tokens, addressed by their position n in the training order, without end.

    The order does not depend on how long the run is: a run that is made longer goes on as it would have.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of different windows."""

    @abstractmethod
    def __getitem__(self, n: int) -> tuple[int, Tensor]:
        """(n, x_0 [S] int64)."""


@dataclass(frozen=True)
class CorpusWindows(WindowDataset):
    """A corpus' windows, without overlap; each epoch is a permutation of its own.

    `number` is the corpus' place in a blend: two corpora of one length have different orders. `num_tokens` is the size
    of the vocabulary that each window is held against as it is read; None for data that is known to keep to it.
    """

    tokens: np.memmap | RemoteTokens
    seq_length: int
    first_window: int
    num_windows: int
    seed: int
    shuffle: bool
    number: int = 0
    num_tokens: int | None = None

    def __len__(self) -> int:
        """Number of different windows."""
        return self.num_windows

    def __getitem__(self, n: int) -> tuple[int, Tensor]:
        """(n, x_0 [S] int64)."""
        epoch, position = divmod(n, self.num_windows)
        window = self.first_window + (int(self._order.of_epoch(epoch)[position]) if self.shuffle else position)
        tokens = self.tokens[window * self.seq_length : (window + 1) * self.seq_length]
        if self.num_tokens is not None:
            check_range(int(tokens.min()), int(tokens.max()), self.num_tokens, str(self.tokens.filename))
        return n, torch.from_numpy(tokens.astype(np.int64))

    @cached_property
    def _order(self) -> SampleOrder:
        return SampleOrder(self.num_windows, self.seed, self.number)

    def __reduce__(self) -> tuple[Any, ...]:
        # Loader processes that are not forked get the dataset by pickle, which would copy the whole corpus to each.
        tokens = self.tokens
        where = tokens if isinstance(tokens, RemoteTokens) else (tokens.filename, tokens.dtype)
        own = (self.seq_length, self.first_window, self.num_windows, self.seed, self.shuffle, self.number)
        return _reopen, (where, *own, self.num_tokens)


@dataclass(frozen=True)
class BlendedWindows(WindowDataset):
    """Windows of several corpora in the proportion of their weights, each corpus in its own epochs."""

    corpora: tuple[CorpusWindows, ...]
    assignment: Assignment

    def __len__(self) -> int:
        """Number of different windows."""
        return sum(map(len, self.corpora))

    def __getitem__(self, n: int) -> tuple[int, Tensor]:
        """(n, x_0 [S] int64)."""
        corpus, own_n = self.assignment.locate(n)
        return n, self.corpora[corpus][own_n][1]


class Windows(NamedTuple):
    """The three parts of a split corpus or blend."""

    train: WindowDataset
    valid: WindowDataset
    test: WindowDataset


def open_windows(
    corpora: Sequence[WeightedCorpus],
    *,
    seq_length: int,
    split: str,
    num_tokens: int,
    seed: int,
    flag: str = "--data-path",
) -> Windows:
    """Open PREFIX.bin/.idx of each corpus and split its windows; each is held against the vocabulary as it is read.

    A corpus without a window in the validation or test part is left out of that part.

    Args:
        corpora: one, or a blend; arguments.weighted_corpora reads them from --data-path.
        split: three weights like 969,30,1.
        num_tokens: of the tokenizer.
        flag: what names the corpora.

    Raises:
        UserError: missing or damaged files, fewer tokens than a window, a bad split.
    """
    opened = [
        _open_corpus(prefix, seq_length, split, seed, number, num_tokens, flag)
        for number, (_, prefix) in enumerate(corpora)
    ]
    parts = []
    for datasets in zip(*opened, strict=True):
        there = [i for i, dataset in enumerate(datasets) if len(dataset) > 0]
        if len(there) <= 1:
            parts.append(datasets[there[0] if there else 0])
        else:
            assignment = Assignment.of([corpora[i].weight for i in there])
            parts.append(BlendedWindows(tuple(datasets[i] for i in there), assignment))
    return Windows(*parts)


def _open_corpus(
    prefix: str, seq_length: int, split: str, seed: int, number: int, num_tokens: int, flag: str
) -> Windows:
    tokens = open_tokens(prefix, flag, is_read_whole=False)
    num_windows = len(tokens) // seq_length
    if num_windows == 0:
        raise UserError(
            f"{flag} {prefix}: has {counted(len(tokens), 'token')}, fewer than one window of --seq-length "
            f"{seq_length}; prepare more text or lower it"
        )
    parts = []
    for (first, last), shuffle in zip(split_ranges(split, num_windows), (True, False, False), strict=True):
        parts.append(CorpusWindows(tokens, seq_length, first, last - first, seed, shuffle, number, num_tokens))
    if len(parts[0]) == 0:
        raise UserError(
            f"--split {split}: leaves no training window of the {num_windows} of {prefix}; give the first part more, "
            "or prepare more text"
        )
    return Windows(*parts)


def has_keyed_order(prefix: str, seq_length: int, split: str) -> bool:
    """Whether a corpus' training windows are so many that their order has no table (data/sample_order.py)."""
    first, last = split_ranges(split, len(open_tokens(prefix, is_read_whole=False)) // seq_length)[0]
    return is_keyed(last - first)


def split_ranges(split: str, num_windows: int) -> list[tuple[int, int]]:
    """Contiguous [first, last) ranges of windows in proportion to the weights.

    Raises:
        UserError: not three numbers of at least 0 with a sum above 0.
    """
    try:
        weights = [float(part) for part in split.split(",")]
    except ValueError:
        weights = []
    if len(weights) != 3 or not all(weight >= 0 for weight in weights) or not 0 < sum(weights) < float("inf"):
        raise UserError(f"--split {split}: must be three weights for training, validation and test, as 969,30,1")
    shares = np.cumsum([0.0, *weights]) / sum(weights)
    bounds = [round(share * num_windows) for share in shares]
    return list(itertools.pairwise(bounds))


def check_tokens(corpora: Iterable[CorpusWindows], num_tokens: int, part: int = 0, num_parts: int = 1) -> None:
    """Read every `num_parts`-th block of the corpora, from the block `part` on, at about a gigabyte per second.

    Raises:
        UserError: it has tokens outside the vocabulary.
    """
    first = part
    for corpus in corpora:
        extremes, num_blocks = range_of_blocks(corpus.tokens, first, num_parts)
        # The next corpus goes on where this one ends: many small ones are shared as well.
        first = (first - num_blocks) % num_parts
        check_range(*extremes, num_tokens, str(corpus.tokens.filename))


def _reopen(where: RemoteTokens | tuple[str, np.dtype], *fields: Any) -> CorpusWindows:
    return CorpusWindows(where if isinstance(where, RemoteTokens) else np.memmap(*where, mode="r"), *fields)
