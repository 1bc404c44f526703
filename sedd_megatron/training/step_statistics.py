"""What a training step tells beside its loss: without a wait for the device and without a collective of its own.

Numbers of the last stage are means over micro-batches, replicas and parts of the sequence, as the loss is, and travel
with it; squares of gradients travel with that of the whole norm, and what is the largest of any rank with the ranks'
flags.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

from sedd_megatron.data.micro_batch import MicroBatch
from sedd_megatron.diffusion import AbsorbingGraph, UniformGraph
from sedd_megatron.diffusion.corruption import NoisyBatch
from sedd_megatron.run_files import NETWORK_PARTS, NUM_BANDS
from sedd_megatron.training.main_parameters import MainParameter

# Of the modules of a layer; other parameters are of the part that their name begins with.
PART_IN_LAYER = {
    "modulation": "modulation",
    "input_layernorm": "norm",
    "self_attention": "attention",
    "pre_mlp_layernorm": "norm",
    "mlp": "mlp",
}
# That are written: float32 has no more.
DIGITS = 9


def loss_numbers(loss: Tensor, of_sequences: Tensor, batch: NoisyBatch) -> Tensor:
    """What the last stage says of a micro-batch: [2 + 2 * NUM_BANDS] float64.

    The loss; the share of tokens that the noise has moved; and by band of t the sum of the sequences' losses, then how
    many there are. `loss` and of_sequences [B] are nats per token.
    """
    # By a product, whose order is fixed on a GPU too: a resumed run writes the same bits.
    bands = torch.arange(NUM_BANDS, device=batch.t.device)[:, None]
    in_band = ((batch.t * NUM_BANDS).long().clamp_max(NUM_BANDS - 1) == bands).double()
    moved = (batch.x_t != batch.x_0).double().mean()
    return torch.cat([torch.stack([loss.double(), moved]), in_band @ of_sequences.double(), in_band.sum(1)])


def parameters_by_part(parameters: Sequence[MainParameter]) -> list[list[Tensor]]:
    """What this rank's optimizer updates of each of NETWORK_PARTS."""
    found: dict[str, list[Tensor]] = {part: [] for part in NETWORK_PARTS}
    for parameter in parameters:
        first, *rest = parameter.sharded.key.split(".")
        found[PART_IN_LAYER[rest[1]] if first == "decoder" else first].append(parameter.tensor)
    return list(found.values())


class StepWatch:
    """One step as the host sees it: its wait for data, and its memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.data_wait = 0.0

    def timed(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """The same micro-batches; the time until each is there is added up."""
        start = time.perf_counter()
        for batch in batches:
            self.data_wait += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def host_numbers(self) -> list[float]:
        """Memory in bytes and the wait in seconds, of which the largest of any rank is wanted."""
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = psutil.Process().memory_info().rss
        return [float(memory), self.data_wait]


def largest_log_score(losses: Sequence[dict[str, Any]], device: torch.device) -> Tensor:
    """Of this rank's micro-batches and columns: [1] float64 on the device; -inf where it has none."""
    none = torch.full((), -math.inf, dtype=torch.float64, device=device)
    return torch.stack([none, *(loss["largest_log_score"].double() for loss in losses)]).amax(0, keepdim=True)


def step_metrics(
    means: Sequence[float], squares: Sequence[float], largest: Sequence[float], graph: AbsorbingGraph | UniformGraph
) -> dict[str, float]:
    """The fields of metrics.jsonl, from the mean of `loss_numbers`, the squared norms of NETWORK_PARTS, and of any rank
    the largest of `host_numbers` and `largest_log_score`.

    loss_band_K is of t from K/8 to (K+1)/8; a band without a sequence in this step has none, as a step without a
    masked token has no largest_log_score.
    """
    _, moved, *bands = means
    sums, counts = bands[:NUM_BANDS], bands[NUM_BANDS:]
    memory, data_wait, log_score = largest
    metrics = {f"loss_band_{band}": sums[band] / counts[band] for band in range(NUM_BANDS) if counts[band]}
    metrics["moved_share" if graph.mask_token_id is None else "masked_share"] = moved
    if log_score > -math.inf:
        metrics["largest_log_score"] = log_score
    metrics |= {f"grad_norm_{part}": math.sqrt(square) for part, square in zip(NETWORK_PARTS, squares, strict=True)}
    metrics = {name: float(f"{value:.{DIGITS}g}") for name, value in metrics.items()}
    return metrics | {"memory_bytes": int(memory), "data_wait_seconds": round(data_wait, 6)}
