"""Dropout's draws: what they are, that parts are parts of the whole, and that they are fair and independent."""

import itertools

import numpy as np
import pytest
import torch

from sedd_megatron.diffusion.draws import Stream
from sedd_megatron.diffusion.philox import _numpy_words
from sedd_megatron.parallel.keyed_dropout import dropout_keys, dropout_steps, dropped_elements, kept_share

SAMPLES = torch.tensor([0, 7, 2**40])


def by_formula(seed: int, sample: int, branch: int, position: int, channel: int, width: int) -> int:
    """An element's 16 bits, from Philox as it is written in diffusion/philox.py."""
    block = position * -(-width // 16) + channel // 16
    counter = [np.array([word], dtype=np.uint64) for word in (block + 1, branch, sample, Stream.DROPOUT)]
    words = _numpy_words(np.array(seed, dtype=np.uint64), counter, 1)
    return int(words[channel % 16 // 4][0]) >> 16 * (channel % 4) & 0xFFFF


@pytest.mark.parametrize("width", [16, 40, 5])
def test_each_element_has_its_own_sixteen_bits(width):
    seed, branch, first, length, probability = 2**64 - 3, 5, 9, 3, 0.3
    dropped = dropped_elements(dropout_keys(seed, SAMPLES), branch, first, length, width, probability)
    assert dropped.shape == (length, len(SAMPLES), width)
    for place, row, channel in itertools.product(range(length), range(len(SAMPLES)), range(width)):
        bits = by_formula(seed, int(SAMPLES[row]), branch, first + place, channel, width)
        assert dropped[place, row, channel] == (bits < round(0.3 * 2**16))


def test_a_rank_drops_its_part_of_what_one_process_drops():
    keys = dropout_keys(1, SAMPLES)
    whole = dropped_elements(keys, 3, 0, 24, 48, 0.5)
    for first in range(0, 24, 8):
        assert torch.equal(dropped_elements(keys[1:], 3, first, 8, 48, 0.5), whole[first : first + 8, 1:])


def test_draws_are_fair_and_those_of_different_keys_independent():
    """Each within five standard deviations of what independent draws would give."""
    length, width = 64, 256
    draws = {
        (seed, branch): dropped_elements(dropout_keys(seed, torch.arange(2)), branch, 0, length, width, 0.1)
        for seed, branch in itertools.product((0, 1), (0, 1, 2))
    }
    rows = [draw[:, row].double() - 0.1 for draw in draws.values() for row in range(2)]
    deviation = (0.1 * 0.9 / (length * width)) ** 0.5
    for row in rows:
        assert row.mean().abs() < 5 * deviation
        for shifted in (row[1:] * row[:-1], row[:, 1:] * row[:, :-1], row[:, 16:] * row[:, :-16]):
            assert shifted.mean().abs() < 5 * 0.09 / shifted.numel() ** 0.5
    for one, other in itertools.combinations(rows, 2):
        assert (one * other).mean().abs() < 5 * 0.09 / (length * width) ** 0.5


@pytest.mark.parametrize("probability", [0.1, 0.25, 1e-4, 0.9999999])
def test_what_is_kept_is_scaled_by_what_is_dropped(probability):
    """To the step that is counted in, so that the mean stays what it was."""
    assert abs(dropout_steps(probability) / 2**16 - probability) <= 2**-16
    assert kept_share(probability) == (2**16 - dropout_steps(probability)) / 2**16 > 0
