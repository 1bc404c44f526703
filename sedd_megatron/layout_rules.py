"""What layout, precision and recompute must keep to, and its one line for people."""

import math
from collections.abc import Callable

import psutil

from sedd_megatron.config import (
    LayoutOptions,
    ModelOptions,
    ParallelOptions,
    PrecisionOptions,
    PretrainOptions,
    RecomputeOptions,
)
from sedd_megatron.errors import require
from sedd_megatron.options import flag_of
from sedd_megatron.wording import counted

# Transformer Engine's matrix products (pytorch/utils.py, assert_dim_for_fp8_exec) and 128 x 128 blocks
# (pytorch/tensor/float8_blockwise_tensor.py): what the inner sizes and the number of rows must be multiples of.
FP8_MULTIPLES = {"delayed": (16, 8), "tensorwise": (16, 8), "blockwise": (128, 128)}
# Of any count, so that the product of two, as of steps and sequences, is a number of 63 bits; of minutes, a year.
MOST, MOST_MINUTES = 2**31 - 1, 525_600


def data_parallel_size_of(parallel: ParallelOptions, world_size: int) -> int:
    """Number of replicas of the model.

    Raises:
        UserError: the tensor, pipeline and context sizes do not divide the number of ranks.
    """
    sizes = {
        "--tensor-model-parallel-size": parallel.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": parallel.pipeline_model_parallel_size,
        "--context-parallel-size": parallel.context_parallel_size,
    }
    model_ranks = math.prod(sizes.values())
    require(
        world_size % model_ranks == 0,
        f"{' times '.join(f'{name} {size}' for name, size in sizes.items())} must divide the "
        f"{counted(world_size, 'rank')} started; start a multiple of {model_ranks} (torchrun --nproc-per-node) or "
        "lower one of them",
    )
    return world_size // model_ranks


def check_model_layout(model: ModelOptions, parallel: ParallelOptions) -> None:
    """Check that the model's sizes divide into heads, tensor-parallel shards and pipeline stages."""
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    context = parallel.context_parallel_size
    rules = [
        ("hidden-size", model.hidden_size, "num-attention-heads", model.num_attention_heads),
        ("num-attention-heads", model.num_attention_heads, "tensor-model-parallel-size", tensor),
        ("ffn-hidden-size", model.mlp_hidden_size, "tensor-model-parallel-size", tensor),
        ("make-vocab-size-divisible-by", model.make_vocab_size_divisible_by, "tensor-model-parallel-size", tensor),
        ("num-layers", model.num_layers, "pipeline-model-parallel-size", pipeline),
        ("seq-length", model.seq_length, "context-parallel-size", context),
    ]
    for name, value, divisor_name, divisor in rules:
        require(
            value % divisor == 0,
            f"--{name} {value} is not a multiple of --{divisor_name} {divisor}; change one of them",
        )
    _check_parallel_switches(model, parallel)
    head_size = model.hidden_size // model.num_attention_heads
    require(
        head_size % 2 == 0,
        f"--hidden-size {model.hidden_size} over --num-attention-heads {model.num_attention_heads} gives heads of "
        f"{head_size}; rotary embedding needs an even size: change one of them",
    )


