"""The time model: published speeds, and its formulas against schedules and rings carried out step by step."""

import dataclasses

import numpy as np
import pytest

from sedd_megatron.planning.devices import DEVICES
from sedd_megatron.planning.time import Group, LinkBytes, Product, Work, Workload, bubble_share, step_time
from tests.benchmarks.goals import PLAN_TIME_ERROR
from tests.benchmarks.published_gpt import AMPERE, HOPPER, estimated_tflops, flops, workload

H100 = DEVICES["h100"]


@pytest.mark.parametrize("table", [AMPERE, HOPPER], ids=["A100", "H100"])
def test_published_speeds_are_met(table):
    ratios = {row.name: row.tflops / estimated_tflops(row, table) for row in table.rows}
    assert max(abs(ratio - 1) for ratio in ratios.values()) < PLAN_TIME_ERROR, ratios


def test_published_operations_are_counted_as_published():
    # The table's aggregate: 44 % of 312 TFLOP/s on 32 GPUs, and 145.6B parameters in 227.1 PFLOP/s on 1536.
    row = AMPERE.rows[0]
    seconds = flops(row, AMPERE) / (row.gpus * row.tflops * 1e12)
    # The paper's own estimate of a step, 8 T P / (n X), leaves out attention and vocabulary (section 5.10).
    assert seconds == pytest.approx(8 * row.batch * 2048 * 1.7e9 / (row.gpus * row.tflops * 1e12), rel=0.25)
    assert flops(HOPPER.rows[0], HOPPER) == pytest.approx(
        192 * 4096 * (24 * 3 * 24 * 2048**2 * (1 + 4096 / (6 * 2048)) + 6 * 2048 * 131072)
    )


def last_finish(stages: int, num_microbatches: int, forward: float, backward: float) -> float:
    """1F1B carried out: each pass starts when its stage is free and its input is there."""
    orders = []
    for stage in range(stages):
        warm_up = min(stages - 1 - stage, num_microbatches)
        order = [("f", n) for n in range(warm_up)]
        for n in range(num_microbatches - warm_up):
            order += [("f", warm_up + n), ("b", n)]
        orders.append(order + [("b", n) for n in range(num_microbatches - warm_up, num_microbatches)])
    done, clock, position = {}, [0.0] * stages, [0] * stages
    while any(position[s] < len(orders[s]) for s in range(stages)):
        for stage in range(stages):
            if position[stage] == len(orders[stage]):
                continue
            kind, n = orders[stage][position[stage]]
            before = (kind, n, stage - 1) if kind == "f" else (kind, n, stage + 1)
            if not 0 <= before[2] < stages:
                before = None if kind == "f" else ("f", n, stage)
            if before is None or before in done:
                start = max(clock[stage], done[before] if before else 0.0)
                clock[stage] = done[kind, n, stage] = start + (forward if kind == "f" else backward)
                position[stage] += 1
    return max(clock)


NOBODY = Group(1, 1)
PLAIN = Workload(
    layer=Work((Product(4096, 2048, 2048),)), head=Work(()), layers=3, stages=1, chunks=1, num_microbatches=1,
    recomputed=0.0, tensor=NOBODY, context=NOBODY, data=NOBODY, message_bytes=0.0, messages_leave_node=False,
    messages_overlap=True, gradient_bytes=0.0, parameter_bytes=0.0, gradients_overlap=False, parameters_overlap=False,
    optimizer_bytes=0.0,
)  # fmt: skip


@pytest.mark.parametrize(("stages", "num_microbatches"), [(1, 3), (2, 2), (4, 4), (4, 9), (8, 8)])
def test_the_bubble_is_that_of_the_schedule(stages, num_microbatches):
    finish = last_finish(stages, num_microbatches, forward=1.0, backward=2.0)
    assert finish == pytest.approx(3 * num_microbatches * (1 + bubble_share(stages, 1, num_microbatches)))
    one = step_time(PLAIN, H100)
    load = dataclasses.replace(PLAIN, stages=stages, num_microbatches=num_microbatches)
    time = step_time(load, H100)
    assert time.compute + time.bubble == pytest.approx(one.compute * finish / 3)


def test_interleaving_shortens_the_bubble_and_sends_more():
    load = dataclasses.replace(PLAIN, stages=4, num_microbatches=8, message_bytes=1e6, messages_leave_node=True)
    plain, interleaved = (step_time(dataclasses.replace(load, chunks=chunks), H100) for chunks in (1, 3))
    assert interleaved.bubble == pytest.approx(plain.bubble / 3)
    assert (plain.links, interleaved.links) == (LinkBytes(0, 8 * 2 * 1e6), LinkBytes(0, 3 * 8 * 2 * 1e6))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_ring_sends_what_the_formula_says(size):
    values = np.arange(size * size, dtype=float).reshape(size, size)  # rank, part
    held, sent = values.copy(), 0
    for step in range(size - 1):
        for rank in range(size):
            part = (rank - step) % size
            held[(rank + 1) % size, part] += held[rank, part]
            sent += 1
    owned = [held[rank, (rank + 1) % size] for rank in range(size)]
    assert owned == [values[:, (rank + 1) % size].sum() for rank in range(size)]
    assert Group(size, size).sends(size) == pytest.approx(sent / size)


def test_a_ring_over_nodes_shares_their_adapters():
    held = 8e9
    inside, outside = Group(8, 8), Group(64, 8)
    assert inside.link_bytes(held) == LinkBytes(held * 7 / 8, 0)
    sent = held * 63 / 64
    assert outside.link_bytes(held) == LinkBytes(sent * 7 / 8, sent / 8)
    # One rank of a node alone has one adapter.
    assert Group(8, 1).seconds(held, H100) > 7 * Group(8, 8).seconds(held, H100)


def test_what_overlaps_is_hidden_as_far_as_there_is_work():
    load = dataclasses.replace(PLAIN, data=Group(8, 8), gradient_bytes=1e6, gradients_overlap=True)
    assert step_time(load, H100).data == 0
    more = dataclasses.replace(load, gradient_bytes=1e12)
    without = dataclasses.replace(more, gradients_overlap=False)
    assert 0 < step_time(more, H100).data < step_time(without, H100).data
    # Half of it is gathered as parameters, after they are updated.
    shared = dataclasses.replace(without, parameter_bytes=1e12)
    assert step_time(shared, H100).data == pytest.approx(step_time(without, H100).data, rel=1e-4)


def test_recompute_makes_each_forward_pass_twice():
    row = AMPERE.rows[3]
    with_it = workload(row, AMPERE)
    without = dataclasses.replace(with_it, recomputed=0.0)
    a100 = DEVICES["a100"]
    assert step_time(with_it, a100).tensor == pytest.approx(1.5 * step_time(without, a100).tensor)
    assert 1.25 < step_time(with_it, a100).compute / step_time(without, a100).compute < 1.36


def test_small_products_reach_less_of_the_peak():
    def share(width: int) -> float:
        load = dataclasses.replace(PLAIN, layer=Work((Product(4096, width, width),)), layers=1)
        return 3 * Product(4096, width, width).flops / step_time(load, H100).compute / H100.peak_flops(fp8=False)

    shares = [share(width) for width in (128, 1024, 8192)]
    assert shares == sorted(shares)
    assert 0.55 < shares[-1] < H100.product_share
