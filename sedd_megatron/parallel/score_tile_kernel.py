"""A tile's logits -> scores, gradient and sums, as one Triton kernel: 4 bytes read and 2 written for each logit.

In a module of its own, since Triton comes with torch for a GPU and is often nowhere else. With TRITON_INTERPRET=1, set
before the import, it runs on a CPU.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from sedd_megatron.parallel.fused_head import ScoreEntropyRows

# One program's part of a tile: a row at a time, whose columns are spread over the threads.
BLOCK_ROWS, BLOCK_COLUMNS, NUM_WARPS = 32, 1024, 4


def scores_and_gradients(
    logits: Tensor,
    bias: Tensor,
    rows: "ScoreEntropyRows",
    first_state: int,
    num_states: int,
    dtype: torch.dtype,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """What parallel/score_tile.py makes of logits [C, N], without their bias [N]; the gradient of them in `dtype`.

    Returns:
        score_sum (scalar float64), grad_logits [C, N], grad_bias [N], row_sums and row_largest [C], as in ScoreTile.
    """
    num_rows, num_columns = logits.shape
    counting = min(max(num_states - first_state, 0), num_columns)
    grid = triton.cdiv(num_columns, BLOCK_COLUMNS), triton.cdiv(num_rows, BLOCK_ROWS)
    score_parts = logits.new_empty(grid)
    row_parts = logits.new_empty(2, grid[0], num_rows)
    grad = torch.empty_like(logits, dtype=dtype) if with_gradient else None
    bias_parts = logits.new_empty(grid[1], num_columns) if with_gradient else None
    score_tile_kernel[grid](
        logits, bias, rows.log_scale, rows.log_sum, rows.target, rows.x_t, rows.x_0, grad, score_parts, bias_parts,
        row_parts, num_rows, num_columns, first_state, counting, BLOCK_ROWS, BLOCK_COLUMNS, num_warps=NUM_WARPS,
    )  # fmt: skip
    grad_bias = bias_parts.sum(0) if with_gradient else None
    return score_parts.sum(dtype=torch.float64), grad, grad_bias, row_parts[0].sum(0), row_parts[1].amax(0)


# Not specialised: both change from tile to tile, and a kernel would be compiled for each kind of number.
@triton.jit(do_not_specialize=["first_state", "counting"])
def score_tile_kernel(
    logits, bias, log_scale, log_sum, target, x_t, x_0, grad, score_parts, bias_parts,
    row_parts, num_rows, num_columns, first_state, counting, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One block of ROWS x COLUMNS of the tile. Columns from `counting` on are padding; log_sum, x_t, grad and
    bias_parts may be None.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < num_columns
    bias_of_column = tl.load(bias + column, mask=inside, other=0.0).to(logits.dtype.element_ty)
    column_sum = tl.zeros([COLUMNS], logits.dtype.element_ty)
    score_sum = tl.zeros([COLUMNS], logits.dtype.element_ty)
    for step in range(ROWS):
        row = tl.program_id(1) * ROWS + step
        # The last block may reach beyond the rows: such a row has no columns.
        is_row = row < num_rows
        in_row = column < tl.where(is_row, num_columns, 0)
        moves = column < tl.where(is_row, counting, 0)
        place = tl.cast(row, tl.int64) * num_columns + column
        logit = tl.load(logits + place, mask=in_row, other=0.0)
        score = tl.exp(logit + bias_of_column + tl.load(log_scale + row, mask=is_row, other=0.0))
        if x_t is not None:
            moves = moves & (column != (tl.load(x_t + row, mask=is_row, other=0) - first_state).to(tl.int32))
        score = tl.where(moves, score, 0.0)
        score_sum += score
        of_row = row_parts + tl.program_id(0) * num_rows + row
        tl.store(of_row, tl.sum(score, 0), mask=is_row)
        tl.store(of_row + tl.num_programs(0) * num_rows, tl.max(score, 0), mask=is_row)
        if grad is not None:
            is_target = column == (tl.load(x_0 + row, mask=is_row, other=0) - first_state).to(tl.int32)
            gradient = score + tl.where(is_target, tl.load(target + row, mask=is_row, other=0.0), 0.0)
            if log_sum is not None:
                gradient += tl.load(log_sum + row, mask=is_row, other=0.0)
            gradient = tl.where(moves, gradient, 0.0)
            column_sum += gradient
            tl.store(grad + place, gradient.to(grad.dtype.element_ty), mask=in_row)
    tl.store(score_parts + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(score_sum, 0))
    if bias_parts is not None:
        tl.store(bias_parts + tl.program_id(1) * num_columns + column, column_sum, mask=inside)
