"""Monte Carlo error of the bound by time and by mask count: python -m tests.benchmarks.likelihood --load DIR --data F

Both take the same number of draws of the same windows, of which the last tokens count and the others are given. The
error falls with the root of the number of draws, so that the ratio of the errors' squares says how many times as many
draws by time have the error by mask count.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from sedd_megatron.pretrained import PretrainedModel, load_pretrained
from tests.benchmarks.pairs import Lines, write_table

HEADER = (
    "| tokens that count | nats per token by time | by mask count | error of one window by time | by mask count | "
    "draws by time for that error | seconds, mask count over time |\n|---|---|---|---|---|---|---|"
)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, help="a model of the absorbing graph")
    parser.add_argument("--data", type=Path, required=True, help="a text that it can have something to say about")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 16, 64], help="and the whole window")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--mc-samples", type=int, default=128)
    parser.add_argument("--output", type=Path, help="a file of tests/benchmarks/results")
    arguments = parser.parse_args(argv)
    model = load_pretrained(arguments.load)
    tokens = torch.tensor(model.tokenizer.encode(arguments.data.read_text(encoding="utf-8")), device=model.device)
    x_0 = tokens[: arguments.windows * model.seq_length].view(-1, model.seq_length)
    lines = Lines()
    lines.say(HEADER)
    for count in [*arguments.counts, model.seq_length]:
        lines.say(row(model, x_0, count, arguments.mc_samples))
    write_table("Error of the bound", "tests.benchmarks.likelihood", argv, arguments.output, lines)


def row(model: PretrainedModel, x_0: torch.Tensor, count: int, num_draws: int) -> str:
    given = (torch.arange(x_0.shape[1], device=x_0.device) < x_0.shape[1] - count).expand_as(x_0)
    nats, errors, seconds = {}, {}, {}
    for integration in ("time", "mask-count"):
        estimator = model.bound_estimator(
            seed=0, num_draws=num_draws, time_eps=1e-3, batch_size=64, integrate_over=integration
        )
        begin = time.perf_counter()
        bound = estimator(x_0, given, range(len(x_0)))
        seconds[integration] = time.perf_counter() - begin
        nats[integration] = (bound.total.mean() / count).item()
        errors[integration] = bound.standard_error.square().mean().sqrt().item()
    more = (errors["time"] / errors["mask-count"]) ** 2
    return (
        f"| {count} | {nats['time']:.4f} | {nats['mask-count']:.4f} | {errors['time']:.4f} | "
        f"{errors['mask-count']:.4f} | {more:.1f}x | {seconds['mask-count'] / seconds['time']:.2f} |"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
