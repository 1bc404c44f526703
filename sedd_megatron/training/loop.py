"""The training loop, from options to the last checkpoint."""

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from sedd_megatron.arguments import weighted_corpora
from sedd_megatron.config import PretrainOptions
from sedd_megatron.data.collator import NoisingCollator
from sedd_megatron.data.digests import SECONDS_TO_WAIT_AT_LAST, DigestCheck, check_in_background
from sedd_megatron.data.loader import training_batches, validation_batches
from sedd_megatron.data.micro_batch import MicroBatch, MicroBatchCollator
from sedd_megatron.data.preparation import Preparation
from sedd_megatron.data.tokenizers import Tokenizer
from sedd_megatron.data.windows import WindowDataset, Windows
from sedd_megatron.diffusion.draws import Stream
from sedd_megatron.diffusion.transfers import to_device
from sedd_megatron.errors import UserError, forget_unsaid
from sedd_megatron.parallel.fused_head import ROW_MULTIPLE
from sedd_megatron.parallel.groups import ParallelGroups, is_first_rank, on_first_rank, tell
from sedd_megatron.training.build import TrainingRun, build_run
from sedd_megatron.training.checkpoint import resume
from sedd_megatron.training.estimates import peak_tflops
from sedd_megatron.training.forward_step import make_forward_step
from sedd_megatron.training.main_parameters import copy_main_parameters_to_model
from sedd_megatron.training.metrics import MetricsWriter
from sedd_megatron.training.metrics_file import MetricsFile, writer_name
from sedd_megatron.training.optimizer_step import step_optimizer
from sedd_megatron.training.run_folder import FoundCheckpoint
from sedd_megatron.training.run_lock import RunLock
from sedd_megatron.training.saving import RunSaver, open_saver
from sedd_megatron.training.stop_requests import StopRequests
from sedd_megatron.training.summary import print_summary, trained_flops_per_token


def train(
    options: PretrainOptions,
    windows: Windows,
    tokenizer: Tokenizer,
    found: FoundCheckpoint | None,
    groups: ParallelGroups,
    preparation: Preparation,
    lock: RunLock | None = None,
) -> TrainingRun:
    """Train until `train_iters`, or until a signal asks to save and leave; returns the finished run.

    `preparation` of the data is kept in its checkpoints; where it is unknown, that of the one which was found.

    Raises:
        UserError: a damaged checkpoint, data that is not what was written, a loss that is not finite, or a disk that
            refuses one save after another; the checkpoints before stay as they are.
    """
    with StopRequests() as requests:
        run = build_run(options, tokenizer, groups)
        if found is not None:
            found = resume(run, found)
            preparation = preparation.completed_by(found.preparation)
        print_summary(run, windows)
        compile_validation(run, windows.valid)
        find_fp8_scales(run, windows.train)
        saver = open_saver(run, found, preparation, lock)
        metrics = _open_metrics(run)
        requests.start_waiting()
        try:
            _train_and_save(run, windows, saver, metrics, requests)
        except UserError:
            # On every rank alike.
            if saver is not None:
                saver.wait()
            raise
        finally:
            if metrics is not None:
                metrics.close()
    forget_unsaid()
    return run


def _train_and_save(
    run: TrainingRun,
    windows: Windows,
    saver: RunSaver | None,
    metrics: MetricsWriter | None,
    requests: StopRequests,
) -> None:
    options, first_iteration = run.options, run.iteration
    request, digests = 0, None
    if on_first_rank(lambda: metrics is not None and metrics.lacks_validation(run.iteration)):
        request = _validate_if_due(run, windows, metrics, requests)
    batches = training_iterators(run, windows.train)
    if is_first_rank():
        digests = check_in_background([prefix for _, prefix in weighted_corpora(options.data)])
    while run.iteration < options.training.train_iters and not request:
        fault = None if digests is None else digests.fault()
        flags = [requests.requested, saver is not None and saver.is_writing, fault is not None]
        step, (request, writing, is_damaged) = train_step(run, batches, flags)
        if is_damaged:
            raise _damaged_data(fault or "the data is not what was written")
        if metrics is not None:
            metrics.train_step(step, options.training.global_batch_size * options.model.seq_length)
        if saver is not None and not writing:
            saver.finish()
        # Who asked the run to end may not wait for more than a checkpoint; what is left out is done on resuming.
        request = request or _validate_if_due(run, windows, metrics, requests)
        is_last = request or run.iteration == options.training.train_iters
        if saver is not None and not is_last and _is_due(run.iteration, options.checkpoint.save_interval):
            saver.save(run)
    if run.iteration > first_iteration:
        # Who asked the run to end may not wait.
        seconds = 0.0 if request else SECONDS_TO_WAIT_AT_LAST
        on_first_rank(lambda: _require_as_written(digests, seconds))
    if saver is not None:
        saver.save_last(run)
    if request:
        saved = f"saved iteration {run.iteration} and " if saver is not None else ""
        end = f"stopped at iteration {run.iteration} of {options.training.train_iters}"
        tell([f"{signal.Signals(request).name}: {saved}{end}"])


