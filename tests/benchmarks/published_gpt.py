"""Megatron-LM's published training speeds, and each run of them as a workload of the planner's time model.

AMPERE: Narayanan et al., arXiv 2104.04473, table 1, with the settings of Megatron-LM's
examples/academic_paper_scripts/sc21/run_table_1.sh: fp16, every layer recomputed, attention in separate kernels, DDP
without overlap, length 2048, 51,200 states. Operations by the paper's equation 3, recompute included.

HOPPER: Megatron-LM's README, images/model_table.png: bf16, length 4096, 131,072 states, communication overlapped
(--overlap-grad-reduce --overlap-param-gather --tp-comm-overlap). Operations without recompute, attention to all
positions counted though the causal kernel skips half. The table says nothing of micro-batches and interleaving: taken
are all sequences of a replica at once without a pipeline, and with one a sequence, and one layer a virtual stage.

Fitted to them are the two shares of the peak in planning/devices.py, one for each table.
"""

from typing import NamedTuple

from sedd_megatron.planning.devices import DEVICES, TENSOR_EXPOSED, Device
from sedd_megatron.planning.time import BACKWARD_BYTES, Group, Product, Work, Workload, step_time

GPUS_PER_NODE = 8


class Published(NamedTuple):
    """One row of a table."""

    name: str
    heads: int
    hidden: int
    layers: int
    tensor: int
    pipeline: int
    gpus: int
    batch: int
    micro_batch: int
    chunks: int
    tflops: float


AMPERE_ROWS = [
    Published("1.7B", 24, 2304, 24, 1, 1, 32, 512, 16, 1, 137),
    Published("3.6B", 32, 3072, 30, 2, 1, 64, 512, 16, 1, 138),
    Published("7.5B", 32, 4096, 36, 4, 1, 128, 512, 16, 1, 142),
    Published("18.4B", 48, 6144, 40, 8, 1, 256, 1024, 8, 1, 135),
    Published("39.1B", 64, 8192, 48, 8, 2, 512, 1536, 4, 1, 138),
    Published("76.1B", 80, 10240, 60, 8, 4, 1024, 1792, 2, 3, 140),
    Published("145.6B", 96, 12288, 80, 8, 8, 1536, 2304, 2, 2, 148),
    Published("310.1B", 128, 16384, 96, 8, 16, 1920, 2160, 1, 2, 155),
    Published("529.6B", 128, 20480, 105, 8, 35, 2520, 2520, 1, 3, 163),
    Published("1008.0B", 160, 25600, 128, 8, 64, 3072, 3072, 1, 1, 163),
]
HOPPER_ROWS = [
    Published("1.7B", 16, 2048, 24, 1, 1, 48, 192, 4, 1, 408.8),
    Published("7.1B", 32, 4096, 30, 2, 1, 96, 192, 4, 1, 465.9),
    Published("16B", 48, 6144, 32, 4, 1, 192, 192, 4, 1, 489.1),
    Published("32B", 56, 7168, 48, 8, 1, 384, 192, 4, 1, 459.6),
    Published("70B", 64, 8192, 84, 8, 2, 768, 384, 1, 42, 419.7),
    Published("119B", 80, 10240, 92, 8, 4, 1536, 768, 1, 23, 420.5),
    Published("177B", 96, 12288, 96, 8, 6, 2304, 1152, 1, 16, 432.8),
    Published("314B", 128, 16384, 96, 8, 8, 3072, 1536, 1, 12, 474.4),
    Published("462B", 144, 18432, 112, 8, 16, 6144, 3072, 1, 7, 459.9),
]


class Table(NamedTuple):
    """Rows, and what they have in common."""

    rows: list[Published]
    device: Device
    length: int
    vocabulary: int
    of_2021: bool  # recompute, attention in separate kernels, and nothing overlaps but gradients without a pipeline


AMPERE = Table(AMPERE_ROWS, DEVICES["a100"], 2048, 51_200, of_2021=True)
HOPPER = Table(HOPPER_ROWS, DEVICES["h100"], 4096, 131_072, of_2021=False)


def estimated_tflops(row: Published, table: Table) -> float:
    """Of one GPU, as the table counts operations, in the time that the planner estimates."""
    return flops(row, table) / row.gpus / step_time(workload(row, table), table.device).total / 1e12


def flops(row: Published, table: Table) -> float:
    """Of a step: arXiv 2104.04473, equation 3, and where nothing is recomputed three passes of its four."""
    tokens, width, passes = row.batch * table.length, row.hidden, 4 if table.of_2021 else 3
    layer = 24 * width**2 * (1 + table.length / (6 * width))
    return tokens * (row.layers * layer * passes + 6 * width * table.vocabulary)


def workload(row: Published, table: Table) -> Workload:
    """A causal GPT's step in the row's layout."""
    rows, width, shards = row.micro_batch * table.length, row.hidden, row.tensor
    replicas, layers = row.gpus // row.tensor // row.pipeline, row.layers // row.pipeline
    parameters = layers * 12 * width**2 / shards + table.vocabulary / shards * width
    columns, of_2021 = table.vocabulary / shards, table.of_2021
    return Workload(
        layer=_layer_work(row, table),
        # Cross entropy in float32, an operation after the other, forward and backward together 52 bytes a logit.
        head=Work((Product(rows, width, columns),), moved_bytes=rows * columns * 52 / (1 + BACKWARD_BYTES)),
        layers=layers,
        stages=row.pipeline,
        chunks=row.chunks,
        num_microbatches=row.batch // replicas // row.micro_batch,
        recomputed=1.0 if of_2021 else 0.0,
        tensor=Group(shards, shards),
        context=Group(1, 1),
        data=Group(replicas, min(GPUS_PER_NODE // shards, replicas)),
        message_bytes=2 * rows * width / shards,
        messages_leave_node=True,
        messages_overlap=not of_2021,
        gradient_bytes=(2 if of_2021 else 4) * parameters,
        parameter_bytes=0.0 if of_2021 else 2 * parameters,
        # torch's DDP without a pipeline, Megatron's of then with one.
        gradients_overlap=not of_2021 or row.pipeline == 1,
        parameters_overlap=not of_2021,
        optimizer_bytes=(4 + 3 * 8 + 2) * parameters / (1 if of_2021 else replicas) + 8 * parameters,
        tensor_exposed=1.0 if of_2021 else TENSOR_EXPOSED,
    )


def _layer_work(row: Published, table: Table) -> Work:
    rows, width, length, shards = row.micro_batch * table.length, row.hidden, table.length, row.tensor
    products = (
        Product(rows, width, 3 * width / shards),
        Product(rows, width / shards, width),
        Product(rows, width, 4 * width / shards),
        Product(rows, 4 * width / shards, width),
    )
    # Norms and residuals with dropout, whole on each rank before there was sequence parallelism; GELU.
    moved = rows * width * (22 / (1 if table.of_2021 else shards) + 16 / shards)
    if table.of_2021:
        size, count = width / row.heads, row.micro_batch * row.heads / shards
        products += (Product(length, size, length, count), Product(length, length, size, count))
        # Softmax reads and writes the scores, and dropout again, with its mask.
        moved += 9 * count * length**2
    return Work(
        products,
        attention_flops=0.0 if table.of_2021 else 4 * rows * length / 2 * width / shards,
        moved_bytes=moved,
        reduced_bytes=2 * 2 * rows * width,
        reductions=2,
    )
