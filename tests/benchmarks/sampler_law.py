"""Every sampler's law on an enumerable toy, by a million draws: python -m tests.benchmarks.sampler_law

3 tokens at 3 positions, strongly correlated, with exact scores. The draws go through the production loop and its step
functions; only the random numbers come from elsewhere, a whole batch at once from torch.rand in float64, because the
counter-based generator of each sequence is the one slow part (tests/diffusion draws with it). p is that of chi-squared
against the model's law over all 27 sequences: below 1e-3 once in a thousand for a right sampler. Bias is how far the
exact law of that many steps is from it, without any draw: the total variation, and what it adds to chi-squared, which
is 26 on average and 7 more or less.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sedd_megatron.diffusion import SAMPLERS, SamplingSettings
from sedd_megatron.diffusion.draws import Stream
from sedd_megatron.diffusion.sampling import run_sampler
from sedd_megatron.diffusion.score_reader import Asked, ChunkLaw, Scores, answers
from sedd_megatron.diffusion.time_grid import sampling_times
from tests.benchmarks.pairs import Lines, write_table
from tests.diffusion.toy import (
    CASES,
    GRAPHS,
    LENGTH,
    SCHEDULES,
    TOKENS,
    ExactScores,
    all_states,
    exact_law,
    law_of_states,
    p_value_of,
    state_number,
    total_variation,
)

HEADER = (
    "| sampler | graph | steps | draws | p | bias: total variation | bias: chi-squared | seconds |\n"
    "|---|---|---|---|---|---|---|---|"
)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--graphs", nargs="+", choices=GRAPHS, default=list(GRAPHS))
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--draws", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=25_000, help="draws at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a file of tests/benchmarks/results")
    arguments = parser.parse_args(argv)
    lines = Lines()

    lines.say(HEADER)
    for name, sampler in CASES:
        if name in arguments.graphs and sampler in arguments.samplers:
            lines.say(measure(name, sampler, arguments))
    write_table("Samplers' law", "tests.benchmarks.sampler_law", argv, arguments.output, lines)


def measure(name: str, sampler: str, arguments: argparse.Namespace) -> str:
    """A line of the table."""
    graph, truth = GRAPHS[name], law_of_states(GRAPHS[name])
    law = exact_law(graph, SCHEDULES[name], sampler, arguments.steps)
    possible = truth > 0
    growth = arguments.draws * ((law - truth)[possible] ** 2 / truth[possible]).sum().item()
    begin = time.perf_counter()
    samples = draw(name, sampler, arguments)
    seconds = time.perf_counter() - begin
    return (
        f"| {sampler} | {name} | {arguments.steps} | {len(samples)} | {p_value_of(samples, truth, graph):.3f} "
        f"| {total_variation(law, truth):.1e} | {growth:.2f} | {seconds:.0f} |"
    )


def draw(name: str, sampler: str, arguments: argparse.Namespace) -> Tensor:
    """[draws, LENGTH] int64. Copies of the toy stand side by side where all sequences make the same steps."""
    graph = GRAPHS[name]
    # Numbers of its own for each case: some samplers have one law here, and would draw the same samples again.
    draws = VectorDraws(arguments.seed + CASES.index((name, sampler)))
    settings = SamplingSettings(sampler, arguments.steps)
    times = sampling_times(settings.time_grid, settings.num_steps, settings.time_eps)
    score_fn = TableScores(ExactScores(graph), times, SCHEDULES[name])
    samples = []
    for start in range(0, arguments.draws, arguments.batch):
        count = min(arguments.batch, arguments.draws - start)
        shape = (count, LENGTH) if SAMPLERS[sampler].draws_jumps_first else (1, count * LENGTH)
        nothing, draws.num_rows = torch.zeros(shape, dtype=torch.long), shape[0]
        result = run_sampler(score_fn, graph, SCHEDULES[name], settings, draws, nothing, nothing.bool())
        samples.append(result.states.view(-1, LENGTH))
    return torch.cat(samples)


class VectorDraws:
    """In place of sampling.Draws: numbers of one torch generator, new ones at every call."""

    device = "cpu"

    def __init__(self, seed: int) -> None:
        self.generator, self.num_rows = torch.Generator().manual_seed(seed), 0

    def on(self, device: torch.device) -> "VectorDraws":
        return self

    def at(self, stream: Stream, steps: int, length: int) -> Tensor:
        return torch.rand(self.num_rows, length, dtype=torch.float64, generator=self.generator)

    def at_each(self, stream: Stream, steps: Tensor) -> Tensor:
        return torch.rand(steps.shape, dtype=torch.float64, generator=self.generator)


class TableScores:
    """A ScoreFn of copies of the toy that looks up the rows asked for, and no others."""

    def __init__(self, scores: ExactScores, times: Tensor, schedule) -> None:
        self.scores = scores
        scores.rows_of(schedule(times).sigma.float())
        self._make_rows()

    def __call__(self, x_t: Tensor, sigma: Tensor, asked: Asked, *laws: ChunkLaw | None) -> Tensor:
        level = self.scores.rows_of(sigma)
        if len(self.scores.levels) != self.num_levels:
            self._make_rows()
        states = self.scores.tables.shape[1]
        row = level[:, None] * states + state_number(x_t.view(len(x_t), -1, LENGTH), self.scores.graph)
        rows = row.flatten()[asked.index // LENGTH] * LENGTH + asked.index % LENGTH
        return answers(lambda part: Scores(self.rows[rows[part]]), torch.empty_like(rows), len(rows), *laws)

    def _make_rows(self) -> None:
        self.num_levels = len(self.scores.levels)
        own = all_states(self.scores.graph)[None, ..., None].expand(self.num_levels, -1, -1, -1)
        self.rows = self.scores.tables.exp().scatter(-1, own, 0.0)[..., :TOKENS].flatten(0, 2).float()


if __name__ == "__main__":
    main(sys.argv[1:])
