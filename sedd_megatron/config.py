"""Every option of a model and its layout, once; training_config.py has those of how a run trains, arguments.py the
rules.

Flags that Megatron-LM has keep Megatron-LM's spelling. Values default to the published SEDD training (arXiv
2310.16834, section 5).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from sedd_megatron.options import check_values, option
from sedd_megatron.training_config import (
    CheckpointOptions,
    DataOptions,
    EndingOptions,
    FaultOptions,
    LoggingOptions,
    ProfilingOptions,
    TrainingOptions,
    VerifyOptions,
)


@dataclass(frozen=True)
class ConfigFile:
    """Configuration file"""

    config: str | None = option(None, "YAML file with any of the options below, or a preset's name; flags override it")


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

    def padded_vocab_size(self, num_states: int) -> int:
        """Number of states that Megatron allocates, independent of the layout."""
        return -(-num_states // self.make_vocab_size_divisible_by) * self.make_vocab_size_divisible_by


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
    grad_reduce_in_bf16: bool = option(False, "with --bf16: gradients are summed in bfloat16, in half the memory")
    tp_comm_overlap: bool = option(
        False, "Transformer Engine's products and what tensor-parallel ranks exchange for them run together"
    )
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
    ending: EndingOptions
    logging: LoggingOptions
    profiling: ProfilingOptions
    verify: VerifyOptions
    faults: FaultOptions

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
