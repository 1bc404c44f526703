"""What a run says of itself before its first step: its layout, its size, and what it will cost."""

import torch
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from sedd_megatron.data.windows import Windows
from sedd_megatron.errors import say
from sedd_megatron.options import flag_of
from sedd_megatron.training.build import TrainingRun
from sedd_megatron.training.estimates import (
    MOVING_AVERAGE_SIZE,
    activation_bytes,
    flops_per_token,
    fraction_of_head_rows,
    gradient_size,
    optimizer_size,
)


def print_summary(run: TrainingRun, windows: Windows) -> None:
    """Two lines from rank 0: what is trained, and what it costs on this rank. Collective over all ranks."""
    parameters = [parameter for chunk in run.model_chunks for parameter in chunk.parameters()]
    own = sum(p.numel() for p in parameters)
    counted_here = (p for p in parameters if param_is_not_tensor_parallel_duplicate(p))
    count = torch.tensor(
        [sum(p.numel() for p in counted_here if not getattr(p, "shared", False))],
        device=run.groups.device,
        dtype=torch.float64,
    )
    torch.distributed.all_reduce(count, group=run.groups.collection.mp)
    if torch.distributed.get_rank() != 0:
        return
    iteration, end = run.iteration, run.end.iteration
    length = flag_of("train_iters" if run.options.training.train_samples is None else "train_samples")
    say(
        f"{count.item():,.0f} parameters, {own:,} of them on this rank | {run.groups.layout} | "
        f"{len(windows.train):,} training and {len(windows.valid):,} validation windows of "
        f"{run.options.model.seq_length} tokens | at iteration {iteration} of {end}"
        + (f": nothing left to train, since {length} counts what is trained already" if iteration >= end else "")
    )
    say(cost_line(run))


def cost_line(run: TrainingRun) -> str:
    """Memory of this rank, of which only the activations are an estimate, and the work of a token."""
    options = run.options
    parameters = [parameter for chunk in run.model_chunks for parameter in chunk.parameters()]
    updated = sum(main.tensor.numel() for main in run.main_parameters)
    groups = run.groups
    num_microbatches = run.num_microbatches_of(options.training.global_batch_size)
    activations = activation_bytes(
        options, run.graph.num_states, _head_rows(run), groups.pipeline_rank, num_microbatches, groups.device.type
    )
    memory = {
        "weights": sum(p.numel() * (1 if is_float8tensor(p) else p.element_size()) for p in parameters),
        "gradients": gradient_size(options) * sum(p.numel() for p in parameters),
        "optimizer": updated * optimizer_size(options),
        "moving average": MOVING_AVERAGE_SIZE * updated,
        "activations about": activations.total,
    }
    return (
        f"memory on this rank: {', '.join(f'{name} {format_bytes(size)}' for name, size in memory.items())} | "
        f"{trained_flops_per_token(run) / 1e9:.3g} GFLOP per trained token, its head on {_head_rows(run):.0%} of the "
        "positions"
    )


def format_bytes(size: float) -> str:
    """3_000_000 -> 2.86 MiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 2**10:.3g} KiB"


def trained_flops_per_token(run: TrainingRun) -> float:
    """`flops_per_token` of this run's model, graph and noise."""
    return flops_per_token(run.options.model, run.graph.num_states, _head_rows(run))


def _head_rows(run: TrainingRun) -> float:
    return fraction_of_head_rows(run.graph, run.schedule, run.options.diffusion.time_eps)
