"""Philox4x64-10 for many keys at once (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011).

Bit for bit the numbers of numpy's Philox under Generator.random: a counter's four words give four numbers, of which
number n has word 0 of the counter at n // 4 + 1. One formula, over numpy's uint64 arrays on a CPU, where each operation
costs least, and over torch's int64 tensors elsewhere, where torch.compile makes one kernel of all of it.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 4  # numbers of one counter
ROUNDS = 10
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
LOW_HALF = 2**32 - 1
MANTISSA_BITS = 53
# More rows at once leave the nearer caches.
ROWS_AT_ONCE = 4096


class _Multiplier(NamedTuple):
    """A multiplier, or one for each word, and its halves of 32 bits."""

    low: Any
    high: Any
    whole: Any


class _Arithmetic(NamedTuple):
    """Where numpy's unsigned words and torch's signed ones differ."""

    low_half: Any
    upper: Callable[[Any], Any]  # 64-bit words -> their upper 32 bits
    upper_in_place: Callable[[Any], Any]  # the same, which may overwrite what it is given
    xor: Callable[[Any, Any], Any]  # may overwrite the first


def _product(word: Any, by: _Multiplier, arithmetic: _Arithmetic) -> tuple[Any, Any]:
    """High and low 64 bits of word * by: neither library has the high ones, but 32-bit halves multiply without loss.

    Written in place where it can be: on a CPU a new array costs a tenth of the whole.
    """
    low, high = word & arithmetic.low_half, arithmetic.upper(word)
    middle = arithmetic.upper_in_place(low * by.low)
    middle += high * by.low
    low *= by.high
    low += middle & arithmetic.low_half
    high *= by.high
    high += arithmetic.upper_in_place(middle)
    high += arithmetic.upper_in_place(low)
    return high, word * by.whole


def _rounds(
    words: Sequence[Any], keys: Iterable[tuple[Any, Any]], multiply: Callable, arithmetic: _Arithmetic
) -> tuple[Any, ...]:
    """Ten rounds over a counter's four words; `multiply` gives the products of words 0 and 2, which are overwritten."""
    xor = arithmetic.xor
    word_0, word_1, word_2, word_3 = words
    for key_0, key_1 in keys:
        (high_0, low_0), (high_2, low_2) = multiply(word_0, word_2)
        word_0, word_1, word_2, word_3 = xor(xor(high_2, word_1), key_0), low_2, xor(xor(high_0, word_3), key_1), low_0
    return word_0, word_1, word_2, word_3


