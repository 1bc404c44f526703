"""Dropout whose draws have keys, as the noise has: every layout, and every recompute, drops the same elements.

An element's key is (seed, sample number, layer, branch, position, channel), and of these the sample number says which
step it is in. Generators with a state cannot do that: what they give an element depends on what a rank drew before.
"""

import numpy as np
import torch
from torch import Tensor

from sedd_megatron.diffusion.draws import Stream

# Elements of one Philox counter: 16 bits each of its four words of 64 bits.
ELEMENTS = 16
STEPS = 2**16


def dropout_steps(probability: float) -> int:
    """The probability in steps of 2^-16, the nearest; never all of them, so that what is kept can be scaled up."""
    return min(round(probability * STEPS), STEPS - 1)


def kept_share(probability: float) -> float:
    """The share of elements that are kept, of which the value must be divided by it."""
    return 1 - dropout_steps(probability) / STEPS


def dropout_keys(seed: int, sample_index: Tensor) -> Tensor:
    """[B, 2] int64: the bits of the seed, and the sample number [B]."""
    seeds = torch.from_numpy(np.full(len(sample_index), seed, dtype=np.uint64).view(np.int64))
    return torch.stack([seeds, sample_index], dim=1)


def dropped_elements(
    keys: Tensor, branch: int, first_position: int, length: int, width: int, probability: float
) -> Tensor:
    """Which elements of hidden states are dropped: bool [length, B, width], on the keys' device.

    The numbers are those of numpy's Philox with key (seed, 0) and counter (block, branch, sample number,
    Stream.DROPOUT), whose blocks are counted position by position and ELEMENTS channels at a time.

    Args:
        keys: [B, 2] int64 (dropout_keys).
        branch: which dropout of the network.
        first_position: of the whole sequence, where this rank's part begins.
    """
    if keys.is_cuda:
        from sedd_megatron.parallel.dropout_kernel import dropped_elements_on_gpu

        return dropped_elements_on_gpu(keys, branch, first_position, length, width, dropout_steps(probability))
    blocks = -(-width // ELEMENTS)
    dropped = np.empty((length, len(keys), width), dtype=np.bool_)
    bits = np.random.Philox(key=np.zeros(2, dtype=np.uint64))
    # Setting its state takes a fifth of the time of a new one.
    state = bits.state
    key, counter = state["state"]["key"], state["state"]["counter"]
    counter[0], counter[1], counter[3] = first_position * blocks, branch, Stream.DROPOUT
    for row, (key[0], counter[2]) in enumerate(keys.numpy().view(np.uint64)):
        bits.state = state
        numbers = bits.random_raw(length * blocks * ELEMENTS // 4).astype("<u8", copy=False).view("<u2")
        np.less(numbers.reshape(length, -1)[:, :width], dropout_steps(probability), out=dropped[:, row])
    return torch.from_numpy(dropped)
