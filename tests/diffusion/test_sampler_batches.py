"""A sample is a function of its seed and number; the network is asked about nothing that cannot change."""

import pytest
import torch

from sedd_megatron.diffusion import (
    SAMPLERS,
    AbsorbingGraph,
    LogLinearSchedule,
    SamplingSettings,
    TokenChoice,
    sample,
)
from sedd_megatron.diffusion.draws import Stream, philox_uniforms
from sedd_megatron.diffusion.sampler import Step
from sedd_megatron.diffusion.sampling import Draws, run_sampler
from sedd_megatron.diffusion.score_reader import ScoreReader, Scores, answers, score_fn_of
from sedd_megatron.diffusion.time_grid import sampling_times
from tests.diffusion.toy import CASES, GRAPHS, LENGTH, SCHEDULES, ExactScores, independent_scores

WIDTH = 4 * LENGTH
ABSORBING = [sampler for name, sampler in CASES if name == "absorb"]


def run(name: str, sampler: str, draws: Draws, fixed_tokens=None, fixed_mask=None, score_fn=None):
    graph, count = GRAPHS[name], len(draws.samples)
    if fixed_mask is None:
        fixed_tokens, fixed_mask = torch.zeros(count, WIDTH, dtype=torch.long), torch.zeros(count, WIDTH).bool()
    settings = SamplingSettings(sampler, num_steps=7, corrector_strength=4.0)
    score_fn = score_fn or score_fn_of(ExactScores(graph), graph.num_tokens)
    return run_sampler(score_fn, graph, SCHEDULES[name], settings, draws, fixed_tokens, fixed_mask)


@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_a_sample_depends_on_its_number_alone(name, sampler):
    graph = GRAPHS[name]

    def some(first: int, count: int) -> torch.Tensor:
        return sample(ExactScores(graph), graph, SCHEDULES[name], num_samples=count, length=WIDTH, num_steps=7,
                      sampler=sampler, seed=3, first_sample=first, corrector_strength=4.0)  # fmt: skip

    whole = some(0, 12)
    assert torch.equal(whole, torch.cat([some(0, 5), some(5, 1), some(6, 6)]))
    assert len(whole.unique(dim=0)) == 12


@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_sequences_of_different_seeds_and_given_tokens_do_not_touch_each_other(name, sampler):
    generator = torch.Generator().manual_seed(1)
    seeds, numbers = [4, 4, 9, 2**60, 4, 9], [0, 1, 0, 5, 10**10, 1]
    masks = torch.rand(6, WIDTH, generator=generator) < torch.linspace(0, 1, 6)[:, None]
    tokens = torch.randint(0, 3, (6, WIDTH), generator=generator)
    together = run(name, sampler, Draws(seeds, numbers), tokens, masks)
    for order in ([3, 5, 1, 0, 4, 2], [2], [4, 2, 0]):
        part = run(name, sampler, Draws([seeds[i] for i in order], [numbers[i] for i in order]), tokens[order],
                   masks[order])  # fmt: skip
        assert torch.equal(part.states, together.states[order])
        assert torch.equal(part.calls, together.calls[order])
    other = run(name, sampler, Draws([seed + 1 for seed in seeds], numbers), tokens, masks)
    assert not torch.equal(other.states[0], together.states[0])


def test_draws_of_a_later_block_are_those_of_its_absolute_positions():
    seeds, samples, steps = [3, 8], [0, 7], [2, 5]
    whole = Draws(seeds, samples).at(Stream.SAMPLING, steps, 20)
    assert torch.equal(Draws(seeds, samples, 12).at(Stream.SAMPLING, steps, 8), whole[:, 12:])
    for row in range(2):
        alone = philox_uniforms(seeds[row], Stream.SAMPLING, samples[row], 20, steps[row])
        assert torch.equal(whole[row : row + 1], alone)


@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_a_later_block_gives_what_the_whole_gives_there(name, sampler):
    # Copies of the toy do not know of each other: a block of some of them is a text of its own.
    whole = run(name, sampler, Draws([6] * 5, range(5))).states
    first = 2 * LENGTH
    nothing = torch.zeros(5, WIDTH - first, dtype=torch.long)
    block = run(name, sampler, Draws([6] * 5, range(5), first), nothing, nothing.bool()).states
    assert torch.equal(block, whole[:, first:])


