"""This rank's micro-batches, for each of its model chunks."""

import itertools
from collections.abc import Iterator
from typing import Any

from sedd_megatron.data.collator import NoisingCollator
from sedd_megatron.data.document_ends import DocumentRules
from sedd_megatron.data.loader import training_batches
from sedd_megatron.data.micro_batch import MicroBatch, MicroBatchCollator
from sedd_megatron.data.windows import WindowDataset
from sedd_megatron.diffusion.draws import Stream
from sedd_megatron.parallel.fused_head import ROW_MULTIPLE
from sedd_megatron.training.build import TrainingRun


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
    groups, documents = run.groups, DocumentRules.of(options.data, run.tokenizer)
    row_multiple = ROW_MULTIPLE[groups.device.type]
    return MicroBatchCollator(noising, groups.context_rank, groups.context_size, row_multiple, documents)


def training_iterators(run: TrainingRun, dataset: WindowDataset) -> list[Iterator[MicroBatch]]:
    """This rank's micro-batches from the run's position on, for each of its model chunks."""
    batches = training_batches(
        dataset,
        micro_batch_collator(run, Stream.TRAIN_NOISE),
        consumed_samples=run.consumed_samples,
        micro_batch_size=run.options.training.micro_batch_size,
        data_parallel_rank=run.groups.data_rank,
        data_parallel_size=run.groups.data_size,
        **loading(run),
    )
    return one_per_chunk(batches, run)


def loading(run: TrainingRun) -> dict[str, Any]:
    """How the loader makes batches for this run's device."""
    device = run.groups.device.type
    return {"num_workers": run.options.data.num_workers_on(device), "pin_memory": device == "cuda"}


def one_per_chunk(batches: Iterator[MicroBatch], run: TrainingRun) -> list[Iterator[MicroBatch]]:
    """Interleaved stages each read every micro-batch, a few apart; it is drawn once."""
    return list(itertools.tee(batches, len(run.ddp_chunks)))
