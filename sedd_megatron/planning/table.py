"""A plan as text for a terminal of 120 columns, and as command lines to copy."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from sedd_megatron.config import PretrainOptions
from sedd_megatron.options import flag_of
from sedd_megatron.planning.layouts import LAYOUT_NAMES, Plan
from sedd_megatron.planning.memory import RankMemory, checkpoint_bytes, parameters_of_model
from sedd_megatron.preset_files import is_checkout
from sedd_megatron.training_schedule import end_of

GIGA, SECONDS_A_DAY = 1e9, 86_400


def plan_lines(plans: Sequence[Plan], num_tokens: int, storage_bandwidth: float) -> Iterator[str]:
    """What is planned, and three tables with a line a layout; gigabytes and the like are powers of 10.

    `storage_bandwidth` in bytes per second is what all ranks together write a checkpoint with.
    """
    first = plans[0]
    options, cluster = first.options, first.cluster
    model, training = options.model, options.training
    size = checkpoint_bytes(options, first.num_states)
    yield (
        f"{parameters_of_model(options, first.num_states):,} parameters, {num_tokens:,} tokens | "
        f"{cluster.gpus:,} x {cluster.device.name}, {cluster.gpus_per_node} a node | "
        f"{end_of(training).iteration:,} steps of {training.global_batch_size:,} x {model.seq_length:,} tokens"
    )
    yield (
        f"a checkpoint is {size / GIGA:,.1f} GB, {seconds(size / storage_bandwidth)} at "
        f"{storage_bandwidth / GIGA:g} GB/s; saving every {options.checkpoint.save_interval:,} steps"
    )
    yield from _block("time; a micro-batch as sequences x number", _TIME_HEADER, [_time_cells(plan) for plan in plans])
    yield from _block(
        "memory of the rank that needs most, GB", _memory_header(), [_memory_cells(plan) for plan in plans]
    )
    yield from _block(
        "of a step's time, %; what a rank sends in it, GB", _SHARE_HEADER, [_share_cells(plan) for plan in plans]
    )


_TIME_HEADER = (
    "tensor pipeline interleaved context data micro-batch recompute s/step tokens/s TFLOP/s MFU bubble days GPU-hours"
).split()
_SHARE_HEADER = "compute tensor context pipeline bubble data optimizer other NVLink network".split()


def _time_cells(plan: Plan) -> list[str]:
    parallel, training, cluster = plan.options.parallel, plan.options.training, plan.cluster
    # As if every batch were of the full size, which those of a ramp are not.
    total = plan.time.total * end_of(training).consumed_samples / training.global_batch_size
    fp8 = plan.options.precision.fp8_format is not None
    return [
        str(parallel.tensor_model_parallel_size),
        str(parallel.pipeline_model_parallel_size),
        str(parallel.num_model_chunks(plan.options.model.num_layers)),
        str(parallel.context_parallel_size),
        str(plan.data_parallel_size),
        f"{training.micro_batch_size} x {plan.num_microbatches}",
        plan.options.recompute.recompute_granularity or "none",
        f"{plan.time.total:.4g}",
        f"{plan.tokens / plan.time.total:,.0f}",
        f"{plan.flops_per_gpu / 1e12:.0f}",
        f"{plan.flops_per_gpu / cluster.device.peak_flops(fp8):.0%}",
        f"{plan.bubble:.1%}",
        f"{total / SECONDS_A_DAY:.3g}",
        f"{total / 3600 * cluster.gpus:,.0f}",
    ]


def _memory_header() -> list[str]:
    return [*(field.name.replace("moving_", "") for field in fields(RankMemory)), "total", "of"]


def _memory_cells(plan: Plan) -> list[str]:
    sizes = [*vars(plan.memory).values(), plan.memory.total, plan.cluster.device.memory]
    return [f"{size / GIGA:.1f}" for size in sizes]


def _share_cells(plan: Plan) -> list[str]:
    time = plan.time
    parts = (time.compute, time.tensor, time.context, time.pipeline, time.bubble, time.data, time.optimizer)
    shares = [*parts, time.total - sum(parts)]
    return [*(f"{100 * part / time.total:.1f}" for part in shares), *(f"{sent / GIGA:.1f}" for sent in time.links)]


def _block(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A title and right-aligned columns, numbered from 1."""
    cells = [["", *header], *([str(number), *row] for number, row in enumerate(rows, start=1))]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    yield ""
    yield f"{title}:"
    for row in cells:
        yield " ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def seconds(time: float) -> str:
    """75 -> 1.2 minutes."""
    return f"{time:.1f} seconds" if time < 60 else f"{time / 60:.1f} minutes"


def layout_flags(options: PretrainOptions, given: PretrainOptions) -> list[str]:
    """The flags that make the layout of `options` from a command line that says `given`."""
    planned, before = options.to_dict(), given.to_dict()
    flags: list[str] = []
    for name in LAYOUT_NAMES:
        if planned[name] != before[name]:
            flags += _flag(name, planned[name])
    return flags


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag_of(name) if value else flag_of(f"no_{name}")]
    return [flag_of(name), *map(str, value if isinstance(value, tuple) else [value])]


def command_lines(plan: Plan, flags: Sequence[str]) -> list[str]:
    """torchrun on each node, and the same under Slurm; `flags` are those of sedd_megatron.pretrain."""
    gpus, node = plan.cluster.gpus, min(plan.cluster.gpus_per_node, plan.cluster.gpus)
    nodes = gpus // node
    several = "" if nodes == 1 else f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 "
    tasks, run = f"--nodes={nodes} --ntasks-per-node={node} --gpus-per-node={node}", shlex.join(flags)
    if not is_checkout():
        module = f"-m sedd_megatron.pretrain {run}"
        return [f"torchrun {several}--nproc-per-node {node} {module}", f"srun {tasks} python {module}"]
    return [
        f"torchrun {several}--nproc-per-node {node} examples/pretrain_sedd.py {run}",
        f"sbatch {tasks} examples/slurm/train.sbatch {run}",
    ]
