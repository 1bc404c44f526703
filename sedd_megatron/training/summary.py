"""What a run says of itself before its first step: its layout, its size, and what it will cost."""

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from sedd_megatron.data.windows import Windows
from sedd_megatron.training.build import TrainingRun


def print_summary(run: TrainingRun, windows: Windows) -> None:
    """One line from rank 0. Collective over all ranks."""
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
    groups, training = run.groups, run.options.training
    print(
        f"{count.item():,.0f} parameters, {own:,} of them on this rank | "
        f"tensor {groups.tensor_size} x pipeline {groups.pipeline_size} x data {groups.data_size} "
        f"on {groups.device.type} | {len(windows.train):,} training and {len(windows.valid):,} validation windows of "
        f"{run.options.model.seq_length} tokens | at iteration {run.iteration} of {training.train_iters}",
        flush=True,
    )
