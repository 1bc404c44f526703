"""Which layouts are planned: those of the rules, all of them, and nothing that a run would refuse."""

import dataclasses
import itertools

import pytest

from sedd_megatron.arguments import check_options
from sedd_megatron.config import GROUPS, ConfigFile, PretrainOptions
from sedd_megatron.errors import UserError
from sedd_megatron.options import parse_options
from sedd_megatron.planning.devices import DEVICES, Cluster
from sedd_megatron.planning.layouts import all_plans, best_plans, layouts, nearest_line

SMALL = "--num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 2048 --global-batch-size 96 --bf16"


def options_of(flags: str = SMALL) -> PretrainOptions:
    _, *groups = parse_options((ConfigFile, *GROUPS), ["--data-path", "x", *flags.split()], "plan", "")
    return PretrainOptions(*groups)


def sizes_of(options: PretrainOptions) -> tuple[int | None, ...]:
    parallel = options.parallel
    return (
        parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size,
        parallel.num_layers_per_virtual_pipeline_stage, options.training.micro_batch_size,
    )  # fmt: skip


def holds(options: PretrainOptions, gpus: int) -> bool:
    try:
        check_options(options, gpus)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("gpus", [1, 6, 24])
def test_the_layouts_are_all_that_the_rules_allow(gpus):
    options, cluster = options_of(), Cluster(gpus, 8, DEVICES["h100"])
    found = list(layouts(options, cluster, ()))
    assert all(holds(layout, gpus) for layout in found)
    expected = set()
    for sizes in itertools.product((1, 2, 4, 8), range(1, 13), (1, 2), (None, *range(1, 13)), (1, 2, 4, 8, 16, 32, 64)):
        tensor, pipeline, context, virtual, micro_batch = sizes
        # One chunk of all layers is no interleaving.
        if virtual is not None and (pipeline == 1 or virtual * pipeline >= 12):
            continue
        layout = dataclasses.replace(
            options,
            parallel=dataclasses.replace(
                options.parallel, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline,
                context_parallel_size=context, num_layers_per_virtual_pipeline_stage=virtual,
            ),
            training=dataclasses.replace(options.training, micro_batch_size=micro_batch),
        )  # fmt: skip
        if holds(layout, gpus):
            expected.add(sizes)
    assert {sizes_of(layout) for layout in found} == expected
    # Without recompute, with a little, and with all.
    assert len(found) == 3 * len(expected)


def test_a_model_of_any_depth_is_planned_in_bounded_time():
    """Of 2 billion layers there are 110 divisors, and of what each leaves as many again."""
    options = options_of(SMALL.replace("-layers 12", "-layers 2000000000"))
    found = list(layouts(options, Cluster(8, 8, DEVICES["h100"]), {"tensor_model_parallel_size"}))
    chunks = {layout.parallel.num_model_chunks(2 * 10**9) for layout in found}
    assert chunks == {1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 40, 50, 64}
    assert len(found) < 3000


def test_what_is_given_stays():
    options = options_of(f"{SMALL} --tensor-model-parallel-size 2 --micro-batch-size 3 --no-sequence-parallel")
    names = {"tensor_model_parallel_size", "micro_batch_size", "sequence_parallel"}
    found = list(layouts(options, Cluster(8, 8, DEVICES["h100"]), names))
    assert {sizes_of(layout)[0] for layout in found} == {2}
    assert {sizes_of(layout)[4] for layout in found} == {3}
    assert not any(layout.parallel.sequence_parallel for layout in found)


def test_the_best_fit_and_come_in_order():
    cluster = Cluster(16, 8, DEVICES["a100-40gb"])
    plans = all_plans(options_of(SMALL.replace("-size 96", "-size 1024")), cluster, 50_257, ())
    best = best_plans(plans)
    assert [plan.time.total for plan in best] == sorted(plan.time.total for plan in best)
    assert all(plan.memory.total <= 40e9 for plan in best)
    assert best[0].time.total == min(plan.time.total for plan in plans if plan.memory.total <= 40e9)
    assert any(plan.memory.total > 40e9 for plan in plans)
    assert len({sizes_of(plan.options)[:3] for plan in best}) == len(best)


def test_more_gpus_are_faster_and_hold_more():
    large = (
        "--num-layers 48 --hidden-size 8192 --num-attention-heads 64 --seq-length 2048 --global-batch-size 512 --bf16"
    )
    few, many = (
        all_plans(options_of(large), Cluster(gpus, 8, DEVICES["h100"]), 50_257, {"context_parallel_size"})
        for gpus in (8, 256)
    )
    assert best_plans(few) == []
    line = nearest_line(few)
    least = min(plan.memory.total for plan in few) / 1e9
    assert line.startswith("nothing fits into the 80 GB of --gpu h100: tensor ")
    assert f"on 8 GPUs needs least, {least:.1f} GB, which is {least - 80:.1f} GB too many; add GPUs" in line
    assert best_plans(many)


@pytest.mark.parametrize(
    ("flags", "cluster", "words"),
    [
        (SMALL, (12, 8, "h100"),
         "--gpus 12 is not a multiple of --gpus-per-node 8, so that a node would be shared; take 8 or 16"),
        (SMALL, (56, 8, "h100"),
         "--gpus 56: no layout keeps to a run's rules; of the simplest: --global-batch-size 96 is not a multiple of "
         "--micro-batch-size 1 times 56 data-parallel ranks; make it a multiple of 56"),
        (SMALL.removesuffix(" --bf16"), (8, 8, "h100"), "add --bf16"),
        (f"{SMALL} --fp8-format hybrid", (8, 8, "a100"), "--fp8-format hybrid: --gpu a100 has no FP8"),
        (f"{SMALL} --device cpu", (8, 8, "h100"), "--device cpu: a plan is for GPUs; leave it out"),
    ],
)  # fmt: skip
def test_what_has_no_plan_says_why(flags, cluster, words):
    gpus, node, name = cluster
    with pytest.raises(UserError) as error:
        all_plans(options_of(flags), Cluster(gpus, node, DEVICES[name]), 50_257, ())
    assert words in str(error.value)
