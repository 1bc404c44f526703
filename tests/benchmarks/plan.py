"""The planner's estimates: memory against what gloo ranks allocate, time against published speeds:
python -m tests.benchmarks.plan

Memory: bytes of tensors of training runs on a CPU, weights, gradients, optimizer and moving average after a step by
their storages, and the most that a step allocates beside them, counted at the allocator. Time: Megatron-LM's published
tables (tests/benchmarks/published_gpt.py), whose causal GPTs are put through the planner's time model.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sedd_megatron.config import GROUPS, ConfigFile, PretrainOptions
from sedd_megatron.diffusion import LogLinearSchedule, make_graph
from sedd_megatron.layout_rules import data_parallel_size_of
from sedd_megatron.options import parse_options
from sedd_megatron.planning.memory import RankMemory, parameters_of_rank, rank_memory
from sedd_megatron.training.estimates import fraction_of_head_rows
from tests.benchmarks.goals import PLAN_MEMORY_ERROR, PLAN_TIME_ERROR
from tests.benchmarks.pairs import Lines, write_table
from tests.benchmarks.published_gpt import AMPERE, HOPPER, estimated_tflops
from tests.distributed.launch import launch
from tests.distributed.layouts import CP2, DIST_OPT, FULL_BLOCK, OVERLAP_GRAD, PP2, SP, TP2, VPP

NUM_TOKENS = 1000
# As much in activations as in weights and what belongs to them.
MODEL = (
    "--data-path random --num-layers 4 --hidden-size 128 --num-attention-heads 4 --cond-dim 32 --seq-length 128 "
    "--hidden-dropout 0 --make-vocab-size-divisible-by 8 --micro-batch-size 4 --global-batch-size 16 "
    "--lr-warmup-iters 1 --device cpu"
).split()
BF16 = ["--bf16"]
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
SELECTIVE = "--recompute-granularity selective --recompute-modules layernorm mlp".split()
OVERLAP = [*DIST_OPT, *OVERLAP_GRAD, "--overlap-param-gather"]
CASES = {
    "one": (1, []),
    "bf16": (1, BF16),
    "uniform-bf16": (1, [*BF16, "--graph", "uniform"]),
    "full": (1, FULL),
    "block": (1, FULL_BLOCK),
    "selective-bf16": (1, [*BF16, *SELECTIVE]),
    "width-256-bf16": (1, [*BF16, "--hidden-size", "256"]),
    "TP2": (2, TP2),
    "SP2": (2, [*TP2, *SP]),
    "SP2-bf16": (2, [*TP2, *SP, *BF16]),
    "PP2": (2, PP2),
    "VPP2": (2, [*PP2, *VPP]),
    "PP2-full-bf16": (2, [*PP2, *FULL, *BF16]),
    "CP2": (2, CP2),
    "DP2": (2, []),
    "DP2-dist-opt": (2, DIST_OPT),
    "DP2-dist-opt-overlap-bf16": (2, [*OVERLAP, *BF16]),
    "SP2-PP2-bf16": (4, [*TP2, *SP, *PP2, *BF16]),
    "SP2-PP2-bf16-uniform": (4, [*TP2, *SP, *PP2, *BF16, "--graph", "uniform"]),
    "PP2-DP2-dist-opt": (4, [*PP2, *DIST_OPT]),
}
MEMORY_HEADER = (
    "| layout | rank | kept, MiB | estimated | in a step, MiB | estimated | both, estimated over measured | within "
    f"{PLAN_MEMORY_ERROR:.0%} |\n|{'---|' * 8}"
)
TIME_HEADER = (
    "| model | GPUs | tensor x pipeline | published TFLOP/s | estimated | time, estimated over published | within "
    f"{PLAN_TIME_ERROR:.0%} |\n|{'---|' * 7}"
)


class RankFound(NamedTuple):
    """One rank of a case: what was measured, and the estimate."""

    name: str
    rank: int
    parameters: tuple[int, int]
    kept: int
    passing: int
    estimate: RankMemory

    @property
    def ratio(self) -> float:
        """Of both together."""
        return self.estimate.total / (self.kept + self.passing)

    @property
    def estimated_passing(self) -> float:
        """What of the estimate is there during a step alone."""
        return self.estimate.activations + self.estimate.head + self.estimate.communication


def main(argv: Sequence[str]) -> int:
    """Exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--output", type=Path, help="a file of tests/benchmarks/results")
    arguments = parser.parse_args(argv)
    lines, missed = Lines(), 0
    lines.say("Of each layout the rank whose estimate is furthest off.\n")
    lines.say(MEMORY_HEADER)
    for _, ranks in itertools.groupby(measured_memory(arguments.cases), key=lambda found: found.name):
        found = max(ranks, key=lambda rank: abs(rank.ratio - 1))
        reached = abs(found.ratio - 1) <= PLAN_MEMORY_ERROR
        missed += not reached
        sizes = (found.kept, found.estimate.total - found.estimated_passing, found.passing, found.estimated_passing)
        cells = [found.name, str(found.rank), *(f"{size / 2**20:.2f}" for size in sizes), f"{found.ratio:.3f}"]
        lines.say(f"| {' | '.join(cells)} | {'yes' if reached else 'no'} |")
    for title, table in (
        ("\nA100, fp16, every layer recomputed, length 2048 (arXiv 2104.04473, table 1).\n", AMPERE),
        ("\nH100, bf16, length 4096 (Megatron-LM's README, images/model_table.png).\n", HOPPER),
    ):
        lines.say(title)
        lines.say(TIME_HEADER)
        for row in table.rows:
            estimate = estimated_tflops(row, table)
            ratio = row.tflops / estimate
            reached = abs(ratio - 1) <= PLAN_TIME_ERROR
            missed += not reached
            lines.say(
                f"| {row.name} | {row.gpus} | {row.tensor} x {row.pipeline} | {row.tflops:g} | {estimate:.1f} | "
                f"{ratio:.3f} | {'yes' if reached else 'no'} |"
            )
    write_table("Plan", "tests.benchmarks.plan", argv, arguments.output, lines)
    return 1 if missed else 0


