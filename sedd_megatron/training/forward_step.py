"""The training objective on one micro-batch, in the form that Megatron's schedules call."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from sedd_megatron.diffusion import AbsorbingGraph, UniformGraph
from sedd_megatron.diffusion.corruption import NoisyBatch
from sedd_megatron.diffusion.score_entropy import weighted_loss
from sedd_megatron.model.score_head import log_score_offset
from sedd_megatron.parallel.groups import ParallelGroups
from sedd_megatron.parallel.vocab_parallel import vocab_parallel_score_entropy

LossFunction = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
ForwardStep = Callable[[Iterator[NoisyBatch], torch.nn.Module], tuple[Tensor, LossFunction]]


def make_forward_step(graph: AbsorbingGraph | UniformGraph, groups: ParallelGroups) -> ForwardStep:
    """Megatron's forward_step_func for this graph and layout."""

    def forward_step(batches: Iterator[NoisyBatch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        batch = own_part_of_sequence(next(batches), groups.context_rank, groups.context_size)
        batch = NoisyBatch(*(field.to(groups.device, non_blocking=True) for field in batch))
        return model(batch.x_t, batch.sigma), partial(score_entropy_loss, batch, graph, groups.collection.tp)

    return forward_step


def own_part_of_sequence(batch: NoisyBatch, context_rank: int, context_size: int) -> NoisyBatch:
    """The contiguous part [B, S / CP] of a whole batch that a context-parallel rank computes."""
    if context_size == 1:
        return batch
    length = batch.x_t.shape[1] // context_size
    own = slice(context_rank * length, (context_rank + 1) * length)
    return batch._replace(x_0=batch.x_0[:, own], x_t=batch.x_t[:, own])


def score_entropy_loss(
    batch: NoisyBatch,
    graph: AbsorbingGraph | UniformGraph,
    tp_group: torch.distributed.ProcessGroup,
    logits: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The bound of arXiv 2310.16834, equation 10, on one micro-batch.

    Args:
        batch: this context-parallel rank's part of the sequences.
        logits: [B, S / CP, padded_vocab_size / TP], this rank's columns.

    Returns:
        The published loss, whose gradient is taken: summed over this rank's positions, averaged over sequences. And
        for the log the same in nats per token of this rank's.
    """
    log_offset = log_score_offset(graph, batch.sigma)[:, None].expand_as(batch.x_t)
    coefficients = graph.coefficients(batch.sigma, batch.x_t, batch.x_0)
    score_entropy = vocab_parallel_score_entropy(
        logits, log_offset, batch.x_t, batch.x_0, coefficients, graph.num_states, tp_group
    )
    loss = weighted_loss(score_entropy, batch.sigma_rate).sum(dim=1).mean()
    return loss, {"loss": loss.detach() / batch.x_t.shape[1]}
