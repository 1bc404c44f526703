"""One optimizer step, and the passes over a batch that it and validation share."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from sedd_megatron.data.micro_batch import MicroBatch
from sedd_megatron.data.windows import WindowDataset
from sedd_megatron.diffusion.transfers import to_device
from sedd_megatron.errors import UserError
from sedd_megatron.parallel.groups import ParallelGroups
from sedd_megatron.training.build import TrainingRun
from sedd_megatron.training.forward_step import make_forward_step
from sedd_megatron.training.iterators import training_iterators
from sedd_megatron.training.main_parameters import copy_main_parameters_to_model
from sedd_megatron.training.optimizer_step import squared_gradient_norm, update_parameters
from sedd_megatron.training.recent_steps import StepResult


def find_fp8_scales(run: TrainingRun, dataset: WindowDataset) -> None:
    """Under delayed scaling, pass once over the next batch and drop the gradients; nothing else.

    The scaling factors come from the steps before. A run that starts or resumes has none, and would quantise its first
    step by a factor of 1. Checkpoints do not hold them: Transformer Engine keeps them in a pickle.
    """
    precision = run.options.precision
    if precision.fp8_format is None or precision.recipe != "delayed":
        return
    begin_training_pass(run)
    forward_backward(run, training_iterators(run, dataset), forward_only=False)
    copy_main_parameters_to_model(run.optimizer, run.ddp_chunks)


def train_step(
    run: TrainingRun, batches: list[Iterator[MicroBatch]], flags: Sequence[int] = ()
) -> tuple[dict[str, Any], list[int]]:
    """One optimizer step on one global batch.

    Returns:
        Its line of metrics.jsonl, and for each of this rank's flags the largest of any rank: ranks that stopped at
        different steps would wait for each other forever. Equal on every rank.

    Raises:
        UserError: a loss or a gradient norm that is not finite, or a spike, if the run's guard does not go on without
            the step. It is not taken then: parameters, optimizer, average and schedule are as before.
    """
    batch_size, start = run.batch_size, time.monotonic()
    begin_training_pass(run)
    run.optimizer.zero_grad()
    losses = forward_backward(run, batches, forward_only=False)
    learning_rate = run.optimizer.param_groups[0]["lr"]
    squared_norm = squared_gradient_norm(run.optimizer, run.groups.device)
    # The one wait for the device. What follows is queued without another, so that the host is ahead of the optimizer
    # and makes the next step's batch meanwhile: a wait after it would leave the device idle there instead.
    result, largest = read_result(losses, squared_norm, run, flags)
    seconds = time.monotonic() - start
    if run.guard is None:
        require_finite("loss", result.loss, run.iteration + 1)
        require_finite("gradient norm", result.grad_norm, run.iteration + 1)
    elif (fault := run.guard.fault(run, result)) is not None:
        return run.guard.skip(run, fault, losses, result), largest
    update_parameters(run.optimizer, squared_norm)
    run.ema.update(run.optimizer_steps + 1)
    run.recent.add(result)
    run.iteration += 1
    run.consumed_samples += batch_size
    run.scheduler.step(increment=batch_size)
    metrics = {
        "iteration": run.iteration,
        "loss": result.loss,
        "learning_rate": learning_rate,
        "grad_norm": result.grad_norm,
        "tokens_per_second": batch_size * run.options.model.seq_length / seconds,
        "consumed_samples": run.consumed_samples,
    }
    return metrics, largest


def read_result(
    losses: list[dict[str, Any]], squared_norm: Tensor, run: TrainingRun, flags: Sequence[int] = ()
) -> tuple[StepResult, list[int]]:
    """A step's result, and of this rank's flags the largest of any rank; one wait for the device. Collective.

    Replicas should have the same result. Where a fault makes them differ every rank gets the largest, or what is not a
    number, for all have to judge alike.
    """
    device = run.groups.device
    rank_norm = [] if run.guard is None else [run.guard.gradient_norm()]
    own = torch.stack([mean_loss(losses, run.groups), squared_norm.sqrt(), *rank_norm])
    largest = torch.cat([
        own.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf),
        to_device(torch.tensor(flags, dtype=torch.float64), device),
    ])  # fmt: skip
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    # On the rank that has it, NaN stays NaN.
    numbers = read_numbers(torch.where(own.isfinite(), largest[: len(own)], own), largest[len(own) :])
    return StepResult(*numbers[: len(own)]), [int(flag) for flag in numbers[len(own) :]]


def read_numbers(*numbers: Tensor) -> list[float]:
    """The elements of float64 tensors, one after the other, on the host; it waits once for all that the device does."""
    return torch.cat([number.view(-1) for number in numbers]).tolist()


def begin_training_pass(run: TrainingRun) -> None:
    """Put the model into training mode, with gradients of 0."""
    for chunk in run.ddp_chunks:
        chunk.train()
        chunk.zero_grad_buffer()


def forward_backward(
    run: TrainingRun, batches: list[Iterator[MicroBatch]], forward_only: bool, batch_size: int | None = None
) -> list[dict[str, Any]]:
    """Megatron's schedule over one global batch of `batch_size`, that of the next step if not given; the last stage's
    losses by micro-batch, nats per token.
    """
    num_microbatches = run.num_microbatches if batch_size is None else run.num_microbatches_of(batch_size)
    return get_forward_backward_func()(
        forward_step_func=make_forward_step(
            run.graph,
            run.groups,
            run.options.training.loss_chunk_rows_on(run.groups.device.type),
            num_microbatches,
        ),
        data_iterator=batches,
        model=run.ddp_chunks,
        num_microbatches=num_microbatches,
        seq_length=run.options.model.seq_length,
        micro_batch_size=run.options.training.micro_batch_size,
        forward_only=forward_only,
    )


def mean_loss(losses: list[dict[str, Any]], groups: ParallelGroups) -> Tensor:
    """Mean over micro-batches, replicas and parts of the sequence, to every rank: scalar float64 on the device, which
    does not depend on how they are split.
    """
    mean = torch.zeros((), dtype=torch.float64, device=groups.device)
    if groups.is_last_stage:
        mean += torch.stack([loss["loss"].double() for loss in losses]).mean()
        torch.distributed.all_reduce(mean, group=groups.collection.dp_cp)
        mean /= groups.collection.dp_cp.size()
    torch.distributed.all_reduce(mean, group=groups.collection.pp)
    return mean


def largest_of_any_rank(flags: Sequence[int], groups: ParallelGroups) -> Tensor:
    largest = to_device(torch.tensor(flags, dtype=torch.float64), groups.device)
    if flags:
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return largest


def require_finite(name: str, value: float, iteration: int) -> None:
    if not math.isfinite(value):
        raise UserError(
            f"the {name} is {value} at iteration {iteration}; nothing is saved from here on: resume from the last "
            "checkpoint with a lower --lr or --clip-grad, and look at the data"
        )
