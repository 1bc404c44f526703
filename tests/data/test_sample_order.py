"""The order of very many windows, which is a function and no table: every window once, and nothing else to tell."""

import numpy as np
import pytest

from sedd_megatron.data import sample_order as module
from sedd_megatron.data.sample_order import MOST_IN_A_TABLE, KeyedPermutation, SampleOrder
from sedd_megatron.diffusion.draws import Stream, philox_generator

GOLDEN = [984374464, 80834491, 318439321, 970137634]


def permutation(n: int, epoch: int = 0, seed: int = 1) -> KeyedPermutation:
    return KeyedPermutation(n, philox_generator(seed, Stream.SAMPLE_ORDER, epoch, 0))


def order(n: int, epoch: int = 0, seed: int = 1) -> np.ndarray:
    keyed = permutation(n, epoch, seed)
    return np.array([keyed[position] for position in range(n)])


def chi_squared_per_degree(observed: np.ndarray, expected: float) -> float:
    return float(((observed - expected) ** 2 / expected).sum() / observed.size)


def test_every_position_has_one_of_all_numbers():
    for n in [*range(1, 70), 255, 256, 257, 1000, 4095, 4097, 10_007]:
        assert sorted(order(n)) == list(range(n)), n
    for n in (2**24 + 1, 10**9, 2**40 + 3):
        keyed = permutation(n)
        found = [keyed[position] for position in (*range(500), *range(n - 500, n))]
        assert len(set(found)) == 1000
        assert 0 <= min(found) < max(found) < n


def test_positions_neighbours_and_epochs_are_as_of_a_random_order():
    n, cells, rounds = 4096, 16, 12
    of = np.array([order(n, epoch) for epoch in range(rounds)]) * cells // n
    where = np.arange(n) * cells // n
    several = {
        "position": (where[None].repeat(rounds, 0), of),
        "next": (of[:, :-1], of[:, 1:]),
        "next but 16": (of[:, :-16], of[:, 16:]),
        "next epoch": (of[:-1], of[1:]),
        "other seed": (of, np.array([order(n, epoch, seed=2) for epoch in range(rounds)]) * cells // n),
    }
    for name, (a, b) in several.items():
        joint = np.zeros((cells, cells))
        np.add.at(joint, (a.ravel(), b.ravel()), 1)
        # 255 degrees of freedom: a mean of 1 and a standard deviation of 0.09.
        assert 0.7 < chi_squared_per_degree(joint, joint.sum() / cells**2) < 1.4, name
    # Bits of neighbours differ in half of the cases each.
    whole = order(n)
    for bit in range(12):
        assert abs(((whole[:-1] ^ whole[1:]) >> bit & 1).mean() - 0.5) < 0.04


def test_fixed_points_and_cycles_are_as_of_a_random_order():
    fixed, cycles = [], []
    for seed in range(300):
        found = order(100, seed=seed)
        fixed.append(int((found == np.arange(100)).sum()))
        seen, count = set(), 0
        for start in range(100):
            count += start not in seen
            while start not in seen:
                seen.add(start)
                start = int(found[start])
        cycles.append(count)
    # Poisson of mean 1; the harmonic number of 100 with a variance of 3.55.
    assert abs(np.mean(fixed) - 1) < 4 / np.sqrt(300)
    assert abs(np.mean(cycles) - 5.187) < 4 * np.sqrt(3.55 / 300)


def test_the_order_of_a_seed_stays_what_it_is(monkeypatch):
    assert MOST_IN_A_TABLE == 1 << 24
    many = SampleOrder(10**9, seed=1234, number=0)
    assert [many.of_epoch(epoch)[position] for epoch, position in ((0, 0), (0, 1), (0, 10**9 - 1), (7, 0))] == GOLDEN
    # At the threshold a table, behind it none.
    monkeypatch.setattr(module, "MOST_IN_A_TABLE", 100)
    assert isinstance(SampleOrder(100, 1, 0).of_epoch(0), np.ndarray)
    assert isinstance(SampleOrder(101, 1, 0).of_epoch(0), KeyedPermutation)


@pytest.mark.parametrize("number", [0, 1])
def test_corpora_of_a_blend_have_orders_of_their_own(number):
    first, second = (SampleOrder(10**9, 1234, number).of_epoch(0) for number in (number, number + 1))
    assert [first[position] for position in range(8)] != [second[position] for position in range(8)]