# Three sequences with more and more tokens given and one of nothing else; whole, and from position 6 at a temperature.
RECORDED = {
    ("absorb", "euler", 0): ("001001022021202 121010101101012 012110000112022 112210220002110", [6, 6, 6, 0]),
    ("absorb", "euler", 6): ("022021202222002 201101112011011 011110021112022 112210220002110", [6, 6, 6, 0]),
    ("absorb", "analytic", 0): ("001001022021202 121010101101012 012110000112022 112210220002110", [6, 6, 6, 0]),
    ("absorb", "analytic", 6): ("022021202222002 201101112011011 011110021112022 112210220002110", [6, 6, 6, 0]),
    ("absorb", "ancestral", 0): ("001001022021202 121010101101012 012110000112022 112210220002110", [6, 6, 4, 0]),
    ("absorb", "ancestral", 6): ("022021202222002 201101112011011 011110021112022 112210220002110", [6, 6, 3, 0]),
    ("absorb", "event-driven", 0): ("021002011221110 111022100201112 011110000112022 112210220002110", [6, 6, 3, 0]),
    ("absorb", "event-driven", 6): ("011221110202000 000201112000011 011110021112022 112210220002110", [6, 4, 3, 0]),
    ("absorb", "predictor-corrector", 0): (
        "011011022021000 100000111101000 011110010112022 112210220002110",
        [11, 10, 7, 0],
    ),
    ("absorb", "predictor-corrector", 6): (
        "022021000222000 110101120011000 011110002112022 112210220002110",
        [11, 10, 9, 0],
    ),
    ("uniform", "euler", 0): ("100011021011102 212112101010020 012110012112022 112210220002110", [7, 7, 7, 0]),
    ("uniform", "euler", 6): ("021011102011000 011010120220000 012110020012002 112210220002110", [7, 7, 7, 0]),
    ("uniform", "analytic", 0): ("001010221112000 210012101111020 012110000112012 112210220002110", [7, 7, 7, 0]),
    ("uniform", "analytic", 6): ("221112000112120 101111120020010 010110010112012 112210220002110", [7, 7, 7, 0]),
    ("uniform", "predictor-corrector", 0): (
        "020011022102012 111221112000102 012110011112002 112210220002110",
        [13, 13, 13, 0],
    ),
    ("uniform", "predictor-corrector", 6): (
        "022102012000022 012000102010010 011110000112002 112210220002110",
        [13, 13, 13, 0],
    ),
}


@pytest.mark.parametrize("key", RECORDED, ids=lambda key: " ".join(map(str, key)))
def test_a_seed_means_the_samples_that_it_has_always_meant(key):
    (name, sampler, first), generator = key, torch.Generator().manual_seed(7)
    tokens = torch.randint(0, 3, (4, 15), generator=generator)
    given = torch.rand(4, 15, generator=generator) < torch.tensor([0.0, 0.2, 0.5, 1.0])[:, None]
    choose = TokenChoice(0.8) if first else TokenChoice()
    settings = SamplingSettings(sampler, num_steps=6, corrector_strength=4.0, choose=choose)
    draws = Draws([3, 3, 2**62 + 5, 2**63 - 1], [0, 1, 10**10, 7], first)
    score_fn = score_fn_of(ExactScores(GRAPHS[name]), 3)
    result = run_sampler(score_fn, GRAPHS[name], SCHEDULES[name], settings, draws, tokens, given)
    states, calls = RECORDED[key]
    assert " ".join("".join(map(str, row)) for row in result.states.tolist()) == states
    assert result.calls.tolist() == calls


@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_a_network_that_answers_in_chunks_changes_nothing(name, sampler):
    graph = GRAPHS[name]
    scores = ExactScores(graph)

    def in_chunks(x_t, sigma, asked, *laws):
        values = scores(x_t, sigma).flatten(0, 1)[asked.index].exp().scatter(-1, x_t.flatten()[asked.index, None], 0.0)
        return answers(lambda part: Scores(values[part, : graph.num_tokens]), torch.empty_like(asked.index), 5, *laws)

    draws = Draws([2] * 9, range(9))
    assert torch.equal(run(name, sampler, draws, score_fn=in_chunks).states, run(name, sampler, draws).states)