def _require_as_written(digests: DigestCheck, seconds: float) -> None:
    fault = digests.last_fault(seconds)
    if fault is not None:
        raise _damaged_data(fault)


def _damaged_data(fault: str) -> UserError:
    return UserError(f"{fault}; nothing is saved from here on")


def _validate_if_due(run: TrainingRun, windows: Windows, metrics: MetricsWriter | None, requests: StopRequests) -> int:
    """Validate, unless that is not due; returns the signal that broke it off, or 0."""
    if not _is_due(run.iteration, run.options.logging.eval_interval) or len(windows.valid) == 0:
        return 0
    request = 0

    def is_broken_off() -> bool:
        nonlocal request
        request = int(read_numbers(_largest_of_any_rank([requests.requested], run.groups))[0])
        return request > 0

    loss = validate(run, windows.valid, is_broken_off)
    if loss is None:
        return request
    _require_finite("validation loss", loss, run.iteration)
    if metrics is not None:
        metrics.validation({"iteration": run.iteration, "validation_loss": loss})
    return 0


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
        UserError: a loss or a gradient norm that is not finite; the parameters and their average are then spoilt.
    """
    options, start = run.options, time.monotonic()
    begin_training_pass(run)
    run.optimizer.zero_grad()
    losses = forward_backward(run, batches, forward_only=False)
    learning_rate = run.optimizer.param_groups[0]["lr"]
    squared_norm = step_optimizer(run.optimizer, run.groups.device)
    run.ema.update(run.iteration + 1)
    # The one wait for the device, when all of the step is in its queue.
    numbers = read_numbers(_mean_loss(losses, run.groups), squared_norm, _largest_of_any_rank(flags, run.groups))
    seconds = time.monotonic() - start
    loss, grad_norm, largest = numbers[0], numbers[1] ** 0.5, numbers[2:]
    _require_finite("loss", loss, run.iteration + 1)
    _require_finite("gradient norm", grad_norm, run.iteration + 1)
    run.iteration += 1
    run.consumed_samples += options.training.global_batch_size
    run.scheduler.step(increment=options.training.global_batch_size)
    metrics = {
        "iteration": run.iteration,
        "loss": loss,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "tokens_per_second": options.training.global_batch_size * options.model.seq_length / seconds,
        "consumed_samples": run.consumed_samples,
    }
    return metrics, [int(flag) for flag in largest]


def read_numbers(*numbers: Tensor) -> list[float]:
    """The elements of float64 tensors, one after the other, on the host; it waits once for all that the device does."""
    return torch.cat([number.view(-1) for number in numbers]).tolist()


def begin_training_pass(run: TrainingRun) -> None:
    """Put the model into training mode, with gradients of 0."""
    for chunk in run.ddp_chunks:
        chunk.train()
        chunk.zero_grad_buffer()


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
    (loss,) = read_numbers(_mean_loss(losses, run.groups))
    return loss


def compile_validation(run: TrainingRun, dataset: WindowDataset) -> None:
    """On a GPU, pass once over a global batch as a validation will, if one is to come.

    What it is compiled to is then there before the first step, and is not made in the middle of the run.
    """
    interval = run.options.logging.eval_interval
    if run.groups.device.type == "cpu" or interval == 0 or len(dataset) == 0:
        return
    if run.options.training.train_iters // interval > run.iteration // interval:
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
        **_loading(run),
    )
    iterators = _one_per_chunk(batches, run)
    for chunk in run.ddp_chunks:
        chunk.eval()
    losses = []
    for _ in range(num_batches):
        if is_broken_off():
            return None
        losses += forward_backward(run, iterators, forward_only=True)
    return losses


def forward_backward(run: TrainingRun, batches: list[Iterator[MicroBatch]], forward_only: bool) -> list[dict[str, Any]]:
    """Megatron's schedule over one global batch; the last stage's losses by micro-batch, nats per token."""
    return get_forward_backward_func()(
        forward_step_func=make_forward_step(
            run.graph,
            run.groups,
            run.options.training.loss_chunk_rows_on(run.groups.device.type),
            run.num_microbatches,
        ),
        data_iterator=batches,
        model=run.ddp_chunks,
        num_microbatches=run.num_microbatches,
        seq_length=run.options.model.seq_length,
        micro_batch_size=run.options.training.micro_batch_size,
        forward_only=forward_only,
    )


def _mean_loss(losses: list[dict[str, Any]], groups: ParallelGroups) -> Tensor:
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


def _largest_of_any_rank(flags: Sequence[int], groups: ParallelGroups) -> Tensor:
    largest = to_device(torch.tensor(flags, dtype=torch.float64), groups.device)
    if flags:
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return largest


def _require_finite(name: str, value: float, iteration: int) -> None:
    if not math.isfinite(value):
        raise UserError(
            f"the {name} is {value} at iteration {iteration}; nothing is saved from here on: resume from the last "
            "checkpoint with a lower --lr or --clip-grad, and look at the data"
        )


def micro_batch_collator(run: TrainingRun, stream: Stream) -> MicroBatchCollator:
    """What makes this rank's micro-batches of its samples, with noise of this stream."""
    options = run.options
    noising = NoisingCollator(
        graph=run.graph,
        schedule=run.schedule,
        seed=options.training.seed,
        stream=stream,
        time_sampling=options.diffusion.time_sampling,
        time_eps=options.diffusion.time_eps,
    )
    groups = run.groups
    return MicroBatchCollator(noising, groups.context_rank, groups.context_size, ROW_MULTIPLE[groups.device.type])


