"""Memory by formula against what gloo ranks allocate; tests/benchmarks/results/plan.md has all layouts."""

import dataclasses

import pytest

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.planning.memory import checkpoint_bytes, parameters_of_model, parameters_of_rank, rank_memory
from tests.benchmarks.goals import PLAN_MEMORY_ERROR
from tests.benchmarks.plan import measured_memory

CASES = ["SP2-bf16", "VPP2", "CP2", "DP2-dist-opt-overlap-bf16"]


def test_memory_is_what_ranks_allocate():
    found = measured_memory(CASES)
    assert [(rank.name, rank.rank) for rank in found] == [(name, rank) for name in CASES for rank in range(2)]
    for rank in found:
        measured, counted = rank.parameters
        assert counted == measured, rank.name
        # But for Adam's counters of steps and the buffers' padding.
        assert rank.estimate.total - rank.estimated_passing == pytest.approx(rank.kept, rel=2e-4), rank.name
        assert abs(rank.ratio - 1) < PLAN_MEMORY_ERROR, (rank.name, rank.rank, rank.ratio)


def options_of(*flags: str):
    return parse_pretrain_options(["--data-path", "x", "--global-batch-size", "64", *flags])


def test_a_model_has_each_parameter_once():
    options = options_of("--num-layers", "6", "--hidden-size", "96", "--ffn-hidden-size", "160")
    assert parameters_of_model(options, 1001) == parameters_of_rank(options, 1001, 0).total
    # Without what is whole on every rank, the shares of two tensor-parallel ranks are the model.
    parallel = dataclasses.replace(options.parallel, tensor_model_parallel_size=2)
    share = parameters_of_rank(dataclasses.replace(options, parallel=parallel), 1001, 0)
    whole = 6 * (6 * 96 * 129 + 3 * 96) + (257 + 129) * 128 + 2 * 96 * 129 + 96
    assert 2 * (share.total - whole) + whole == parameters_of_model(options, 1001)


def test_a_checkpoint_has_weights_master_weights_moments_and_average():
    options = options_of()
    count = parameters_of_model(options, 50258)
    assert checkpoint_bytes(options, 50258) == 4 * 4 * count
    assert checkpoint_bytes(options_of("--bf16"), 50258) == (2 + 4 * 4) * count


def test_replicas_share_what_the_distributed_optimizer_holds():
    plain, shared = (
        rank_memory(options_of("--bf16", *flags), 50258, 1.0, 8, 0, "cuda")
        for flags in ([], ["--use-distributed-optimizer"])
    )
    assert shared.optimizer == plain.optimizer / 8
    assert shared.moving_average == plain.moving_average / 8
    assert (shared.weights, shared.gradients) == (plain.weights, plain.gradients)


def test_gradients_in_bf16_take_half_the_memory():
    plain, half = (
        rank_memory(options_of("--bf16", *flags), 50258, 1.0, 8, 0, "cuda") for flags in ([], ["--grad-reduce-in-bf16"])
    )
    assert half.gradients == plain.gradients / 2 == plain.weights
    assert plain.total - half.total == half.gradients


def test_the_head_needs_memory_for_positions_that_count():
    flags = ["--bf16", "--micro-batch-size", "1", "--loss-chunk-rows", "4096"]
    absorbing, uniform = (rank_memory(options_of(*flags), 50258, rows, 8, 0, "cuda") for rows in (0.5, 1.0))
    # A chunk's hidden states and what its norm needs, of width 768, for half of 1024 positions.
    chunk = 512 * 768 * (2 * 2 + 5 * 4)
    tile = lambda rows: min(rows * 50258, 2**25) * (4 + 2)  # noqa: E731
    assert uniform.head - absorbing.head == chunk + tile(1024) - tile(512)
