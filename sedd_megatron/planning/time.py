"""Seconds of a training step on a cluster, by formula, from what one rank computes, moves and sends.

A matrix product takes its operations over a share of the peak and its bytes over a share of the memory's bandwidth:
small per-rank products are slow by themselves, without a table of measured sizes. What has no product in it takes its
bytes. The pipeline's bubble is (p - 1) / v of a micro-batch's time (Narayanan et al., arXiv 2104.04473, section 2.2.2),
and a ring all-reduce sends 2 (n - 1) / n of its bytes from each of n ranks (Patarasuk and Yuan, 2009).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sedd_megatron.planning.devices import ATTENTION_SHARE, LINK_SHARE, MEMORY_SHARE, Device

# Gradients of both factors: two products for each of the forward pass.
BACKWARD_PRODUCTS = 2.0
# Attention's fused kernel makes its scores again: five products for two (Dao, arXiv 2307.08691, section 2.3.2).
BACKWARD_ATTENTION = 2.5
# The incoming gradient and what was kept are read, and one gradient is written.
BACKWARD_BYTES = 1.5
# Of a collective or a message, however short; and of an operation on the host, which the device cannot run ahead of.
COLLECTIVE_SECONDS, LAUNCH_SECONDS = 20e-6, 5e-6
# Launching, waiting for the slowest rank, data and logging, over all that is counted.
OVERHEAD = 1.03


class Product(NamedTuple):
    """[rows, inner] times [inner, columns], `count` of them."""

    rows: float
    inner: float
    columns: float
    count: float = 1

    @property
    def flops(self) -> float:
        """2 per multiply-add."""
        return 2 * self.rows * self.inner * self.columns * self.count

    def moved_bytes(self, size: int) -> float:
        """Both factors read and the product written, in elements of `size` bytes."""
        rows, inner, columns, count = self
        return size * count * (rows * inner + inner * columns + rows * columns)


@dataclass(frozen=True)
class Work:
    """What one rank computes forward, of a layer or of the head, for one micro-batch."""

    products: Sequence[Product]
    attention_flops: float = 0.0  # in one kernel
    moved_bytes: float = 0.0  # by what is no product
    reduced_bytes: float = 0.0  # summed over tensor-parallel ranks, all calls together
    reductions: int = 0
    gathered_bytes: float = 0.0  # put together over context-parallel ranks
    operations: int = 0  # that the host launches
    fp8: bool = False


@dataclass(frozen=True)
class Group:
    """Ranks of one collective: how many, and how many of them are in a node."""

    size: int
    in_node: int

    def sends(self, held: float) -> float:
        """Bytes that each rank sends to give or take (n - 1) / n of `held` bytes by a ring."""
        return held * (self.size - 1) / self.size

    def seconds(self, held: float, device: Device) -> float:
        """A ring's time; where it leaves the node all of its ranks there share their adapters."""
        if self.size == 1 or held == 0:
            return 0.0
        bandwidth = device.nvlink
        if self.in_node < self.size:
            bandwidth = min(bandwidth, self.in_node * device.network)
        return self.sends(held) / (LINK_SHARE * bandwidth) + COLLECTIVE_SECONDS

    def link_bytes(self, held: float) -> "LinkBytes":
        """What a rank sends, by kind of link: of a ring's hops one in `in_node` leaves the node."""
        sent = self.sends(held)
        outside = sent / self.in_node if self.in_node < self.size else 0.0
        return LinkBytes(sent - outside, outside)


class LinkBytes(NamedTuple):
    """Bytes that a rank sends in a step."""

    nvlink: float
    network: float


