"""The validation loss, of the moving average."""

from collections.abc import Callable
from typing import Any

import torch

from sedd_megatron.data.loader import validation_batches
from sedd_megatron.data.windows import WindowDataset
from sedd_megatron.diffusion.draws import Stream
from sedd_megatron.training.build import TrainingRun
from sedd_megatron.training.iterators import loading, micro_batch_collator, one_per_chunk
from sedd_megatron.training.step import forward_backward, mean_numbers, read_numbers


def validate(
    run: TrainingRun, dataset: WindowDataset, is_broken_off: Callable[[], bool] = lambda: False
) -> float | None:
    """The bound in nats per token of the EMA weights, on the same windows, times and noise at every call.

    `is_broken_off` is asked before each global batch, on every rank; None once it holds.
    """
    with run.ema.swapped_in():
        losses = _validation_losses(run, dataset, run.options.logging.eval_iters, is_broken_off)
    if losses is None:
        return None
    (means,) = read_numbers(mean_numbers(losses, run.groups))
    return means[0]


def compile_validation(run: TrainingRun, dataset: WindowDataset) -> None:
    """On a GPU, pass once over a global batch as a validation will, if one is to come.

    What it is compiled to is then there before the first step, and is not made in the middle of the run.
    """
    interval = run.options.logging.eval_interval
    if run.groups.device.type == "cpu" or interval == 0 or len(dataset) == 0:
        return
    if run.end.iteration // interval > run.iteration // interval:
        _validation_losses(run, dataset, 1)


@torch.no_grad()
def _validation_losses(
    run: TrainingRun, dataset: WindowDataset, num_batches: int, is_broken_off: Callable[[], bool] = lambda: False
) -> list[dict[str, Any]] | None:
    """Of the first global batches, by micro-batch, with the weights that are there; the last stage's."""
    training = run.options.training
    batches = validation_batches(
        dataset,
        micro_batch_collator(run, Stream.VALIDATION_NOISE),
        num_samples=num_batches * training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        data_parallel_rank=run.groups.data_rank,
        data_parallel_size=run.groups.data_size,
        **loading(run),
    )
    iterators = one_per_chunk(batches, run)
    for chunk in run.ddp_chunks:
        chunk.eval()
    losses = []
    for _ in range(num_batches):
        if is_broken_off():
            return None
        losses += forward_backward(run, iterators, forward_only=True, batch_size=training.global_batch_size)
    return losses
