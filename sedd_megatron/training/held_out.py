"""The losses of windows that are not trained on: validation in a run, the test loss at its end, and --skip-train."""

from dataclasses import replace
from pathlib import Path

from sedd_megatron.data.windows import WindowDataset, Windows
from sedd_megatron.errors import UserError
from sedd_megatron.parallel.groups import is_first_rank, on_first_rank, tell
from sedd_megatron.run_files import METRICS
from sedd_megatron.training.build import TrainingRun
from sedd_megatron.training.metrics import MetricsWriter
from sedd_megatron.training.metrics_file import MetricsFile
from sedd_megatron.training.profiling import StepProbe
from sedd_megatron.training.step import largest_of_any_rank, read_numbers, require_finite
from sedd_megatron.training.stop_requests import StopRequests
from sedd_megatron.training.validation import validate
from sedd_megatron.training_schedule import is_due


def validate_if_due(
    run: TrainingRun, windows: Windows, metrics: MetricsWriter | None, requests: StopRequests, probe: StepProbe
) -> int:
    """Validate, unless that is not due; returns the signal that broke it off, or 0."""
    if not is_due(run.iteration, run.options.logging.eval_interval):
        return 0
    with probe.around_validation():
        return _evaluate(run, "validation", windows.valid, metrics, requests)


def compute_test_loss(run: TrainingRun, windows: Windows, metrics: MetricsWriter | None, requests: StopRequests) -> int:
    """The loss of the test windows, as Megatron-LM computes it after the last step; returns as `validate_if_due`. A
    start that has trained nothing makes up for one that a kill or a signal has broken off, and repeats none.
    """
    is_there = on_first_rank(lambda: metrics is not None and metrics.has_test_loss(run.iteration))
    if run.options.logging.eval_interval == 0 or is_there:
        return 0
    return _evaluate(run, "test", windows.test, metrics, requests)


def evaluate_alone(run: TrainingRun, windows: Windows) -> None:
    """What --skip-train does in place of training. Nothing is written but metrics.jsonl in --log-dir, where that is not
    the folder of a run.

    Raises:
        UserError: there are no windows to evaluate.
    """
    if len(windows.valid) + len(windows.test) == 0:
        raise UserError(
            f"--skip-train: --split {run.options.data.split} leaves no window for validation or test; give them a share"
        )
    for name, dataset in (("validation", windows.valid), ("test", windows.test)):
        if len(dataset) == 0:
            tell([f"no {name} windows, and no {name} loss: the data has none, or --split gives them no share"])
    metrics = _open_metrics(run) if is_first_rank() else None
    try:
        # A signal ends it at once: there is nothing to save.
        _evaluate(run, "validation", windows.valid, metrics)
        _evaluate(run, "test", windows.test, metrics)
    finally:
        if metrics is not None:
            metrics.close()


def request_to_any_rank(run: TrainingRun, requests: StopRequests) -> int:
    """The signal that has asked any rank to end, or 0. Collective over all ranks; waits for the device."""
    ((largest,),) = read_numbers(largest_of_any_rank([requests.requested], run.groups))
    return int(largest)


def _open_metrics(run: TrainingRun) -> MetricsWriter:
    save, log_dir = run.options.checkpoint.save, run.options.logging.log_dir
    file = None
    if log_dir is not None and (save is None or Path(save).resolve() != Path(log_dir).resolve()):
        file = MetricsFile(Path(log_dir) / METRICS, None, "a run that does not save")
    # TensorBoard would no longer show what the run has written after this step.
    return MetricsWriter(replace(run.options.logging, tensorboard_dir=None), file, run.iteration)


def _evaluate(
    run: TrainingRun,
    name: str,
    dataset: WindowDataset,
    metrics: MetricsWriter | None,
    requests: StopRequests | None = None,
) -> int:
    if len(dataset) == 0:
        return 0
    request = 0

    def is_broken_off() -> bool:
        nonlocal request
        if requests is None:
            return False
        request = request_to_any_rank(run, requests)
        return request > 0

    loss = validate(run, dataset, is_broken_off)
    if loss is None:
        return request
    require_finite(f"{name} loss", loss, run.iteration)
    if metrics is not None:
        metrics.held_out(name, {"iteration": run.iteration, f"{name}_loss": loss})
    return 0