def measured_memory(names: Sequence[str]) -> list[RankFound]:
    """Every rank of the cases, measured by ranks that train two steps; the cases of one size share a start."""
    with tempfile.TemporaryDirectory() as folder:
        for world_size, group in itertools.groupby(sorted(names, key=_world_size), key=_world_size):
            jobs = [([*MODEL, *CASES[name][1]], NUM_TOKENS, f"{folder}/{name}") for name in group]
            launch("run_plan_memory.py", world_size, jobs)
        return [_found(name, rank, Path(folder)) for name in names for rank in range(_world_size(name))]


def _world_size(name: str) -> int:
    return CASES[name][0]


def _found(name: str, rank: int, folder: Path) -> RankFound:
    found = json.loads((folder / f"{name}-{rank}.json").read_text())
    _, *groups = parse_options((ConfigFile, *GROUPS), [*MODEL, *CASES[name][1]], "plan", "")
    options = PretrainOptions(*groups)
    graph = make_graph(options.diffusion.graph, NUM_TOKENS)
    head_rows = fraction_of_head_rows(graph, LogLinearSchedule(options.diffusion.noise_eps), options.diffusion.time_eps)
    replicas, stage = data_parallel_size_of(options.parallel, _world_size(name)), found["pipeline_rank"]
    return RankFound(
        name,
        rank,
        (found["parameters"], parameters_of_rank(options, graph.num_states, stage).total),
        sum(found[kind] for kind in ("weights", "gradients", "optimizer", "moving average")),
        found["passing"],
        rank_memory(options, graph.num_states, head_rows, replicas, stage, "cpu"),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
