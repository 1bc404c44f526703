"""Which layouts of a run a cluster may take, and what each costs: from options to estimates in order of their time."""

import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from sedd_megatron.arguments import check_diffusion, check_options, check_ranges
from sedd_megatron.config import PretrainOptions, RecomputeOptions
from sedd_megatron.diffusion import make_graph, make_schedule
from sedd_megatron.errors import UserError, require
from sedd_megatron.layout_rules import data_parallel_size_of
from sedd_megatron.planning.devices import Cluster
from sedd_megatron.planning.memory import RankMemory, rank_memory
from sedd_megatron.planning.time import StepTime, bubble_share, step_time
from sedd_megatron.planning.workload import workload_of
from sedd_megatron.training.estimates import flops_per_token, fraction_of_head_rows
from sedd_megatron.wording import counted

# Below this a rank's part of a sequence is not worth its exchange of keys and values.
LEAST_TOKENS_OF_A_PART = 1024
MOST_SEQUENCES = 64  # of a micro-batch
MOST_CHUNKS = 64  # that a rank's layers are interleaved in, where hardly anything of a bubble is left
# What a plan decides, but for what its command line gives.
LAYOUT_NAMES = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage",
    "context_parallel_size", "sequence_parallel", "use_distributed_optimizer", "overlap_grad_reduce",
    "overlap_param_gather", "micro_batch_size", "recompute_granularity", "recompute_method", "recompute_num_layers",
    "recompute_modules",
)  # fmt: skip
RECOMPUTE_NAMES = tuple(field.name for field in fields(RecomputeOptions))


@dataclass(frozen=True)
class Plan:
    """One layout and its estimates."""

    options: PretrainOptions
    cluster: Cluster
    num_states: int
    head_rows: float
    memory: RankMemory  # of the rank that needs most
    time: StepTime

    @property
    def data_parallel_size(self) -> int:
        """Number of replicas."""
        return data_parallel_size_of(self.options.parallel, self.cluster.gpus)

    @property
    def num_microbatches(self) -> int:
        """Of a replica and step."""
        training = self.options.training
        return training.global_batch_size // training.micro_batch_size // self.data_parallel_size

    @property
    def bubble(self) -> float:
        """The pipeline's bubble as a share of the work."""
        parallel, model = self.options.parallel, self.options.model
        chunks = parallel.num_model_chunks(model.num_layers)
        return bubble_share(parallel.pipeline_model_parallel_size, chunks, self.num_microbatches)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.options.training.global_batch_size * self.options.model.seq_length

    @property
    def flops_per_gpu(self) -> float:
        """Useful operations per second of each GPU."""
        work = flops_per_token(self.options.model, self.num_states, self.head_rows) * self.tokens
        return work / self.time.total / self.cluster.gpus

    @property
    def fits(self) -> bool:
        """Whether every rank's memory is enough."""
        return self.memory.total <= self.cluster.device.memory


def best_plans(plans: Iterable[Plan]) -> list[Plan]:
    """Those that fit, the fastest first; of each division into tensor, pipeline and context ranks the fastest alone."""
    best: dict[tuple[int, ...], Plan] = {}
    for plan in plans:
        parallel = plan.options.parallel
        key = (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.context_parallel_size,
        )
        if plan.fits and (key not in best or _order(plan) < _order(best[key])):
            best[key] = plan
    return sorted(best.values(), key=_order)


def _order(plan: Plan) -> tuple[float, float]:
    return plan.time.total, plan.memory.total


def all_plans(options: PretrainOptions, cluster: Cluster, num_tokens: int, kept: Collection[str]) -> list[Plan]:
    """An estimate of every layout that a run may take, whether or not it fits; `kept` are options to leave as they are.

    Raises:
        UserError: a number is out of its range, the cluster or the precision has no estimate, or no layout keeps to
            the rules.
    """
    check_ranges(options)
    check_diffusion(options.diffusion)
    _check_cluster(options, cluster)
    diffusion = options.diffusion
    graph = make_graph(diffusion.graph, num_tokens)
    schedule = make_schedule(
        diffusion.noise, eps=diffusion.noise_eps, sigma_min=diffusion.sigma_min, sigma_max=diffusion.sigma_max
    )
    head_rows = fraction_of_head_rows(graph, schedule, diffusion.time_eps)
    return [plan_of(layout, cluster, graph.num_states, head_rows) for layout in layouts(options, cluster, kept)]


def plan_of(options: PretrainOptions, cluster: Cluster, num_states: int, head_rows: float) -> Plan:
    """The estimates of one layout."""
    replicas = data_parallel_size_of(options.parallel, cluster.gpus)
    stages = options.parallel.pipeline_model_parallel_size
    # The first stage has the embedding and keeps most micro-batches, the last one has the head.
    ranks = (rank_memory(options, num_states, head_rows, replicas, rank, "cuda") for rank in {0, stages - 1})
    memory = max(ranks, key=lambda found: found.total)
    time = step_time(workload_of(options, cluster, num_states, head_rows), cluster.device)
    return Plan(options, cluster, num_states, head_rows, memory, time)


