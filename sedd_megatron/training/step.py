"""One optimizer step, and the passes over a batch that it and validation share."""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from sedd_megatron.data.micro_batch import MicroBatch
from sedd_megatron.data.windows import WindowDataset
from sedd_megatron.diffusion.transfers import to_device
from sedd_megatron.errors import UserError
from sedd_megatron.parallel.groups import ParallelGroups
from sedd_megatron.run_files import NUM_BANDS
from sedd_megatron.training.build import TrainingRun
from sedd_megatron.training.forward_step import make_forward_step
from sedd_megatron.training.iterators import training_iterators
from sedd_megatron.training.main_parameters import copy_main_parameters_to_model
from sedd_megatron.training.optimizer_step import squared_gradient_norms, update_parameters
from sedd_megatron.training.recent_steps import StepResult
from sedd_megatron.training.step_statistics import (
    StepWatch,
    largest_log_score,
    step_metrics,
)


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
    watch = StepWatch(run.groups.device)
    losses = forward_backward(run, [watch.timed(own) for own in batches], forward_only=False)
    learning_rate = run.optimizer.param_groups[0]["lr"]
    squares = squared_gradient_norms(run.optimizer, run.groups.device, run.parameters_by_part)
    # The one wait for the device. What follows is queued without another, so that the host is ahead of the optimizer
    # and makes the next step's batch meanwhile: a wait after it would leave the device idle there instead.
    result, means, squares_read, largest = read_step(run, losses, squares, [*flags, *watch.host_numbers()])
    asked = [int(flag) for flag in largest[: len(flags)]]
    if run.guard is None:
        require_finite("loss", result.loss, run.iteration + 1)
        require_finite("gradient norm", result.grad_norm, run.iteration + 1)
    elif (fault := run.guard.fault(run, result)) is not None:
        return run.guard.skip(run, fault, losses, result), asked
    update_parameters(run.optimizer, squares[0])
    run.ema.update(run.optimizer_steps + 1)
    run.recent.add(result)
    seconds = time.monotonic() - start
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
    return metrics | step_metrics(means, squares_read[1:], largest[len(flags) :], run.graph), asked


class StepReading(NamedTuple):
    """A step's numbers on the host."""

    result: StepResult
    means: list[float]  # of mean_numbers
    squares: list[float]  # of squared_gradient_norms
    largest: list[float]  # of any rank: the numbers that were given, and the largest log-score


def read_step(
    run: TrainingRun, losses: list[dict[str, Any]], squares: Tensor, numbers: Sequence[float] = ()
) -> StepReading:
    """What a step has come to, and of this rank's `numbers` the largest of any rank; one wait for the device.
    Collective.

    Replicas should have the same result. Where a fault makes them differ every rank gets the largest, or what is not a
    number, for all have to judge alike.
    """
    means = mean_numbers(losses, run.groups)
    rank_norm = [] if run.guard is None else [run.guard.gradient_norm()]
    own = torch.stack([means[0], squares[0].sqrt(), *rank_norm])
    largest = torch.cat([
        own.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf),
        to_device(torch.tensor(numbers, dtype=torch.float64), run.groups.device),
        largest_log_score(losses, run.groups.device),
    ])  # fmt: skip
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    # On the rank that has it, NaN stays NaN.
    judged = torch.where(own.isfinite(), largest[: len(own)], own)
    result, *rest = read_numbers(judged, means, squares, largest[len(own) :])
    return StepReading(StepResult(*result), *rest)


def read_numbers(*numbers: Tensor) -> list[list[float]]:
    """The elements of 1-D float64 tensors on the host; it waits once for all that the device does."""
    elements = iter(torch.cat(numbers).tolist())
    return [list(itertools.islice(elements, len(tensor))) for tensor in numbers]


def begin_training_pass(run: TrainingRun) -> None:
    """Put the model into training mode, with gradients of 0."""
    for chunk in run.ddp_chunks:
        chunk.train()
        chunk.zero_grad_buffer()


def forward_backward(
    run: TrainingRun, batches: list[Iterator[MicroBatch]], forward_only: bool, batch_size: int | None = None
) -> list[dict[str, Any]]:
    """Megatron's schedule over one global batch of `batch_size`, that of the next step if not given; by micro-batch
    what the last stage says, as in forward_step.py.
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


def mean_numbers(losses: list[dict[str, Any]], groups: ParallelGroups) -> Tensor:
    """Mean of `loss_numbers` over micro-batches, replicas and parts of the sequence, to every rank: float64 on the
    device, first the loss; it does not depend on how they are split.
    """
    mean = torch.zeros(2 + 2 * NUM_BANDS, dtype=torch.float64, device=groups.device)
    if groups.is_last_stage:
        mean += torch.stack([loss["numbers"] for loss in losses]).mean(0)
        torch.distributed.all_reduce(mean, group=groups.collection.dp_cp)
        mean /= groups.collection.dp_cp.size()
    torch.distributed.all_reduce(mean, group=groups.collection.pp)
    return mean


def largest_of_any_rank(numbers: Sequence[float], groups: ParallelGroups) -> Tensor:
    """Elementwise, of this rank's numbers: 1-D float64 on the device."""
    largest = to_device(torch.tensor(numbers, dtype=torch.float64), groups.device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return largest


def require_finite(name: str, value: float, iteration: int) -> None:
    """Raise a UserError that names what has this value after this iteration, unless it is finite."""
    if not math.isfinite(value):
        raise UserError(
            f"the {name} is {value} at iteration {iteration}; nothing is saved from here on: resume from the last "
            "checkpoint with a lower --lr or --clip-grad, and look at the data"
        )
