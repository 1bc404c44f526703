"""A step that is not finite or a spike: it is not taken, it is replayed to find out why, and it is written down."""

import itertools
import json
import math
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from sedd_megatron.data.micro_batch import MicroBatch
from sedd_megatron.data.windows import WindowDataset
from sedd_megatron.errors import UserError, one_line, say
from sedd_megatron.output_files import unused_path
from sedd_megatron.parallel.groups import on_first_rank, tell
from sedd_megatron.training.build import TrainingRun
from sedd_megatron.training.checkpoint_format import write_synced
from sedd_megatron.training.iterators import training_iterators
from sedd_megatron.training.optimizer_step import squared_gradient_norms
from sedd_megatron.training.recent_steps import StepResult
from sedd_megatron.training.run_folder import checkpoint_name
from sedd_megatron.training.step import begin_training_pass, forward_backward, read_numbers, read_step

FOLDER = "skipped_steps"
# How far a replay may be off, relative. A CPU gives the same bits. A GPU's kernels may add in another order, and
# delayed FP8 scales are a step further; what makes a step bad is another size of number.
TOLERANCE = {"cpu": 0.0, "cuda": 0.05}
MOST_NAMED = 8


class LocalGradientNorms:
    """Norms of this rank's own gradients, bucket by bucket, noted just before each is summed over the replicas, which
    overwrites it. Costs a pass over the gradients, and no wait.
    """

    def __init__(self, ddp_chunks: Sequence[DistributedDataParallel]) -> None:
        groups = [group for chunk in ddp_chunks for group in chunk.bucket_groups]
        self._norms: list[Tensor | None] = [None] * len(groups)
        for number, group in enumerate(groups):
            # Of the object: Megatron calls it from its hooks as well, in the middle of the backward pass.
            group.start_grad_sync = self._noting(number, group)

    def _noting(self, number: int, group: Any) -> Any:
        start_grad_sync = type(group).start_grad_sync

        def noted_start(*arguments: Any, **keywords: Any) -> None:
            # Of gradients that are summed in bfloat16 a norm in that would have three digits.
            norms = [torch.linalg.vector_norm(bucket.grad_data, dtype=torch.float32) for bucket in group.buckets]
            self._norms[number] = torch.stack(norms)
            start_grad_sync(group, *arguments, **keywords)

        return noted_start

    def norm(self) -> Tensor:
        """That of all buckets together in the last pass: scalar float64."""
        return torch.linalg.vector_norm(torch.cat(self._norms).double())

    def read(self) -> list[float]:
        """The norms of the last step, on the host."""
        (norms,) = read_numbers(torch.cat(self._norms).double())
        return norms


@dataclass(frozen=True)
class LocalPass:
    """What one rank computed by itself, before anything was summed over ranks."""

    losses: list[float]  # by micro-batch, nats per token; only on the last stage
    gradient_norms: list[float]  # by bucket


@dataclass(frozen=True)
class RankReport:
    """One rank's two passes over its part of a batch."""

    rank: int
    host: str
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    data_rank: int
    samples: list[list[int]]  # positions in the training order, by micro-batch
    times: list[list[float]]
    first: LocalPass
    replayed: LocalPass

    def differs(self, tolerance: float) -> bool:
        """Whether the two passes are further apart than that."""
        first, replayed = ((*one.losses, *one.gradient_norms) for one in (self.first, self.replayed))
        return any(_differ(a, b, tolerance) for a, b in zip(first, replayed, strict=True))


