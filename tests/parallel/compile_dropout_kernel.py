"""Compiles dropout's kernel for sm_90 as a launch on a GPU would, without one: one line."""

import torch
from triton.runtime.driver import driver

from sedd_megatron.diffusion.draws import Stream
from sedd_megatron.diffusion.philox import KEY_STEPS, MULTIPLIERS, ROUNDS
from sedd_megatron.parallel.dropout_kernel import NUM_WARPS, SIZE, dropout_kernel
from tests.parallel.compile_score_tile_kernel import NoDriver, resources


def compiled_for(branch: int, first_position: int, steps: int):
    """The kernel of 16 sequences of width 768."""
    return dropout_kernel.warmup(
        torch.int64, torch.int32, 16, 48, 16 * 48 * 1024, branch, first_position, steps, int(Stream.DROPOUT),
        *MULTIPLIERS, *KEY_STEPS, ROUNDS, SIZE, num_warps=NUM_WARPS, grid=(1,),
    )  # fmt: skip


if __name__ == "__main__":
    driver.set_active(NoDriver())
    kernels = [compiled_for(*numbers) for numbers in ((0, 0, 6554), (1, 1024, 6554), (95, 1, 16))]
    registers, spilled = resources(kernels[0].asm["cubin"])
    compilations = len({id(kernel) for kernel in kernels})
    print(f"kernel dropout registers={registers} spilled={spilled} compilations={compilations}")