@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_sequences_at_steps_of_their_own_move_as_if_alone(name, sampler):
    graph, schedule = GRAPHS[name], SCHEDULES[name]
    now, later = torch.tensor([[0.9, 0.5, 0.2, 0.05], [0.6, 0.45, 0.1, 0.01]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, graph.num_states, (4, 50 * LENGTH), generator=generator)
    free = torch.rand(x.shape, generator=generator) < 0.8
    free[1] = False
    uniform = {stream: torch.rand(x.shape, dtype=torch.float64, generator=generator) for stream in Stream}
    score_fn = score_fn_of(ExactScores(graph), graph.num_tokens)

    def move(rows: slice) -> torch.Tensor:
        begin, end = now[rows], later[rows]
        step = Step(graph, schedule(begin), schedule(end), begin - end, free[rows],
                    lambda stream: uniform[stream][rows], TokenChoice(), 2.0)  # fmt: skip
        return SAMPLERS[sampler].step(ScoreReader(score_fn, len(begin), "cpu"), x[rows], step)

    together = move(slice(None))
    assert torch.equal(together, torch.cat([move(slice(row, row + 1)) for row in range(4)]))
    assert not torch.equal(together, x)


class Recorder:
    """A ScoreFn that notes which positions of which sequences were asked for. Token 0 names the sequence."""

    def __init__(self, score_fn) -> None:
        self.score_fn, self.calls, self.sigmas = score_fn, [], []

    def __call__(self, x_t, sigma, asked, *laws):
        rows, columns = asked.index // x_t.shape[1], asked.index % x_t.shape[1]
        self.calls.append((x_t[:, 0].tolist(), x_t, rows, columns))
        self.sigmas.append(sigma)
        return self.score_fn(x_t, sigma, asked, *laws)


@pytest.mark.parametrize("sampler", ABSORBING)
def test_the_network_is_asked_about_free_masks_and_sequences_that_have_some(sampler):
    count, length, num_tokens = 30, 40, 50
    graph = AbsorbingGraph(num_tokens)
    generator = torch.Generator().manual_seed(0)
    given = torch.rand(count, length, generator=generator) < torch.linspace(0, 1, count)[:, None]
    given[:, 0] = True
    given[-1] = True
    tokens = torch.randint(0, num_tokens, (count, length), generator=generator)
    tokens[:, 0] = torch.arange(count)
    recorder = Recorder(independent_scores(torch.full((num_tokens,), 1 / num_tokens)))
    settings = SamplingSettings(sampler, num_steps=10, corrector_strength=2.0)
    result = run_sampler(
        recorder, graph, LogLinearSchedule(), settings, Draws([1] * count, range(count)), tokens, given
    )
    counted = torch.zeros(count, dtype=torch.long)
    for names, x_t, rows, columns in recorder.calls:
        assert set(rows.tolist()) == set(range(len(names))), "a sequence without a position to ask for"
        assert (x_t[rows, columns] == graph.mask_token_id).all()
        assert not given[torch.tensor(names)][rows, columns].any()
        counted[names] += 1
    assert torch.equal(result.calls, counted)
    assert result.calls[-1] == 0, "nothing is free there"
    assert torch.equal(result.calls > 0, ~given.all(1))


@pytest.mark.parametrize("sampler", ABSORBING)
def test_the_network_is_told_the_noise_where_the_step_begins_and_the_corrector_where_it_ends(sampler):
    count, graph, schedule = 20, AbsorbingGraph(50), LogLinearSchedule()
    tokens = torch.arange(count)[:, None].repeat(1, 9)
    given = torch.zeros(count, 9).bool()
    given[:, 0] = True
    recorder, settings = Recorder(independent_scores(torch.full((50,), 0.02))), SamplingSettings(sampler, num_steps=12)
    times = torch.cat([sampling_times("uniform", 12, settings.time_eps), torch.tensor([settings.time_eps])])
    levels, seen = schedule(times).sigma.float(), {"begins": 0, "ends": 0}

    def check(progress) -> None:
        for (names, *_), sigma in zip(recorder.calls, recorder.sigmas, strict=True):
            steps = progress.steps[names]
            begins = torch.equal(sigma, levels[steps - 1])
            assert begins or torch.equal(sigma, levels[steps])
            seen["begins" if begins else "ends"] += 1
        recorder.calls.clear()
        recorder.sigmas.clear()

    run_sampler(recorder, graph, schedule, settings, Draws([1] * count, range(count)), tokens, given, check)
    assert seen["begins"] > 5
    assert (seen["ends"] > 0) == (sampler == "predictor-corrector")


@pytest.mark.parametrize("sampler", ["ancestral", "event-driven"])
def test_exact_samplers_ask_about_each_position_once_and_euler_again_and_again(sampler):
    def asked(name: str) -> int:
        graph, nothing = AbsorbingGraph(4), torch.zeros(6, 50, dtype=torch.long)
        recorder = Recorder(independent_scores(torch.full((4,), 0.25)))
        settings, draws = SamplingSettings(name, num_steps=10), Draws([1] * 6, range(6))
        run_sampler(recorder, graph, LogLinearSchedule(), settings, draws, nothing, nothing.bool())
        return sum(len(rows) for *_, rows, _ in recorder.calls)

    assert asked(sampler) == 6 * 50
    assert asked("euler") > 4 * 6 * 50


def test_a_finished_sequence_is_in_no_later_batch_of_the_event_driven_sampler():
    graph = AbsorbingGraph(50)
    given = torch.ones(2, 40).bool()
    given[0, 5] = given[1, 1:] = False
    tokens = torch.zeros(2, 40, dtype=torch.long)
    tokens[1] = 1
    recorder = Recorder(independent_scores(torch.full((50,), 0.02)))
    run_sampler(recorder, graph, LogLinearSchedule(), SamplingSettings("event-driven", 64), Draws([1] * 2, range(2)),
                tokens, given)  # fmt: skip
    assert recorder.calls[0][0] == [0, 1], "both begin at once, each at its own step"
    assert len(recorder.calls) > 15
    assert all(names == [1] for names, *_ in recorder.calls[1:])
