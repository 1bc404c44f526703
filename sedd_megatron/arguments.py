"""From the command line to checked options: every rule that needs no cluster, and its one line for people."""

import math
import os
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

import psutil

from sedd_megatron.config import (
    GROUPS,
    ConfigFile,
    DataOptions,
    DiffusionOptions,
    LayoutOptions,
    ModelOptions,
    ParallelOptions,
    PrecisionOptions,
    PretrainOptions,
    RecomputeOptions,
    WeightedCorpus,
)
from sedd_megatron.errors import UserError
from sedd_megatron.options import flag_of, parse_options
from sedd_megatron.wording import counted

# Transformer Engine's matrix products (pytorch/utils.py, assert_dim_for_fp8_exec) and 128 x 128 blocks
# (pytorch/tensor/float8_blockwise_tensor.py): what the inner sizes and the number of rows must be multiples of.
FP8_MULTIPLES = {"delayed": (16, 8), "tensorwise": (16, 8), "blockwise": (128, 128)}
# Of any count, so that the product of two, as of steps and sequences, is a number of 63 bits; of minutes, a year.
MOST, MOST_MINUTES = 2**31 - 1, 525_600
MOST_NOISE = 80.0
# Above what training/run_lock.py needs to find a lock's owner dead.
LEAST_MINUTES_TO_SAVE = 1.5
# Exact as a fraction; of few digits, for 1e99999999 would be a fraction of as many.
WEIGHT = re.compile(r"[\d.]{1,40}(e[+-]?\d{1,3})?|\d{1,40}/\d{1,40}", re.IGNORECASE | re.ASCII)


def parse_pretrain_options(argv: Sequence[str]) -> PretrainOptions:
    """Read flags and the YAML file they name, and check every value that needs no cluster.

    Raises:
        UserError: with the value, the rule and the way out.
    """
    description = "Train a score entropy discrete diffusion model on Megatron-Core."
    _, *groups = parse_options((ConfigFile, *GROUPS), argv, "pretrain_sedd.py", description)
    options = PretrainOptions(*groups)
    check_options(options, int(os.environ.get("WORLD_SIZE", "1")))
    return options


