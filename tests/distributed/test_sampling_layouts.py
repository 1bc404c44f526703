"""Every sampler draws the same tokens in every layout, on every rank, from the published weights."""

import itertools
import json
from pathlib import Path

import pytest

from tests.distributed.launch import launch

GRAPHS = ("absorb", "uniform")
# name -> (tensor ranks, pipeline stages, what the vocabulary is padded to a multiple of). 31 states padded to 128 leave
# nothing but padding to the second of two ranks.
LAYOUTS = {
    "one": (1, 1, 8),
    "TP2": (2, 1, 8),
    "TP2-padding": (2, 1, 128),
    "PP2": (1, 2, 8),
    "TP2-PP2": (2, 2, 8),
}


def run(folder: Path, world_size: int) -> dict[tuple[str, str], list[dict[str, list]]]:
    """What each rank drew in the layouts of that many ranks: (layout, graph) -> of each rank, sampler -> samples."""
    names = [name for name, (tensor, pipeline, _) in LAYOUTS.items() if tensor * pipeline == world_size]
    jobs = [(str(folder), name, graph, *LAYOUTS[name]) for name in names for graph in GRAPHS]
    launch("run_sampling.py", world_size, jobs)
    return {
        (name, graph): [json.loads((folder / f"{name}-{graph}-{rank}.json").read_text()) for rank in range(world_size)]
        for name in names
        for graph in GRAPHS
    }


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory) -> dict[str, dict[str, list]]:
    return {graph: ranks[0] for (_, graph), ranks in run(tmp_path_factory.mktemp("one"), 1).items()}


def test_samples_differ_and_keep_what_is_given(in_one_process):
    assert {graph: len(samplers) for graph, samplers in in_one_process.items()} == {"absorb": 6, "uniform": 4}
    for graph, samplers in in_one_process.items():
        for samples in samplers.values():
            tokens = [tokens for tokens, _, _ in samples]
            assert all((ids[:2], ids[11]) == ([0, 1], 2) for ids in tokens[:3])
            assert all((ids[0], ids[-3:], len(ids)) == (16, [23, 24, 25], 35) for ids in tokens[3:5])
            assert len(set(map(tuple, tokens))) == 6
        # Under the absorbing graph with log-linear noise an Euler step is an analytic one.
        same = [{"euler", "analytic"}] if graph == "absorb" else []
        pairs = itertools.combinations(samplers, 2)
        assert [{a, b} for a, b in pairs if samplers[a] == samplers[b]] == same


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_draws_what_one_process_draws(tmp_path, in_one_process, world_size):
    for (name, graph), ranks in run(tmp_path, world_size).items():
        for samplers in ranks:
            assert samplers == in_one_process[graph], f"{name}, {graph}"
