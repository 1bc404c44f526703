"""Windows of a token stream in an order that is a function of (seed, n) alone."""

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sedd_megatron.data.corpus import open_tokens
from sedd_megatron.diffusion.draws import Stream, philox_generator
from sedd_megatron.errors import UserError


@dataclass(frozen=True)
class WindowDataset(torch.utils.data.Dataset):
    """Windows of seq_length tokens without overlap, addressed by their position n in the training order, without end.

    Each epoch is a permutation of its own. The order does not depend on how long the run is: a run that is made
    longer goes on as it would have.
    """

    tokens: np.memmap
    seq_length: int
    first_window: int
    num_windows: int
    seed: int
    shuffle: bool

    def __len__(self) -> int:
        """Number of different windows."""
        return self.num_windows

    def __getitem__(self, n: int) -> tuple[int, Tensor]:
        """(n, x_0 [S] int64)."""
        epoch, position = divmod(n, self.num_windows)
        window = self.first_window + (
            int(_permutation(self.seed, epoch, self.num_windows)[position]) if self.shuffle else position
        )
        tokens = self.tokens[window * self.seq_length : (window + 1) * self.seq_length]
        return n, torch.from_numpy(tokens.astype(np.int64))

    def __reduce__(self) -> tuple[Any, ...]:
        # Loader processes that are not forked get the dataset by pickle, which would copy the whole corpus to each.
        where = (self.tokens.filename, self.tokens.dtype)
        return _reopen, (*where, self.seq_length, self.first_window, self.num_windows, self.seed, self.shuffle)


class Windows(NamedTuple):
    """The three parts of a split corpus."""

    train: WindowDataset
    valid: WindowDataset
    test: WindowDataset


def open_windows(data_path: str, *, seq_length: int, split: str, num_tokens: int, seed: int) -> Windows:
    """Open PREFIX.bin/.idx, check every token, and split its windows.

    Args:
        split: three weights like 969,30,1.
        num_tokens: of the tokenizer; reads the file once, at about a gigabyte per second.

    Raises:
        UserError: missing or damaged files, tokens outside the vocabulary, fewer tokens than a window, a bad split.
    """
    tokens = open_tokens(data_path)
    _check_tokens(tokens, num_tokens, data_path)
    num_windows = len(tokens) // seq_length
    if num_windows == 0:
        raise UserError(
            f"--data-path {data_path}: {len(tokens)} tokens are fewer than one window of --seq-length {seq_length}; "
            "prepare more text or lower it"
        )
    parts = []
    for (first, last), shuffle in zip(split_ranges(split, num_windows), (True, False, False), strict=True):
        parts.append(WindowDataset(tokens, seq_length, first, last - first, seed, shuffle))
    if len(parts[0]) == 0:
        raise UserError(
            f"--split {split}: leaves no training window of the {num_windows} there are; give the first part more, or "
            "prepare more text"
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
    if len(weights) != 3 or not all(0 <= weight < float("inf") for weight in weights) or sum(weights) == 0:
        raise UserError(f"--split {split}: must be three weights for training, validation and test, as 969,30,1")
    shares = np.cumsum([0.0, *weights]) / sum(weights)
    bounds = [round(share * num_windows) for share in shares]
    return list(itertools.pairwise(bounds))


def _check_tokens(tokens: np.ndarray, num_tokens: int, data_path: str) -> None:
    chunk = 1 << 24
    parts = [tokens[start : start + chunk] for start in range(0, len(tokens), chunk)]
    # Both of one part before the next, so that the file is read once.
    lows, highs = zip(*((int(part.min()), int(part.max())) for part in parts), strict=True)
    low, high = min(lows), max(highs)
    if low < 0 or high >= num_tokens:
        raise UserError(
            f"{data_path}.bin: has tokens {low} to {high}, the tokenizer's vocabulary has tokens 0 to "
            f"{num_tokens - 1}; prepare the data with this tokenizer"
        )


def _reopen(filename: str, dtype: np.dtype, *fields: Any) -> WindowDataset:
    return WindowDataset(np.memmap(filename, dtype=dtype, mode="r"), *fields)


# Three: a batch may straddle two epochs, and validation never asks.
@lru_cache(maxsize=3)
def _permutation(seed: int, epoch: int, num_windows: int) -> np.ndarray:
    return philox_generator(seed, Stream.SAMPLE_ORDER, epoch).permutation(num_windows)
