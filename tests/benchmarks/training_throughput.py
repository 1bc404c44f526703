"""Training speed and memory of one device by shape and precision: python -m tests.benchmarks.training_throughput

Optimizer steps of several micro-batches on random tokens, the moving average included: all that training does but
reading files and drawing noise, which loaders do beside it. Useful work is what the mathematics needs
(training/estimates.py); the matrix rate is that of one large product alone, measured in the same process at its start.
Beside it the same shape as a causal GPT of Megatron's own modules, with the same batches, optimizer and moving average.
Each row has a process of its own: no compiled code, memory or state is another row's.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.config import PretrainOptions
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import choose_device, parallel_groups
from tests.benchmarks.goals import GPT_TIME_RATIO, goal_of
from tests.benchmarks.pairs import Lines, seconds_of, write_table
from tests.distributed.launch import REPOSITORY, child_environment

MODULE = "tests.benchmarks.training_throughput"


class Shape(NamedTuple):
    """Sizes of a model and of a micro-batch that fills a device."""

    layers: int
    width: int
    heads: int
    micro_batch: int
    length: int
    num_tokens: int


SHAPES = {
    "tiny": Shape(2, 64, 4, 4, 32, 256),
    "SEDD-small": Shape(12, 768, 12, 64, 1024, 50257),
    "SEDD-medium": Shape(24, 1024, 16, 32, 1024, 50257),
    "1.7B": Shape(32, 2048, 16, 2, 4096, 50257),
    # A quarter of its layers: all of them take 22 bytes a parameter, more than any one device has.
    "7B-slice": Shape(8, 4096, 32, 2, 4096, 50257),
}
FP8 = "--bf16 --fp8-format hybrid --fp8-recipe"
PRECISIONS = {
    "float32": "",
    "bf16": "--bf16",
    "bf16-local": "--bf16 --transformer-impl local",
    "fp8-delayed": f"{FP8} delayed",
    "fp8-tensorwise": f"{FP8} tensorwise",
    "fp8-blockwise": f"{FP8} blockwise",
}
WARM_UP_STEPS = 3
NUM_BATCHES = 8  # micro-batches that go round
COLUMNS = (
    "shape", "precision", "tokens a step", "tokens/s", "TFLOP/s of useful work", "goal", "share of the matrix rate",
    "memory", "GPT tokens/s", f"time per token over the GPT's, at most {GPT_TIME_RATIO}",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def main(argv: Sequence[str]) -> int:
    """Exit code 1 if a row failed for another reason than its memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES][1:])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16", "fp8-delayed"])
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step")
    parser.add_argument(
        "--steps", type=int, default=10, help=f"timed steps, after {WARM_UP_STEPS} or more that are not"
    )
    parser.add_argument("--no-gpt", action="store_true", help="leave the GPT out")
    parser.add_argument("--flags", default="", help="further flags of examples/pretrain_sedd.py, in quotes")
    parser.add_argument("--output", type=Path, help="a file of tests/benchmarks/results")
    parser.add_argument("--only", nargs=2, metavar=("SHAPE", "PRECISION"), help="measure this row in this process")
    arguments = parser.parse_args(argv)
    if arguments.only:
        measure(*arguments.only, arguments)
        return 0
    lines, failures = Lines(), 0
    lines.say(HEADER)
    for shape, precision in itertools.product(arguments.shapes, arguments.precisions):
        found = measured_alone(shape, precision, arguments)
        lines.say(row_of(shape, precision, found))
        failures += "failure" in found
        write_table("Training throughput", MODULE, argv, arguments.output, lines)
    return 1 if failures else 0


