"""The fused head and loss are the dense ones in value and gradient, whatever rows count and however they are cut."""

import pytest

from tests.distributed.launch import launch

# Graph, tokens, padded vocabulary (padding in the last shard, whole shards of it, none), which positions are masked,
# rows of a chunk, what the number of rows is filled up to (a GPU's static chunks), dtype.
CASES = [
    ["absorb", 13, 16, "some", 4, 1, "float32"],
    ["absorb", 13, 16, "some", 4, 4, "float32"],
    ["absorb", 13, 16, "some", 100, 32, "float32"],
    ["absorb", 5, 16, "some", 1, 1, "float32"],
    ["absorb", 15, 16, "all", 5, 5, "float32"],
    ["absorb", 13, 16, "none", 4, 4, "float32"],
    ["absorb", 13, 16, "some", 4, 4, "bfloat16"],
    ["uniform", 13, 16, "some", 4, 1, "float32"],
    ["uniform", 5, 16, "all", 100, 1, "float32"],
    ["uniform", 16, 16, "none", 8, 1, "float32"],
    ["uniform", 13, 16, "some", 4, 1, "bfloat16"],
]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_fused_head_is_the_dense_loss_without_collectives_in_the_gradient_path(world_size):
    launch("run_fused_head.py", world_size, CASES)
