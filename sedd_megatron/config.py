"""Every option of a training run, once: flags and YAML keys come from these dataclasses; arguments.py has the rules.

Flags that Megatron-LM has keep Megatron-LM's spelling. Values default to the published SEDD training (arXiv
2310.16834, section 5).
"""

import dataclasses
from dataclasses import MISSING, dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from sedd_megatron.options import check_values, option

# What an option that is not given is on each kind of device.
LOSS_CHUNK_ROWS = {"cuda": 8192, "cpu": 2048}
NUM_WORKERS = {"cuda": 2, "cpu": 0}


def _if_not_given(defaults: dict[str, int]) -> str:
    return f"{defaults['cuda']} on a GPU and {defaults['cpu']} on a CPU if not given"


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
class LayoutOptions:
    """Layout"""

    tensor_model_parallel_size: int = option(1, "ranks that share each layer's matrices")
    pipeline_model_parallel_size: int = option(1, "ranks that share the layers")
    device: str = option("auto", "auto takes GPUs where there are any", choices=("auto", "cpu", "cuda"))
    distributed_timeout_minutes: float = option(10.0, "how long a collective may wait for a lost rank")


@dataclass(frozen=True)
class ParallelOptions(LayoutOptions):
    """Parallelism"""

    num_layers_per_virtual_pipeline_stage: int | None = option(None, "layers of one of a rank's interleaved stages")
    context_parallel_size: int = option(1, "ranks that share each sequence")
    cp_comm_type: str = option(
        "p2p", "how Transformer Engine exchanges keys and values", choices=("p2p", "all_gather", "a2a")
    )
    sequence_parallel: bool = option(False, "tensor-parallel ranks share the sequence outside the matrices")
    use_distributed_optimizer: bool = option(False, "replicas share the optimizer's state and the moving average")
    overlap_grad_reduce: bool = option(False, "reduce gradients while the backward pass runs")
    overlap_param_gather: bool = option(False, "gather updated parameters while the next forward pass runs")
    ddp_bucket_size: int | None = option(None, "parameters per overlapped reduction; Megatron's choice if not given")

    def num_model_chunks(self, num_layers: int) -> int:
        """Number of interleaved pipeline stages on each rank; 1 without virtual pipeline parallelism."""
        layers_per_stage = self.num_layers_per_virtual_pipeline_stage
        return num_layers // self.pipeline_model_parallel_size // layers_per_stage if layers_per_stage else 1


@dataclass(frozen=True)
class PrecisionOptions:
    """Precision and kernels"""

    bf16: bool = option(False, "bfloat16 weights and activations, float32 master weights, gradients and loss")
    transformer_impl: str = option(
        "auto",
        "layers of plain torch or of Transformer Engine; auto takes the latter for bf16 training where it can run",
        choices=("auto", "local", "transformer_engine"),
    )
    fp8_format: str | None = option(
        None, "FP8 for the layers' matrix products: e4m3, or hybrid with e5m2 gradients", choices=("e4m3", "hybrid")
    )
    fp8_recipe: str | None = option(
        None, "how FP8 scaling factors are found; delayed if not given", choices=("delayed", "tensorwise", "blockwise")
    )
    fp8_amax_history_len: int = option(1024, "delayed recipe: steps whose largest values are remembered")
    fp8_amax_compute_algo: str = option(
        "max", "delayed recipe: which of the remembered values scales", choices=("most_recent", "max")
    )
    fp8_param_gather: bool = option(False, "keep the layers' matrices in FP8 and gather them so")

    @property
    def recipe(self) -> str:
        """The FP8 recipe that counts, if FP8 is on."""
        return self.fp8_recipe or "delayed"


