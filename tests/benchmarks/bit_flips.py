"""How many bit flips in one rank's gradients are found, and named by their rank; and of those in its parameters.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bit_flips [--flips 400] [--output FILE]

Each layout trains a tiny model on gloo ranks, and in every second step a random exponent bit (or the sign) of a random
element of a random parameter's gradient flips on a random rank, before the reduction. Whether a flip matters is judged
from metrics.jsonl alone. Then one random bit of any kind flips in a parameter between two steps.
"""

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sedd_megatron.data.corpus import write_corpus
from sedd_megatron.data.tokenizers import ByteTokenizer
from tests.benchmarks.pairs import Lines, write_table
from tests.distributed.bit_flips import Flip
from tests.distributed.launch import launch
from tests.distributed.layouts import CP2, DIST_OPT, MODEL, OVERLAP, PP2, SP, TP2, VPP

GOAL = "100 of 100"
SPIKE_FACTOR = 8.0
# The first flip comes when there is a median; between two of them one step is whole.
FIRST, APART = 12, 2
LAYOUTS = {
    "DP2": (2, []),
    "DP2 distributed optimizer, overlap": (2, [*DIST_OPT, *OVERLAP]),
    "TP2": (2, TP2),
    "TP2 sequence parallel": (2, [*TP2, *SP]),
    "PP2": (2, PP2),
    "CP2": (2, CP2),
    "VPP2 x DP2 distributed optimizer": (4, [*PP2, *VPP, *DIST_OPT]),
    "TP2 x DP2": (4, TP2),
}
SMALL = "--hidden-size 16 --cond-dim 8 --seq-length 8 --hidden-dropout 0".split()


@dataclass
class Counts:
    """Flips of one layout."""

    flips: int = 0
    bad: int = 0  # steps that are not finite or a spike
    found: int = 0
    named: int = 0  # that rank, and no other
    false_alarms: int = 0  # steps without a flip that were skipped
    kinds: Counter[int] = field(default_factory=Counter)  # of the bad, by bit


def draw_flips(count: int, num_ranks: int, seed: int) -> list[Flip]:
    """Flips at random places, `APART` steps from each other."""
    draws = random.Random(seed)
    # The two highest bits of the exponent, and the lower ones and the sign, half of the time each: few of the latter
    # make a number that anybody sees.
    return [
        Flip(FIRST + APART * number, draws.randrange(num_ranks), draws.random(), draws.random(),
             draws.choice([30, draws.randrange(23, 32)]))
        for number in range(count)
    ]  # fmt: skip


def train_with(flips: Sequence[Flip], num_ranks: int, flags: Sequence[str], corpus: Path, folder: Path) -> Counts:
    """Train through these flips, and count what became of them."""
    steps = flips[-1].iteration + 1
    arguments = [*MODEL, *SMALL, *flags, "--data-path", str(corpus), "--save", str(folder), "--train-iters", str(steps),
                 "--eval-interval", "0", "--log-interval", "100000", "--lr", "1e-4",
                 "--spike-factor", str(SPIKE_FACTOR), "--max-skipped-steps", str(steps)]  # fmt: skip
    launch("run_bit_flips.py", num_ranks, [(arguments, flips)], timeout=3000)
    return count(flips, folder)


def count(flips: Sequence[Flip], folder: Path) -> Counts:
    """What became of a run's flips, by its files."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    by_iteration = {flip.iteration: flip for flip in flips}
    counts, norms = Counts(flips=len(flips)), []
    for record in records:
        flip, is_skipped = by_iteration.get(record["iteration"]), "skipped" in record
        if is_skipped:
            counts.false_alarms += flip is None
        else:
            # A step that was taken: had it to be?
            norm = math.inf if record["grad_norm"] is None else record["grad_norm"]
            is_bad = len(norms) >= 8 and norm > SPIKE_FACTOR * statistics.median(norms[-32:])
            counts.bad += is_bad
            norms.append(norm)
        if is_skipped and flip is not None:
            counts.bad += 1
            counts.found += 1
            counts.named += named_ranks(folder, record["iteration"]) == [flip.rank]
            counts.kinds[flip.bit] += 1
    return counts


def named_ranks(folder: Path, iteration: int) -> list[int]:
    """The ranks whose two passes differ, by the record of a skipped step."""
    record = json.loads((folder / "skipped_steps" / f"iter_{iteration:07d}.json").read_text())
    differing = [rank["rank"] for rank in record["ranks"] if rank["first"] != rank["replayed"]]
    # What people are told has to be the same.
    assert all(f"rank {rank} on " in record["cause"] for rank in differing)
    return differing


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=400, help="in all layouts together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    lines, total = Lines(), Counts()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        corpus = root / "bytes_text_document"
        text = Path(__file__).read_text(encoding="utf-8") * 20
        write_corpus(iter([text]), ByteTokenizer(), root / "bytes", append_eod=False)
        lines.say("| layout | flips | bad steps | found | named | false alarms |")
        lines.say("|---|---|---|---|---|---|")
        for number, (name, (num_ranks, flags)) in enumerate(LAYOUTS.items()):
            flips = draw_flips(arguments.flips // len(LAYOUTS), num_ranks, arguments.seed + number)
            found = train_with(flips, num_ranks, flags, corpus, root / str(number))
            lines.say(_row(name, found))
            for what in ("flips", "bad", "found", "named", "false_alarms"):
                setattr(total, what, getattr(total, what) + getattr(found, what))
            total.kinds += found.kinds
    lines.say(_row("together", total))
    lines.say("")
    bits = ", ".join(f"bit {bit}: {number}" for bit, number in sorted(total.kinds.items(), reverse=True))
    lines.say(f"Goal: {GOAL}. Found and named: {total.named} of {total.bad} ({bits}).")
    lines.say(
        f"The other {total.flips - total.bad} made no number larger than --spike-factor {SPIKE_FACTOR:g} times the "
        "usual one (a bit that was set, a sign, an element near 0): such a step is taken, as nobody can tell it by its "
        "size. Replicas stay equal after it."
    )
    write_table("Bit flips in gradients", "tests.benchmarks.bit_flips", argv, arguments.output, lines)


def _row(name: str, counts: Counts) -> str:
    return f"| {name} | {counts.flips} | {counts.bad} | {counts.found} | {counts.named} | {counts.false_alarms} |"


if __name__ == "__main__":
    main(sys.argv[1:])
