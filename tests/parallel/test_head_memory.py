"""What head and loss take of a GPU's memory at SEDD-small's shape, counted by tensors of shapes without memory."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sedd_megatron.config import ParallelOptions
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.training_config import LOSS_CHUNK_ROWS
from tests.benchmarks.goals import HEAD_MEMORY_MIB

LENGTH, BATCH, WIDTH, NUM_TOKENS, PADDED = 1024, 64, 768, 50257, 50304


class PeakMemory(TorchDispatchMode):
    """`most` is the largest number of bytes that tensors made in here have taken at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        given = {self._key(tensor) for tensor in _tensors((arguments, keywords))}
        made = function(*arguments, **(keywords or {}))
        for tensor in _tensors(made):
            if (key := self._key(tensor)) not in given | self.known:
                self.known.add(key)
                self._change(tensor.untyped_storage().nbytes())
                weakref.finalize(tensor.untyped_storage(), self._forget, key, tensor.untyped_storage().nbytes())
        return made

    def _key(self, tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self._change(-size)

    def _change(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def tile_without_numbers(hidden, weight, bias, rows, first_state, num_states, with_gradient):
    """The tensors that score_tile_in_one_kernel makes."""
    from sedd_megatron.parallel.score_tile import ScoreTile
    from sedd_megatron.parallel.score_tile_kernel import BLOCK_ROWS

    logits = empty(len(hidden), len(weight))
    grad_logits = torch.empty_like(logits, dtype=weight.dtype)
    bias_parts = empty(-(-len(hidden) // BLOCK_ROWS), len(weight))
    row_sums, row_largest = empty(2, len(hidden))
    return ScoreTile(empty(dtype=torch.float64), grad_logits, bias_parts.sum(0), row_sums, row_largest)


def test_the_count_sees_what_lives_at_once():
    with PeakMemory() as memory:
        first = empty(1000)
        second = empty(2000).add_(1.0)[:10]
        del first
        third = second + empty(10)
    assert memory.most == 4 * (1000 + 2000)
    assert memory.now == 4 * (2000 + 10)
    del second, third
    assert memory.now == 0


@pytest.mark.parametrize("has_log_sum", [False, True])
@pytest.mark.parametrize("num_rows", [16_384, 32_868, 65_536])
def test_64k_positions_stay_below_the_goal(num_rows, has_log_sum, monkeypatch):
    pytest.importorskip("triton")
    cpu_backend.install()
    from sedd_megatron.parallel import fused_head
    from sedd_megatron.parallel.groups import groups_of_this_process

    tp_group = groups_of_this_process(ParallelOptions(device="cpu")).collection.tp
    for sizes in (fused_head.TILE_ELEMENTS, fused_head.ROW_MULTIPLE, fused_head.COLUMN_MULTIPLE):
        monkeypatch.setitem(sizes, "meta", sizes["cuda"])
    monkeypatch.setitem(fused_head.SCORE_TILES, "meta", tile_without_numbers)
    # Adds in place: the product of bf16 into float32 has no form without a device.
    monkeypatch.setattr(fused_head, "add_product", lambda total, left, right, scale=1.0: total)
    filled = -(-num_rows // fused_head.ROW_MULTIPLE["cuda"]) * fused_head.ROW_MULTIPLE["cuda"]
    numbers, states = empty(filled), empty(filled, dtype=torch.long)
    rows = fused_head.ScoreEntropyRows(
        num_rows, states, states, states if has_log_sum else None, numbers, numbers if has_log_sum else None, numbers,
        numbers,
    )  # fmt: skip
    hidden_states = empty(LENGTH, BATCH, WIDTH, dtype=torch.bfloat16).requires_grad_()
    factor, shift = (empty(BATCH, WIDTH).requires_grad_() for _ in range(2))
    weight, bias = (torch.nn.Parameter(empty(*shape, dtype=torch.bfloat16)) for shape in ((PADDED, WIDTH), (PADDED,)))
    for parameter in (weight, bias):
        parameter.main_grad = empty(*parameter.shape)
    settings = fused_head.FusedHeadSettings(NUM_TOKENS, LOSS_CHUNK_ROWS["cuda"], 1.0)
    with PeakMemory() as memory:
        fused_head.fused_head_score_entropy(hidden_states, factor, shift, weight, bias, rows, settings, 1e-5, tp_group)
    # Beside the gradient of the hidden states, which any way has to give.
    used = (memory.most - hidden_states.nbytes) / 2**20
    print(f"{num_rows} rows: {used:.0f} MiB, goal below {HEAD_MEMORY_MIB} MiB")
    assert used < HEAD_MEMORY_MIB
