"""The training objective on one micro-batch, in the form that Megatron's schedules call."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from sedd_megatron.data.micro_batch import MicroBatch
from sedd_megatron.diffusion import AbsorbingGraph, UniformGraph
from sedd_megatron.diffusion.corruption import NoisyBatch
from sedd_megatron.diffusion.score_entropy import ScoreEntropyCoefficients, weighted_loss
from sedd_megatron.diffusion.transfers import to_device
from sedd_megatron.model.score_head import log_score_offset
from sedd_megatron.parallel.fused_head import FusedHeadSettings, HeadLoss, ScoreEntropyRows, sum_by_sequence
from sedd_megatron.parallel.groups import ParallelGroups
from sedd_megatron.parallel.vocab_parallel import largest_log_score, vocab_parallel_score_entropy
from sedd_megatron.training.step_statistics import loss_numbers

LossFunction = Callable[[Tensor | HeadLoss], tuple[Tensor, dict[str, Tensor]]]
ForwardStep = Callable[[Iterator[MicroBatch], torch.nn.Module], tuple[Tensor, LossFunction]]


def make_forward_step(
    graph: AbsorbingGraph | UniformGraph, groups: ParallelGroups, loss_chunk_rows: int, num_microbatches: int
) -> ForwardStep:
    """Megatron's forward_step_func for this graph and layout; `loss_chunk_rows` 0 takes the dense logits' way."""
    settings = FusedHeadSettings(
        # Only tokens count: under the absorbing graph every row is at the mask, whose own column is left out.
        num_states=graph.num_tokens,
        chunk_rows=loss_chunk_rows,
        # Megatron's schedule multiplies the loss by this (pipeline_parallel/schedules.py).
        gradient_scale=groups.context_size / num_microbatches,
    )

    def forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        noisy, position, num_rows, keys, ends, positions = next(batches)
        batch = NoisyBatch(*(to_device(field, groups.device) for field in noisy))
        run_model = partial(
            model,
            batch.x_t,
            batch.sigma,
            dropout_keys=to_device(keys, groups.device),
            # Stays on the host, which cuts by it.
            document_ends=ends,
            position_ids=None if positions is None else to_device(positions, groups.device),
        )
        # Megatron asks the last stage alone for a loss.
        if loss_chunk_rows == 0 or not groups.is_last_stage:
            return run_model(), partial(score_entropy_loss, batch, graph, groups.collection.tp)
        rows, constant = score_entropy_rows(batch, graph, to_device(position, groups.device), num_rows)
        output = run_model(rows=rows, settings=settings)
        return output, partial(_add_constant, batch, rows, constant)

    return forward_step


def score_entropy_rows(
    batch: NoisyBatch, graph: AbsorbingGraph | UniformGraph, position: Tensor, num_rows: int
) -> tuple[ScoreEntropyRows, Tensor]:
    """The bound of arXiv 2310.16834, equation 10, on one micro-batch, as `score_entropy_loss` has it, by rows.

    Returns:
        The rows that `position` names, of which those from `num_rows` on weigh nothing; and what is the same for every
        model, of each row [R].
    """
    is_absorbing = graph.mask_token_id is not None

    def of_rows(values: Tensor) -> Tensor:
        return values.expand_as(batch.x_t).t().flatten().index_select(0, position)

    x_0, x_t, sigma = of_rows(batch.x_0), of_rows(batch.x_t), of_rows(batch.sigma[:, None])
    counts = torch.arange(len(position), device=position.device) < num_rows
    weight = torch.where(counts, of_rows(batch.sigma_rate[:, None]) / len(batch.sigma), 0.0)
    # Each row as a sequence of one.
    coefficients = ScoreEntropyCoefficients(*(c[:, 0] for c in graph.coefficients(sigma, x_t[:, None], x_0[:, None])))
    log_offset = log_score_offset(graph, sigma)
    rows = ScoreEntropyRows(
        num_rows=num_rows,
        position=position,
        x_0=x_0,
        x_t=None if is_absorbing else x_t,
        log_scale=torch.log(weight * coefficients.exp_sum) - log_offset,
        log_sum=None if is_absorbing else weight * coefficients.log_sum,
        target=weight * coefficients.target,
        log_offset=log_offset,
    )
    # The uniform graph has no offset; the absorbing one no sum of log-scores, and its x_0 is never x_t at a mask.
    return rows, weight * coefficients.constant - rows.target * log_offset


def _add_constant(
    batch: NoisyBatch, rows: ScoreEntropyRows, constant: Tensor, output: HeadLoss
) -> tuple[Tensor, dict[str, Tensor]]:
    num_sequences, length = batch.x_t.shape
    loss = output.loss + constant.sum()
    of_sequences = output.of_sequences + sum_by_sequence(constant.double(), rows.position, num_sequences)
    # Weights have the mean over sequences in them.
    numbers = loss_numbers(loss.detach() / length, of_sequences * (num_sequences / length), batch)
    return loss, {"numbers": numbers, "largest_log_score": output.largest_log_score}


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
        for the log `loss_numbers`, in nats per token of this rank's, and the largest log-score that counts.
    """
    log_offset = log_score_offset(graph, batch.sigma)[:, None].expand_as(batch.x_t)
    coefficients = graph.coefficients(batch.sigma, batch.x_t, batch.x_0)
    score_entropy = vocab_parallel_score_entropy(
        logits, log_offset, batch.x_t, batch.x_0, coefficients, graph.num_states, tp_group
    )
    of_sequences = weighted_loss(score_entropy, batch.sigma_rate).sum(dim=1)
    loss, length = of_sequences.mean(), batch.x_t.shape[1]
    numbers = loss_numbers(loss.detach() / length, of_sequences.detach() / length, batch)
    counts = coefficients.exp_sum > 0
    largest = largest_log_score(logits.detach(), log_offset, batch.x_t, counts, graph.num_states, tp_group)
    return loss, {"numbers": numbers, "largest_log_score": largest}
