"""From the command line to checked options: every rule that needs no cluster, and its one line for people."""

import dataclasses
import os
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from sedd_megatron.config import GROUPS, ConfigFile, DiffusionOptions, PretrainOptions
from sedd_megatron.diffusion.graph import find_for_graph, make_graph
from sedd_megatron.diffusion.sampler import SAMPLERS
from sedd_megatron.errors import UserError, require
from sedd_megatron.layout_rules import (
    MOST,
    check_communication,
    check_fp8_sizes,
    check_layout,
    check_model_layout,
    check_precision,
    check_recompute,
    check_vocabulary_fits,
    check_weights_fit,
    data_parallel_size_of,
)
from sedd_megatron.megatron_flags import answer_of
from sedd_megatron.options import flag_of, parse_options
from sedd_megatron.training_config import (
    CheckpointOptions,
    DataOptions,
    FaultOptions,
    WeightedCorpus,
    is_in_object_storage,
)
from sedd_megatron.training_schedule import check_batch_sizes, check_training_schedule

MOST_NOISE = 80.0
# Of the data, each with a flag of its own in place of --data-path.
DATA_OF_PARTS = ("train_data_path", "valid_data_path", "test_data_path")

# Above what training/run_lock.py needs to find a lock's owner dead.
LEAST_MINUTES_TO_SAVE = 1.5
# Whole numbers up to here are float64 numbers, with which the learning rate is computed.
MOST_SAMPLES = 2**53
# Exact as a fraction; of few digits, for 1e99999999 would be a fraction of as many.
WEIGHT = re.compile(r"[\d.]{1,40}(e[+-]?\d{1,3})?|\d{1,40}/\d{1,40}", re.IGNORECASE | re.ASCII)


def parse_pretrain_options(argv: Sequence[str]) -> PretrainOptions:
    """Read flags and the YAML file they name, and check every value that needs no cluster.

    Raises:
        UserError: with the value, the rule and the way out.
    """
    description = "Train a score entropy discrete diffusion model on Megatron-Core."
    _, *groups = parse_options((ConfigFile, *GROUPS), argv, "pretrain_sedd.py", description, answer_of)
    options = PretrainOptions(*groups)
    check_options(options, int(os.environ.get("WORLD_SIZE", "1")))
    return options


def check_options(options: PretrainOptions, world_size: int, on_this_machine: bool = True) -> None:
    """Check ranges, divisibility and the layout against the number of ranks, and `on_this_machine` against its memory.

    Raises:
        UserError: naming the first value that breaks a rule.
    """
    check_ranges(options)
    check_model_layout(options.model, options.parallel)
    if on_this_machine:
        check_weights_fit(options.model, options.parallel)
        check_vocabulary_fits(options)
    check_diffusion(options.diffusion)
    check_recompute(options.recompute, options.precision)
    check_precision(options.precision, options.parallel)
    check_communication(options.parallel, options.precision)
    check_fp8_sizes(options)
    check_data(options.data)
    data_parallel_size = data_parallel_size_of(options.parallel, world_size)
    minutes = options.parallel.distributed_timeout_minutes
    require(
        world_size == 1 or options.checkpoint.save is None or minutes >= LEAST_MINUTES_TO_SAVE,
        f"--distributed-timeout-minutes {minutes} must be at least {LEAST_MINUTES_TO_SAVE} with --save, whose lock the "
        "first rank may watch for a minute while the others wait; raise it",
    )
    check_profiling(options, world_size)
    check_logging(options)
    interleaves = options.parallel.num_layers_per_virtual_pipeline_stage is not None
    stages = options.parallel.pipeline_model_parallel_size if interleaves else None
    check_batch_sizes(options.training, data_parallel_size, stages)


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


def check_logging(options: PretrainOptions) -> None:
    """Check that what is logged has somewhere to go, and the sampler of --sample-interval its graph."""
    logging = options.logging
    for service, needs in (("wandb", "wandb_project"), ("mlflow", "mlflow_experiment")):
        for field in dataclasses.fields(logging):
            value = getattr(logging, field.name)
            require(
                value is None or not field.name.startswith(service) or getattr(logging, needs) is not None,
                f"{flag_of(field.name)} {value} says nothing without {flag_of(needs)}; add that, or leave it out",
            )
    try:
        graph = make_graph(options.diffusion.graph, 2)
        find_for_graph(SAMPLERS, logging.sampler_for(options.diffusion.graph), graph, flag_of("sampler"))
    except ValueError as error:
        raise UserError(str(error)) from error
    require(
        logging.sample_interval == 0 or bool(options.checkpoint.save or logging.log_dir),
        f"--sample-interval {logging.sample_interval} has no folder for its samples; add --save or --log-dir",
    )


