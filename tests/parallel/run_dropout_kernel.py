"""Dropout's Triton kernel, in Triton's interpreter on a CPU, against numpy's Philox. Started by test_dropout_kernel.py
with TRITON_INTERPRET=1, which Triton reads when it is imported.
"""

import torch

from sedd_megatron.parallel import dropout_kernel
from sedd_megatron.parallel.keyed_dropout import dropout_keys, dropout_steps, dropped_elements

if __name__ == "__main__":
    dropout_kernel.SIZE = 8
    # Blocks that end with the elements and that do not; a first position beyond 32 bits of counters.
    for width, first, length, probability in ((16, 0, 4, 0.1), (40, 3, 5, 0.5), (5, 2**33, 3, 0.9)):
        keys = dropout_keys(2**64 - 3, torch.tensor([0, 5, 2**62]))
        for branch in (0, 1, 95):
            arguments = keys, branch, first, length, width
            expected = dropped_elements(*arguments, probability)
            actual = dropout_kernel.dropped_elements_on_gpu(*arguments, dropout_steps(probability))
            assert actual.dtype == torch.bool
            assert torch.equal(actual, expected), (width, first, branch)
            assert 0 < actual.double().mean() < 1
