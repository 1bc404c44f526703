"""Counter-based random numbers: every draw is a function of (seed, stream, index, step) alone."""

import enum
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15


class Stream(enum.IntEnum):
    """What a draw is for; streams never overlap. The numbers are part of what a seed means: never renumber."""

    TRAIN_NOISE = 0
    VALIDATION_NOISE = 1
    SAMPLING = 2
    SAMPLE_ORDER = 3
    TIME_OFFSET = 4
    CORRECTOR = 5
    EVALUATION_TIME = 6
    EVALUATION_NOISE = 7
    EVALUATION_LAST = 8


def philox_generator(seed: int, stream: int, index: int, step: int = 0) -> np.random.Generator:
    """A generator of its own for each (seed, stream, index, step).

    Philox counts its low word up, one per four draws: with the other three words fixed, generators stay 2^64 blocks
    apart.
    """
    counter = np.array([0, step, index, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, 0], dtype=np.uint64), counter=counter))


def philox_uniforms(
    seed: int | Sequence[int],
    stream: int,
    index: int | Sequence[int] | Tensor,
    count: int,
    step: int | Sequence[int] = 0,
) -> Tensor:
    """[B, count] float64 in [0, 1), row b from (seed, index, step) of b alone; a single number counts for all rows."""
    keys = np.broadcast_arrays(*(np.atleast_1d(np.asarray(key)) for key in (seed, index, step)))
    rows = [philox_generator(int(s), stream, int(i), int(k)).random(count) for s, i, k in zip(*keys, strict=True)]
    return torch.from_numpy(np.stack(rows))


def low_discrepancy_times(seed: int, index: Tensor, eps: float, stream: int) -> Tensor:
    """t_n = eps + (1 - eps) * frac(u + n * phi) for sample indices n [B]; [B] float64.

    Steps of the golden ratio's fraction spread any run of consecutive samples almost evenly, so every micro-batch is
    nearly stratified without knowing its size or rank. In 64-bit integers the fraction is exact for every n.
    """
    offset = philox_generator(seed, Stream.TIME_OFFSET, stream).integers(0, 2**64, dtype=np.uint64)
    # numpy's unsigned integers wrap around, which is the fraction.
    position = offset + np.asarray(index).astype(np.uint64) * np.uint64(GOLDEN_RATIO_64)
    fraction = torch.from_numpy((position >> np.uint64(11)).astype(np.float64) * 2.0**-53)
    return eps + (1 - eps) * fraction


def independent_times(seed: int, index: Tensor, eps: float, stream: int) -> Tensor:
    """t_n uniform in [eps, 1], each on its own; [B] float64."""
    return eps + (1 - eps) * philox_uniforms(seed, stream, index, 1, step=1)[:, 0]


TIME_SAMPLING = {"low-discrepancy": low_discrepancy_times, "independent": independent_times}
