"""What --reset-attention-mask costs: python -m tests.benchmarks.document_masks

A forward and backward pass with the flag and without, in turns in one process and in its CPU seconds, by the length of
the documents; and the same with a boolean [S, S] mask for each window, which is what Megatron-LM makes.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch.nn import functional as F

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.diffusion import AbsorbingGraph
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import parallel_groups
from tests.benchmarks.pairs import Lines, peak_memory, write_table

HEADER = (
    "| length of a document | without the flag | with it | ratio | with a mask | ratio | memory without | with it | "
    "with a mask |\n|---|---|---|---|---|---|---|---|---|"
)
NUM_TOKENS = 255


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[16, 64, 256, 1024])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a file of tests/benchmarks/results")
    arguments = parser.parse_args(argv)
    cpu_backend.install()
    from sedd_megatron.training.build import build_model

    options = parse_pretrain_options(
        ["--data-path", "x", "--device", "cpu", "--num-layers", str(arguments.layers), "--hidden-size",
         str(arguments.width), "--num-attention-heads", "4", "--seq-length", str(arguments.seq_length)]
    )  # fmt: skip
    lines = Lines()
    lines.say(HEADER)
    with parallel_groups(options.parallel) as groups, torch.random.fork_rng():
        (model,) = build_model(options.model, options.parallel, options.precision, options.recompute,
                               AbsorbingGraph(NUM_TOKENS), groups)  # fmt: skip
        model.eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        for length in arguments.lengths:
            lines.say(row(model, arguments, length))
    write_table("Attention within documents", "tests.benchmarks.document_masks", argv, arguments.output, lines)


def row(model: torch.nn.Module, arguments: argparse.Namespace, length: int) -> str:
    """The table's line for documents of one length."""
    batch, window = arguments.batch, arguments.seq_length
    x_t, sigma = torch.randint(NUM_TOKENS, (batch, window)), torch.rand(batch) + 0.1
    number = torch.arange(window) // length
    mask = (number[:, None] == number)[None, None].expand(batch, 1, -1, -1).contiguous()

    def step(document_ends: torch.Tensor | None = None) -> None:
        model(x_t, sigma, document_ends=document_ends).sum().backward()

    def masked_step() -> None:
        with patch.object(F, "scaled_dot_product_attention", partial(F.scaled_dot_product_attention, attn_mask=mask)):
            step()

    packed_step = partial(step, torch.arange(length, batch * window + 1, length))
    ways = (step, packed_step, masked_step)
    memory = [peak_memory(way) / 2**20 for way in ways]
    seconds = np.array([[cpu_seconds(way) for way in ways] for _ in range(arguments.pairs)])
    plain, packed, masked = np.median(seconds, axis=0)
    to_packed, to_masked = np.median(seconds[:, 1:] / seconds[:, :1], axis=0)
    cells = [
        f"{length:,}",
        f"{plain:.3f} s",
        f"{packed:.3f} s",
        f"{to_packed:.2f}",
        f"{masked:.3f} s",
        f"{to_masked:.2f}",
    ]
    cells += [f"{number:.0f} MiB" for number in memory]
    return "| " + " | ".join(cells) + " |"


def cpu_seconds(function: Callable[[], None]) -> float:
    """Of this process, on its one thread, whatever else the machine does."""
    start = time.process_time()
    function()
    return time.process_time() - start


if __name__ == "__main__":
    main(sys.argv[1:])
