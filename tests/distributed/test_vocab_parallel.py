"""The loss on vocabulary shards is the dense loss, in value and gradient, and its gradient needs no collective."""

import pytest

from tests.distributed.launch import launch

# (graph, tokens, padded vocabulary): padding inside the last shard, a whole shard of padding, and none.
CASES = [("absorb", 13, 16), ("absorb", 5, 16), ("absorb", 15, 16), ("uniform", 13, 16), ("uniform", 5, 16),
         ("uniform", 16, 16)]  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_sharded_loss_equals_dense_loss_without_collectives_in_backward(world_size):
    launch("run_vocab_parallel.py", world_size, CASES)
