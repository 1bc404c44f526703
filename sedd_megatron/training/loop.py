"""The training loop, from options to the last checkpoint."""

import contextlib
from pathlib import Path

import torch

from sedd_megatron.arguments import weighted_corpora
from sedd_megatron.config import PretrainOptions
from sedd_megatron.data.digests import SECONDS_TO_WAIT_AT_LAST, DigestCheck, check_in_background
from sedd_megatron.data.preparation import Preparation
from sedd_megatron.data.tokenizers import Tokenizer
from sedd_megatron.data.windows import Windows
from sedd_megatron.errors import UserError, forget_unsaid
from sedd_megatron.parallel.groups import ParallelGroups, is_first_rank, on_first_rank
from sedd_megatron.training.build import TrainingRun, build_run
from sedd_megatron.training.checkpoint import resume
from sedd_megatron.training.ending import asked_to_stop, at_exit_interval, end_run
from sedd_megatron.training.estimates import peak_tflops
from sedd_megatron.training.iterators import training_iterators
from sedd_megatron.training.metrics import MetricsWriter
from sedd_megatron.training.metrics_file import MetricsFile, writer_name
from sedd_megatron.training.run_folder import FoundCheckpoint
from sedd_megatron.training.run_lock import RunLock
from sedd_megatron.training.saving import RunSaver, open_saver
from sedd_megatron.training.step import find_fp8_scales, largest_of_any_rank, read_numbers, require_finite, train_step
from sedd_megatron.training.stop_requests import StopRequests
from sedd_megatron.training.summary import print_summary, trained_flops_per_token
from sedd_megatron.training.validation import compile_validation, validate


def train(
    options: PretrainOptions,
    windows: Windows,
    tokenizer: Tokenizer,
    found: FoundCheckpoint | None,
    groups: ParallelGroups,
    preparation: Preparation,
    lock: RunLock | None = None,
    requests: StopRequests | None = None,
) -> TrainingRun:
    """Train until `train_iters`, or until a signal asks to save and leave; returns the finished run.

    `preparation` of the data is kept in its checkpoints; where it is unknown, that of the one which was found.
    `requests` listens already where the command has heard signals since it began.

    Raises:
        UserError: a damaged checkpoint, data that is not what was written, a loss that is not finite, or a disk that
            refuses one save after another; the checkpoints before stay as they are.
    """
    with StopRequests() if requests is None else contextlib.nullcontext(requests) as requests:
        run = build_run(options, tokenizer, groups)
        if found is not None:
            found = resume(run, found)
            preparation = preparation.completed_by(found.preparation)
        print_summary(run, windows)
        compile_validation(run, windows.valid)
        find_fp8_scales(run, windows.train)
        saver = open_saver(run, found, preparation, lock)
        metrics = _open_metrics(run)
        # Together: at a signal a rank before this line leaves, and one behind it would wait for that in its step.
        torch.distributed.barrier()
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
    options, first_iteration, end = run.options, run.iteration, run.options.training.train_iters
    request, digests = 0, None
    if on_first_rank(lambda: metrics is not None and metrics.lacks_validation(run.iteration)):
        request = _validate_if_due(run, windows, metrics, requests)
    batches = training_iterators(run, windows.train)
    if is_first_rank():
        digests = check_in_background([prefix for _, prefix in weighted_corpora(options.data)])
    while run.iteration < end and not request:
        fault = None if digests is None else digests.fault()
        flags = [asked_to_stop(run, requests, end), saver is not None and saver.is_writing, fault is not None]
        step, (request, writing, is_damaged) = train_step(run, batches, flags)
        if is_damaged:
            raise _damaged_data(fault or "the data is not what was written")
        if metrics is not None:
            metrics.train_step(step, options.training.global_batch_size * options.model.seq_length)
        if saver is not None and not writing:
            saver.finish()
        # Who asked the run to end may not wait for more than a checkpoint; what is left out is done on resuming.
        request = request or _validate_if_due(run, windows, metrics, requests) or at_exit_interval(run, end)
        is_last = request or run.iteration == end
        if saver is not None and not is_last and _is_due(run.iteration, options.checkpoint.save_interval):
            saver.save(run)
    if run.iteration > first_iteration:
        # Who asked the run to end may not wait.
        seconds = 0.0 if request else SECONDS_TO_WAIT_AT_LAST
        on_first_rank(lambda: _require_as_written(digests, seconds))
    if saver is not None:
        saver.save_last(run)
    end_run(run, end, request, first_iteration)


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
        request = int(read_numbers(largest_of_any_rank([requests.requested], run.groups))[0])
        return request > 0

    loss = validate(run, windows.valid, is_broken_off)
    if loss is None:
        return request
    require_finite("validation loss", loss, run.iteration)
    if metrics is not None:
        metrics.validation({"iteration": run.iteration, "validation_loss": loss})
    return 0


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