@dataclass(frozen=True)
class Workload:
    """One rank's step, of the stage that has the head."""

    layer: Work
    head: Work
    layers: int  # on a rank
    stages: int
    chunks: int  # stages that are interleaved on a rank
    num_microbatches: int
    recomputed: float  # layers' forward passes made again, as a share of all
    tensor: Group
    context: Group
    data: Group
    message_bytes: float  # between neighbouring stages, for a micro-batch
    messages_leave_node: bool
    messages_overlap: bool
    gradient_bytes: float  # reduced over replicas
    parameter_bytes: float  # gathered from them; 0 where all update all
    gradients_overlap: bool
    parameters_overlap: bool
    optimizer_bytes: float  # read and written by the update
    tensor_exposed: float = 1.0  # the share of tensor-parallel communication that nothing hides


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they are spent on, and what a rank sends in it."""

    compute: float
    tensor: float
    context: float
    pipeline: float
    bubble: float
    data: float
    optimizer: float
    links: LinkBytes

    @property
    def total(self) -> float:
        """All of it, with what nobody counts."""
        parts = self.compute + self.tensor + self.context + self.pipeline + self.bubble + self.data + self.optimizer
        return OVERHEAD * parts


def step_time(load: Workload, device: Device) -> StepTime:
    """Seconds of one optimizer step: 1F1B, the last stage with the head setting the pace."""
    forward, backward = _compute_seconds(load.layer, device)
    backward += load.recomputed * forward
    head = sum(_compute_seconds(load.head, device))
    passes = 2 + load.recomputed
    reduced = 2 * load.layer.reduced_bytes
    tensor = load.tensor_exposed * passes * _collective_seconds(load.tensor, reduced, load.layer.reductions, device)
    head_tensor = 2 * _collective_seconds(load.tensor, 2 * load.head.reduced_bytes, load.head.reductions, device)
    # Keys and values gathered forward, and their gradients scattered back.
    context = passes * _collective_seconds(load.context, load.layer.gathered_bytes, 1, device)
    link = device.network if load.messages_leave_node else device.nvlink
    messages = 0 if load.stages == 1 else 2 * load.chunks
    message_seconds = messages * load.message_bytes / (LINK_SHARE * link)
    layers, count = load.layers, load.num_microbatches
    stage = layers * (forward + backward + tensor + context)
    waits = (load.stages - 1) / load.chunks
    # Overlapped, messages are waited for while the pipeline fills and empties.
    exposed = waits if load.messages_overlap else count + waits
    # Interleaved, a stage's last micro-batches pass its chunks one after the other, a round of them at a time.
    last_round = min(load.stages, count) if load.chunks > 1 else 1
    gradients, parameters = (
        max(load.data.seconds(held, device) - (last_round * layers * hidden if overlaps else 0.0), 0.0)
        for held, hidden, overlaps in (
            # An all-reduce is both halves of it.
            (load.gradient_bytes * (1 if load.parameter_bytes else 2), backward, load.gradients_overlap),
            (load.parameter_bytes, forward, load.parameters_overlap),
        )
    )
    return StepTime(
        compute=count * (layers * (forward + backward) + head),
        tensor=count * (layers * tensor + head_tensor),
        context=count * layers * context,
        pipeline=exposed * message_seconds + count * messages * COLLECTIVE_SECONDS,
        bubble=waits * stage,
        data=gradients + parameters,
        optimizer=load.optimizer_bytes / (MEMORY_SHARE * device.memory_bandwidth),
        links=_link_bytes(load, passes, count * messages * load.message_bytes),
    )


def bubble_share(stages: int, chunks: int, num_microbatches: int) -> float:
    """Time of the bubble over that of the work (arXiv 2104.04473, section 2.2.2)."""
    return (stages - 1) / (chunks * num_microbatches)


def _compute_seconds(work: Work, device: Device) -> tuple[float, float]:
    """Forward and backward."""
    size = 1 if work.fp8 else 2
    peak = device.product_share * device.peak_flops(work.fp8)
    bandwidth = MEMORY_SHARE * device.memory_bandwidth
    products = sum(p.flops / peak + p.moved_bytes(size) / bandwidth for p in work.products)
    attention = work.attention_flops / (ATTENTION_SHARE * device.peak_flops(fp8=False))
    moved = work.moved_bytes / bandwidth
    backward = BACKWARD_PRODUCTS * products + BACKWARD_ATTENTION * attention + BACKWARD_BYTES * moved
    launches = LAUNCH_SECONDS * work.operations
    return max(products + attention + moved, launches), max(backward, BACKWARD_PRODUCTS * launches)


def _collective_seconds(group: Group, held: float, calls: int, device: Device) -> float:
    return group.seconds(held, device) + (calls - 1) * COLLECTIVE_SECONDS if group.size > 1 and held > 0 else 0.0


def _link_bytes(load: Workload, passes: float, messages: float) -> LinkBytes:
    per_layer = load.num_microbatches * load.layers * passes
    reduced = per_layer * load.layer.reduced_bytes + 2 * load.num_microbatches * load.head.reduced_bytes
    gradients = load.gradient_bytes * (1 if load.parameter_bytes else 2)
    parts = [
        load.tensor.link_bytes(2 * reduced),
        load.context.link_bytes(per_layer * load.layer.gathered_bytes),
        load.data.link_bytes(gradients + load.parameter_bytes),
        LinkBytes(0.0, messages) if load.messages_leave_node else LinkBytes(messages, 0.0),
    ]
    return LinkBytes(sum(part.nvlink for part in parts), sum(part.network for part in parts))