def training_iterators(run: TrainingRun, dataset: WindowDataset) -> list[Iterator[MicroBatch]]:
    """This rank's micro-batches from the run's position on, for each of its model chunks."""
    batches = training_batches(
        dataset,
        micro_batch_collator(run, Stream.TRAIN_NOISE),
        consumed_samples=run.consumed_samples,
        micro_batch_size=run.options.training.micro_batch_size,
        data_parallel_rank=run.groups.data_rank,
        data_parallel_size=run.groups.data_size,
        **_loading(run),
    )
    return _one_per_chunk(batches, run)


def _loading(run: TrainingRun) -> dict[str, Any]:
    """How the loader makes batches for this run's device."""
    device = run.groups.device.type
    return {"num_workers": run.options.data.num_workers_on(device), "pin_memory": device == "cuda"}


def _one_per_chunk(batches: Iterator[MicroBatch], run: TrainingRun) -> list[Iterator[MicroBatch]]:
    """Interleaved stages each read every micro-batch, a few apart; it is drawn once."""
    return list(itertools.tee(batches, len(run.ddp_chunks)))


def _open_metrics(run: TrainingRun) -> MetricsWriter | None:
    if torch.distributed.get_rank() != 0:
        return None
    options, tflop_per_token, peak = run.options, 0.0, None
    if run.groups.device.type == "cuda":
        tflop_per_token = trained_flops_per_token(run) / 1e12 / torch.distributed.get_world_size()
        peak = peak_tflops(torch.cuda.get_device_name(run.groups.device), options.precision.fp8_format is not None)
    save, log_dir = options.checkpoint.save, options.logging.log_dir or options.checkpoint.save
    file = None
    if log_dir:
        # A save folder belongs to one run. A log folder may be shared, and what others wrote there is not cut.
        path = Path(log_dir) / "metrics.jsonl"
        if save is None:
            file = MetricsFile(path, None, "a run that does not save")
        else:
            root = Path(save).resolve()
            file = MetricsFile(path, run.iteration, None if path.resolve().parent == root else writer_name(root))
    return MetricsWriter(options.logging, file, options.training.train_iters, run.iteration, tflop_per_token, peak)


def _is_due(iteration: int, interval: int) -> bool:
    return interval > 0 and iteration % interval == 0
