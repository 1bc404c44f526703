"""Windows of a token stream, or of several in proportion, in an order that is a function of (seed, n) alone."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sedd_megatron.data.blend import Assignment
from sedd_megatron.data.corpus import open_tokens
from sedd_megatron.data.digests import has_digests
from sedd_megatron.diffusion.draws import Stream, philox_generator
from sedd_megatron.errors import UserError
from sedd_megatron.training_config import WeightedCorpus
from sedd_megatron.wording import counted

TOKENS_AT_ONCE = 1 << 24


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

    `number` is the corpus' place in a blend: two corpora of one length have different orders.
    """

    tokens: np.memmap
    seq_length: int
    first_window: int
    num_windows: int
    seed: int
    shuffle: bool
    number: int = 0

    def __len__(self) -> int:
        """Number of different windows."""
        return self.num_windows

    def __getitem__(self, n: int) -> tuple[int, Tensor]:
        """(n, x_0 [S] int64)."""
        epoch, position = divmod(n, self.num_windows)
        window = self.first_window + (int(self._permutation(epoch)[position]) if self.shuffle else position)
        tokens = self.tokens[window * self.seq_length : (window + 1) * self.seq_length]
        return n, torch.from_numpy(tokens.astype(np.int64))

    @cached_property
    def _permutation(self) -> Any:
        def permutation(epoch: int) -> np.ndarray:
            generator = philox_generator(self.seed, Stream.SAMPLE_ORDER, epoch, self.number)
            # The order of generator.permutation(num_windows), in half the memory.
            order = np.arange(self.num_windows, dtype=np.uint32 if self.num_windows < 1 << 32 else np.int64)
            generator.shuffle(order)
            return order

        # Two: a batch may straddle two epochs.
        return lru_cache(maxsize=2)(permutation)

    def __reduce__(self) -> tuple[Any, ...]:
        # Loader processes that are not forked get the dataset by pickle, which would copy the whole corpus to each.
        where = (self.tokens.filename, self.tokens.dtype)
        own = (self.seq_length, self.first_window, self.num_windows, self.seed, self.shuffle, self.number)
        return _reopen, (*where, *own)


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
    num_tokens: int | None,
    seed: int,
    flag: str = "--data-path",
) -> Windows:
    """Open PREFIX.bin/.idx of each corpus, check every token, and split its windows.

    A corpus without a window in the validation or test part is left out of that part.

    Args:
        corpora: one, or a blend; arguments.weighted_corpora reads them from --data-path.
        split: three weights like 969,30,1.
        num_tokens: of the tokenizer; reads the files once, at about a gigabyte per second. None leaves the tokens to
            check_tokens, for ranks to share.
        flag: what names the corpora.

    Raises:
        UserError: missing or damaged files, tokens outside the vocabulary, fewer tokens than a window, a bad split.
    """
    opened = [_open_corpus(prefix, seq_length, split, seed, number, flag) for number, (_, prefix) in enumerate(corpora)]
    parts = []
    for datasets in zip(*opened, strict=True):
        there = [i for i, dataset in enumerate(datasets) if len(dataset) > 0]
        if len(there) <= 1:
            parts.append(datasets[there[0] if there else 0])
        else:
            assignment = Assignment.of([corpora[i].weight for i in there])
            parts.append(BlendedWindows(tuple(datasets[i] for i in there), assignment))
    windows = Windows(*parts)
    if num_tokens is not None:
        check_tokens(windows, num_tokens)
    return windows


def _open_corpus(prefix: str, seq_length: int, split: str, seed: int, number: int, flag: str) -> Windows:
    tokens = open_tokens(prefix, flag)
    num_windows = len(tokens) // seq_length
    if num_windows == 0:
        raise UserError(
            f"{flag} {prefix}: has {counted(len(tokens), 'token')}, fewer than one window of --seq-length "
            f"{seq_length}; prepare more text or lower it"
        )
    parts = []
    for (first, last), shuffle in zip(split_ranges(split, num_windows), (True, False, False), strict=True):
        parts.append(CorpusWindows(tokens, seq_length, first, last - first, seed, shuffle, number))
    if len(parts[0]) == 0:
        raise UserError(
            f"--split {split}: leaves no training window of the {num_windows} of {prefix}; give the first part more, "
            "or prepare more text"
        )
    return Windows(*parts)


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


def check_tokens(windows: Windows, num_tokens: int, part: int = 0, num_parts: int = 1) -> None:
    """Read every `num_parts`-th block of the corpora, from the block `part` on.

    Raises:
        UserError: it has tokens outside the vocabulary.
    """
    train, first = windows.train, part
    # A corpus without a training window was refused.
    for corpus in train.corpora if isinstance(train, BlendedWindows) else (train,):
        tokens = corpus.tokens
        starts = range(0, len(tokens), TOKENS_AT_ONCE)
        blocks = [tokens[start : start + TOKENS_AT_ONCE] for start in starts[first::num_parts]]
        # The next corpus goes on where this one ends: many small ones are shared as well.
        first = (first - len(starts)) % num_parts
        # Both of one block before the next, so that the file is read once.
        extremes = [(int(block.min()), int(block.max())) for block in blocks]
        low, high = min((low for low, _ in extremes), default=0), max((high for _, high in extremes), default=0)
        if low < 0 or high >= num_tokens:
            prefix = str(tokens.filename).removesuffix(".bin")
            whether = f", or see by prepare_data --check {prefix} whether it is damaged" if has_digests(prefix) else ""
            raise UserError(
                f"{tokens.filename}: has tokens {low} to {high}, the tokenizer's vocabulary has tokens 0 to "
                f"{num_tokens - 1}; prepare the data with this tokenizer{whether}"
            )


def _reopen(filename: str, dtype: np.dtype, *fields: Any) -> CorpusWindows:
    return CorpusWindows(np.memmap(filename, dtype=dtype, mode="r"), *fields)
