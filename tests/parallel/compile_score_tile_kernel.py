"""Compiles the tile's kernel for sm_90 as a launch on a GPU would, without one: a line for each of its variants."""

import itertools
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from sedd_megatron.parallel.score_tile_kernel import BLOCK_COLUMNS, BLOCK_ROWS, NUM_WARPS, score_tile_kernel


class NoDriver:
    """What compiling asks a GPU's driver for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_for(has_log_sum: bool, with_gradient: bool, num_columns: int, first_state: int, counting: int):
    """The kernel of 8,192 rows and bf16 weights; pointers as a launch passes them, by their types alone."""
    log_sum, x_t = (torch.float32, torch.int64) if has_log_sum else (None, None)
    grad, bias_parts = (torch.bfloat16, torch.float32) if with_gradient else (None, None)
    return score_tile_kernel.warmup(
        torch.float32, torch.bfloat16, torch.float32, log_sum, torch.float32, x_t, torch.int64, grad, torch.float32,
        bias_parts, torch.float32, 8192, num_columns, first_state, counting, BLOCK_ROWS, BLOCK_COLUMNS,
        num_warps=NUM_WARPS, grid=(1,),
    )  # fmt: skip


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes on its stack, which is where they spill to."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return int(registers), int(stack)


if __name__ == "__main__":
    driver.set_active(NoDriver())
    for has_log_sum, with_gradient in itertools.product((False, True), (False, True)):
        # The first tile, a later one, the last one with its padding, and a shard that begins at an odd state.
        tiles = [(4096, 0, 4096), (4096, 4096, 4096), (1152, 49152, 1105), (4096, 25153, 4095)]
        kernels = [compiled_for(has_log_sum, with_gradient, *tile) for tile in tiles]
        registers, spilled = resources(kernels[0].asm["cubin"])
        loads = len(re.findall(r"ld\.global\S*\.v[24]\.b(?:32|64)", kernels[0].asm["ptx"]))
        stores = len(re.findall(r"st\.global\S*\.v[24]\.b(?:32|64)", kernels[0].asm["ptx"]))
        print(
            f"kernel log_sum={has_log_sum:d} gradient={with_gradient:d} registers={registers} spilled={spilled} "
            f"wide_loads={loads} wide_stores={stores} compilations={len({id(kernel) for kernel in kernels})}"
        )
