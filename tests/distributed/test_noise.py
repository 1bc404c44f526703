"""Noise and sample order do not depend on the layout: exactly, and without a broadcast."""

import pytest

from tests.distributed.launch import launch
from tests.distributed.layouts import GRAPHS, LAYOUTS, MODEL

NAMES = {1: ["accumulate-8"], 2: ["TP2", "VPP2", "CP2", "DP2-dist-opt"],
         4: ["TP2-DP2", "VPP2-CP2-dist-opt", "CP2-DP2-dist-opt", "SP2-CP2"]}  # fmt: skip


@pytest.mark.parametrize("world_size", NAMES)
def test_every_rank_reads_what_one_process_reads(world_size, byte_corpus):
    common = [*MODEL, "--data-path", str(byte_corpus)]
    # The ranks parse as torchrun's would: their number is in their environment.
    jobs = [[*common, *LAYOUTS[name][1], *graph] for name in NAMES[world_size] for graph in GRAPHS.values()]
    launch("run_noise.py", world_size, jobs)