def weighted_corpora(data: DataOptions) -> list[WeightedCorpus]:
    """Every corpus that a run reads, with its weight in its blend, as `corpora_by_flag` has them."""
    return [corpus for corpora in corpora_by_flag(data).values() for corpus in corpora]


def corpora_by_flag(data: DataOptions) -> dict[str, list[WeightedCorpus]]:
    """What --data-path names, or --train-data-path and its like each for its part; nothing for --mock-data. Of a corpus
    in object storage the prefix of its files that are copied.

    Raises:
        UserError: an odd number of values, a weight that is not a number above 0, or no place for those copies.
    """
    return {
        flag: [WeightedCorpus(weight, _place_of(flag, prefix, data)) for weight, prefix in corpora]
        for flag, corpora in _named_corpora(data).items()
    }


def corpora_in_object_storage(data: DataOptions) -> dict[str, str]:
    """Of the corpora that are there, each one's URL and the prefix of its files that are copied."""
    return {
        prefix: _place_of(flag, prefix, data)
        for flag, corpora in _named_corpora(data).items()
        for _, prefix in corpora
        if is_in_object_storage(prefix)
    }


def _place_of(flag: str, prefix: str, data: DataOptions) -> str:
    if not is_in_object_storage(prefix):
        return prefix
    folder, (scheme, _, name) = data.object_storage_cache_path, prefix.partition("://")
    require(
        folder is not None,
        f"{flag} {prefix}: is in object storage; give --object-storage-cache-path FOLDER for its index and tokenizer",
    )
    require(
        "/" in name.strip("/") and not {"", ".", ".."} & set(name.split("/")),
        f"{flag} {prefix}: must be a bucket and a prefix, as s3://BUCKET/FOLDER/NAME_text_document",
    )
    return os.path.join(folder, scheme, name)


def _named_corpora(data: DataOptions) -> dict[str, list[WeightedCorpus]]:
    values = {flag_of(name): getattr(data, name) for name in ("data_path", *DATA_OF_PARTS)}
    return {flag: _weighted(flag, given) for flag, given in values.items() if given is not None}


def _weighted(flag: str, values: Sequence[str]) -> list[WeightedCorpus]:
    """One prefix, or weights and prefixes in turn."""
    example = "a blend is weights and prefixes in turn, as 0.7 data/a 0.3 data/b"
    if len(values) == 1:
        return [WeightedCorpus(Fraction(1), values[0])]
    require(
        len(values) % 2 == 0,
        f"{flag} {' '.join(values)}: is {len(values)} values, must be one or an even number; {example}",
    )
    corpora = []
    for text, prefix in zip(values[::2], values[1::2], strict=True):
        try:
            weight = Fraction(text) if WEIGHT.fullmatch(text) else Fraction(0)
        except (ValueError, ZeroDivisionError):
            weight = Fraction(0)
        require(weight > 0, f"{flag} {text} {prefix}: the weight {text} must be a number above 0; {example}")
        corpora.append(WeightedCorpus(weight, prefix))
    return corpora


def check_data(data: DataOptions) -> None:
    """Check that the data comes from one place, and mock data's tokens from nowhere else."""
    parts = [flag_of(name) for name in DATA_OF_PARTS[1:] if getattr(data, name)]
    require(
        bool(data.data_path or data.train_data_path or data.mock_data or parts),
        "missing --data-path: required; --help explains",
    )
    require(
        not parts or data.train_data_path is not None,
        f"{' and '.join(parts)}: only beside --train-data-path; name that too, or cut --data-path by --split",
    )
    is_null = data.tokenizer_type == "NullTokenizer"
    require(
        is_null or data.vocab_size is None,
        f"--vocab-size {data.vocab_size} belongs to --tokenizer-type NullTokenizer; add that, or leave it out",
    )
    require(
        not is_null or data.vocab_size is not None,
        "--tokenizer-type NullTokenizer needs --vocab-size, the number of its tokens; add it",
    )
    require(
        is_null or not data.mock_data,
        "--mock-data has no text, and needs --tokenizer-type NullTokenizer and --vocab-size; add them",
    )
    corpora_by_flag(data)


