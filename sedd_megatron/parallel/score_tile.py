"""One tile of rows x states of the fused head: logits, scores, and the gradient with respect to the logits."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sedd_megatron.parallel.compiled import compiled
from sedd_megatron.parallel.main_grad import add_product
from sedd_megatron.parallel.vocab_parallel import column_in_shard, zero_at_state

if TYPE_CHECKING:
    from sedd_megatron.parallel.fused_head import ScoreEntropyRows


class ScoreTile(NamedTuple):
    """What is left of a tile of C rows and N states; the gradients are None where they are not wanted."""

    score_sum: Tensor  # scalar float64: the weighted scores
    grad_logits: Tensor | None  # [C, N] in the weight's dtype
    grad_bias: Tensor | None  # [N] in the rows' dtype


def score_tile_by_index(
    hidden: Tensor, weight: Tensor, bias: Tensor, rows: "ScoreEntropyRows", first_state: int, with_gradient: bool
) -> ScoreTile:
    """The tile of hidden [C, H], weight [N, H] and bias [N], which are the states from `first_state` on.

    In place: for a CPU, whose cache holds the tile between its passes.
    """
    tile = rows.log_scale[:, None] + bias
    add_product(tile, hidden, weight.t()).exp_()
    if rows.x_t is not None:
        zero_at_state(tile, rows.x_t, first_state)
    column_sums = tile.sum(0)
    score_sum = column_sums.sum(dtype=torch.float64)
    if not with_gradient:
        return ScoreTile(score_sum, None, None)
    if rows.log_sum is not None:
        tile.add_(rows.log_sum[:, None])
        zero_at_state(tile, rows.x_t, first_state)
        column_sums = tile.sum(0)
    in_tile, column = column_in_shard(rows.x_0, first_state, len(weight))
    target = torch.where(in_tile, rows.target[:, None], 0.0)
    # Here and not after the products: near the optimum it cancels the score, and bf16 would round each by itself.
    tile.scatter_add_(-1, column, target)
    column_sums.scatter_add_(0, column[:, 0], target[:, 0])
    return ScoreTile(score_sum, tile.to(weight.dtype), column_sums)


def score_tile_in_one_kernel(
    hidden: Tensor, weight: Tensor, bias: Tensor, rows: "ScoreEntropyRows", first_state: int, with_gradient: bool
) -> ScoreTile:
    """As `score_tile_by_index`, for a GPU: what follows the product is compiled, and writes nothing but its answer."""
    logits = torch.mm(hidden, weight.t(), out_dtype=rows.target.dtype)
    # Relative to the tile, so that the compiler sees no number that changes from tile to tile.
    x_t, x_0 = None if rows.x_t is None else rows.x_t - first_state, rows.x_0 - first_state
    return ScoreTile(
        *compiled(scores_and_gradients)(
            logits, bias, rows.log_scale, rows.log_sum, rows.target, x_t, x_0, weight.dtype, with_gradient
        )
    )


def scores_and_gradients(
    logits: Tensor,
    bias: Tensor,
    log_scale: Tensor,
    log_sum: Tensor | None,
    target: Tensor,
    x_t: Tensor | None,
    x_0: Tensor,
    dtype: torch.dtype,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`score_tile_by_index` after its product, without an index: each column is compared with those of x_t and x_0."""
    column = torch.arange(logits.shape[1], device=logits.device)
    score = torch.exp(logits + bias + log_scale[:, None])
    if x_t is not None:
        score = torch.where(column == x_t[:, None], 0.0, score)
    score_sum = score.sum(-1).sum(dtype=torch.float64)
    if not with_gradient:
        return score_sum, None, None
    grad = score + torch.where(column == x_0[:, None], target[:, None], 0.0)
    if log_sum is not None:
        grad = torch.where(column == x_t[:, None], 0.0, grad + log_sum[:, None])
    return score_sum, grad.to(dtype), grad.sum(0)


SCORE_TILES = {"cpu": score_tile_by_index, "cuda": score_tile_in_one_kernel}


def logit_at(column: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The logit of one column of each row [C], in float32 or better; 0 where the column is none of the weight's."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    in_weight, column = (column >= 0) & (column < len(weight)), column.clamp(0, len(weight) - 1)
    logit = (hidden.to(dtype) * weight.index_select(0, column).to(dtype)).sum(-1) + bias.index_select(0, column)
    return torch.where(in_weight, logit, 0.0)