class StepGuard:
    """Judges a run's steps. All ranks judge alike."""

    def __init__(self, run: TrainingRun, dataset: WindowDataset) -> None:
        """`dataset` is what the run trains on: a batch is made again from it."""
        self._dataset = dataset
        self._norms = LocalGradientNorms(run.ddp_chunks)

    def gradient_norm(self) -> Tensor:
        """The norm of this rank's own gradients in the last pass: scalar float64 on the device. Not collective."""
        return self._norms.norm()

    def fault(self, run: TrainingRun, result: StepResult) -> str | None:
        """In words, why a step with this result is not to be taken; None if it may be."""
        return run.recent.fault(result, run.options.faults.spike_factor)

    def skip(self, run: TrainingRun, fault: str, losses: list[dict[str, Any]], result: StepResult) -> dict[str, Any]:
        """Replay the step whose result this is, write it down, and go on after it. Collective over all ranks.

        Returns:
            Its line of metrics.jsonl.

        Raises:
            UserError: it is one more than --max-skipped-steps.
        """
        training, most = run.options.training, run.options.faults.max_skipped_steps
        first = self._local_pass(losses)
        replayed, reports = self._replay(run, first)
        tolerance = TOLERANCE[run.groups.device.type]
        # At the edge of a spike a GPU's replay may be on its other side, and is the same.
        is_same = not any(_differ(one, other, tolerance) for one, other in zip(result, replayed, strict=True))
        again = fault if is_same else self.fault(run, replayed)
        cause, way_out = _verdict(again, replayed, reports, tolerance)
        iteration = run.iteration + 1
        record = {
            "iteration": iteration,
            "fault": fault,
            "cause": cause,
            "result": result._asdict(),
            "replayed": replayed._asdict(),
            "seed": training.seed,
            "consumed_samples": run.consumed_samples,
            "ranks": [asdict(report) for report in reports],
        }
        written = _write_down(run, record)
        run.consumed_samples += run.batch_size
        run.iteration, run.skipped_steps = iteration, run.skipped_steps + 1
        if run.skipped_steps > most:
            raise UserError(
                f"{fault} at iteration {iteration}; nothing is saved from here on: {cause}{written}; {way_out}, or go "
                f"on without such steps by --max-skipped-steps {run.skipped_steps}"
            )
        skipped = f"is skipped ({run.skipped_steps} of --max-skipped-steps {most})"
        tell([f"warning: {fault} at iteration {iteration}, which {skipped}: {cause}{written}"], to_stderr=True)
        return {"iteration": iteration, "skipped": f"{fault}: {cause}", "consumed_samples": run.consumed_samples}

    def _local_pass(self, losses: list[dict[str, Any]]) -> LocalPass:
        return LocalPass([loss["numbers"][0].item() for loss in losses], self._norms.read())

    def _replay(self, run: TrainingRun, first: LocalPass) -> tuple[StepResult, list[RankReport]]:
        """The same batch again, from the data on: every draw has a key, and the parameters are what they were."""
        batches, seen = training_iterators(run, self._dataset), []
        batches[0] = _seen(itertools.islice(batches[0], run.num_microbatches), seen)
        begin_training_pass(run)
        run.optimizer.zero_grad()
        losses = forward_backward(run, batches, forward_only=False)
        result = read_step(run, losses, squared_gradient_norms(run.optimizer, run.groups.device)).result
        groups = run.groups
        own = RankReport(
            rank=torch.distributed.get_rank(),
            host=socket.gethostname(),
            tensor_rank=groups.tensor_rank,
            pipeline_rank=groups.pipeline_rank,
            context_rank=groups.context_rank,
            data_rank=groups.data_rank,
            samples=[batch.noisy.sample_index.tolist() for batch in seen],
            times=[batch.noisy.t.tolist() for batch in seen],
            first=first,
            replayed=self._local_pass(losses),
        )
        reports: list[RankReport] = [own] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(reports, own)
        return result, reports


def _seen(batches: Iterator[MicroBatch], seen: list[MicroBatch]) -> Iterator[MicroBatch]:
    for batch in batches:
        seen.append(batch)
        yield batch


def _verdict(fault: str | None, result: StepResult, reports: list[RankReport], tolerance: float) -> tuple[str, str]:
    """What a replay tells of the cause, and the way out; `fault` is what is wrong with the replay's own `result`."""
    restart = "start again from the last checkpoint, without that machine"
    differing = [report for report in reports if report.differs(tolerance)]
    if differing:
        names = ", ".join(f"rank {report.rank} on {report.host}" for report in differing[:MOST_NAMED])
        more = f" and {len(differing) - MOST_NAMED} more" if len(differing) > MOST_NAMED else ""
        return f"replayed, {names}{more} computed something else, which is hardware", restart
    if fault is None:
        size = f"the loss is {result.loss:.4g} and the gradient norm {result.grad_norm:.4g}"
        return f"replayed, every rank computed the same and {size}, which is hardware between the ranks", restart
    return (
        "replayed, every rank computed the same, which is the data or the model",
        "go on from the last checkpoint, or start anew, with a lower --lr or --clip-grad, and look at the data",
    )


def _differ(first: float, replayed: float, tolerance: float) -> bool:
    both_nan = math.isnan(first) and math.isnan(replayed)
    return not both_nan and not math.isclose(first, replayed, rel_tol=tolerance)


def _write_down(run: TrainingRun, record: dict[str, Any]) -> str:
    """Write a record on the first rank, and say where on all; nowhere without a folder, or on a disk that refuses."""
    folder = run.options.checkpoint.save or run.options.logging.log_dir
    return "" if folder is None else on_first_rank(lambda: _written(Path(folder) / FOLDER, record))


def _written(folder: Path, record: dict[str, Any]) -> str:
    # A run that goes back may skip the same step again, and for another reason.
    path = unused_path(folder, checkpoint_name(record["iteration"]), ".json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_synced(path, json.dumps(_as_json(record), allow_nan=False) + "\n")
    except OSError as error:
        say(f"warning: {path}: {one_line(error)}; what was skipped is not written down", to_stderr=True)
        return ""
    return f" ({path})"


def _as_json(value: Any) -> Any:
    """With words for the numbers that JSON has none for."""
    if isinstance(value, dict):
        return {name: _as_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
