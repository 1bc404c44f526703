"""Random numbers: their law, and that they depend on their key alone."""

import pytest
import torch

from sedd_megatron.diffusion import AbsorbingGraph, LogLinearSchedule, UniformGraph, corrupt
from sedd_megatron.diffusion.categorical import sample_categorical
from sedd_megatron.diffusion.draws import Stream, independent_times, low_discrepancy_times, philox_uniforms
from tests.diffusion.laws import chi_squared_p_value


def noisy(graph, x_0, index, seed=5, stream=Stream.TRAIN_NOISE, **options):
    return corrupt(x_0, index, graph=graph, schedule=LogLinearSchedule(), seed=seed, stream=stream, **options)


@pytest.mark.parametrize("graph", [AbsorbingGraph(11), UniformGraph(11)])
@pytest.mark.parametrize("time_sampling", ["low-discrepancy", "independent"])
def test_noise_depends_on_seed_stream_and_sample_index_alone(graph, time_sampling):
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, 11, (6, 20), generator=generator)
    index = torch.tensor([0, 1, 7, 10**6, 2**40, 2**40 + 1])
    together = noisy(graph, x_0, index, time_sampling=time_sampling)
    order = [4, 0, 5, 2, 1, 3]
    shuffled = noisy(graph, x_0[order], index[order], time_sampling=time_sampling)
    for whole, part in zip(together, shuffled, strict=True):
        assert torch.equal(whole[order], part)
    alone = noisy(graph, x_0[3:4], index[3:4], time_sampling=time_sampling)
    assert torch.equal(alone.x_t, together.x_t[3:4])
    same_window = noisy(graph, x_0[:1].expand(6, -1), index)
    assert len({tuple(row.tolist()) for row in same_window.x_t}) == 6
    for change in ({"seed": 6}, {"stream": Stream.VALIDATION_NOISE}):
        assert not torch.equal(noisy(graph, x_0, index, **change).x_t, together.x_t)


def test_uniforms_of_different_keys_share_no_number():
    keys = [(s, i, step) for s in (0, 1, 2) for i in (0, 1, 2**33) for step in (0, 1, 2)]
    rows = torch.cat([philox_uniforms(9, s, i, 400, step=step)[0] for s, i, step in keys])
    assert len(rows.unique()) == len(rows)
    assert chi_squared_p_value(torch.histc(rows, 50, 0, 1), torch.full((50,), 1 / 50)) > 1e-3


@pytest.mark.parametrize("first", [0, 12345, 10**12])
@pytest.mark.parametrize("count", [8, 32, 512])
def test_any_run_of_samples_has_nearly_stratified_times(first, count):
    t = low_discrepancy_times(3, torch.arange(first, first + count), 1e-3, Stream.TRAIN_NOISE)
    assert ((t >= 1e-3) & (t <= 1)).all()
    fraction = ((t - 1e-3) / (1 - 1e-3)).sort().values
    # Discrepancy of the golden-ratio sequence: below 2 log2(n) / n; independent times have about 1 / sqrt(n).
    discrepancy = (fraction - (torch.arange(count) + 0.5) / count).abs().max()
    assert discrepancy < 2 / count * max(torch.tensor(count).log2().item() / 2, 1)


def test_independent_times_are_uniform():
    t = independent_times(3, torch.arange(20000), 0.0, Stream.TRAIN_NOISE)
    assert chi_squared_p_value(torch.histc(t, 40, 0, 1), torch.full((40,), 1 / 40)) > 1e-3


@pytest.mark.parametrize("graph", [AbsorbingGraph(5), UniformGraph(5)])
def test_corrupted_tokens_have_the_law_of_the_transition(graph):
    x_0 = torch.full((40, 1000), 2)
    sigma = torch.full((40,), 0.8, dtype=torch.float64)
    uniforms = philox_uniforms(1, 0, range(40), 2000).view(40, 2, 1000)
    x_t = graph.corrupt_tokens(x_0, sigma, uniforms)
    counts = torch.bincount(x_t.flatten(), minlength=graph.num_states)
    assert chi_squared_p_value(counts, graph.transition_probs(x_0[:1, :1], sigma[:1])[0, 0]) > 1e-3


def test_categorical_draws_have_their_law_down_to_rare_tokens():
    probs = torch.cat([torch.tensor([0.0, 3.0, 1e-5]), torch.full((20,), 0.05), torch.zeros(3)]).double()
    uniform = philox_uniforms(2, 0, range(200), 20000).flatten()
    counts = torch.zeros(len(probs), dtype=torch.long)
    for part in uniform.chunk(200):
        counts += torch.bincount(sample_categorical(probs.expand(len(part), -1), part), minlength=len(probs))
    assert chi_squared_p_value(counts, probs / probs.sum()) > 1e-3


def test_categorical_never_draws_what_cannot_be():
    probs = torch.tensor([[0.0, 0.1, 0.2, 0.7, 0.0, 0.0]])
    for uniform in (0.0, 1 - 2**-53, 0.1, 0.3):
        drawn = sample_categorical(probs, torch.tensor([uniform], dtype=torch.float64))
        assert drawn.item() in (1, 2, 3)
