"""Score entropy on vocabulary shards: one small all-reduce for the value, none in the gradient path.

Score entropy is affine in three sums over the vocabulary (diffusion/score_entropy.py), so its gradient

    d loss / d log_score_y = c_exp * exp(log_score_y) + c_log + c_target * [y = x_0],   y != x_t and y not padding

needs nothing from the other shards. A softmax cross entropy needs its normaliser; this needs none.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sedd_megatron.diffusion.score_entropy import ScoreEntropyCoefficients, ScoreSums, score_sums


class _VocabParallelScoreEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, log_offset, x_t, x_0, coefficients, num_states, tp_group):
        first_state = tp_group.rank() * logits.shape[-1]
        # Float32 before the sigma scaling and the exp: from bf16 log-scores the gradient is off by up to 4 percent.
        log_score = logits.float() - log_offset[..., None]
        sums = score_sums(log_score, x_t, x_0, first_state=first_state, num_states=num_states)
        sums = _sum_over_shards(sums, tp_group)
        ctx.save_for_backward(logits, log_offset, x_t, x_0, *coefficients)
        ctx.first_state, ctx.num_states = first_state, num_states
        return coefficients.apply(sums)

    @staticmethod
    def backward(ctx, grad_output):
        logits, log_offset, x_t, x_0, *coefficients = ctx.saved_tensors
        c_exp, c_log, c_target, _ = (c * grad_output for c in coefficients)
        # Recomputed and not saved: the exponentials would double the memory of the largest tensor in training.
        grad = (logits.float() - log_offset[..., None]).exp_().mul_(c_exp[..., None]).add_(c_log[..., None])
        _add_at_state(grad, x_0, c_target, ctx.first_state)
        zero_at_state(grad, x_t, ctx.first_state)
        grad[..., max(ctx.num_states - ctx.first_state, 0) :] = 0
        return grad.to(logits.dtype), None, None, None, None, None, None


def vocab_parallel_score_entropy(
    logits: Tensor,
    log_offset: Tensor,
    x_t: Tensor,
    x_0: Tensor,
    coefficients: ScoreEntropyCoefficients,
    num_states: int,
    tp_group: torch.distributed.ProcessGroup,
) -> Tensor:
    """Score entropy of every position from this rank's shard of the logits.

    Args:
        logits: [B, S, padded_vocab_size / TP], any floating dtype: this rank's columns; log_score = logits -
            log_offset.
        log_offset: [B, S] float32, the sigma scaling; 0 where the graph has none.
        x_t, x_0: [B, S] int64, corrupted and clean tokens.
        coefficients: of the graph, each [B, S] float32 (arXiv 2310.16834, equation 5, as an affine form in three sums).
        num_states: real states; columns from here on are padding and take no part.
        tp_group: the ranks that hold the other columns.

    Returns:
        [B, S] float32 score entropy in nats, not yet times sigma_rate; the same on every rank of the group.
    """
    return _VocabParallelScoreEntropy.apply(logits, log_offset, x_t, x_0, coefficients, num_states, tp_group)


def largest_log_score(
    logits: Tensor,
    log_offset: Tensor,
    x_t: Tensor,
    counts: Tensor,
    num_states: int,
    tp_group: torch.distributed.ProcessGroup,
) -> Tensor:
    """The largest of this rank's columns, at positions that count [B, S] bool and states other than x_t: scalar
    float32, -inf where there is none. Arguments as above.
    """
    first_state = tp_group.rank() * logits.shape[-1]
    # The offset is a row's: of its largest logit the rest of the row need not be asked.
    largest = logits.clone()
    largest[..., max(num_states - first_state, 0) :] = -torch.inf
    _set_at_state(largest, x_t, first_state, -torch.inf)
    return (largest.amax(-1).float() - log_offset).masked_fill(~counts, -torch.inf).amax()


def gather_log_score(
    logits: Tensor, log_offset: Tensor, x_t: Tensor, num_states: int, tp_group: torch.distributed.ProcessGroup
) -> Tensor:
    """Whole log-scores for sampling: [B, S, num_states] float32 with 0 at x_t, on every rank of the group. No
    gradient.
    """
    shards = [torch.empty_like(logits) for _ in range(tp_group.size())]
    torch.distributed.all_gather(shards, logits.contiguous(), group=tp_group)
    log_score = torch.cat(shards, dim=-1)[..., :num_states].float() - log_offset[..., None]
    return log_score.scatter_(-1, x_t[..., None], 0.0)


def add_over_shards(sums: Tensor, tp_group: torch.distributed.ProcessGroup) -> Tensor:
    """Each rank's sums over its own columns, added up: bit for bit the same on every rank. No gradient."""
    if tp_group.size() == 1:
        return sums
    sums = sums.clone()
    torch.distributed.all_reduce(sums, group=tp_group)
    return sums


def gather_columns(
    values: Tensor, shard_columns: int, num_columns: int, tp_group: torch.distributed.ProcessGroup
) -> Tensor:
    """Rows [R, this rank's columns] put together from all ranks: [R, num_columns]. No gradient.

    A rank has shard_columns of them, or fewer where they are padding.
    """
    if tp_group.size() == 1:
        return values
    padded = F.pad(values, (0, shard_columns - values.shape[1]))
    shards = [torch.empty_like(padded) for _ in range(tp_group.size())]
    torch.distributed.all_gather(shards, padded, group=tp_group)
    return torch.cat(shards, dim=-1)[:, :num_columns]


def _sum_over_shards(sums: ScoreSums, tp_group: torch.distributed.ProcessGroup) -> ScoreSums:
    if tp_group.size() == 1:
        return sums
    stacked = torch.stack(sums)
    torch.distributed.all_reduce(stacked, group=tp_group)
    return ScoreSums(*stacked)


def _add_at_state(grad: Tensor, state: Tensor, value: Tensor, first_state: int) -> None:
    in_shard, column = column_in_shard(state, first_state, grad.shape[-1])
    grad.scatter_add_(-1, column, torch.where(in_shard, value[..., None], 0.0))


def zero_at_state(grad: Tensor, state: Tensor, first_state: int) -> None:
    """Set grad [..., N] to 0 at `state` [...], where that is one of the N states from `first_state` on."""
    _set_at_state(grad, state, first_state, 0.0)


def _set_at_state(values: Tensor, state: Tensor, first_state: int, value: float) -> None:
    in_shard, column = column_in_shard(state, first_state, values.shape[-1])
    values.scatter_(-1, column, torch.where(in_shard, value, values.gather(-1, column)))


def column_in_shard(state: Tensor, first_state: int, columns: int) -> tuple[Tensor, Tensor]:
    """Whether each state is one of the `columns` states from `first_state` on, and as which column: [..., 1] each."""
    column = (state - first_state)[..., None]
    return (column >= 0) & (column < columns), column.clamp(0, columns - 1)