def measured_alone(shape: str, precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own finds out about one row, as far as it gets."""
    command = [sys.executable, "-m", MODULE, "--only", shape, precision, "--steps", str(arguments.steps),
               "--micro-batches", str(arguments.micro_batches), f"--flags={arguments.flags}",
               *["--no-gpt"] * arguments.no_gpt]  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, env=child_environment(), stdout=subprocess.PIPE, text=True)
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found if done.returncode == 0 else found | {"failure": f"failed with code {done.returncode}"}


def row_of(shape: str, precision: str, found: dict[str, Any]) -> str:
    """The table's line; what is missing was not measured."""
    failure = found.get("failure", "")
    speed, gpt_speed = found.get("tokens_per_second"), found.get("gpt_tokens_per_second")
    work = speed and speed * found["tflop_per_token"]
    cells = [
        shape,
        precision + found.get("layers", ""),
        f"{found['tokens']:,}" if "tokens" in found else "",
        f"{speed:,.0f}" if speed else found.get("note", failure),
        f"{work:.3g}" if work else "",
        goal_of(f"{shape} {precision}", found.get("device", "")),
        f"{work / found['matrix_tflops']:.0%} of {found['matrix_tflops']:.3g}, {found['product']}" if work else "",
        found.get("memory", ""),
        (f"{gpt_speed:,.0f}" if gpt_speed else failure) + found.get("gpt_note", ""),
        f"{gpt_speed / speed:.3f}" if speed and gpt_speed else "",
    ]
    return f"| {' | '.join(cells)} |"


def measure(shape_name: str, precision: str, arguments: argparse.Namespace) -> None:
    """Print what is found about one row, an object of JSON a line, as soon as it is known."""
    if not torch.cuda.is_available():
        cpu_backend.install()
    shape = SHAPES[shape_name]
    options = options_of(shape, precision, arguments.micro_batches, arguments.flags)
    from sedd_megatron.model.layer_spec import check_transformer_engine, transformer_engine_runs_on

    device = choose_device(options.parallel.device)
    # Megatron's local layers take no notice of an FP8 that they are told of.
    check_transformer_engine(options.precision, device)
    if device.type == "cuda" and not transformer_engine_runs_on(device):
        tell(layers=", Transformer Engine missing")
    tell(tokens=options.training.global_batch_size * options.model.seq_length)
    tell(**matrix_rate(options))
    try:
        tell(**time_sedd(options, shape.num_tokens, arguments.steps))
    except torch.OutOfMemoryError:
        tell(note="does not fit")
    release_memory()
    if arguments.no_gpt:
        return
    micro_batch, note = options.training.micro_batch_size, ""
    while micro_batch > 0:
        try:
            tell(gpt_tokens_per_second=time_gpt(options, micro_batch, shape.num_tokens, arguments.steps), gpt_note=note)
            return
        except torch.OutOfMemoryError:
            # Its logits are there as a whole: the same global batch in smaller parts.
            micro_batch //= 2
            note = f" in micro-batches of {micro_batch}"
        release_memory()
    tell(gpt_note="does not fit")


def options_of(shape: Shape, precision: str, micro_batches: int, flags: str) -> PretrainOptions:
    """The options of a run whose global batch is `micro_batches` micro-batches."""
    return parse_pretrain_options(
        f"--data-path random --num-layers {shape.layers} --hidden-size {shape.width} --num-attention-heads "
        f"{shape.heads} --seq-length {shape.length} --micro-batch-size {shape.micro_batch} --global-batch-size "
        f"{shape.micro_batch * micro_batches} --lr-warmup-iters 1 {PRECISIONS[precision]} {flags}".split()
    )


def tell(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def release_memory() -> None:
    """Of a run that no one holds any more: DDP's hooks and their model hold each other."""
    gc.collect()
    torch.cuda.empty_cache()


def matrix_rate(options: PretrainOptions) -> dict[str, Any]:
    """TFLOP/s of one large square product by itself in this precision, and which product that was."""
    on_gpu = torch.cuda.is_available()
    device, size, repeats = ("cuda", 8192, 10) if on_gpu else ("cpu", 512, 5)
    dtype = torch.bfloat16 if options.precision.bf16 else torch.float32
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    name = f"torch.mm {str(dtype).removeprefix('torch.')}"
    if options.precision.fp8_format is None:

        def product() -> Tensor:
            return torch.mm(left, right)

    else:
        left, right = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
        one, name = torch.ones((), device=device), "torch._scaled_mm e4m3"

        def product() -> Tensor:
            return torch._scaled_mm(left, right, one, one, out_dtype=dtype, use_fast_accum=True)

    # The best of some: it is a rate to compare with, which a pause of the process must not lower.
    seconds = min(seconds_of_each(product, repeats) for _ in range(5))
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "matrix_tflops": 2 * size**3 / seconds / 1e12,
        "product": name,
    }


def seconds_of_each(function: Callable[[], Any], repeats: int, warm_up: int = WARM_UP_STEPS) -> float:
    """Seconds of one call among `repeats` without a wait between them, after some that are not timed."""
    for _ in range(warm_up):
        function()

    def all_of_them() -> None:
        for _ in range(repeats):
            function()

    return seconds_of(all_of_them) / repeats


def time_sedd(options: PretrainOptions, num_tokens: int, steps: int) -> dict[str, Any]:
    """Speed, work of a token, and peak memory."""
    from sedd_megatron.training.summary import format_bytes, trained_flops_per_token

    with parallel_groups(options.parallel) as groups:
        on_gpu = groups.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        run, step = sedd_run(options, num_tokens, groups)
        # Every batch once before: each has another number of masked positions.
        seconds = seconds_of_each(step, steps, max(WARM_UP_STEPS, NUM_BATCHES // run.num_microbatches))
        return {
            "tokens_per_second": options.training.global_batch_size * options.model.seq_length / seconds,
            "tflop_per_token": trained_flops_per_token(run) / 1e12,
            "memory": format_bytes(torch.cuda.max_memory_allocated()) if on_gpu else "not measured",
        }


def sedd_run(options: PretrainOptions, num_tokens: int, groups) -> tuple[Any, Callable[[], Any]]:
    """A run at its first step, and what makes a step of it."""
    from sedd_megatron.diffusion.draws import Stream
    from sedd_megatron.training.build import build_run
    from sedd_megatron.training.iterators import micro_batch_collator
    from sedd_megatron.training.step import train_step

    run = build_run(options, SimpleNamespace(num_tokens=num_tokens), groups)
    collator = micro_batch_collator(run, Stream.TRAIN_NOISE)
    size, windows = options.training.micro_batch_size, random_windows(options, num_tokens)
    batches = [
        collator([(n * size + i, window) for i, window in enumerate(part)])
        for n, part in enumerate(itertools.islice(itertools.cycle(windows.split(size)), NUM_BATCHES))
    ]
    endless = [itertools.cycle(batches) for _ in run.model_chunks]
    return run, lambda: train_step(run, endless)


def time_gpt(options: PretrainOptions, micro_batch: int, num_tokens: int, steps: int) -> float:
    """Tokens per second of the GPT, the global batch in micro-batches of this size."""
    from tests.benchmarks.causal_gpt import build_causal_run, train_gpt_step

    training = dataclasses.replace(options.training, micro_batch_size=micro_batch)
    with parallel_groups(options.parallel) as groups:
        run = build_causal_run(dataclasses.replace(options, training=training), num_tokens, groups)
        x_0, iterations = random_windows(options, num_tokens).to(groups.device), itertools.count(1)
        return x_0.numel() / seconds_of_each(lambda: train_gpt_step(run, x_0, next(iterations)), steps)


def random_windows(options: PretrainOptions, num_tokens: int) -> Tensor:
    """Tokens of one global batch, [B, S] int64."""
    shape = options.training.global_batch_size, options.model.seq_length
    return torch.randint(0, num_tokens, shape, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
