"""How many bit flips in one rank's gradients are found, and named by their rank; and of those in its parameters.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bit_flips [--flips 400] [--output FILE]

Each layout trains a tiny model on gloo ranks, and in every second step a random exponent bit (or the sign) of a random
element of a random parameter's gradient flips on a random rank, before the reduction. Whether a flip matters is judged
from metrics.jsonl alone. Then random bits of all kinds flip in what the ranks keep, one at a time, and replicas are
compared. Last, what the guard costs a step of the tiny preset where nothing is wrong.
"""

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sedd_megatron.arguments import parse_pretrain_options, weighted_corpora
from sedd_megatron.data.corpus import write_corpus
from sedd_megatron.data.tokenizers import ByteTokenizer
from sedd_megatron.data.windows import open_windows
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import groups_of_this_process
from tests.benchmarks.pairs import Lines, write_table
from tests.distributed.bit_flips import Flip
from tests.distributed.launch import REPOSITORY, launch
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
KEPT_LAYOUTS = ("TP2 x DP2", "VPP2 x DP2 distributed optimizer")
TINY = REPOSITORY / "examples" / "configs" / "tiny.yaml"
SMALL = "--hidden-size 16 --cond-dim 8 --seq-length 8 --hidden-dropout 0".split()


@dataclass
class Counts:
    """Flips of one layout."""

    flips: int = 0
    bad: int = 0  # steps that are not finite or a spike
    found: int = 0
    named: int = 0  # that rank, and no other
    own_spikes: int = 0  # steps without a flip that are one, by the data or the model
    false_alarms: int = 0  # of those steps, put down to hardware
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
            is_blamed = "which is hardware" in record["skipped"]
            counts.false_alarms += flip is None and is_blamed
            counts.own_spikes += flip is None and not is_blamed
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
    parser.add_argument("--kept", type=int, default=100, help="flips in what is kept, in each of two layouts")
    parser.add_argument("--pairs", type=int, default=15, help="of steps with and without the guard; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    lines, total = Lines(), Counts()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        corpus = root / "bytes_text_document"
        text = Path(__file__).read_text(encoding="utf-8") * 20
        write_corpus(iter([text]), ByteTokenizer(), root / "bytes", append_eod=False)
        lines.say("| layout | flips | bad steps | found | named | false alarms | spikes of the model |")
        lines.say("|---|---|---|---|---|---|---|")
        for number, (name, (num_ranks, flags)) in enumerate(LAYOUTS.items()):
            flips = draw_flips(arguments.flips // len(LAYOUTS), num_ranks, arguments.seed + number)
            found = train_with(flips, num_ranks, flags, corpus, root / str(number))
            lines.say(_row(name, found))
            for what in ("flips", "bad", "found", "named", "false_alarms", "own_spikes"):
                setattr(total, what, getattr(total, what) + getattr(found, what))
            total.kinds += found.kinds
        lines.say(_row("together", total))
        lines.say("")
        _say_verdict(lines, total)
        if arguments.kept:
            lines.say("")
            for name in KEPT_LAYOUTS:
                lines.say(_kept_line(name, arguments.kept, corpus, root))
        if arguments.pairs:
            lines.say("")
            lines.say(_cost(arguments.pairs, corpus))
    write_table("Bit flips", "tests.benchmarks.bit_flips", argv, arguments.output, lines)


def _say_verdict(lines: Lines, total: Counts) -> None:
    bits = ", ".join(f"bit {bit}: {number}" for bit, number in sorted(total.kinds.items(), reverse=True))
    lines.say(f"Goal: {GOAL}. Found and named: {total.named} of {total.bad} ({bits}).")
    lines.say(
        f"The other {total.flips - total.bad} made no number larger than --spike-factor {SPIKE_FACTOR:g} times the "
        "usual one (a bit that was set, a sign, an element near 0): such a step is taken, as nobody can tell it by its "
        "size. Where it makes ranks differ that hold the same, --check-replicas-interval finds it."
    )


def _kept_line(name: str, flips: int, corpus: Path, root: Path) -> str:
    num_ranks, flags = LAYOUTS[name]
    output = root / "kept.json"
    arguments = [*MODEL, *SMALL, *flags, "--data-path", str(corpus), "--check-replicas-interval", "1"]
    launch("run_replicas.py", num_ranks, [(arguments, flips, str(output))], timeout=3000)
    found = json.loads(output.read_text())
    shared = [flip for flip in found if flip["holders"] > 1]
    named = [flip for flip in shared if flip["message"] and f"rank {flip['rank']} on" in flip["message"]]
    false_alarms = sum(flip["message"] is not None for flip in found) - len(named)
    return (
        f"Any bit of weights, moments and average, {name}: {len(found)} flips, {len(shared)} of them in what another "
        f"rank holds too. Found by --check-replicas-interval and named, of two that differ both: {len(named)} of "
        f"{len(shared)}; false alarms: {false_alarms}."
    )


def _cost(pairs: int, corpus: Path) -> str:
    """CPU time of a step with the guard over one without, in turns."""
    cpu_backend.install()
    from sedd_megatron.training.build import build_run
    from sedd_megatron.training.iterators import training_iterators
    from sedd_megatron.training.step import train_step
    from sedd_megatron.training.step_guard import StepGuard

    options = parse_pretrain_options(["--config", str(TINY), "--data-path", str(corpus), "--device", "cpu"])
    groups, steps = groups_of_this_process(options.parallel), []
    windows = open_windows(weighted_corpora(options.data), seq_length=options.model.seq_length, split="1,0,0",
                           num_tokens=256, seed=0)  # fmt: skip
    for is_guarded in (True, False):
        run = build_run(options, ByteTokenizer(), groups)
        run.guard = StepGuard(run, windows.train) if is_guarded else None
        steps.append(partial(train_step, run, training_iterators(run, windows.train)))
    ratios, seconds = [], []
    for step in steps:
        step()
    for _ in range(pairs):
        guarded, plain = (_cpu_seconds(step) for step in steps)
        ratios.append(guarded / plain)
        seconds.append(plain)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return (
        f"A good step of the tiny preset takes {middle:.4f} times the CPU time that it takes without the guard (median "
        f"of {pairs} pairs in turns, quartiles {low:.4f} and {high:.4f}; {statistics.median(seconds):.2f} s a step; "
        "goal below 1.01)."
    )


def _cpu_seconds(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def _row(name: str, counts: Counts) -> str:
    bad = f"{counts.bad} | {counts.found} | {counts.named}"
    return f"| {name} | {counts.flips} | {bad} | {counts.false_alarms} | {counts.own_spikes} |"


if __name__ == "__main__":
    main(sys.argv[1:])