def check_profiling(options: PretrainOptions, world_size: int) -> None:
    """Check what is timed, profiled and collected, and that there is a folder for it."""
    profiling = options.profiling
    first, last = profiling.profile_step_start, profiling.profile_step_end
    require(profiling.timing_log_level <= 2, f"--timing-log-level {profiling.timing_log_level} must be 0, 1 or 2")
    require(
        not profiling.profile or first < last,
        f"--profile-step-start {first} must be below --profile-step-end {last}",
    )
    require(
        not profiling.profile or options.checkpoint.save is not None or options.logging.log_dir is not None,
        "--profile writes into the log folder, and there is none; add --log-dir",
    )
    for rank in profiling.profile_ranks:
        require(0 <= rank < world_size or not profiling.profile, f"--profile-ranks {rank} must be below {world_size}, "
                 "the number of ranks, and at least 0")  # fmt: skip
    require(
        profiling.manual_gc_interval == 0 or profiling.manual_gc,
        f"--manual-gc-interval {profiling.manual_gc_interval} belongs to --manual-gc; add that, or leave it out",
    )


def check_ranges(options: PretrainOptions) -> None:
    """Check every number by itself, and those that bound each other."""
    check_layout(options.parallel)
    at_least_one = (
        "num_layers hidden_size num_attention_heads ffn_hidden_size seq_length cond_dim make_vocab_size_divisible_by "
        "num_layers_per_virtual_pipeline_stage context_parallel_size ddp_bucket_size fp8_amax_history_len "
        "recompute_num_layers micro_batch_size global_batch_size lr_decay_iters lr_decay_samples "
        "lr_wsd_decay_iters lr_wsd_decay_samples ema_interval save_interval keep_last keep_every max_save_failures "
        "exit_interval eval_iters log_interval num_samples sampling_steps verify_layout_steps vocab_size"
    ).split()
    at_least_zero = (
        "ckpt_step loss_chunk_rows train_iters train_samples lr min_lr lr_warmup_iters lr_warmup_samples "
        "lr_warmup_init clip_grad weight_decay seed num_workers eval_interval sample_interval timing_log_level "
        "profile_step_start profile_step_end manual_gc_interval max_skipped_steps check_replicas_interval"
    ).split()
    below_one = ["hidden_dropout", "adam_beta1", "adam_beta2", "ema_decay", "lr_warmup_fraction"]
    samples = ["train_samples", "lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples"]
    values = options.to_dict()
    counts = [name for name in (*at_least_one, *at_least_zero)
              if type(values[name]) is int and name not in ("seed", "ddp_bucket_size", *samples)]  # fmt: skip
    for names, holds, rule in (
        (at_least_one, lambda v: v >= 1, "at least 1"),
        (at_least_zero, lambda v: v >= 0, "at least 0"),
        (below_one, lambda v: 0 <= v < 1, "at least 0 and below 1"),
        (["adam_eps", "exit_duration_in_mins", "verify_layout_tolerance"], lambda v: v > 0, "above 0"),
        (["spike_factor"], lambda v: v > 1, "above 1"),
        (counts, lambda v: v <= MOST, f"at most {MOST:,}"),
        (samples, lambda v: v <= MOST_SAMPLES, f"at most {MOST_SAMPLES:,}"),
    ):
        for name in names:
            value = values[name]
            require(value is None or holds(value), f"{flag_of(name)} {value} must be {rule}")
    require(
        options.ending.exit_signal_handler,
        "--no-exit-signal-handler: a run that is asked to end always saves; leave it out",
    )
    checkpoint = options.checkpoint
    require(
        checkpoint.keep_every is None or checkpoint.keep_last is not None,
        f"--keep-every {checkpoint.keep_every} keeps more than --keep-last does, which is not given, so that all is "
        "kept; add --keep-last, or leave it out",
    )
    check_training_schedule(options.training)
    _check_start(checkpoint)
    _check_faults(options.faults)


def _check_faults(faults: FaultOptions) -> None:
    for name in ("spike_factor", "max_skipped_steps"):
        value = getattr(faults, name)
        require(
            faults.check_for_nan_in_loss_and_grad or not value,
            f"{flag_of(name)} {value} goes on after a step that --no-check-for-nan-in-loss-and-grad does not look "
            "into; leave one of them out",
        )


def _check_start(checkpoint: CheckpointOptions) -> None:
    """What a run starts from, by the names of things alone."""
    load = checkpoint.load
    for words, is_given in (
        (f"--ckpt-step {checkpoint.ckpt_step}", checkpoint.ckpt_step is not None),
        ("--finetune", checkpoint.finetune),
        ("--no-load-optim", not checkpoint.load_optim),
    ):
        require(not is_given or load is not None, f"{words} is of what --load names; add --load, or leave it out")
    require(
        checkpoint.ckpt_step is None or not Path(load).name.startswith("iter_"),
        f"--load {load} names a checkpoint, and --ckpt-step {checkpoint.ckpt_step} one in a folder of them; give the "
        "folder, or leave --ckpt-step out",
    )