def check_options(options: PretrainOptions, world_size: int) -> None:
    """Check ranges, divisibility and the layout against the number of ranks.

    Raises:
        UserError: naming the first value that breaks a rule.
    """
    _check_ranges(options)
    check_model_layout(options.model, options.parallel)
    _check_weights_fit(options.model, options.parallel)
    check_diffusion(options.diffusion)
    check_recompute(options.recompute, options.precision)
    check_precision(options.precision, options.parallel)
    check_fp8_sizes(options)
    weighted_corpora(options.data)
    data_parallel_size = data_parallel_size_of(options.parallel, world_size)
    minutes = options.parallel.distributed_timeout_minutes
    _require(
        world_size == 1 or options.checkpoint.save is None or minutes >= LEAST_MINUTES_TO_SAVE,
        f"--distributed-timeout-minutes {minutes} must be at least {LEAST_MINUTES_TO_SAVE} with --save, whose lock the "
        "first rank may watch for a minute while the others wait; raise it",
    )
    training = options.training
    per_step = training.micro_batch_size * data_parallel_size
    _require(
        training.global_batch_size % per_step == 0,
        f"--global-batch-size {training.global_batch_size} is not a multiple of --micro-batch-size "
        f"{training.micro_batch_size} times {data_parallel_size} data-parallel ranks; make it a multiple of {per_step}",
    )
    num_microbatches, stages = training.global_batch_size // per_step, options.parallel.pipeline_model_parallel_size
    _require(
        options.parallel.num_layers_per_virtual_pipeline_stage is None or num_microbatches % stages == 0,
        f"--global-batch-size {training.global_batch_size} makes {num_microbatches} micro-batch(es), and "
        f"interleaved stages need multiples of --pipeline-model-parallel-size {stages}; make it a multiple of "
        f"{per_step * stages}",
    )


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
    _require(
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
        _require(
            value % divisor == 0,
            f"--{name} {value} is not a multiple of --{divisor_name} {divisor}; change one of them",
        )
    _check_parallel_switches(model, parallel)
    head_size = model.hidden_size // model.num_attention_heads
    _require(
        head_size % 2 == 0,
        f"--hidden-size {model.hidden_size} over --num-attention-heads {model.num_attention_heads} gives heads of "
        f"{head_size}; rotary embedding needs an even size: change one of them",
    )


def _check_parallel_switches(model: ModelOptions, parallel: ParallelOptions) -> None:
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if parallel.sequence_parallel:
        per_rank = model.seq_length // parallel.context_parallel_size
        _require(tensor > 1, "--sequence-parallel shares the sequence among tensor-parallel ranks and "
                 "--tensor-model-parallel-size is 1; raise that or leave --sequence-parallel out")  # fmt: skip
        _require(
            per_rank % tensor == 0,
            f"--seq-length {model.seq_length} over --context-parallel-size {parallel.context_parallel_size} leaves "
            f"{per_rank} tokens, not a multiple of --tensor-model-parallel-size {tensor} as --sequence-parallel needs",
        )
    virtual = parallel.num_layers_per_virtual_pipeline_stage
    if virtual is not None:
        _require(pipeline > 1, f"--num-layers-per-virtual-pipeline-stage {virtual} interleaves pipeline stages and "
                 "--pipeline-model-parallel-size is 1; raise that or leave it out")  # fmt: skip
        _require(
            (model.num_layers // pipeline) % virtual == 0,
            f"--num-layers {model.num_layers} over --pipeline-model-parallel-size {pipeline} gives "
            f"{model.num_layers // pipeline} layers a rank, not a multiple of "
            f"--num-layers-per-virtual-pipeline-stage {virtual}; change one of them",
        )
    heads_per_rank = model.num_attention_heads // tensor
    _require(
        parallel.cp_comm_type != "a2a" or heads_per_rank % parallel.context_parallel_size == 0,
        f"--cp-comm-type a2a shares {heads_per_rank} attention heads among --context-parallel-size "
        f"{parallel.context_parallel_size} ranks, which does not divide; take p2p or all_gather",
    )
    _require(
        not parallel.overlap_param_gather or (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce),
        "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce; add them or leave it out",
    )
    _require(
        parallel.ddp_bucket_size is None or parallel.overlap_grad_reduce,
        f"--ddp-bucket-size {parallel.ddp_bucket_size} cuts what --overlap-grad-reduce overlaps; add that or leave "
        "it out",
    )


def check_diffusion(diffusion: DiffusionOptions) -> None:
    """Check the noise schedule's numbers."""
    _require(0 < diffusion.noise_eps < 1, f"--noise-eps {diffusion.noise_eps} must lie between 0 and 1, as 1e-3")
    _require(0 < diffusion.time_eps < 1, f"--time-eps {diffusion.time_eps} must lie between 0 and 1, as 1e-3")
    _require(
        0 < diffusion.sigma_min < diffusion.sigma_max,
        f"--sigma-min {diffusion.sigma_min} must be above 0 and below --sigma-max {diffusion.sigma_max}",
    )
    _require(
        diffusion.sigma_max <= MOST_NOISE,
        f"--sigma-max {diffusion.sigma_max} must be at most {MOST_NOISE}: beyond it exp(sigma) is not a float32 number",
    )


def check_recompute(recompute: RecomputeOptions, precision: PrecisionOptions) -> None:
    """Check that the recompute flags make sense together, by Megatron's rules."""
    full = recompute.recompute_granularity == "full"
    method, layers = recompute.recompute_method, recompute.recompute_num_layers
    _require(
        not full or (method is not None and layers is not None),
        "--recompute-granularity full needs --recompute-method (uniform or block) and --recompute-num-layers",
    )
    _require(
        full or (method is None and layers is None),
        f"--recompute-method {method} and --recompute-num-layers {layers} belong to --recompute-granularity full; add "
        "it or leave them out",
    )
    _require(
        recompute.recompute_modules is None or recompute.recompute_granularity == "selective",
        f"--recompute-modules {' '.join(recompute.recompute_modules or ())} belongs to --recompute-granularity "
        "selective; add it or leave the modules out",
    )
    _require(
        "layernorm" not in recompute.modules or precision.fp8_format is None,
        "--recompute-modules layernorm cannot restore what FP8 products kept of its output; leave layernorm out with "
        f"--fp8-format {precision.fp8_format}",
    )


def check_precision(precision: PrecisionOptions, parallel: ParallelOptions) -> None:
    """Check that the precision flags make sense together."""
    _require(
        precision.fp8_format is None or precision.bf16,
        f"--fp8-format {precision.fp8_format} quantises bfloat16 activations; add --bf16",
    )
    _require(
        precision.fp8_recipe is None or precision.fp8_format is not None,
        f"--fp8-recipe {precision.fp8_recipe} alone leaves FP8 off; add --fp8-format hybrid or e4m3",
    )
    _require(
        precision.fp8_format is None or precision.transformer_impl != "local",
        f"--fp8-format {precision.fp8_format} needs Transformer Engine's layers, and --transformer-impl is local; "
        "leave one of them out",
    )
    _require(
        not precision.fp8_param_gather or (precision.fp8_format is not None and parallel.use_distributed_optimizer),
        "--fp8-param-gather needs --fp8-format and --use-distributed-optimizer; add them or leave it out",
    )
    for name, value in (("--transformer-impl", precision.transformer_impl == "transformer_engine"),
                        ("--fp8-format", precision.fp8_format is not None)):  # fmt: skip
        _require(not value or parallel.device != "cpu", f"{name} runs on GPUs, and --device is cpu; change one of them")


def weighted_corpora(data: DataOptions) -> list[WeightedCorpus]:
    """What --data-path names: one prefix, or weights and prefixes in turn.

    Raises:
        UserError: an odd number of values, or a weight that is not a number above 0.
    """
    values, example = data.data_path, "a blend is weights and prefixes in turn, as 0.7 data/a 0.3 data/b"
    if len(values) == 1:
        return [WeightedCorpus(Fraction(1), values[0])]
    _require(
        len(values) % 2 == 0,
        f"--data-path {' '.join(values)}: is {len(values)} values, must be one or an even number; {example}",
    )
    corpora = []
    for text, prefix in zip(values[::2], values[1::2], strict=True):
        try:
            weight = Fraction(text) if WEIGHT.fullmatch(text) else Fraction(0)
        except (ValueError, ZeroDivisionError):
            weight = Fraction(0)
        _require(weight > 0, f"--data-path {text} {prefix}: the weight {text} must be a number above 0; {example}")
        corpora.append(WeightedCorpus(weight, prefix))
    return corpora


def check_fp8_sizes(options: PretrainOptions) -> None:
    """Refuse sizes that FP8 matrix products cannot take, by name, as each rank sees them."""
    if options.precision.fp8_format is None:
        return
    model, parallel, recipe = options.model, options.parallel, options.precision.recipe
    tensor, inner, rows_multiple = parallel.tensor_model_parallel_size, *FP8_MULTIPLES[recipe]
    for name, size in (("--hidden-size", model.hidden_size), ("--ffn-hidden-size", model.mlp_hidden_size)):
        for share, where in ((size, ""), (size // tensor, f" over --tensor-model-parallel-size {tensor}")):
            _require(
                share % inner == 0,
                f"{name} {size}{where} is {share}, not a multiple of {inner} as --fp8-recipe {recipe} needs; change "
                "it or leave --fp8-format out",
            )
    ranks = parallel.context_parallel_size * (tensor if parallel.sequence_parallel else 1)
    rows = options.training.micro_batch_size * model.seq_length // ranks
    _require(
        rows % rows_multiple == 0,
        f"--micro-batch-size {options.training.micro_batch_size} times --seq-length {model.seq_length} over "
        f"{counted(ranks, 'rank')} of the sequence is {rows} rows, not a multiple of {rows_multiple} as "
        f"--fp8-recipe {recipe} needs",
    )


def check_layout(layout: LayoutOptions, name_of: Callable[[str], str] = flag_of) -> None:
    """Check what every command's layout must keep to, by itself; `name_of` says how an error names an option."""
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        value = getattr(layout, name)
        _require(1 <= value <= MOST, f"{name_of(name)} {value} must be at least 1 and at most {MOST:,}")
    minutes = layout.distributed_timeout_minutes
    _require(
        0 < minutes <= MOST_MINUTES,
        f"{name_of('distributed_timeout_minutes')} {minutes} must be above 0 and at most {MOST_MINUTES:,}",
    )


def _check_weights_fit(model: ModelOptions, parallel: ParallelOptions) -> None:
    """Refuse a model whose layers alone, in float32, are more than this machine's memory, before any of it is taken."""
    width, inner = model.hidden_size, model.mlp_hidden_size
    layer = 4 * width * width + 2 * width * inner + 6 * width * model.cond_dim
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    needed, there = 4 * layer * model.num_layers // ranks, psutil.virtual_memory().total
    _require(
        needed <= there,
        f"--num-layers {model.num_layers} of --hidden-size {width} and MLPs of {inner} are {needed / 2**30:,.0f} GiB "
        f"of weights on each rank, and this machine has {there / 2**30:,.0f}; lower them, or share them among more "
        "ranks",
    )


def _check_ranges(options: PretrainOptions) -> None:
    check_layout(options.parallel)
    at_least_one = (
        "num_layers hidden_size num_attention_heads ffn_hidden_size seq_length cond_dim make_vocab_size_divisible_by "
        "num_layers_per_virtual_pipeline_stage context_parallel_size ddp_bucket_size fp8_amax_history_len "
        "recompute_num_layers micro_batch_size global_batch_size lr_decay_iters ema_interval save_interval keep_last "
        "keep_every max_save_failures eval_iters log_interval verify_layout_steps"
    ).split()
    at_least_zero = (
        "loss_chunk_rows train_iters lr min_lr lr_warmup_iters clip_grad weight_decay seed num_workers eval_interval"
    ).split()
    below_one = ["hidden_dropout", "adam_beta1", "adam_beta2", "ema_decay"]
    values = options.to_dict()
    counts = [name for name in (*at_least_one, *at_least_zero)
              if type(values[name]) is int and name not in ("seed", "ddp_bucket_size")]  # fmt: skip
    for names, holds, rule in (
        (at_least_one, lambda v: v >= 1, "at least 1"),
        (at_least_zero, lambda v: v >= 0, "at least 0"),
        (below_one, lambda v: 0 <= v < 1, "at least 0 and below 1"),
        (["adam_eps", "verify_layout_tolerance"], lambda v: v > 0, "above 0"),
        (counts, lambda v: v <= MOST, f"at most {MOST:,}"),
    ):
        for name in names:
            value = values[name]
            _require(value is None or holds(value), f"{flag_of(name)} {value} must be {rule}")
    checkpoint = options.checkpoint
    _require(
        checkpoint.keep_every is None or checkpoint.keep_last is not None,
        f"--keep-every {checkpoint.keep_every} keeps more than --keep-last does, which is not given, so that all is "
        "kept; add --keep-last, or leave it out",
    )
    training = options.training
    _require(
        training.ema_interval <= max(training.train_iters, 1),
        f"--ema-interval {training.ema_interval} is above --train-iters {training.train_iters}: the average, by which "
        "models are sampled and evaluated, would stay as it began; lower it",
    )
    _require(training.min_lr <= training.lr,
             f"--min-lr {training.min_lr} must not be above --lr {training.lr}")  # fmt: skip
    decay_iters = training.lr_decay_iters or training.train_iters
    if training.lr_decay_style != "constant":
        _require(
            training.lr_warmup_iters < decay_iters,
            f"--lr-warmup-iters {training.lr_warmup_iters} must be below the {decay_iters} steps of the decay "
            "(--lr-decay-iters, or --train-iters)",
        )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
