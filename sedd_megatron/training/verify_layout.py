"""`--verify-layout`: a few steps in this layout against the same steps in one process, on these very machines."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sedd_megatron.config import ParallelOptions, PretrainOptions
from sedd_megatron.data.tokenizers import Tokenizer
from sedd_megatron.data.windows import Windows
from sedd_megatron.parallel.groups import ParallelGroups, parallel_groups, raise_on_every_rank
from sedd_megatron.parallel.user_buffers import user_buffers
from sedd_megatron.training.build import TrainingRun, build_run
from sedd_megatron.training.checkpoint_format import Shard, host_copy
from sedd_megatron.training.iterators import training_iterators
from sedd_megatron.training.step import find_fp8_scales, train_step

# Rounding of the weights is what layouts differ by: 2^-24, 2^-9, and 2^-4 for the inputs of FP8 products.
TOLERANCES = {"float32": 1e-5, "bf16": 2e-2, "FP8": 5e-2}


def verify_layout(options: PretrainOptions, windows: Windows, tokenizer: Tokenizer) -> bool:
    """Train `verify_layout_steps` steps alone, then with all ranks, and print the largest relative differences.

    Every rank trains alone first, so that the comparison of weights needs no whole model on the wire; it takes the
    memory of the whole model on each rank. Warm-up is off. Adam's epsilon is raised to 1e-4: its first
    updates are signs, and an entry whose gradient is rounding noise would move by a whole step either way.

    Raises:
        UserError: of a rank that has joined without training, as pretrain has it.

    Returns:
        Whether every difference is within the tolerance and all replicas agree bit for bit.
    """
    options = replace(
        options,
        training=replace(
            options.training,
            lr_warmup_iters=0,
            lr_warmup_samples=None,
            lr_warmup_fraction=None,
            adam_eps=1e-4,
            lr_decay_style="constant",
        ),
    )
    alone = replace(options, parallel=_one_process(options.parallel, options.precision.fp8_param_gather))
    with parallel_groups(alone.parallel, world_size=1) as groups:
        run, expected_steps = _train(alone, windows, tokenizer, groups)
        expected_weights = _whole_weights(run)
        del run
    num_chunks = options.parallel.num_model_chunks(options.model.num_layers)
    with parallel_groups(options.parallel, num_chunks) as groups, user_buffers(options, groups):
        # A rank that could not begin has come here at once, with its reason.
        raise_on_every_rank(None)
        run, steps = _train(options, windows, tokenizer, groups)
        differences = {
            "loss": _largest("loss", steps, expected_steps),
            "gradient norm": _largest("grad_norm", steps, expected_steps),
            "parameters": _weight_difference(run, expected_weights),
        }
        torn = _disagreeing_replicas(run)
        tolerance = _tolerance(options)
        passed = not torn and all(value <= tolerance for value, _ in differences.values())
        if torch.distributed.get_rank() == 0:
            print(_report(options, groups, differences, torn, tolerance, passed), flush=True)
    return passed


def _one_process(parallel: ParallelOptions, needs_distributed_optimizer: bool) -> ParallelOptions:
    """The same device and kernels, and nothing shared."""
    return ParallelOptions(
        device=parallel.device,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        use_distributed_optimizer=needs_distributed_optimizer,
    )


def _train(
    options: PretrainOptions, windows: Windows, tokenizer: Tokenizer, groups: ParallelGroups
) -> tuple[TrainingRun, list[dict[str, Any]]]:
    run = build_run(options, tokenizer, groups)
    find_fp8_scales(run, windows.train)
    batches = training_iterators(run, windows.train)
    return run, [train_step(run, batches)[0] for _ in range(options.verify.verify_layout_steps)]


def _main_shards(run: TrainingRun) -> Iterator[Shard]:
    return (main.shard("", main.tensor) for main in run.main_parameters)


def _whole_weights(run: TrainingRun) -> dict[str, Tensor]:
    """Whole tensors in host memory by their names, of a run in one process, which holds every box of them."""
    weights: dict[str, Tensor] = {}
    for shard in _main_shards(run):
        whole = weights.setdefault(shard.key, torch.empty(shard.global_shape))
        whole[shard.slices].view(-1)[slice(*shard.range)] = host_copy(shard.data).view(-1)
    return weights


def _weight_difference(run: TrainingRun, expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of a tensor over its norm, and the tensor's name; each rank adds what it holds."""
    names = sorted(expected)
    squares = torch.zeros(len(names), dtype=torch.float64)
    for shard in _main_shards(run):
        if shard.is_first_replica:
            own = expected[shard.key][shard.slices].reshape(-1)[slice(*shard.range)]
            difference = host_copy(shard.data).view(-1).double() - own.double()
            squares[names.index(shard.key)] += difference.square().sum()
    squares = squares.to(run.groups.device)
    torch.distributed.all_reduce(squares)
    norms = torch.stack([expected[name].double().norm() for name in names])
    relative = squares.cpu().sqrt() / norms.clamp_min(torch.finfo(torch.float32).tiny)
    largest = int(relative.argmax())
    return relative[largest].item(), names[largest]


def _disagreeing_replicas(run: TrainingRun) -> list[str]:
    """Names of the tensors of which two ranks hold different bits of the same place."""
    run.gather_parameters()
    own = []
    for chunk in run.model_chunks:
        for sharded in chunk.sharded_tensors().values():
            bits = host_copy(sharded.data).view(torch.uint8).numpy().tobytes()
            own.append((sharded.key, tuple(sharded.global_offset), hashlib.sha256(bits).hexdigest()))
    gathered: list[list[tuple]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, own)
    digests: dict[tuple, set[str]] = {}
    for key, offset, digest in (entry for entries in gathered for entry in entries):
        digests.setdefault((key, offset), set()).add(digest)
    return sorted({key for (key, _), found in digests.items() if len(found) > 1})


def _largest(name: str, actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> tuple[float, str]:
    relative = [abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(actual, expected, strict=True)]
    largest = max(range(len(relative)), key=relative.__getitem__)
    return relative[largest], f"step {largest + 1}"


def _tolerance(options: PretrainOptions) -> float:
    precision = options.precision
    name = "FP8" if precision.fp8_format else "bf16" if precision.bf16 else "float32"
    return options.verify.verify_layout_tolerance or TOLERANCES[name]


def _report(
    options: PretrainOptions,
    groups: ParallelGroups,
    differences: dict[str, tuple[float, str]],
    torn: list[str],
    tolerance: float,
    passed: bool,
) -> str:
    return "\n".join([
        f"{groups.layout} against one process, {options.verify.verify_layout_steps} steps; largest "
        "relative differences:",
        *(f"  {name:<14} {value:.1e}  ({where})" for name, (value, where) in differences.items()),
        f"  {'replicas':<14} " + ("agree bit for bit" if not torn else f"differ in {', '.join(torn)}"),
        f"{'PASSED' if passed else 'FAILED'}: the tolerance is {tolerance:.0e} (--verify-layout-tolerance)",
    ])  # fmt: skip
