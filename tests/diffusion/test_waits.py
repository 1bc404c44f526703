"""How often a round of sampling makes the host wait for its device, on a simulated one; and that samples stay as they
were.
"""

import pytest
import torch

from sedd_megatron.diffusion import SamplingSettings, TokenChoice
from sedd_megatron.diffusion.sampling import Draws, run_sampler
from sedd_megatron.diffusion.score_reader import Asked, Scores, answers
from sedd_megatron.diffusion.transfers import to_device, to_host
from tests.diffusion.simulated_device import DEVICE, SimulatedDevice
from tests.diffusion.toy import CASES, GRAPHS, SCHEDULES

NUM_STEPS, LENGTH = 9, 40
SEEDS, SAMPLES = [3, 3, 2**62 + 5, 2**63 - 1], [0, 1, 10**10, 7]
# Waits of a round at most, and of the denoising. Of a step the host reads which positions are masked, and how many
# leave; the ancestral sampler and the corrector know the first, and learn from one read which positions are due.
WAITS = {
    "absorb euler": (2, 1),
    "absorb analytic": (2, 1),
    "absorb ancestral": (1, 0),
    "absorb event-driven": (0, 0),
    "absorb predictor-corrector": (2, 0),
    "uniform euler": (1, 1),
    "uniform analytic": (1, 1),
    "uniform predictor-corrector": (2, 1),
}


class PairScores:
    """A ScoreFn that lives on the device: the score of a token depends on the state before its position.

    In chunks, each of which must not cost a wait of its own.
    """

    def __init__(self, graph, device) -> None:
        generator = torch.Generator().manual_seed(0)
        table = torch.rand(graph.num_states, graph.num_states, graph.num_tokens, generator=generator)
        self.table = to_device(table, device)

    def __call__(self, x_t: torch.Tensor, sigma: torch.Tensor, asked: Asked, *laws) -> torch.Tensor:
        own, before = x_t.flatten()[asked.index], x_t.roll(1, 1).flatten()[asked.index]
        # Positions come as the table has them, too.
        columns = asked.table[asked.row, asked.sequence]
        before = torch.where(columns == asked.index % x_t.shape[1], before, -1)
        values = self.table[own, before] / torch.expm1(sigma)[asked.sequence, None]
        tokens = torch.arange(values.shape[1], device=values.device)
        values = torch.where(tokens == own[:, None], 0.0, values)
        return answers(lambda part: Scores(values[part]), torch.empty_like(asked.index), 13, *laws)


def sample_on(device, name: str, sampler: str, on_round=None, choose=TokenChoice()) -> torch.Tensor:  # noqa: B008
    generator = torch.Generator().manual_seed(5)
    given = torch.rand(len(SEEDS), LENGTH, generator=generator) < torch.tensor([0.0, 0.2, 0.5, 0.9])[:, None]
    tokens = torch.randint(0, 3, given.shape, generator=generator)
    tokens, given = to_device(tokens, device), to_device(given, device)
    graph, settings = GRAPHS[name], SamplingSettings(sampler, NUM_STEPS, corrector_strength=5.0, choose=choose)
    draws = Draws(SEEDS, SAMPLES, 6)
    return run_sampler(PairScores(graph, device), graph, SCHEDULES[name], settings, draws, tokens, given, on_round)


@pytest.mark.parametrize("choose", [TokenChoice(), TokenChoice(0.8, 2, 0.9)], ids=["own law", "sharpened"])
@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_a_round_waits_twice_at_most_and_samples_are_those_of_the_cpu(name, sampler, choose):
    waits: list[list[str]] = []
    with SimulatedDevice() as device:
        result = sample_on(DEVICE, name, sampler, lambda progress: waits.append(device.take_waits()), choose)
        states = to_host(result.states)
    expected = sample_on("cpu", name, sampler, None, choose)
    assert torch.equal(states, expected.states)
    assert torch.equal(result.calls, expected.calls)
    counts = [len(names) for names in waits]
    assert counts[0] == 1, "which positions are given is read before the first round"
    most, of_denoising = WAITS[f"{name} {sampler}"]
    if sampler == "event-driven":
        assert counts[1:] == [0] * (len(counts) - 1)
    else:
        assert len(counts) == NUM_STEPS + 2
        assert max(counts[1:-1]) == most, waits
        assert counts[-1] == of_denoising, waits[-1]
