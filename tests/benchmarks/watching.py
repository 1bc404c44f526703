"""What watching a step costs: python -m tests.benchmarks.watching --baseline FOLDER

FOLDER is a checkout of the version to compare with, as one from before a step told more than its loss and was judged.
Each version trains the tiny preset in a process of its own, on the same batches, one step of one and then one of the
other in turns; a step is what the training loop does: the step itself, judged by the run's guard where the version has
one, and its line of metrics.jsonl. Times are of the process's processor, which other processes of the machine change
least.
"""

import argparse
import contextlib
import inspect
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

GOAL = 0.01
REPOSITORY = Path(__file__).resolve().parents[2]
WAYS = {
    "tiny": [],
    "tiny, uniform": ["--graph", "uniform"],
    "tiny, dense": ["--loss-chunk-rows", "0"],
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, required=True, help="checkout of the version to compare with")
    parser.add_argument("--steps", type=int, default=60, help="of each version")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--output", type=Path, help="a file of tests/benchmarks/results")
    arguments = parser.parse_args(argv)
    # Not at the top: a stepper has no use for it, and an old version may lack it.
    from tests.benchmarks.pairs import Lines, write_table

    lines = Lines()
    lines.say("| step | milliseconds | baseline | overhead, median of pairs | of the fastest quarters | goal |")
    lines.say("|---|---|---|---|---|---|")
    for way in arguments.ways:
        ours, theirs = times_in_turns(arguments.baseline.resolve(), WAYS[way], arguments.steps)
        paired = statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) - 1
        fast, fast_baseline = (statistics.mean(sorted(times)[: len(times) // 4 or 1]) for times in (ours, theirs))
        numbers = f"{fast * 1e3:.1f} | {fast_baseline * 1e3:.1f} | {paired:+.2%} | {fast / fast_baseline - 1:+.2%}"
        lines.say(f"| {way} | {numbers} | below {GOAL:.0%} |")
    write_table("What watching a step costs", "tests.benchmarks.watching", argv, arguments.output, lines)


def times_in_turns(baseline: Path, flags: list[str], steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each step here and in the baseline, after three that are not counted."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        corpus = f"{folder}/README_text_document"
        command = [sys.executable, "-m", "sedd_megatron.prepare_data", "--input", str(REPOSITORY / "README.md"),
                   "--output-prefix", f"{folder}/README", "--tokenizer-type", "ByteTokenizer"]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, env=environment(REPOSITORY))
        steppers = [stack.enter_context(stepper(root, [corpus, *flags])) for root in (REPOSITORY, baseline)]
        times: tuple[list[float], list[float]] = ([], [])
        for number in range(-3, steps):
            # Each goes first in turn.
            for which in (0, 1) if number % 2 else (1, 0):
                steppers[which].stdin.write("step\n")
                steppers[which].stdin.flush()
                seconds = float(steppers[which].stdout.readline())
                if number >= 0:
                    times[which].append(seconds)
    return times


@contextlib.contextmanager
def stepper(root: Path, arguments: list[str]) -> Iterator[subprocess.Popen]:
    """A process that takes a step of that version for each line of its input, and answers with its seconds."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), *arguments]
    process = subprocess.Popen(
        command, env=environment(root), cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait()


def environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}


def take_steps(corpus: str, *flags: str) -> None:
    """What a stepper's process does."""
    from sedd_megatron.arguments import parse_pretrain_options, weighted_corpora
    from sedd_megatron.data.tokenizers import ByteTokenizer
    from sedd_megatron.data.windows import open_windows
    from sedd_megatron.parallel import cpu_backend

    cpu_backend.install()
    from sedd_megatron.parallel.groups import groups_of_this_process
    from sedd_megatron.training.build import build_run
    from sedd_megatron.training.iterators import training_iterators
    from sedd_megatron.training.metrics import MetricsWriter
    from sedd_megatron.training.metrics_file import MetricsFile
    from sedd_megatron.training.step import train_step

    preset = str(REPOSITORY / "examples" / "configs" / "tiny.yaml")
    options = parse_pretrain_options(["--config", preset, "--data-path", corpus, "--device", "cpu", *flags])
    run = build_run(options, ByteTokenizer(), groups_of_this_process(options.parallel))
    windows = open_windows(
        weighted_corpora(options.data), seq_length=options.model.seq_length, split="1,0,0", num_tokens=256, seed=0
    )
    with contextlib.suppress(ModuleNotFoundError):
        from sedd_megatron.training.step_guard import StepGuard

        run.guard = StepGuard(run, windows.train)
    batches = training_iterators(run, windows.train)
    answers, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory() as folder:
        writer = MetricsWriter(options.logging, MetricsFile(Path(folder) / "metrics.jsonl", None), 10**6)
        # Of this step and, in a later version, of those that are left.
        num_tokens = options.training.global_batch_size * options.model.seq_length
        counts = [num_tokens] * (len(inspect.signature(writer.train_step).parameters) - 1)
        for _ in sys.stdin:
            start = time.process_time()
            metrics, _ = train_step(run, batches, [0, 0, 0])
            writer.train_step(metrics, *counts)
            print(time.process_time() - start, file=answers, flush=True)


if __name__ == "__main__":
    # A stepper is this file started by its path, where the package of either version may be the one that is found.
    if __spec__ is None:
        take_steps(*sys.argv[1:])
    else:
        main(sys.argv[1:])
