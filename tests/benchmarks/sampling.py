"""Sampling against the published Euler sampler: python -m tests.benchmarks.sampling

Both sample from one model with the same weights, in turns in one process: ours whole samples, the opponent some steps
of one, for its steps cost the same from beginning to end. The head's bias is shifted so that scores have their true
sum, as a trained network's have: with any other a sampler that reads the sum would unmask too early or too late.

Cases with a precision of their own are timed without the opponent, whose samples would take minutes there. The goal
for medium-long (SEDD-medium, event-driven) on an H100 is 1.5 s a sample:

    python -m tests.benchmarks.sampling --cases medium-long --samplers event-driven --pairs 1 [--cuda-graph]
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_megatron.diffusion import SAMPLERS, LogLinearSchedule, TokenChoice, make_graph
from sedd_megatron.diffusion.sampling import Draws, SamplingResult, SamplingSettings, run_sampler
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import parallel_groups
from tests.benchmarks.pairs import Lines, seconds_of, write_table
from tests.benchmarks.published_sampling import published_euler_step
from tests.benchmarks.train import Case, build_published, options_of


class SamplingCase(NamedTuple):
    """A model, in how many steps it samples, and flags of precision, with which it has no opponent."""

    shape: Case
    num_steps: int
    flags: str = ""


CASES = {
    "tiny": SamplingCase(Case(2, 64, 4, 2, 32, 300), 8),
    "tiny-bf16": SamplingCase(Case(2, 64, 4, 2, 32, 300), 8, "--bf16"),
    "narrow": SamplingCase(Case(4, 256, 4, 1, 256, 50257), 128),
    "narrow-batch": SamplingCase(Case(4, 256, 4, 4, 256, 50257), 128),
    "small": SamplingCase(Case(12, 768, 12, 1, 256, 50257), 128),
    "long": SamplingCase(Case(4, 256, 4, 1, 1024, 50257), 1024),
    "medium-long": SamplingCase(Case(24, 1024, 16, 16, 1024, 50257), 1024, "--bf16"),
}
HEADER = (
    "| case | layers x width, V, B x S, steps | sampler | ms per step | published Euler | faster | network calls "
    "per sample | exact draws over torch.multinomial, of a step | seconds per sample |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


class TimedChoice:
    """A way to draw tokens, and the seconds that went into it."""

    def __init__(self, choose: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.choose, self.seconds = choose, 0.0

    def __call__(self, weights: Tensor, uniform: Tensor) -> Tensor:
        tokens = []
        self.seconds += seconds_of(lambda: tokens.append(self.choose(weights, uniform)))
        return tokens[0]


def multinomial(weights: Tensor, uniform: Tensor) -> Tensor:
    """What exact draws are compared with: torch's own, in float32."""
    if len(weights) == 0:
        return torch.empty(0, dtype=torch.long, device=weights.device)
    return torch.multinomial(weights.float(), 1)[:, 0]


