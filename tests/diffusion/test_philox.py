"""Philox by both of our routes against numpy's own, the published test vectors and recorded values."""

import warnings

import numpy as np
import pytest
import torch

from sedd_megatron.diffusion import draws
from sedd_megatron.diffusion.draws import Stream, philox_generator, philox_uniforms, philox_uniforms_at
from sedd_megatron.diffusion.philox import numpy_uniforms, plain_torch_uniforms, torch_uniforms
from sedd_megatron.diffusion.transfers import to_device, to_host
from tests.diffusion.simulated_device import DEVICE, SimulatedDevice

EDGES = [0, 1, 2, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1]


def random_keys(count: int, seed: int) -> list[int]:
    """Of 64 bits, the edges among them."""
    keys = np.random.default_rng(seed).integers(0, 2**64, count - len(EDGES), dtype=np.uint64).tolist() + EDGES
    return np.random.default_rng(seed + 1).permutation(np.array(keys, dtype=np.uint64)).tolist()


def by_numpy(seeds, stream, indices, count, steps) -> torch.Tensor:
    keys = np.broadcast(*(np.array(key, dtype=np.uint64) for key in (seeds, indices, steps)))
    rows = [philox_generator(int(s), stream, int(i), int(k)).random(count) for s, i, k in keys]
    return torch.from_numpy(np.stack(rows))


def signed(keys) -> torch.Tensor:
    return torch.from_numpy(np.array(keys, dtype=np.uint64).view(np.int64))


@pytest.mark.parametrize("count", [1, 3, 4, 5, 16, 31, 33, 200])
@pytest.mark.parametrize("rows", [9, 70])
def test_numbers_are_numpys_for_any_keys_and_counts(rows, count):
    seeds, indices, steps = (random_keys(70, seed)[:rows] for seed in (0, 2, 4))
    expected = by_numpy(seeds, Stream.SAMPLING, indices, count, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(philox_uniforms(seeds, Stream.SAMPLING, indices, count, steps), expected)
    assert torch.equal(philox_uniforms(signed(seeds), Stream.SAMPLING, signed(indices), count, steps), expected)
    for first in range(min(count, 6)):
        part = philox_uniforms(seeds, Stream.SAMPLING, indices, count - first, steps, first=first)
        assert torch.equal(part, expected[:, first:])
    seed, index, step = (signed(key)[:, None] for key in (seeds, indices, steps))
    position = torch.arange(count)
    counter = (position // 4 + 1, step, index, torch.tensor(int(Stream.SAMPLING)))
    assert torch.equal(torch_uniforms(seed, counter, position % 4), expected)


@pytest.mark.parametrize("broadcast", ["seed", "index", "step", "seed and step", "all"])
def test_a_single_number_counts_for_all_rows(broadcast):
    seeds, indices, steps = (random_keys(100, seed) for seed in (10, 12, 14))
    seeds = 2**64 - 1 if broadcast in ("seed", "seed and step", "all") else seeds
    indices = 2**63 if broadcast in ("index", "all") else indices
    steps = 7 if broadcast in ("step", "seed and step", "all") else steps
    for count in (4, 50):
        expected = by_numpy(seeds, Stream.CORRECTOR, indices, count, steps)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = philox_uniforms(seeds, Stream.CORRECTOR, indices, count, steps)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rows_at_once", [1, 64, 4096])
def test_all_routes_give_the_same(rows_at_once, monkeypatch):
    monkeypatch.setattr("sedd_megatron.diffusion.philox.ROWS_AT_ONCE", rows_at_once)
    seeds, indices, steps = (random_keys(150, seed) for seed in (20, 22, 24))
    found = []
    for most, fewest in ((0, 0), (10**9, 0)):
        monkeypatch.setattr(draws, "MOST_BLOCKS_AT_ONCE", most)
        monkeypatch.setattr(draws, "FEWEST_ROWS_AT_ONCE", fewest)
        found.append(philox_uniforms(seeds, 1, indices, 30, steps, first=5))
    assert torch.equal(*found)


def test_each_element_has_the_number_of_its_own_key_and_position():
    seeds, indices = random_keys(20, 30), random_keys(20, 32)
    generator = torch.Generator().manual_seed(0)
    steps, position = torch.randint(0, 9, (20, 33), generator=generator), torch.arange(33) + 6
    keys = signed(seeds)[:, None], Stream.SAMPLING, signed(indices)[:, None], steps, position
    at = philox_uniforms_at(*keys)
    for step in range(9):
        rows = by_numpy(seeds, Stream.SAMPLING, indices, 39, step)[:, 6:]
        assert torch.equal(at[steps == step], rows[steps == step])
    with SimulatedDevice() as device:
        sent = [key if isinstance(key, int) else to_device(key, DEVICE) for key in keys]
        on_device = philox_uniforms_at(*sent, DEVICE)
        rows = philox_uniforms(sent[0], Stream.SAMPLING, sent[2], 30, 4, first=3, device=DEVICE)
        assert device.take_waits() == [], "a draw made the host wait"
        assert torch.equal(to_host(on_device), at)
        assert torch.equal(to_host(rows), by_numpy(seeds, Stream.SAMPLING, indices, 33, 4)[:, 3:])


def test_the_compiler_takes_the_formula_whole_and_once_for_all_sizes():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(plain_torch_uniforms, fullgraph=True, dynamic=True, backend=backend)
    generator = torch.Generator().manual_seed(0)
    for size in (7, 1, 4096, 9, 2):
        words = torch.randint(-(2**63), 2**63 - 1, (5, size), generator=generator)
        lanes = torch.randint(0, 4, (size,), generator=generator)
        assert torch.equal(compiled(*words, lanes), plain_torch_uniforms(*words, lanes))
    assert len(graphs) == 2, "one number, and many"


# Random123's known answers (kat_vectors): counter, key and result of philox4x64-10 where the key's second word is 0.
ZERO = (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)


def test_the_published_vector():
    words = torch.from_numpy((np.array(ZERO, dtype=np.uint64) >> np.uint64(11)).astype(np.float64)) * 2.0**-53
    zero = np.array(0, dtype=np.uint64)
    assert torch.equal(torch.from_numpy(numpy_uniforms(zero, [zero] * 4)), words)
    assert torch.equal(torch_uniforms(torch.tensor(0), [torch.tensor(0)] * 4, torch.arange(4)), words)


RECORDED = [
    [
        "0x1.bc44fdbfe7b81p-1",
        "0x1.389fb75f1f8bap-1",
        "0x1.febcff884c830p-1",
        "0x1.bc25b7231e006p-1",
        "0x1.848a7a7f3391cp-1",
    ],
    [
        "0x1.5343edff83443p-1",
        "0x1.b3abb41d914e1p-1",
        "0x1.f7d1489e777e0p-3",
        "0x1.8c37385f21deep-2",
        "0x1.168a871b4a9cap-1",
    ],
    [
        "0x1.78fea49c4a1d6p-1",
        "0x1.999d641e2962fp-1",
        "0x1.fbd9e448d90b0p-3",
        "0x1.b1f19cc29f1b6p-2",
        "0x1.4f49273db4778p-3",
    ],
]


def test_recorded_values():
    """What seeds mean: these numbers are never to change."""
    rows = philox_uniforms([0, 5, 2**63 + 11], Stream.SAMPLING, [0, 3, 10**12], 5, [0, 1, 77])
    assert [[number.hex() for number in row] for row in rows.tolist()] == RECORDED