def numpy_uniforms(key: np.ndarray, counter: Sequence[np.ndarray]) -> np.ndarray:
    """All four numbers in [0, 1) of each counter: float64 of the arguments' common shape and [4] behind it.

    Args:
        key: uint64, the first word of the key; the second is 0.
        counter: four words, uint64, of shapes that broadcast with the key's.
    """
    shape = np.broadcast(key, *counter).shape
    # A word that all share stays one.
    key, *words = (word if word.ndim == 0 else np.broadcast_to(word, shape).ravel() for word in (key, *counter))
    size = math.prod(shape)
    uniforms = np.empty((size, BLOCK))
    for start in range(0, size, ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        own_key, *own = (word[part] if word.ndim else word for word in (key, *words))
        for column, word in enumerate(_numpy_words(own_key, own, len(uniforms[part]))):
            uniforms[part, column] = word >> _SHIFT
    uniforms *= 2.0**-MANTISSA_BITS
    return uniforms.reshape(*shape, BLOCK)


def _array(value: int) -> np.ndarray:
    """Of no dimension: numpy takes twice as long for its scalars."""
    return np.array(value % 2**64, dtype=np.uint64)


_HALF, _SHIFT = _array(32), _array(64 - MANTISSA_BITS)
_KEY_STEPS = [tuple(_array(number * step) for step in KEY_STEPS) for number in range(ROUNDS)]
_UNSIGNED = _Arithmetic(
    _array(LOW_HALF),
    lambda words: words >> _HALF,
    lambda words: np.right_shift(words, _HALF, words),
    lambda words, other: np.bitwise_xor(words, other, words),
)


def _numpy_words(key: np.ndarray, counter: Sequence[np.ndarray], size: int) -> tuple[np.ndarray, ...]:
    # Both words of a round are multiplied as one array: half as many operations.
    both, by = np.empty(2 * size, dtype=np.uint64), _multipliers(size)

    def multiply(word_0: np.ndarray, word_2: np.ndarray) -> tuple[tuple, tuple]:
        both[:size], both[size:] = word_0, word_2
        high, low = _product(both, by, _UNSIGNED)
        return (high[:size], low[:size]), (high[size:], low[size:])

    return _rounds(counter, ((np.asarray(key + first), second) for first, second in _KEY_STEPS), multiply, _UNSIGNED)


@functools.lru_cache(maxsize=4)
def _multipliers(size: int) -> _Multiplier:
    whole = np.repeat(np.array(MULTIPLIERS, dtype=np.uint64), size)
    return _Multiplier(whole & _UNSIGNED.low_half, whole >> _HALF, whole)


def torch_uniforms(key: Tensor, counter: Sequence[Tensor], lane: Tensor) -> Tensor:
    """Number `lane` of each counter, elementwise and in one kernel on a GPU: float64 of the arguments' common shape.

    Args:
        key, counter: as numpy_uniforms', int64 of the same bits, of shapes that broadcast with the lane's.
        lane: int64 from 0 to 3.
    """
    together = torch.broadcast_tensors(key, *counter, lane)
    if not lane.is_cuda:
        return plain_torch_uniforms(*together)
    # In a row, so that the compiler meets two kinds of call alone, one number and many: after 8 kinds it would run the
    # plain form, silently and for good.
    flat = compiled_torch_uniforms()(*(tensor.contiguous().view(-1) for tensor in together))
    return flat.view(together[0].shape)


def signed(value: int) -> int:
    """The int64 of the same bits."""
    return (value + 2**63) % 2**64 - 2**63


def _logical_shift(words: Tensor, bits: int) -> Tensor:
    return (words >> bits) & (2 ** (64 - bits) - 1)


# torch cannot trace `^=` of tensors.
_SIGNED = _Arithmetic(
    LOW_HALF, *(functools.partial(_logical_shift, bits=32) for _ in range(2)), xor=lambda words, other: words ^ other
)


def plain_torch_uniforms(
    key: Tensor, word_0: Tensor, word_1: Tensor, word_2: Tensor, word_3: Tensor, lane: Tensor
) -> Tensor:
    """`torch_uniforms` of tensors of one shape, as written.

    Each number is computed by itself: a counter's four at once would take more than one kernel.
    """
    by = [_Multiplier(value & LOW_HALF, value >> 32, signed(value)) for value in MULTIPLIERS]

    def multiply(*words: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [_product(word, one, _SIGNED) for word, one in zip(words, by, strict=True)]

    keys = [(key + signed(number * KEY_STEPS[0]), signed(number * KEY_STEPS[1])) for number in range(ROUNDS)]
    words = _rounds((word_0, word_1, word_2, word_3), keys, multiply, _SIGNED)
    chosen = torch.where(lane < 2, torch.where(lane == 0, *words[:2]), torch.where(lane == 2, *words[2:]))
    return _logical_shift(chosen, 64 - MANTISSA_BITS).double() * 2.0**-MANTISSA_BITS


@functools.cache
def compiled_torch_uniforms() -> Callable[..., Tensor]:
    """Made when it is first asked for: importing the compiler takes seconds. One version for all sizes.

    For GPUs alone: in the C++ that it makes for a CPU signed numbers may not overflow, and some come out wrong.
    """
    return torch.compile(plain_torch_uniforms, fullgraph=True, dynamic=True)
