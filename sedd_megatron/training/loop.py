"""The training loop, from options to the last checkpoint."""

import contextlib
from pathlib import Path

import torch

from sedd_megatron.arguments import weighted_corpora
from sedd_megatron.config import PretrainOptions
from sedd_megatron.data.background_check import SECONDS_TO_WAIT_AT_LAST, DataCheck, check_in_background
from sedd_megatron.data.preparation import Preparation
from sedd_megatron.data.tokenizers import Tokenizer
from sedd_megatron.data.windows import Windows
from sedd_megatron.errors import UserError, forget_unsaid
from sedd_megatron.parallel.groups import (
    ParallelGroups,
    errors_of_all_ranks,
    is_first_of_machine,
    on_first_rank,
    raise_on_every_rank,
)
from sedd_megatron.run_files import METRICS
from sedd_megatron.training.build import TrainingRun, build_run
from sedd_megatron.training.checkpoint import resume
from sedd_megatron.training.ending import asked_to_stop, at_exit_interval, end_run
from sedd_megatron.training.estimates import peak_tflops
from sedd_megatron.training.held_out import compute_test_loss, evaluate_alone, request_to_any_rank, validate_if_due
from sedd_megatron.training.iterators import training_iterators
from sedd_megatron.training.metrics import MetricsWriter
from sedd_megatron.training.metrics_file import MetricsFile, run_id_of, writer_name
from sedd_megatron.training.profiling import StepProbe, profiling
from sedd_megatron.training.replicas import check_replicas_if_due
from sedd_megatron.training.run_folder import FoundCheckpoint
from sedd_megatron.training.run_lock import RunLock
from sedd_megatron.training.samples import draw_samples_if_due, make_up_for_samples
from sedd_megatron.training.saving import RunSaver, open_saver
from sedd_megatron.training.step import find_fp8_scales, train_step
from sedd_megatron.training.step_guard import StepGuard
from sedd_megatron.training.stop_requests import StopRequests
from sedd_megatron.training.summary import print_summary, trained_flops_per_token
from sedd_megatron.training.trackers import open_trackers
from sedd_megatron.training.validation import compile_validation
from sedd_megatron.training_schedule import is_due


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
    """Train to the run's end, or until a signal asks to save and leave; returns the finished run. With --skip-train
    evaluate it as it is loaded.

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
        if options.training.skip_train:
            find_fp8_scales(run, windows.train)
            evaluate_alone(run, windows)
            forget_unsaid()
            return run
        print_summary(run, windows)
        compile_validation(run, windows.valid)
        find_fp8_scales(run, windows.train)
        saver = open_saver(run, found, preparation, lock)
        metrics = _open_metrics(run)
        # Together: at a signal a rank before this line leaves, and one behind it would wait for that in its step.
        torch.distributed.barrier()
        requests.start_waiting()
        try:
            with profiling(run, _log_folder(options)) as probe:
                _train_and_save(run, windows, saver, metrics, requests, probe)
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
    probe: StepProbe,
) -> None:
    options, first_iteration, (end, last_sample) = run.options, run.iteration, run.end
    request, digests = 0, None
    if on_first_rank(lambda: metrics is not None and metrics.lacks_validation(run.iteration)):
        request = validate_if_due(run, windows, metrics, requests, probe)
    request = request or make_up_for_samples(run, metrics, lambda: request_to_any_rank(run, requests))
    batches = probe.timed(training_iterators(run, windows.train))
    if options.faults.check_for_nan_in_loss_and_grad:
        run.guard = StepGuard(run, windows.train)
    if is_first_of_machine():
        prefixes = [prefix for _, prefix in weighted_corpora(options.data)]
        digests = check_in_background(prefixes, run.tokenizer.num_tokens)
    while run.iteration < end and not request:
        fault, first_sample = None if digests is None else digests.fault(), run.consumed_samples
        flags = [asked_to_stop(run, requests, end), saver is not None and saver.is_writing, fault is not None]
        probe.before_step()
        step, (request, writing, is_damaged) = train_step(run, batches, flags)
        step |= probe.after_step(step)
        if is_damaged:
            # Whoever speaks for all may not have found it.
            raise_on_every_rank(_damaged_data(fault) if fault is not None else None)
        if metrics is not None:
            samples = (run.consumed_samples - first_sample, last_sample - run.consumed_samples)
            metrics.train_step(step, *(number * options.model.seq_length for number in samples))
        check_replicas_if_due(run)
        if saver is not None and not writing:
            saver.finish()
        # Who asked the run to end may not wait for more than a checkpoint; what is left out is done on resuming.
        request = request or validate_if_due(run, windows, metrics, requests, probe)
        request = request or draw_samples_if_due(run, lambda: request_to_any_rank(run, requests))
        request = request or at_exit_interval(run, end)
        is_last = request or run.iteration == end
        if saver is not None and not is_last and is_due(run.iteration, options.checkpoint.save_interval):
            saver.save(run)
    if run.iteration > first_iteration:
        # Who asked the run to end may not wait.
        seconds = 0.0 if request else SECONDS_TO_WAIT_AT_LAST
        with errors_of_all_ranks():
            _require_as_written(digests, seconds)
    if saver is not None:
        saver.save_last(run)
    # A start that finds nothing to train was broken off before it had said that it is finished.
    request = request or compute_test_loss(run, windows, metrics, requests)
    end_run(run, end, request, first_iteration)


def _require_as_written(digests: DataCheck | None, seconds: float) -> None:
    fault = None if digests is None else digests.last_fault(seconds)
    if fault is not None:
        raise _damaged_data(fault)


def _damaged_data(fault: str) -> UserError:
    return UserError(f"{fault}; nothing is saved from here on")


def _open_metrics(run: TrainingRun) -> MetricsWriter | None:
    if torch.distributed.get_rank() != 0:
        return None
    options, tflop_per_token, peak = run.options, 0.0, None
    if run.groups.device.type == "cuda":
        tflop_per_token = trained_flops_per_token(run) / 1e12 / torch.distributed.get_world_size()
        peak = peak_tflops(torch.cuda.get_device_name(run.groups.device), options.precision.fp8_format is not None)
    save, log_dir = options.checkpoint.save, _log_folder(options)
    file = None
    if log_dir is not None:
        # A save folder belongs to one run. A log folder may be shared, and what others wrote there is not cut.
        path = log_dir / METRICS
        if save is None:
            file = MetricsFile(path, None, "a run that does not save")
        else:
            root = Path(save).resolve()
            file = MetricsFile(path, run.iteration, None if path.resolve().parent == root else writer_name(root))
    is_tracked = options.logging.wandb_project is not None or options.logging.mlflow_experiment is not None
    trackers = open_trackers(options, run_id_of(Path(save)) if is_tracked and save is not None else None)
    return MetricsWriter(options.logging, file, run.end.iteration, run.iteration, tflop_per_token, peak, trackers)


def _log_folder(options: PretrainOptions) -> Path | None:
    folder = options.logging.log_dir or options.checkpoint.save
    return None if folder is None else Path(folder)
