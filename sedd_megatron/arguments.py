"""From the command line to checked options: every rule that needs no cluster, and its one line for people."""

import os
import re
from collections.abc import Sequence
from fractions import Fraction

from sedd_megatron.config import GROUPS, ConfigFile, DiffusionOptions, PretrainOptions
from sedd_megatron.errors import require
from sedd_megatron.layout_rules import (
    MOST,
    check_fp8_sizes,
    check_layout,
    check_model_layout,
    check_precision,
    check_recompute,
    check_weights_fit,
    data_parallel_size_of,
)
from sedd_megatron.options import flag_of, parse_options
from sedd_megatron.training_config import DataOptions, WeightedCorpus, is_in_object_storage

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
    check_weights_fit(options.model, options.parallel)
    check_diffusion(options.diffusion)
    check_recompute(options.recompute, options.precision)
    check_precision(options.precision, options.parallel)
    check_fp8_sizes(options)
    weighted_corpora(options.data)
    data_parallel_size = data_parallel_size_of(options.parallel, world_size)
    minutes = options.parallel.distributed_timeout_minutes
    require(
        world_size == 1 or options.checkpoint.save is None or minutes >= LEAST_MINUTES_TO_SAVE,
        f"--distributed-timeout-minutes {minutes} must be at least {LEAST_MINUTES_TO_SAVE} with --save, whose lock the "
        "first rank may watch for a minute while the others wait; raise it",
    )
    training = options.training
    per_step = training.micro_batch_size * data_parallel_size
    require(
        training.global_batch_size % per_step == 0,
        f"--global-batch-size {training.global_batch_size} is not a multiple of --micro-batch-size "
        f"{training.micro_batch_size} times {data_parallel_size} data-parallel ranks; make it a multiple of {per_step}",
    )
    num_microbatches, stages = training.global_batch_size // per_step, options.parallel.pipeline_model_parallel_size
    require(
        options.parallel.num_layers_per_virtual_pipeline_stage is None or num_microbatches % stages == 0,
        f"--global-batch-size {training.global_batch_size} makes {num_microbatches} micro-batch(es), and "
        f"interleaved stages need multiples of --pipeline-model-parallel-size {stages}; make it a multiple of "
        f"{per_step * stages}",
    )


def check_diffusion(diffusion: DiffusionOptions) -> None:
    """Check the noise schedule's numbers."""
    require(0 < diffusion.noise_eps < 1, f"--noise-eps {diffusion.noise_eps} must lie between 0 and 1, as 1e-3")
    require(0 < diffusion.time_eps < 1, f"--time-eps {diffusion.time_eps} must lie between 0 and 1, as 1e-3")
    require(
        0 < diffusion.sigma_min < diffusion.sigma_max,
        f"--sigma-min {diffusion.sigma_min} must be above 0 and below --sigma-max {diffusion.sigma_max}",
    )
    require(
        diffusion.sigma_max <= MOST_NOISE,
        f"--sigma-max {diffusion.sigma_max} must be at most {MOST_NOISE}: beyond it exp(sigma) is not a float32 number",
    )


def weighted_corpora(data: DataOptions) -> list[WeightedCorpus]:
    """What --data-path names: one prefix, or weights and prefixes in turn; of a corpus in object storage that of its
    files which are copied.

    Raises:
        UserError: an odd number of values, a weight that is not a number above 0, or no place for those copies.
    """
    return [WeightedCorpus(weight, _place_of(prefix, data)) for weight, prefix in _named_corpora(data)]


def corpora_in_object_storage(data: DataOptions) -> dict[str, str]:
    """Of the corpora that are there, each one's URL and the prefix of its files that are copied."""
    named = [prefix for _, prefix in _named_corpora(data)]
    return {prefix: _place_of(prefix, data) for prefix in named if is_in_object_storage(prefix)}


def _place_of(prefix: str, data: DataOptions) -> str:
    if not is_in_object_storage(prefix):
        return prefix
    folder, name = data.object_storage_cache_path, prefix.partition("://")[2]
    require(
        folder is not None,
        f"--data-path {prefix}: is in object storage; give --object-storage-cache-path FOLDER for its index and "
        "tokenizer",
    )
    require(
        "/" in name.strip("/") and not {"", ".", ".."} & set(name.split("/")),
        f"--data-path {prefix}: must be a bucket and a prefix, as s3://BUCKET/FOLDER/NAME_text_document",
    )
    return os.path.join(folder, name)


def _named_corpora(data: DataOptions) -> list[WeightedCorpus]:
    values, example = data.data_path, "a blend is weights and prefixes in turn, as 0.7 data/a 0.3 data/b"
    if len(values) == 1:
        return [WeightedCorpus(Fraction(1), values[0])]
    require(
        len(values) % 2 == 0,
        f"--data-path {' '.join(values)}: is {len(values)} values, must be one or an even number; {example}",
    )
    corpora = []
    for text, prefix in zip(values[::2], values[1::2], strict=True):
        try:
            weight = Fraction(text) if WEIGHT.fullmatch(text) else Fraction(0)
        except (ValueError, ZeroDivisionError):
            weight = Fraction(0)
        require(weight > 0, f"--data-path {text} {prefix}: the weight {text} must be a number above 0; {example}")
        corpora.append(WeightedCorpus(weight, prefix))
    return corpora


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
            require(value is None or holds(value), f"{flag_of(name)} {value} must be {rule}")
    checkpoint = options.checkpoint
    require(
        checkpoint.keep_every is None or checkpoint.keep_last is not None,
        f"--keep-every {checkpoint.keep_every} keeps more than --keep-last does, which is not given, so that all is "
        "kept; add --keep-last, or leave it out",
    )
    training = options.training
    require(
        training.ema_interval <= max(training.train_iters, 1),
        f"--ema-interval {training.ema_interval} is above --train-iters {training.train_iters}: the average, by which "
        "models are sampled and evaluated, would stay as it began; lower it",
    )
    require(training.min_lr <= training.lr,
             f"--min-lr {training.min_lr} must not be above --lr {training.lr}")  # fmt: skip
    decay_iters = training.lr_decay_iters or training.train_iters
    if training.lr_decay_style != "constant":
        require(
            training.lr_warmup_iters < decay_iters,
            f"--lr-warmup-iters {training.lr_warmup_iters} must be below the {decay_iters} steps of the decay "
            "(--lr-decay-iters, or --train-iters)",
        )
