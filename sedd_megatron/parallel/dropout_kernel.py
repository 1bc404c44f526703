"""Which elements dropout drops, as one Triton kernel: 1 byte written for each.

In a module of its own, and to be interpreted on a CPU, as score_tile_kernel.py is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sedd_megatron.diffusion.draws import Stream
from sedd_megatron.diffusion.philox import KEY_STEPS, MULTIPLIERS, ROUNDS
from sedd_megatron.parallel.keyed_dropout import ELEMENTS

# Counters of one program.
SIZE, NUM_WARPS = 256, 4


def dropped_elements_on_gpu(
    keys: Tensor, branch: int, first_position: int, length: int, width: int, steps: int
) -> Tensor:
    """`dropped_elements` (keyed_dropout.py) for a probability of `steps` / 2^16."""
    blocks = triton.cdiv(width, ELEMENTS)
    # A word's four elements are stored as one number of 4 bytes, each 0 or 1.
    dropped = torch.empty(length, len(keys), 4 * blocks, dtype=torch.int32, device=keys.device)
    num_counters = dropped.numel() // 4
    dropout_kernel[(triton.cdiv(num_counters, SIZE),)](
        keys, dropped, len(keys), blocks, num_counters, branch, first_position, steps,
        int(Stream.DROPOUT), *MULTIPLIERS, *KEY_STEPS, ROUNDS, SIZE, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dropped.view(torch.bool)[..., :width]


# Not specialised: the layers and the ranks differ in them, and a kernel would be compiled for each kind of number.
@triton.jit(do_not_specialize=["branch", "first_position", "steps"])
def dropout_kernel(
    keys, dropped, batch_size, blocks, num_counters, branch, first_position, steps, STREAM: tl.constexpr,
    MULTIPLIER_0: tl.constexpr, MULTIPLIER_1: tl.constexpr, KEY_STEP_0: tl.constexpr, KEY_STEP_1: tl.constexpr,
    ROUNDS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Philox4x64-10 of SIZE counters, each of which decides on 16 elements."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < num_counters
    row = place // blocks
    position = first_position + row // batch_size
    key_of_row = keys + 2 * (row % batch_size)
    key_0 = tl.load(key_of_row, mask=inside, other=0).to(tl.uint64, bitcast=True)
    word_2 = tl.load(key_of_row + 1, mask=inside, other=0).to(tl.uint64, bitcast=True)
    # Counters begin at 1, as numpy's do.
    word_0 = (position * blocks + place % blocks + 1).to(tl.uint64, bitcast=True)
    word_1 = tl.zeros([SIZE], tl.uint64) + branch.to(tl.uint64)
    word_3 = tl.zeros([SIZE], tl.uint64) + STREAM
    by_0 = tl.full([SIZE], MULTIPLIER_0, tl.uint64)
    by_1 = tl.full([SIZE], MULTIPLIER_1, tl.uint64)
    key_1 = tl.zeros([SIZE], tl.uint64)
    for _ in tl.static_range(ROUNDS):
        high_0, high_2 = tl.umulhi(word_0, by_0), tl.umulhi(word_2, by_1)
        low_0, low_2 = word_0 * by_0, word_2 * by_1
        word_0, word_1, word_2, word_3 = high_2 ^ word_1 ^ key_0, low_2, high_0 ^ word_3 ^ key_1, low_0
        key_0 += tl.full([SIZE], KEY_STEP_0, tl.uint64)
        key_1 += tl.full([SIZE], KEY_STEP_1, tl.uint64)
    for number in tl.static_range(4):
        if number == 0:
            word = word_0
        elif number == 1:
            word = word_1
        elif number == 2:
            word = word_2
        else:
            word = word_3
        flags = tl.zeros([SIZE], tl.int32)
        for element in tl.static_range(4):
            is_dropped = ((word >> (16 * element)) & 0xFFFF).to(tl.int32) < steps
            flags |= is_dropped.to(tl.int32) << (8 * element)
        tl.store(dropped + 4 * place + number, flags, mask=inside)
