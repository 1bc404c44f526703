"""Sampling against the published Euler sampler: python -m tests.benchmarks.sampling

Both sample from one model with the same weights, in turns in one process: ours whole samples, the opponent some steps
of one, for its steps cost the same from beginning to end. The head's bias is shifted so that scores have their true
sum, as a trained network's have: with any other a sampler that reads the sum would unmask too early or too late.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from sedd_megatron.diffusion import SAMPLERS, LogLinearSchedule, TokenChoice, make_graph
from sedd_megatron.diffusion.sampling import Draws, SamplingResult, SamplingSettings, run_sampler
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import parallel_groups
from tests.benchmarks.pairs import Lines, seconds_of, write_table
from tests.benchmarks.published_sampling import published_euler_step
from tests.benchmarks.train import Case, build_published, options_of

CASES = {
    "tiny": (Case(2, 64, 4, 2, 32, 300), 8),
    "narrow": (Case(4, 256, 4, 1, 256, 50257), 128),
    "narrow-batch": (Case(4, 256, 4, 4, 256, 50257), 128),
    "small": (Case(12, 768, 12, 1, 256, 50257), 128),
    "long": (Case(4, 256, 4, 1, 1024, 50257), 1024),
}
HEADER = (
    "| case | layers x width, V, B x S, steps | sampler | ms per step | published Euler | faster | network calls "
    "per sample | exact draws over torch.multinomial, of a step |\n|---|---|---|---|---|---|---|---|"
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
    """One case: both models, and their samplers."""

    def __init__(self, case: Case, num_steps: int, groups) -> None:
        from sedd_megatron.model.score_network import ScoreNetwork
        from sedd_megatron.training.build import build_model

        torch.manual_seed(0)
        options = options_of(case, "")
        self.case, self.num_steps, self.schedule = case, num_steps, LogLinearSchedule()
        self.graph = make_graph(case.graph, case.num_tokens)
        (model,) = build_model(
            options.model, options.parallel, options.precision, options.recompute, self.graph, groups
        )
        run = SimpleNamespace(graph=self.graph, groups=groups, model_chunks=[model])
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
        sums = self.published(x, sigma)[..., :-1].logsumexp(-1) + torch.expm1(sigma).log()
        self.published.output_layer["linear"].bias -= sums.mean()
        model.head.linear.bias -= sums.mean()


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["narrow", "narrow-batch", "small"])
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=["euler", "event-driven"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--published-steps", type=int, default=8, help="the opponent's steps in each pair")
    parser.add_argument("--output", type=Path, help="a file of tests/benchmarks/results")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        cpu_backend.install()
    lines = Lines()
    lines.say(HEADER)
    for name in arguments.cases:
        case, num_steps = CASES[name]
        with parallel_groups(options_of(case, "").parallel) as groups:
            bench = Bench(case, num_steps, groups)
            for sampler in arguments.samplers:
                size = f"{case.layers} x {case.width}, {case.num_tokens}, {case.batch} x {case.length}, {num_steps}"
                lines.say(f"| {name} | {size} | {sampler} | {row_of(bench, sampler, arguments)} |")
    write_table("Sampling", "tests.benchmarks.sampling", argv, arguments.output, lines)


def row_of(bench: Bench, sampler: str, arguments: argparse.Namespace) -> str:
    """Medians over the pairs."""
    steps, results = arguments.published_steps, []
    bench.theirs(1), bench.ours(sampler, TokenChoice())
    times = []
    for _ in range(arguments.pairs):
        exact = TimedChoice(TokenChoice())
        ours = seconds_of(lambda choose=exact: results.append(bench.ours(sampler, choose)))
        theirs = seconds_of(lambda: bench.theirs(steps)) / steps * bench.num_steps
        times.append((ours, theirs, theirs / ours))
    ours, theirs, faster = (statistics.median(column) for column in zip(*times, strict=True))
    # Not compared by whole runs: they differ by more than the draws do, and other draws make other samples.
    float32 = TimedChoice(multinomial)
    bench.ours(sampler, float32)
    overhead = (exact.seconds - float32.seconds) / ours
    calls = statistics.mean(itertools.chain.from_iterable(result.calls.tolist() for result in results))
    return (
        f"{ours / bench.num_steps * 1e3:.1f} | {theirs / bench.num_steps * 1e3:.1f} | {faster:.1f}x | "
        f"{calls:.1f} of {bench.num_steps} | {overhead * 100:+.2f} %"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
