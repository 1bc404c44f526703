"""In which order a corpus' windows are read: a permutation of its own for each epoch, a function of (seed, epoch).

Up to MOST_IN_A_TABLE windows it is numpy's shuffle, in a table of 4 bytes a window, as it has been from the first
release on. Beyond, it is a keyed function that needs no table: a billion windows would take 4 GB of each process.
"""

from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np

from sedd_megatron.diffusion.draws import Stream, philox_generator

# Part of what a seed means, as is ROUNDS: never to be changed.
MOST_IN_A_TABLE = 1 << 24
ROUNDS = 8
MASK_64 = (1 << 64) - 1


class Permutation(Protocol):
    """A bijection of 0 to n - 1."""

    def __getitem__(self, position: int) -> int:
        """What stands at a position."""


class KeyedPermutation:
    """A Feistel network over the numbers of as many bits as n - 1 has, walked along until it is below n again (Black
    and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002): less than two calls on average.

    Its round function is splitmix64's finalizer (Steele, Lea, Flood, OOPSLA 2014) of one half and the round's key, in
    plain integers: about 7 us a number.
    """

    def __init__(self, n: int, generator: np.random.Generator) -> None:
        self.n = n
        bits = max((n - 1).bit_length(), 2)
        # Where the bits are odd in number, the halves take turns in being the longer one.
        self.low_bits, self.high_bits = bits // 2, bits - bits // 2
        self.keys = [int(key) for key in generator.integers(0, 2**64, size=ROUNDS, dtype=np.uint64)]

    def __getitem__(self, position: int) -> int:
        """What stands at a position."""
        found = self._shuffled(position)
        while found >= self.n:
            found = self._shuffled(found)
        return found

    def _shuffled(self, number: int) -> int:
        low_bits, high_bits = self.low_bits, self.high_bits
        high, low = number >> low_bits, number & ((1 << low_bits) - 1)
        for key in self.keys:
            high, low = low, high ^ (_mixed(low ^ key) & ((1 << high_bits) - 1))
            low_bits, high_bits = high_bits, low_bits
        # An even number of rounds: the halves have their lengths again.
        return high << low_bits | low


class SampleOrder:
    """The permutations of one corpus, of `num_windows` windows; `number` is its place in a blend."""

    def __init__(self, num_windows: int, seed: int, number: int) -> None:
        self.num_windows, self.seed, self.number = num_windows, seed, number

    @cached_property
    def of_epoch(self) -> "lru_cache[Permutation]":
        """The permutation of an epoch; two are kept, for a batch may straddle them."""
        return lru_cache(maxsize=2)(self._made)

    def _made(self, epoch: int) -> Permutation:
        generator = philox_generator(self.seed, Stream.SAMPLE_ORDER, epoch, self.number)
        if is_keyed(self.num_windows):
            return KeyedPermutation(self.num_windows, generator)
        # The order of generator.permutation(num_windows), in half the memory.
        order = np.arange(self.num_windows, dtype=np.uint32)
        generator.shuffle(order)
        return order


def is_keyed(num_windows: int) -> bool:
    """Whether a corpus of so many training windows is read in the order that needs no table."""
    return num_windows > MOST_IN_A_TABLE


def _mixed(number: int) -> int:
    number = (number + 0x9E3779B97F4A7C15) & MASK_64
    number = ((number ^ number >> 30) * 0xBF58476D1CE4E5B9) & MASK_64
    number = ((number ^ number >> 27) * 0x94D049BB133111EB) & MASK_64
    return number ^ number >> 31
