"""Windows without data: what a layout or a machine is tried on."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sedd_megatron.data.windows import WindowDataset, Windows
from sedd_megatron.diffusion.draws import Stream, philox_generator

# No windows are stored, and so many are told apart; a corpus of 16 million tokens in windows of 1024 has as many.
NUM_WINDOWS = 1 << 14
MOST_STEP = 4
# Beyond the numbers of corpora in a blend, which take this place in the keys of their orders.
FIRST_STEP = 1 << 32


@dataclass(frozen=True)
class MockWindows(WindowDataset):
    """Window n counts up from a token, in steps, modulo the vocabulary; both are functions of (seed, part, n) alone.

    There is something to learn in it, as in Megatron-LM's mock data, so that a loss that does not fall is a fault.
    """

    num_tokens: int
    seq_length: int
    seed: int
    part: int

    def __len__(self) -> int:
        """Number of different windows."""
        return NUM_WINDOWS

    def __getitem__(self, n: int) -> tuple[int, Tensor]:
        """(n, x_0 [S] int64)."""
        draws = philox_generator(self.seed, Stream.SAMPLE_ORDER, n % NUM_WINDOWS, FIRST_STEP + self.part)
        start, step = draws.integers(0, self.num_tokens), draws.integers(1, MOST_STEP + 1)
        return n, torch.from_numpy((start + step * np.arange(self.seq_length)) % self.num_tokens)


def mock_windows(num_tokens: int, seq_length: int, seed: int) -> Windows:
    """All three parts."""
    return Windows(*(MockWindows(num_tokens, seq_length, seed, part) for part in range(3)))
