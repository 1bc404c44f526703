"""Counter-based random numbers: every draw is a function of (seed, stream, index, step) alone."""

import enum
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sedd_megatron.diffusion.philox import BLOCK, numpy_uniforms, signed, torch_uniforms
from sedd_megatron.diffusion.transfers import to_device

Key = int | Sequence[int] | np.ndarray | Tensor

# Where all rows together are faster than one by one (tests/benchmarks/draws.py).
MOST_BLOCKS_AT_ONCE = 16
FEWEST_ROWS_AT_ONCE = 64
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
    DROPOUT = 9


def philox_generator(seed: int, stream: int, index: int, step: int = 0) -> np.random.Generator:
    """A generator of its own for each (seed, stream, index, step).

    Philox counts its low word up, one per four draws: with the other three words fixed, generators stay 2^64 blocks
    apart.
    """
    counter = np.array([0, step, index, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, 0], dtype=np.uint64), counter=counter))


def philox_uniforms(
    seed: Key,
    stream: int,
    index: Key,
    count: int,
    step: Key = 0,
    *,
    first: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """[B, count] float64 in [0, 1), row b from (seed, index, step) of b alone; a single number counts for all rows.

    They are the numbers of `philox_generator` from number `first` on.

    Args:
        seed, index, step: from 0 to 2^64 - 1; in a tensor, [B] int64 of the same bits.
        device: where the numbers are made, without a copy or a wait if the keys are there or are single numbers.
    """
    if torch.device(device).type != "cpu":
        position = torch.arange(first, first + count, device=device)
        seed, index, step = (device_key(key, device).reshape(-1, 1) for key in (seed, index, step))
        return philox_uniforms_at(seed, stream, index, step, position, device)
    keys = [_host_key(key) for key in (seed, index, step)]
    num_rows, (begin, skipped) = max(key.size for key in keys), divmod(first, BLOCK)
    num_blocks = -(-(skipped + count) // BLOCK)
    if num_blocks > MOST_BLOCKS_AT_ONCE or num_rows < FEWEST_ROWS_AT_ONCE:
        uniforms = _row_by_row(stream, *(np.broadcast_to(key, num_rows) for key in keys), begin, skipped + count)
    else:
        seed, index, step = (key.reshape(-1, 1) if key.size > 1 else key.reshape(()) for key in keys)
        number = (
            _host_key(begin + 1) if num_blocks == 1 else np.arange(begin + 1, begin + 1 + num_blocks, dtype=np.uint64)
        )
        uniforms = numpy_uniforms(seed, (number, step, index, _host_key(int(stream)))).reshape(num_rows, -1)
    return torch.from_numpy(uniforms[:, skipped : skipped + count])


def philox_uniforms_at(
    seed: Key, stream: int, index: Key, step: Key, position: Key, device: torch.device | str = "cpu"
) -> Tensor:
    """Number `position` of each key's, of the keys' common shape: float64, elementwise, on the device.

    Keys as those of `philox_uniforms`, of any shapes that broadcast.
    """
    if torch.device(device).type != "cpu":
        seed, index, step, position = (device_key(key, device) for key in (seed, index, step, position))
        counter = (position // BLOCK + 1, step, index, device_key(int(stream), device))
        return torch_uniforms(seed, counter, position % BLOCK)
    seed, index, step, position = (_host_key(key) for key in (seed, index, step, position))
    # uint64 with a plain number is floating in numpy 1.
    number, lane = position // np.uint64(BLOCK) + np.uint64(1), position % np.uint64(BLOCK)
    uniforms = numpy_uniforms(seed, (np.asarray(number), step, index, _host_key(int(stream))))
    lane = np.broadcast_to(lane.astype(np.int64), uniforms.shape[:-1])[..., None]
    return torch.from_numpy(np.take_along_axis(uniforms, lane, axis=-1)[..., 0])


def _row_by_row(
    stream: int, seeds: np.ndarray, indices: np.ndarray, steps: np.ndarray, begin: int, count: int
) -> np.ndarray:
    """[B, count] by numpy's own generator, whose state is set for each row: making a new one takes five times as long.

    begin: the number of blocks that are left out.
    """
    bits = np.random.Philox(key=np.zeros(2, dtype=np.uint64))
    # Whose buffer of numbers is empty.
    state, generator, uniforms = bits.state, np.random.Generator(bits), np.empty((len(seeds), count))
    key, counter = state["state"]["key"], state["state"]["counter"]
    counter[0], counter[3] = begin, stream
    for row, (key[0], counter[2], counter[1]) in enumerate(zip(seeds, indices, steps, strict=True)):
        bits.state = state
        generator.random(out=uniforms[row])
    return uniforms


def _host_key(key: Key) -> np.ndarray:
    """uint64 of the key's shape."""
    if isinstance(key, Tensor):
        return key.cpu().numpy().astype(np.uint64)
    # Without the dtype numpy makes floating numbers of a list with some above 2^63.
    return np.asarray(key, dtype=np.uint64)


def device_key(key: Key, device: torch.device | str) -> Tensor:
    """int64 of the key's shape and bits, on the device."""
    if isinstance(key, int):
        # Filled there: a copy would have to be made first.
        return torch.full((), signed(key), device=device)
    return to_device(key if isinstance(key, Tensor) else torch.from_numpy(_host_key(key).view(np.int64)), device)


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
