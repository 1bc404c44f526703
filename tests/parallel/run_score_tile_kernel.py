"""The Triton kernel of a tile, in Triton's interpreter on a CPU, against the tile by index. Started by
test_kernels.py with TRITON_INTERPRET=1, which Triton reads when it is imported.
"""

import itertools

import torch

from sedd_megatron.parallel import score_tile_kernel
from sedd_megatron.parallel.fused_head import ScoreEntropyRows
from sedd_megatron.parallel.score_tile import ScoreTile, score_tile_by_index


def check(num_rows: int, num_columns: int, first_state: int, num_states: int, has_log_sum: bool) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator) for shape in ((num_rows, 3), (num_columns, 3), (num_columns,))
    )
    # States of this tile, of those before and behind it.
    x_t, x_0 = torch.randint(0, num_states, (2, num_rows), generator=generator)
    x_t[0], x_0[1] = min(first_state, num_states - 1), min(first_state + num_columns, num_states) - 1
    log_scale, log_sum, target = torch.rand(3, num_rows, generator=generator)
    # A row that only fills a chunk.
    log_scale[-1], log_sum[-1], target[-1] = -torch.inf, 0.0, 0.0
    # A position that has not moved has no target: its log-score there is 0 whatever the model says.
    target[x_t == x_0] = 0.0
    position, log_sum = torch.arange(num_rows), log_sum if has_log_sum else None
    rows = ScoreEntropyRows(
        num_rows - 1, position, x_0, x_t if has_log_sum else None, log_scale, log_sum, -target, log_scale
    )
    for dtype, with_gradient in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        expected = score_tile_by_index(hidden, weight, bias, rows, first_state, num_states, with_gradient)
        actual = ScoreTile(
            *score_tile_kernel.scores_and_gradients(
                hidden @ weight.t(), bias, rows, first_state, num_states, dtype, with_gradient
            )
        )
        torch.testing.assert_close(actual.score_sum, expected.score_sum, rtol=1e-6, atol=0)
        torch.testing.assert_close(actual.row_sums, expected.row_sums, rtol=1e-6, atol=0)
        torch.testing.assert_close(actual.row_largest, expected.row_largest, rtol=1e-6, atol=0)
        assert (actual.grad_logits is not None) == with_gradient
        if with_gradient:
            assert actual.grad_logits.dtype == dtype
            # The interpreter cuts bf16 off, where a GPU rounds.
            tolerance = 1e-5 if dtype == torch.float32 else 2**-7
            difference = (actual.grad_logits.float() - expected.grad_logits).abs()
            assert (difference <= tolerance * expected.grad_logits.abs() + 1e-7).all(), difference.max()
            torch.testing.assert_close(actual.grad_bias, expected.grad_bias, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    score_tile_kernel.BLOCK_ROWS, score_tile_kernel.BLOCK_COLUMNS = 4, 16
    for has_log_sum in (False, True):
        # Several blocks both ways, the last of them partly outside; then padding that begins inside a block, between
        # two, and before the first column; then one block.
        for sizes in ((10, 40, 16, 100), (10, 40, 32, 62), (8, 48, 16, 48), (5, 16, 64, 60), (3, 5, 7, 12)):
            check(*sizes, has_log_sum)