class Bench:
    """One case: both models, or ours alone, and their samplers."""

    def __init__(self, sampling_case: SamplingCase, groups) -> None:
        from sedd_megatron.model.score_network import ScoreNetwork
        from sedd_megatron.training.build import build_model

        torch.manual_seed(0)
        case, self.num_steps, flags = sampling_case
        options = options_of(case, flags)
        self.case, self.schedule = case, LogLinearSchedule()
        self.graph = make_graph(case.graph, case.num_tokens)
        (model,) = build_model(
            options.model, options.parallel, options.precision, options.recompute, self.graph, groups
        )
        run = SimpleNamespace(graph=self.graph, groups=groups, model_chunks=[model])
        if flags:
            self.published = None
            for parameter in model.parameters():
                parameter.data.normal_(0, 0.02)
        else:
            self.published = build_published(case, run).eval()
        self._give_scores_their_true_sum(model.eval())
        self.score_fn, self.device = ScoreNetwork(model, groups), groups.device

    def ours(self, sampler: str, choose: Callable[[Tensor, Tensor], Tensor]) -> SamplingResult:
        """A whole batch of samples."""
        settings = SamplingSettings(sampler, self.num_steps, denoise=False, choose=choose)
        batch, length = self.case.batch, self.case.length
        tokens = torch.zeros(batch, length, dtype=torch.long, device=self.device)
        draws = Draws([0] * batch, range(batch))
        return run_sampler(self.score_fn, self.graph, self.schedule, settings, draws, tokens, tokens.bool())

    @torch.no_grad()
    def theirs(self, steps: int) -> None:
        """Some steps of a batch, from the middle of a sample."""
        x = torch.full((self.case.batch, self.case.length), self.case.num_tokens, device=self.device)
        x[:, ::2] = 0
        for _ in range(steps):
            x = published_euler_step(self.published, self.schedule, x, 0.5, 1 / self.num_steps)

    @torch.no_grad()
    def _give_scores_their_true_sum(self, model) -> None:
        """On average over positions: the sum over tokens of exp(log_score) is 1 / expm1(sigma)."""
        x = torch.full((1, self.case.length), self.case.num_tokens, device=model.head.linear.weight.device)
        sigma = self.schedule(torch.full((1,), 0.5, device=x.device)).sigma
        sums = model.log_score(x, sigma)[..., :-1].logsumexp(-1) + torch.expm1(sigma).log()
        if self.published is not None:
            self.published.output_layer["linear"].bias -= sums.mean()
        model.head.linear.bias -= sums.mean()


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["narrow", "narrow-batch", "small"])
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=["euler", "event-driven"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--published-steps", type=int, default=8, help="the opponent's steps in each pair")
    parser.add_argument("--cuda-graph", action="store_true", help="as the flag of generate")
    parser.add_argument("--output", type=Path, help="a file of tests/benchmarks/results")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        cpu_backend.install()
    lines = Lines()
    lines.say(HEADER)
    for name in arguments.cases:
        case, num_steps, _ = CASES[name]
        with parallel_groups(options_of(case, "").parallel) as groups:
            bench = Bench(CASES[name], groups)
            if arguments.cuda_graph:
                bench.score_fn.capture()
            for sampler in arguments.samplers:
                size = f"{case.layers} x {case.width}, {case.num_tokens}, {case.batch} x {case.length}, {num_steps}"
                lines.say(f"| {name} | {size} | {sampler} | {row_of(bench, sampler, arguments)} |")
    write_table("Sampling", "tests.benchmarks.sampling", argv, arguments.output, lines)


def row_of(bench: Bench, sampler: str, arguments: argparse.Namespace) -> str:
    """Medians over the pairs."""
    steps, results = arguments.published_steps, []
    bench.ours(sampler, TokenChoice())
    if bench.published is not None:
        bench.theirs(1)
    ours_times, theirs_times = [], []
    for _ in range(arguments.pairs):
        # Without a timer of the draws, which would wait for each of them.
        ours_times.append(seconds_of(lambda: results.append(bench.ours(sampler, TokenChoice()))))
        if bench.published is not None:
            theirs_times.append(seconds_of(lambda: bench.theirs(steps)) / steps * bench.num_steps)
    ours = statistics.median(ours_times)
    calls = statistics.mean(itertools.chain.from_iterable(result.calls.tolist() for result in results))
    published, faster, draws = "", "", ""
    if theirs_times:
        published = f"{statistics.median(theirs_times) / bench.num_steps * 1e3:.1f}"
        faster = f"{statistics.median(b / a for a, b in zip(ours_times, theirs_times, strict=True)):.1f}x"
        draws = f"{draws_of(bench, sampler) / ours * 100:+.2f} %"
    return (
        f"{ours / bench.num_steps * 1e3:.1f} | {published} | {faster} | {calls:.1f} of {bench.num_steps} | "
        f"{draws} | {ours / bench.case.batch:.2f}"
    )


def draws_of(bench: Bench, sampler: str) -> float:
    """Seconds of a whole batch that exact draws take more than torch's.

    Not compared by whole runs: they differ by more than the draws do, and other draws make other samples.
    """
    exact, float32 = TimedChoice(TokenChoice()), TimedChoice(multinomial)
    for choice in (exact, float32):
        bench.ours(sampler, choice)
    return exact.seconds - float32.seconds


if __name__ == "__main__":
    main(sys.argv[1:])
