"""Training speed and memory of one device by shape and precision: python -m tests.benchmarks.training_throughput

Real optimizer steps on random tokens, with everything that training does but reading files. Prints a table, and with
--output writes it to a file with the date, the machine and the command.
"""

import argparse
import datetime
import gc
import itertools
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.config import PretrainOptions
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import parallel_groups

# Layers, width, heads, micro-batch, length, tokens in the vocabulary. The published models have GPT-2's.
SHAPES = {
    "tiny": (2, 64, 4, 4, 32, 256),
    "SEDD-small": (12, 768, 12, 16, 1024, 50257),
    "SEDD-medium": (24, 1024, 16, 8, 1024, 50257),
    "1.3B": (24, 2048, 16, 4, 1024, 50257),
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
HEADER = "| shape | precision | rows | tokens/s | TFLOP/s | of peak | memory |\n|---|---|---|---|---|---|---|"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["SEDD-small", "SEDD-medium", "1.3B"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=[*PRECISIONS][1:])
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after 3 that are not")
    parser.add_argument("--flags", default="", help="further flags of examples/pretrain_sedd.py, in quotes")
    parser.add_argument("--output", type=Path, help="a file of tests/benchmarks/results")
    arguments = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})"
    rows = []
    print(HEADER)
    for shape, precision in itertools.product(arguments.shapes, arguments.precisions):
        rows.append(measure(shape, precision, arguments.flags, arguments.steps, machine))
        print(rows[-1], flush=True)
    if arguments.output:
        command = shlex.join(["python", "-m", "tests.benchmarks.training_throughput", *argv])
        about = f"{datetime.date.today()}, {machine}, torch {torch.__version__}\n\n    {command}\n\n"
        arguments.output.write_text(f"# Training throughput\n\n{about}{HEADER}\n" + "\n".join(rows) + "\n")


def measure(shape: str, precision: str, flags: str, steps: int, machine: str) -> str:
    """One row of the table; a shape that does not fit says so."""
    layers, width, heads, micro_batch, length, num_tokens = SHAPES[shape]
    options = parse_pretrain_options(
        f"--data-path random --num-layers {layers} --hidden-size {width} --num-attention-heads {heads} "
        f"--seq-length {length} --micro-batch-size {micro_batch} --global-batch-size {micro_batch} "
        f"--lr-warmup-iters 1 {PRECISIONS[precision]} {flags}".split()
    )
    tokens = options.training.global_batch_size * length
    try:
        seconds, memory, tflop_per_token, peak = time_steps(options, num_tokens, steps, machine)
    except torch.OutOfMemoryError:
        return f"| {shape} | {precision} | {tokens} | out of memory | | | |"
    speed = tokens / seconds * tflop_per_token
    share = f"{speed / peak:.0%}" if peak else "unknown"
    return f"| {shape} | {precision} | {tokens} | {tokens / seconds:,.0f} | {speed:.3g} | {share} | {memory} |"


def time_steps(
    options: PretrainOptions, num_tokens: int, steps: int, machine: str
) -> tuple[float, str, float, float | None]:
    """Median seconds of a step, peak memory, TFLOP per token, the device's peak in TFLOP/s."""
    if not torch.cuda.is_available():
        cpu_backend.install()
    from sedd_megatron.data.collator import NoisingCollator
    from sedd_megatron.diffusion.draws import Stream
    from sedd_megatron.training.build import build_run
    from sedd_megatron.training.estimates import peak_tflops
    from sedd_megatron.training.loop import train_step
    from sedd_megatron.training.summary import format_bytes, trained_flops_per_token

    with parallel_groups(options.parallel) as groups:
        run = build_run(options, SimpleNamespace(num_tokens=num_tokens), groups)
        collator = NoisingCollator(graph=run.graph, schedule=run.schedule, seed=0, stream=Stream.TRAIN_NOISE)
        size, length = options.training.micro_batch_size, options.model.seq_length
        windows = torch.randint(0, num_tokens, (size, length), generator=torch.Generator().manual_seed(0))
        batches = [collator([(n * size + i, window) for i, window in enumerate(windows)]) for n in range(8)]
        endless, seconds = [itertools.cycle(batches)], []
        if groups.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for step in range(3 + steps):
            # A step ends with a number on the host, and so with the device idle.
            start = time.perf_counter()
            train_step(run, endless)
            if step >= 3:
                seconds.append(time.perf_counter() - start)
        memory = format_bytes(torch.cuda.max_memory_allocated()) if groups.device.type == "cuda" else "not measured"
        tflop = trained_flops_per_token(run) / 1e12
    del run
    gc.collect()
    torch.cuda.empty_cache()
    return statistics.median(seconds), memory, tflop, peak_tflops(machine, options.precision.fp8_format is not None)


if __name__ == "__main__":
    main(sys.argv[1:])
