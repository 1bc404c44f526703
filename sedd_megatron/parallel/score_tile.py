"""One tile of rows x states of the fused head: logits, scores, and the gradient with respect to the logits."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sedd_megatron.parallel.main_grad import add_product
from sedd_megatron.parallel.vocab_parallel import column_in_shard, zero_at_state

if TYPE_CHECKING:
    from sedd_megatron.parallel.fused_head import ScoreEntropyRows


class ScoreTile(NamedTuple):
    """What is left of a tile of C rows and N states; the gradients are None where they are not wanted."""

    score_sum: Tensor  # scalar float64: the weighted scores
    grad_logits: Tensor | None  # [C, N] in the weight's dtype
    grad_bias: Tensor | None  # [N] in the rows' dtype
    row_sums: Tensor  # [C] in the rows' dtype: the weighted scores of each row, for the log
    row_largest: Tensor  # [C] the largest of them


def score_tile_by_index(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: "ScoreEntropyRows",
    first_state: int,
    num_states: int,
    with_gradient: bool,
) -> ScoreTile:
    """The tile of hidden [C, H], weight [N, H] and bias [N], which are the states from `first_state` on.

    States from `num_states` on are padding: their scores and gradients are 0. In place: for a CPU, whose cache holds
    the tile between its passes.
    """
    padding = slice(max(num_states - first_state, 0), None)
    tile = rows.log_scale[:, None] + bias
    add_product(tile, hidden, weight.t()).exp_()
    if rows.x_t is not None:
        zero_at_state(tile, rows.x_t, first_state)
    tile[:, padding] = 0
    column_sums = tile.sum(0)
    score_sum = column_sums.sum(dtype=torch.float64)
    row_sums, row_largest = tile.sum(1), tile.amax(1)
    if not with_gradient:
        return ScoreTile(score_sum, None, None, row_sums, row_largest)
    if rows.log_sum is not None:
        tile.add_(rows.log_sum[:, None])
        zero_at_state(tile, rows.x_t, first_state)
        tile[:, padding] = 0
        column_sums = tile.sum(0)
    in_tile, column = column_in_shard(rows.x_0, first_state, len(weight))
    target = torch.where(in_tile, rows.target[:, None], 0.0)
    # Here and not after the products: near the optimum it cancels the score, and bf16 would round each by itself.
    tile.scatter_add_(-1, column, target)
    column_sums.scatter_add_(0, column[:, 0], target[:, 0])
    return ScoreTile(score_sum, tile.to(weight.dtype), column_sums, row_sums, row_largest)


def score_tile_in_one_kernel(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: "ScoreEntropyRows",
    first_state: int,
    num_states: int,
    with_gradient: bool,
) -> ScoreTile:
    """As `score_tile_by_index`, for a GPU: what follows the product reads the logits once and writes nothing but its
    answer.
    """
    # Imported here: a machine without a GPU may have no Triton.
    from sedd_megatron.parallel.score_tile_kernel import scores_and_gradients

    logits = torch.mm(hidden, weight.t(), out_dtype=rows.target.dtype)
    return ScoreTile(*scores_and_gradients(logits, bias, rows, first_state, num_states, weight.dtype, with_gradient))


SCORE_TILES = {"cpu": score_tile_by_index, "cuda": score_tile_in_one_kernel}


def logit_at(column: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The logit of one column of each row [C], in float32 or better; 0 where the column is none of the weight's."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    in_weight, column = (column >= 0) & (column < len(weight)), column.clamp(0, len(weight) - 1)
    logit = (hidden.to(dtype) * weight.index_select(0, column).to(dtype)).sum(-1) + bias.index_select(0, column)
    return torch.where(in_weight, logit, 0.0)