@dataclass(frozen=True)
class RecomputeOptions:
    """Activation recompute"""

    recompute_granularity: str | None = option(
        None, "recompute whole layers, or selected modules, in the backward pass", choices=("full", "selective")
    )
    recompute_method: str | None = option(
        None,
        "full: checkpoint every run of recompute-num-layers layers, or only that many layers of a stage",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int | None = option(None, "full: layers per checkpoint (uniform) or per stage (block)")
    recompute_modules: tuple[str, ...] | None = option(
        None, "selective: which modules; core_attn if not given", choices=("core_attn", "layernorm", "mlp")
    )

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that are recomputed by themselves; none unless the granularity is selective."""
        return (self.recompute_modules or ("core_attn",)) if self.recompute_granularity == "selective" else ()


@dataclass(frozen=True)
class TrainingOptions:
    """Training"""

    micro_batch_size: int = option(8, "sequences per rank and forward pass")
    global_batch_size: int = option(512, "sequences per optimizer step")
    loss_chunk_rows: int | None = option(
        None,
        f"positions whose head and loss are computed at once, {_if_not_given(LOSS_CHUNK_ROWS)}; 0 makes all logits "
        "first, the plain reference",
    )
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
    ema_interval: int = option(
        1,
        "steps between updates of that average, each with the decay of them all; weights in between are taken to be "
        "the last, and steps after the last update are left out",
    )
    seed: int = option(1234, "seed of initialisation, sample order, noise and dropout")

    def loss_chunk_rows_on(self, device: str) -> int:
        """The number that counts on a `device` of this type, cpu or cuda."""
        return LOSS_CHUNK_ROWS[device] if self.loss_chunk_rows is None else self.loss_chunk_rows


class WeightedCorpus(NamedTuple):
    """A prefix of --data-path and its weight in the blend."""

    weight: Fraction
    prefix: str


@dataclass(frozen=True)
class DataOptions:
    """Data"""

    data_path: tuple[str, ...] = option(
        MISSING,
        "prefix of a .bin/.idx pair, as printed by sedd_megatron.prepare_data; or a blend of several, weights and "
        "prefixes in turn: 0.7 data/a 0.3 data/b",
    )
    split: str = option("969,30,1", "weights of training, validation and test windows, for each corpus of a blend")
    num_workers: int | None = option(
        None, f"loader processes per rank, {_if_not_given(NUM_WORKERS)}; with 0 training makes its batches itself"
    )
    tokenizer_type: str | None = option(None, "only for data that has no tokenizer beside it: as for prepare_data")
    tokenizer_model: str | None = option(None, "its model file or folder")
    vocab_file: str | None = option(None, "its vocabulary (GPT2BPETokenizer)")
    merge_file: str | None = option(None, "its merges (GPT2BPETokenizer)")

    def num_workers_on(self, device: str) -> int:
        """The number that counts on a `device` of this type, cpu or cuda."""
        return NUM_WORKERS[device] if self.num_workers is None else self.num_workers


# What a run must have in common with the checkpoint that it continues, unless --allow-changed names it.
CHANGES_TO_ALLOW = "seed split seq_length data_path global_batch_size time_sampling time_eps tokenizer".split()


@dataclass(frozen=True)
class CheckpointOptions:
    """Checkpoints"""

    save: str | None = option(
        None, "folder for checkpoints; where it holds this run's, the run goes on from the newest of them"
    )
    load: str | None = option(
        None,
        "folder of checkpoints, or one iter_* folder in it, to start from where --save holds none; any layout loads "
        "into any other",
    )
    resume: bool = option(True, "go on from what --save holds; --no-resume refuses a folder that holds checkpoints")
    exact_load: bool = option(False, "refuse a damaged checkpoint, and do not fall back to the one before it")
    allow_changed: tuple[str, ...] = option(
        (), "differences from the run that is continued which are meant", choices=CHANGES_TO_ALLOW
    )
    keep_last: int | None = option(None, "keep this many of the newest checkpoints; all if not given")
    keep_every: int | None = option(None, "with --keep-last: also keep the iterations that are multiples of this")
    save_interval: int = option(5000, "steps between checkpoints; the last step is always saved")
    async_save: bool = option(False, "write checkpoints while training goes on; costs a copy in host memory")
    max_save_failures: int = option(
        3, "checkpoints in a row that the disk may refuse; training goes on without them until then"
    )


@dataclass(frozen=True)
class LoggingOptions:
    """Validation and logging"""

    eval_interval: int = option(1000, "steps between validations; 0 for none")
    eval_iters: int = option(10, "global batches per validation")
    log_interval: int = option(100, "steps between progress lines")
    log_dir: str | None = option(None, "folder for metrics.jsonl; the save folder if not given")
    tensorboard_dir: str | None = option(None, "folder for TensorBoard; needs the extra 'log'")


@dataclass(frozen=True)
class VerifyOptions:
    """Check of a layout, instead of a training run"""

    verify_layout: bool = option(False, "train a few steps in this layout and in one process, and compare")
    verify_layout_steps: int = option(5, "steps of the comparison")
    verify_layout_tolerance: float | None = option(
        None, "largest relative difference allowed; 1e-5 in float32, 2e-2 in bf16, 5e-2 in FP8 if not given"
    )


@dataclass(frozen=True)
class PretrainOptions:
    """All options of a training run, by group."""

    model: ModelOptions
    diffusion: DiffusionOptions
    parallel: ParallelOptions
    precision: PrecisionOptions
    recompute: RecomputeOptions
    training: TrainingOptions
    data: DataOptions
    checkpoint: CheckpointOptions
    logging: LoggingOptions
    verify: VerifyOptions

    def to_dict(self) -> dict[str, Any]:
        """Every option by its name, as kept in checkpoints."""
        groups = (getattr(self, field.name) for field in dataclasses.fields(self))
        return {name: value for group in groups for name, value in dataclasses.asdict(group).items()}


GROUPS = tuple(field.type for field in dataclasses.fields(PretrainOptions))


def model_options_from_dict(values: dict[str, Any], where: str) -> tuple[ModelOptions, DiffusionOptions]:
    """The model's part of a checkpoint's options; `where` names the checkpoint in errors."""
    groups = []
    for cls in (ModelOptions, DiffusionOptions):
        names = {field.name for field in dataclasses.fields(cls)}
        groups.append(cls(**check_values({k: v for k, v in values.items() if k in names}, (cls,), where)))
    return groups[0], groups[1]