def _check_parallel_switches(model: ModelOptions, parallel: ParallelOptions) -> None:
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if parallel.sequence_parallel:
        per_rank = model.seq_length // parallel.context_parallel_size
        require(tensor > 1, "--sequence-parallel shares the sequence among tensor-parallel ranks and "
                 "--tensor-model-parallel-size is 1; raise that or leave --sequence-parallel out")  # fmt: skip
        require(
            per_rank % tensor == 0,
            f"--seq-length {model.seq_length} over --context-parallel-size {parallel.context_parallel_size} leaves "
            f"{per_rank} tokens, not a multiple of --tensor-model-parallel-size {tensor} as --sequence-parallel needs",
        )
    virtual = parallel.num_layers_per_virtual_pipeline_stage
    if virtual is not None:
        require(pipeline > 1, f"--num-layers-per-virtual-pipeline-stage {virtual} interleaves pipeline stages and "
                 "--pipeline-model-parallel-size is 1; raise that or leave it out")  # fmt: skip
        require(
            (model.num_layers // pipeline) % virtual == 0,
            f"--num-layers {model.num_layers} over --pipeline-model-parallel-size {pipeline} gives "
            f"{model.num_layers // pipeline} layers a rank, not a multiple of "
            f"--num-layers-per-virtual-pipeline-stage {virtual}; change one of them",
        )
    heads_per_rank = model.num_attention_heads // tensor
    require(
        parallel.cp_comm_type != "a2a" or heads_per_rank % parallel.context_parallel_size == 0,
        f"--cp-comm-type a2a shares {heads_per_rank} attention heads among --context-parallel-size "
        f"{parallel.context_parallel_size} ranks, which does not divide; take p2p or all_gather",
    )
    require(
        not parallel.overlap_param_gather or (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce),
        "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce; add them or leave it out",
    )
    require(
        parallel.ddp_bucket_size is None or parallel.overlap_grad_reduce,
        f"--ddp-bucket-size {parallel.ddp_bucket_size} cuts what --overlap-grad-reduce overlaps; add that or leave "
        "it out",
    )


def check_recompute(recompute: RecomputeOptions, precision: PrecisionOptions) -> None:
    """Check that the recompute flags make sense together, by Megatron's rules."""
    full = recompute.recompute_granularity == "full"
    method, layers = recompute.recompute_method, recompute.recompute_num_layers
    require(
        not full or (method is not None and layers is not None),
        "--recompute-granularity full needs --recompute-method (uniform or block) and --recompute-num-layers",
    )
    require(
        full or (method is None and layers is None),
        f"--recompute-method {method} and --recompute-num-layers {layers} belong to --recompute-granularity full; add "
        "it or leave them out",
    )
    require(
        recompute.recompute_modules is None or recompute.recompute_granularity == "selective",
        f"--recompute-modules {' '.join(recompute.recompute_modules or ())} belongs to --recompute-granularity "
        "selective; add it or leave the modules out",
    )
    require(
        "layernorm" not in recompute.modules or precision.fp8_format is None,
        "--recompute-modules layernorm cannot restore what FP8 products kept of its output; leave layernorm out with "
        f"--fp8-format {precision.fp8_format}",
    )


def check_precision(precision: PrecisionOptions, parallel: ParallelOptions) -> None:
    """Check that the precision flags make sense together."""
    require(
        precision.fp8_format is None or precision.bf16,
        f"--fp8-format {precision.fp8_format} quantises bfloat16 activations; add --bf16",
    )
    require(
        precision.fp8_recipe is None or precision.fp8_format is not None,
        f"--fp8-recipe {precision.fp8_recipe} alone leaves FP8 off; add --fp8-format hybrid or e4m3",
    )
    require(
        precision.fp8_format is None or precision.transformer_impl != "local",
        f"--fp8-format {precision.fp8_format} needs Transformer Engine's layers, and --transformer-impl is local; "
        "leave one of them out",
    )
    require(
        not precision.fp8_param_gather or (precision.fp8_format is not None and parallel.use_distributed_optimizer),
        "--fp8-param-gather needs --fp8-format and --use-distributed-optimizer; add them or leave it out",
    )
    for name, value in (("--transformer-impl", precision.transformer_impl == "transformer_engine"),
                        ("--fp8-format", precision.fp8_format is not None)):  # fmt: skip
        require(not value or parallel.device != "cpu", f"{name} runs on GPUs, and --device is cpu; change one of them")


def check_communication(parallel: ParallelOptions, precision: PrecisionOptions) -> None:
    """Check what the exchanges of gradients and of activations need of each other and of the precision."""
    require(
        not parallel.grad_reduce_in_bf16 or precision.bf16,
        "--grad-reduce-in-bf16 sums gradients of bfloat16 weights; add --bf16, or leave it out",
    )
    require(
        not parallel.tp_comm_overlap or (parallel.sequence_parallel and precision.bf16),
        "--tp-comm-overlap runs beside bfloat16 products over a shared sequence; add --sequence-parallel and --bf16, "
        "or leave it out",
    )
    for name, holds in (("--device cpu", parallel.device != "cpu"),
                        ("--transformer-impl local", precision.transformer_impl != "local")):  # fmt: skip
        require(
            not parallel.tp_comm_overlap or holds,
            f"--tp-comm-overlap needs Transformer Engine's layers on GPUs, and not {name}; leave one of them out",
        )


def check_fp8_sizes(options: PretrainOptions) -> None:
    """Refuse sizes that FP8 matrix products cannot take, by name, as each rank sees them."""
    if options.precision.fp8_format is None:
        return
    model, parallel, recipe = options.model, options.parallel, options.precision.recipe
    tensor, inner, rows_multiple = parallel.tensor_model_parallel_size, *FP8_MULTIPLES[recipe]
    for name, size in (("--hidden-size", model.hidden_size), ("--ffn-hidden-size", model.mlp_hidden_size)):
        for share, where in ((size, ""), (size // tensor, f" over --tensor-model-parallel-size {tensor}")):
            require(
                share % inner == 0,
                f"{name} {size}{where} is {share}, not a multiple of {inner} as --fp8-recipe {recipe} needs; change "
                "it or leave --fp8-format out",
            )
    ranks = parallel.context_parallel_size * (tensor if parallel.sequence_parallel else 1)
    rows = options.training.micro_batch_size * model.seq_length // ranks
    require(
        rows % rows_multiple == 0,
        f"--micro-batch-size {options.training.micro_batch_size} times --seq-length {model.seq_length} over "
        f"{counted(ranks, 'rank')} of the sequence is {rows} rows, not a multiple of {rows_multiple} as "
        f"--fp8-recipe {recipe} needs",
    )


def check_layout(layout: LayoutOptions, name_of: Callable[[str], str] = flag_of) -> None:
    """Check what every command's layout must keep to, by itself; `name_of` says how an error names an option."""
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        value = getattr(layout, name)
        require(1 <= value <= MOST, f"{name_of(name)} {value} must be at least 1 and at most {MOST:,}")
    minutes = layout.distributed_timeout_minutes
    require(
        0 < minutes <= MOST_MINUTES,
        f"{name_of('distributed_timeout_minutes')} {minutes} must be above 0 and at most {MOST_MINUTES:,}",
    )


def check_vocabulary_fits(options: PretrainOptions) -> None:
    """The same of --vocab-size, which no tokenizer bounds: embedding and head, in float32."""
    num_tokens, width = options.data.vocab_size or 0, options.model.hidden_size
    needed = 2 * 4 * num_tokens * width // options.parallel.tensor_model_parallel_size
    there = psutil.virtual_memory().total
    require(
        needed <= there,
        f"--vocab-size {num_tokens} of --hidden-size {width} is {needed / 2**30:,.0f} GiB of embedding and head on "
        f"each rank, and this machine has {there / 2**30:,.0f}; lower it",
    )


def check_weights_fit(model: ModelOptions, parallel: ParallelOptions) -> None:
    """Refuse a model whose layers alone, in float32, are more than this machine's memory, before any of it is taken."""
    width, inner = model.hidden_size, model.mlp_hidden_size
    layer = 4 * width * width + 2 * width * inner + 6 * width * model.cond_dim
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    needed, there = 4 * layer * model.num_layers // ranks, psutil.virtual_memory().total
    require(
        needed <= there,
        f"--num-layers {model.num_layers} of --hidden-size {width} and MLPs of {inner} are {needed / 2**30:,.0f} GiB "
        f"of weights on each rank, and this machine has {there / 2**30:,.0f}; lower them, or share them among more "
        "ranks",
    )
