"""What uniform numbers by key cost: python -m tests.benchmarks.draws

1,000 rows of one block, four numbers, beside the goal; then, on a CPU, both ways to make rows of more numbers: one by
one by numpy's generator, or all at once by the vectorised one. Which of them philox_uniforms takes is marked.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sedd_megatron.diffusion import draws
from sedd_megatron.diffusion.draws import Stream, philox_generator, philox_uniforms
from tests.benchmarks.pairs import Lines, seconds_of, write_table

GOAL = 0.2  # milliseconds
ROWS, COUNTS = (16, 64, 256, 1000, 4000), (4, 16, 32, 64, 256)
# The least blocks that go row by row, and the fewest rows that do not.
ONE_BY_ONE, AT_ONCE = (0, 0), (10**9, 0)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repeats", type=int, default=1000, help="of the 1,000 rows; of the others as many as take a second"
    )
    parser.add_argument("--output", type=Path, help="a file of tests/benchmarks/results")
    arguments = parser.parse_args(argv)
    lines = Lines()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines.say("| 1,000 rows of 4 numbers | ms, median | ms, best tenth | goal |\n|---|---|---|---|")
    index = torch.arange(1000, device=device)
    ours = milliseconds(lambda: philox_uniforms(7, Stream.SAMPLING, index, 4, 1, device=device), arguments.repeats)
    lines.say(f"| philox_uniforms, {device} | {statistics.median(ours):.3f} | {best_tenth(ours):.3f} | {GOAL} |")
    theirs = milliseconds(one_generator_a_row, max(arguments.repeats // 50, 1))
    lines.say(f"| a generator for each row | {statistics.median(theirs):.3f} | {best_tenth(theirs):.3f} | |")
    lines.say("\nMilliseconds on a CPU, one by one / all at once; in bold what is taken.\n")
    lines.say(f"| rows | {' | '.join(f'{count} numbers' for count in COUNTS)} |\n|---{'|---' * len(COUNTS)}|")
    for rows in ROWS:
        lines.say(f"| {rows} | {' | '.join(cell(rows, count, arguments.repeats) for count in COUNTS)} |")
    write_table("Draws", "tests.benchmarks.draws", argv, arguments.output, lines)


def cell(rows: int, count: int, repeats: int) -> str:
    blocks = -(-count // draws.BLOCK)
    taken = blocks > draws.MOST_BLOCKS_AT_ONCE or rows < draws.FEWEST_ROWS_AT_ONCE
    times = [of_route(route, rows, count, repeats) for route in (ONE_BY_ONE, AT_ONCE)]
    one_by_one, at_once = (
        f"**{ms:.2f}**" if bold else f"{ms:.2f}" for ms, bold in zip(times, (taken, not taken), strict=True)
    )
    return f"{one_by_one} / {at_once}"


def of_route(route: tuple[int, int], rows: int, count: int, repeats: int) -> float:
    """Milliseconds with the choice between the routes set aside."""
    choice, index = (draws.MOST_BLOCKS_AT_ONCE, draws.FEWEST_ROWS_AT_ONCE), torch.arange(rows)
    draws.MOST_BLOCKS_AT_ONCE, draws.FEWEST_ROWS_AT_ONCE = route
    try:
        begin, times = time.perf_counter(), []
        while len(times) < repeats and time.perf_counter() - begin < 1:
            times += milliseconds(lambda: philox_uniforms(7, Stream.SAMPLING, index, count, 1), 1)
    finally:
        draws.MOST_BLOCKS_AT_ONCE, draws.FEWEST_ROWS_AT_ONCE = choice
    return best_tenth(times)


def one_generator_a_row() -> None:
    for index in range(1000):
        philox_generator(7, Stream.SAMPLING, index, 1).random(4)


def milliseconds(function: Callable[[], object], repeats: int) -> list[float]:
    """One call that is not counted, and `repeats` that are."""
    function()
    return [seconds_of(function) * 1e3 for _ in range(repeats)]


def best_tenth(times: Sequence[float]) -> float:
    """What a tenth of the calls took at most: other work on the machine makes the rest longer."""
    return sorted(times)[len(times) // 10]


if __name__ == "__main__":
    main(sys.argv[1:])
