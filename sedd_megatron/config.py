"""Every option of a training run, once: flags, YAML keys and checks come from these dataclasses.

Flags that Megatron-LM has keep Megatron-LM's spelling. Values default to the published SEDD training (arXiv
2310.16834, section 5).
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any

from sedd_megatron.errors import UserError
from sedd_megatron.options import check_values, flag_of, option, parse_options


@dataclass(frozen=True)
class ConfigFile:
    """Configuration file"""

    config: str | None = option(None, "YAML file with any of the options below; flags override it")


@dataclass(frozen=True)
class ModelOptions:
    """Model"""

    num_layers: int = option(12, "transformer layers")
    hidden_size: int = option(768, "width H of the hidden states")
    num_attention_heads: int = option(12, "attention heads; divides the hidden size")
    ffn_hidden_size: int | None = option(None, "width of the MLP; 4 times the hidden size if not given")
    seq_length: int = option(1024, "tokens S in a sequence")
    cond_dim: int = option(128, "width of the noise conditioning")
    hidden_dropout: float = option(0.1, "dropout after attention and MLP")
    make_vocab_size_divisible_by: int = option(128, "the states are padded to a multiple of this")

    @property
    def mlp_hidden_size(self) -> int:
        """Width of the MLP's inner layer."""
        return self.ffn_hidden_size or 4 * self.hidden_size


@dataclass(frozen=True)
class DiffusionOptions:
    """Diffusion"""

    graph: str = option("absorb", "what noise turns a token into", choices=("absorb", "uniform"))
    noise: str = option("loglinear", "noise schedule", choices=("loglinear", "geometric"))
    noise_eps: float = option(1e-3, "log-linear noise: the chance that a token survives at t = 1")
    sigma_min: float = option(1e-4, "geometric noise: total noise at t = 0")
    sigma_max: float = option(20.0, "geometric noise: total noise at t = 1")
    time_sampling: str = option("low-discrepancy", "how times t are drawn", choices=("low-discrepancy", "independent"))
    time_eps: float = option(1e-3, "smallest time t in training")


@dataclass(frozen=True)
class ParallelOptions:
    """Parallelism and precision"""

    tensor_model_parallel_size: int = option(1, "ranks that share each layer's matrices")
    pipeline_model_parallel_size: int = option(1, "ranks that share the layers")
    device: str = option("auto", "auto takes GPUs where there are any", choices=("auto", "cpu", "cuda"))
    bf16: bool = option(False, "bfloat16 weights and activations, float32 master weights, gradients and loss")
    distributed_timeout_minutes: int = option(10, "how long a collective may wait for a lost rank")


@dataclass(frozen=True)
class TrainingOptions:
    """Training"""

    micro_batch_size: int = option(8, "sequences per rank and forward pass")
    global_batch_size: int = option(512, "sequences per optimizer step")
    train_iters: int = option(400_000, "optimizer steps in all, counted from the start of the first run")
    lr: float = option(3e-4, "peak learning rate")
    min_lr: float = option(0.0, "learning rate at the end of the decay")
    lr_decay_style: str = option("constant", "after the warm-up", choices=("constant", "linear", "cosine"))
    lr_decay_iters: int | None = option(None, "steps until min-lr; train-iters if not given")
    lr_warmup_iters: int = option(2500, "steps of linear warm-up")
    clip_grad: float = option(1.0, "largest global gradient norm; 0 for no clipping")
    adam_beta1: float = option(0.9, "Adam's first decay")
    adam_beta2: float = option(0.999, "Adam's second decay")
    adam_eps: float = option(1e-8, "Adam's epsilon")
    weight_decay: float = option(0.0, "decoupled weight decay on matrices")
    ema_decay: float = option(0.9999, "decay of the exponential moving average of the weights")
    seed: int = option(1234, "seed of initialisation, sample order, noise and dropout")


@dataclass(frozen=True)
class DataOptions:
    """Data"""

    data_path: str = option(MISSING, "prefix of a .bin/.idx pair, as printed by sedd_megatron.prepare_data")
    split: str = option("969,30,1", "weights of training, validation and test windows")
    num_workers: int = option(0, "loader processes per rank")
    tokenizer_type: str | None = option(None, "only for data that has no tokenizer beside it: as for prepare_data")
    tokenizer_model: str | None = option(None, "its model file or folder")
    vocab_file: str | None = option(None, "its vocabulary (GPT2BPETokenizer)")
    merge_file: str | None = option(None, "its merges (GPT2BPETokenizer)")


@dataclass(frozen=True)
class CheckpointOptions:
    """Checkpoints"""

    save: str | None = option(None, "folder for checkpoints")
    load: str | None = option(None, "folder of checkpoints to resume from; any layout loads into any other")
    save_interval: int = option(5000, "steps between checkpoints; the last step is always saved")


@dataclass(frozen=True)
class LoggingOptions:
    """Validation and logging"""

    eval_interval: int = option(1000, "steps between validations; 0 for none")
    eval_iters: int = option(10, "global batches per validation")
    log_interval: int = option(100, "steps between progress lines")
    log_dir: str | None = option(None, "folder for metrics.jsonl; the save folder if not given")
    tensorboard_dir: str | None = option(None, "folder for TensorBoard; needs the extra 'log'")


@dataclass(frozen=True)
class PretrainOptions:
    """All options of a training run, by group."""

    model: ModelOptions
    diffusion: DiffusionOptions
    parallel: ParallelOptions
    training: TrainingOptions
    data: DataOptions
    checkpoint: CheckpointOptions
    logging: LoggingOptions

    def to_dict(self) -> dict[str, Any]:
        """Every option by its name, as kept in checkpoints."""
        groups = (getattr(self, field.name) for field in dataclasses.fields(self))
        return {name: value for group in groups for name, value in dataclasses.asdict(group).items()}


