"""Compiles the tile's kernel for sm_90, which needs no GPU, and says what it takes: a line for each of its variants."""

import itertools
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sedd_megatron.parallel.score_tile_kernel import BLOCK_COLUMNS, BLOCK_ROWS, NUM_WARPS, score_tile_kernel

TYPES = {
    "logits": "*fp32", "bias": "*bf16", "log_scale": "*fp32", "log_sum": "*fp32", "target": "*fp32", "x_t": "*i64",
    "x_0": "*i64", "grad": "*bf16", "score_parts": "*fp32", "bias_parts": "*fp32", "num_rows": "i32",
    "num_columns": "i32", "first_state": "i32", "counting": "i32", "ROWS": "constexpr", "COLUMNS": "constexpr",
}  # fmt: skip
NOT_SPECIALISED = ("num_rows", "first_state", "counting")


def compiled_for(has_log_sum: bool, with_gradient: bool):
    missing = [] if has_log_sum else ["log_sum", "x_t"]
    missing += [] if with_gradient else ["grad", "bias_parts"]
    values = dict.fromkeys(missing) | {"ROWS": BLOCK_ROWS, "COLUMNS": BLOCK_COLUMNS}
    types = TYPES | dict.fromkeys(missing, "constexpr")
    place = {name: (index,) for index, name in enumerate(score_tile_kernel.arg_names)}
    # As the launcher finds them: pointers and a width that 16 divides.
    divisible = [name for name, kind in types.items() if kind != "constexpr" and name not in NOT_SPECIALISED]
    source = ASTSource(
        score_tile_kernel,
        types,
        {place[name]: value for name, value in values.items()},
        {place[name]: [["tt.divisibility", 16]] for name in divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": NUM_WARPS})


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
    for has_log_sum, with_gradient in itertools.product((False, True), (False, True)):
        kernel = compiled_for(has_log_sum, with_gradient)
        registers, spilled = resources(kernel.asm["cubin"])
        loads = len(re.findall(r"ld\.global\S*\.v[24]\.b(?:32|64)", kernel.asm["ptx"]))
        stores = len(re.findall(r"st\.global\S*\.v[24]\.b(?:32|64)", kernel.asm["ptx"]))
        print(
            f"kernel log_sum={has_log_sum:d} gradient={with_gradient:d} registers={registers} spilled={spilled} "
            f"wide_loads={loads} wide_stores={stores}"
        )