def layouts(options: PretrainOptions, cluster: Cluster, kept: Collection[str]) -> Iterator[PretrainOptions]:
    """Every layout that keeps to the rules of a run.

    Tensor-parallel ranks share a node: their sums are waited for in every layer. They share the sequence as well, and
    replicas the optimizer, and communication overlaps wherever that is possible, for nothing is faster or smaller
    without.

    Raises:
        UserError: there is none.
    """
    found, refusal = False, None
    for values in _choices(options, cluster, kept):
        candidate = _with_values(options, values)
        try:
            check_options(candidate, cluster.gpus, on_this_machine=False)
        except UserError as error:
            # Of the simplest layout, which comes first, and which a person would try.
            refusal = refusal or error
            continue
        found = True
        yield candidate
    if not found:
        reason = f"of the simplest: {refusal}" if refusal else "the sizes given do not divide the GPUs and the batch"
        raise UserError(f"--gpus {cluster.gpus}: no layout keeps to a run's rules; {reason}")


def _choices(options: PretrainOptions, cluster: Cluster, kept: Collection[str]) -> Iterator[dict[str, Any]]:
    """Values by name, of layouts whose sizes divide what they must."""
    model, gpus, batch = options.model, cluster.gpus, options.training.global_batch_size

    def of(name: str, values: Iterable[Any]) -> list[Any]:
        return [_value(options, name)] if name in kept else list(values)

    sizes = itertools.product(
        of("tensor_model_parallel_size", _powers_of_two(min(cluster.gpus_per_node, gpus))),
        of("pipeline_model_parallel_size", _divisors(model.num_layers)),
        of("context_parallel_size", _powers_of_two(model.seq_length // LEAST_TOKENS_OF_A_PART)),
    )
    for tensor, stages, context in sizes:
        if gpus % (tensor * stages * context):
            continue
        replicas = gpus // (tensor * stages * context)
        shares, interleaved = replicas * context > 1, [None]
        if stages > 1:
            layers = model.num_layers // stages
            interleaved += [layers // chunks for chunks in range(MOST_CHUNKS, 1, -1) if layers % chunks == 0]
        for virtual, micro_batch, recompute in itertools.product(
            of("num_layers_per_virtual_pipeline_stage", interleaved),
            of("micro_batch_size", _powers_of_two(MOST_SEQUENCES)),
            _recompute_choices(options, kept),
        ):
            per_replica = micro_batch * replicas
            # The first of all is let through, for its error.
            if batch % per_replica and not tensor == stages == context == micro_batch == 1:
                continue
            values = {
                "tensor_model_parallel_size": tensor,
                "pipeline_model_parallel_size": stages,
                "context_parallel_size": context,
                "num_layers_per_virtual_pipeline_stage": virtual,
                "micro_batch_size": micro_batch,
                "sequence_parallel": tensor > 1,
                "use_distributed_optimizer": shares,
                "overlap_grad_reduce": shares,
                "overlap_param_gather": shares,
                **recompute,
            }
            yield {name: _value(options, name) if name in kept else value for name, value in values.items()}


def _recompute_choices(options: PretrainOptions, kept: Collection[str]) -> list[dict[str, Any]]:
    """Nothing, the cheap modules, each layer by itself."""
    if any(name in kept for name in RECOMPUTE_NAMES):
        return [{name: getattr(options.recompute, name) for name in RECOMPUTE_NAMES}]
    modules = ("mlp",) if options.precision.fp8_format else ("layernorm", "mlp")
    choices = [(None, None, None, None), ("selective", None, None, modules), ("full", "uniform", 1, None)]
    return [dict(zip(RECOMPUTE_NAMES, choice, strict=True)) for choice in choices]


def _with_values(options: PretrainOptions, values: dict[str, Any]) -> PretrainOptions:
    def part(group: Any) -> Any:
        names = {field.name for field in fields(group)}
        return replace(group, **{name: value for name, value in values.items() if name in names})

    return replace(
        options,
        parallel=part(options.parallel),
        training=part(options.training),
        recompute=part(options.recompute),
    )


def _value(options: PretrainOptions, name: str) -> Any:
    return (vars(options.parallel) | vars(options.training) | vars(options.recompute))[name]


def _powers_of_two(most: int) -> list[int]:
    return [2**n for n in range(max(most, 1).bit_length())]


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _check_cluster(options: PretrainOptions, cluster: Cluster) -> None:
    gpus, node, device = cluster.gpus, cluster.gpus_per_node, cluster.device
    require(
        gpus <= node or gpus % node == 0,
        f"--gpus {gpus} is not a multiple of --gpus-per-node {node}, so that a node would be shared; take "
        f"{gpus // node * node} or {-(-gpus // node) * node}",
    )
    precision = options.precision
    require(
        precision.bf16,
        "a plan is for bfloat16 or FP8, for float32 products have no matrix units at full precision; add --bf16",
    )
    require(
        options.parallel.device != "cpu",
        "--device cpu: a plan is for GPUs; leave it out",
    )
    require(
        precision.fp8_format is None or device.peak_flops(fp8=True) is not None,
        f"--fp8-format {precision.fp8_format}: --gpu {device.name} has no FP8; leave it out, or plan for another GPU",
    )


def nearest_line(plans: list[Plan]) -> str:
    """What is missing where nothing fits: of the layout that needs least."""
    plan = min(plans, key=lambda found: found.memory.total)
    parallel, device = plan.options.parallel, plan.cluster.device
    return (
        f"nothing fits into the {device.memory / 1e9:.0f} GB of --gpu {device.name}: tensor "
        f"{parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} x context "
        f"{parallel.context_parallel_size} on {counted(plan.cluster.gpus, 'GPU')} needs least, "
        f"{plan.memory.total / 1e9:.1f} GB, which is {(plan.memory.total - device.memory) / 1e9:.1f} GB too many; add "
        "GPUs, or take larger ones or a smaller model"
    )