GROUPS = tuple(field.type for field in dataclasses.fields(PretrainOptions))


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


def model_options_from_dict(values: dict[str, Any], where: str) -> tuple[ModelOptions, DiffusionOptions]:
    """The model's part of a checkpoint's options; `where` names the checkpoint in errors."""
    groups = []
    for cls in (ModelOptions, DiffusionOptions):
        names = {field.name for field in dataclasses.fields(cls)}
        groups.append(cls(**check_values({k: v for k, v in values.items() if k in names}, (cls,), where)))
    return groups[0], groups[1]


def check_options(options: PretrainOptions, world_size: int) -> None:
    """Check ranges, divisibility and the layout against the number of ranks.

    Raises:
        UserError: naming the first value that breaks a rule.
    """
    _check_ranges(options)
    check_model_layout(options.model, options.parallel)
    check_diffusion(options.diffusion)
    data_parallel_size = data_parallel_size_of(options.parallel, world_size)
    training = options.training
    per_step = training.micro_batch_size * data_parallel_size
    _require(
        training.global_batch_size % per_step == 0,
        f"--global-batch-size {training.global_batch_size} is not a multiple of --micro-batch-size "
        f"{training.micro_batch_size} times {data_parallel_size} data-parallel ranks; make it a multiple of {per_step}",
    )


def data_parallel_size_of(parallel: ParallelOptions, world_size: int) -> int:
    """Number of replicas of the model.

    Raises:
        UserError: the tensor and pipeline sizes do not divide the number of ranks.
    """
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    _require(
        world_size % model_ranks == 0,
        f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size} times --pipeline-model-parallel-size "
        f"{parallel.pipeline_model_parallel_size} must divide the {world_size} ranks started; start a multiple of "
        f"{model_ranks} (torchrun --nproc-per-node) or lower one of them",
    )
    return world_size // model_ranks


def check_model_layout(model: ModelOptions, parallel: ParallelOptions) -> None:
    """Check that the model's sizes divide into heads, tensor-parallel shards and pipeline stages."""
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    rules = (
        ("hidden-size", model.hidden_size, "num-attention-heads", model.num_attention_heads),
        ("num-attention-heads", model.num_attention_heads, "tensor-model-parallel-size", tensor),
        ("ffn-hidden-size", model.mlp_hidden_size, "tensor-model-parallel-size", tensor),
        ("make-vocab-size-divisible-by", model.make_vocab_size_divisible_by, "tensor-model-parallel-size", tensor),
        ("num-layers", model.num_layers, "pipeline-model-parallel-size", pipeline),
    )
    for name, value, divisor_name, divisor in rules:
        _require(
            value % divisor == 0,
            f"--{name} {value} is not a multiple of --{divisor_name} {divisor}; change one of them",
        )
    head_size = model.hidden_size // model.num_attention_heads
    _require(
        head_size % 2 == 0,
        f"--hidden-size {model.hidden_size} over --num-attention-heads {model.num_attention_heads} gives heads of "
        f"{head_size}; rotary embedding needs an even size: change one of them",
    )


def check_diffusion(diffusion: DiffusionOptions) -> None:
    """Check the noise schedule's numbers."""
    _require(0 < diffusion.noise_eps < 1, f"--noise-eps {diffusion.noise_eps} must lie between 0 and 1, as 1e-3")
    _require(0 < diffusion.time_eps < 1, f"--time-eps {diffusion.time_eps} must lie between 0 and 1, as 1e-3")
    _require(
        0 < diffusion.sigma_min < diffusion.sigma_max,
        f"--sigma-min {diffusion.sigma_min} must be above 0 and below --sigma-max {diffusion.sigma_max}",
    )


def _check_ranges(options: PretrainOptions) -> None:
    at_least_one = (
        "num_layers hidden_size num_attention_heads ffn_hidden_size seq_length cond_dim make_vocab_size_divisible_by "
        "tensor_model_parallel_size pipeline_model_parallel_size distributed_timeout_minutes micro_batch_size "
        "global_batch_size lr_decay_iters save_interval eval_iters log_interval"
    ).split()
    at_least_zero = (
        "train_iters lr min_lr lr_warmup_iters clip_grad weight_decay seed num_workers eval_interval"
    ).split()
    below_one = ["hidden_dropout", "adam_beta1", "adam_beta2", "ema_decay"]
    values = options.to_dict()
    for names, holds, rule in (
        (at_least_one, lambda v: v >= 1, "at least 1"),
        (at_least_zero, lambda v: v >= 0, "at least 0"),
        (below_one, lambda v: 0 <= v < 1, "at least 0 and below 1"),
        (["adam_eps"], lambda v: v > 0, "above 0"),
    ):
        for name in names:
            value = values[name]
            _require(value is None or holds(value), f"{flag_of(name)} {value} must be {rule}")
    _require(options.training.min_lr <= options.training.lr,
             f"--min-lr {options.training.min_lr} must not be above --lr {options.training.lr}")  # fmt: skip
    decay_iters = options.training.lr_decay_iters or options.training.train_iters
    if options.training.lr_decay_style != "constant":
        _require(
            options.training.lr_warmup_iters < decay_iters,
            f"--lr-warmup-iters {options.training.lr_warmup_iters} must be below the {decay_iters} steps of the decay "
            "(--lr-decay-iters, or --train-iters)",
        )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
