"""How a run trains, on which data, and what it keeps and logs: the options that no model has."""

from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from sedd_megatron.diffusion.sampler import SAMPLERS
from sedd_megatron.options import option

# Of samples during training, for each graph.
SAMPLER = {"absorb": "event-driven", "uniform": "analytic"}
# Options by which documents that share a window are not one text.
PARTED_DOCUMENTS = ("reset_attention_mask", "reset_position_ids")
# What an option that is not given is on each kind of device.
LOSS_CHUNK_ROWS = {"cuda": 8192, "cpu": 2048}
NUM_WORKERS = {"cuda": 2, "cpu": 0}


def _if_not_given(defaults: dict[str, int]) -> str:
    return f"{defaults['cuda']} on a GPU and {defaults['cpu']} on a CPU if not given"


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
    rampup_batch_size: tuple[int, ...] | None = option(
        None,
        "START INCREMENT SAMPLES: the batch grows from START by INCREMENT to global-batch-size, evenly over the first "
        "SAMPLES; needs train-samples",
    )
    train_iters: int = option(
        400_000,
        "optimizer steps in all, counted from the start of the first run",
        instead_of=("train_samples", "rampup_batch_size"),
    )
    train_samples: int | None = option(
        None,
        "the length of the run in samples, in place of train-iters; what no whole batch is made of is left out",
        instead_of=("train_iters",),
    )
    lr: float = option(3e-4, "peak learning rate")
    min_lr: float = option(0.0, "learning rate at the end of the decay")
    lr_decay_style: str = option(
        "constant",
        "after the warm-up; WSD keeps lr until its decay at the end",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_decay_iters: int | None = option(
        None, "steps until min-lr; train-iters if not given", instead_of=("lr_decay_samples",)
    )
    lr_decay_samples: int | None = option(
        None, "samples until min-lr; train-samples if not given", instead_of=("lr_decay_iters",)
    )
    lr_wsd_decay_style: str = option(
        "exponential", "WSD's decay", choices=("exponential", "linear", "cosine", "minus_sqrt")
    )
    lr_wsd_decay_iters: int | None = option(
        None, "the last steps of the decay, in which WSD decays", instead_of=("lr_wsd_decay_samples",)
    )
    lr_wsd_decay_samples: int | None = option(
        None, "the same in samples, with train-samples", instead_of=("lr_wsd_decay_iters",)
    )
    lr_warmup_iters: int = option(
        2500,
        "steps of linear warm-up; with train-samples, as many batches of the global size if nothing else is given",
        instead_of=("lr_warmup_samples", "lr_warmup_fraction"),
    )
    lr_warmup_samples: int | None = option(
        None, "samples of linear warm-up, with train-samples", instead_of=("lr_warmup_iters", "lr_warmup_fraction")
    )
    lr_warmup_fraction: float | None = option(
        None,
        "linear warm-up as a part of the steps or samples of the decay",
        instead_of=("lr_warmup_iters", "lr_warmup_samples"),
    )
    lr_warmup_init: float = option(0.0, "learning rate at which the warm-up begins")
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
    skip_train: bool = option(
        False,
        "by both names: only compute the validation and the test loss of what --save holds, or --load; nothing is "
        "saved",
        also=("eval_only",),
    )
    seed: int = option(1234, "seed of initialisation, sample order, noise and dropout")

    def loss_chunk_rows_on(self, device: str) -> int:
        """The number that counts on a `device` of this type, cpu or cuda."""
        return LOSS_CHUNK_ROWS[device] if self.loss_chunk_rows is None else self.loss_chunk_rows


class WeightedCorpus(NamedTuple):
    """A prefix of --data-path and its weight in the blend."""

    weight: Fraction
    prefix: str


def is_in_object_storage(prefix: str) -> bool:
    """Whether a corpus is read from there, and not from a disk."""
    return prefix.startswith(("s3://", "msc://"))


@dataclass(frozen=True)
class DataOptions:
    """Data"""

    data_path: tuple[str, ...] | None = option(
        None,
        "prefix of a .bin/.idx pair, as printed by sedd_megatron.prepare_data; or a blend of several, weights and "
        "prefixes in turn: 0.7 data/a 0.3 data/b; --split cuts each",
        instead_of=("train_data_path", "valid_data_path", "test_data_path", "mock_data"),
    )
    train_data_path: tuple[str, ...] | None = option(
        None,
        "in place of --data-path: a prefix or a blend that is trained on whole",
        instead_of=("data_path", "mock_data", "split"),
    )
    valid_data_path: tuple[str, ...] | None = option(None, "with --train-data-path: what is validated on, if anything")
    test_data_path: tuple[str, ...] | None = option(None, "with --train-data-path: test windows, if any")
    mock_data: bool = option(
        False,
        "made-up windows in place of data, to try a layout or a machine; needs --tokenizer-type NullTokenizer",
        instead_of=("data_path", "train_data_path", "valid_data_path", "test_data_path", "split"),
    )
    split: str = option(
        "969,30,1", "weights of training, validation and test windows of --data-path, for each corpus of a blend"
    )
    object_storage_cache_path: str | None = option(
        None, "folder for the indexes and tokenizers of corpora in object storage, s3://BUCKET/PREFIX or msc://..."
    )
    reset_attention_mask: bool = option(
        False, "documents that share a window do not see each other; they end at end-of-document tokens"
    )
    reset_position_ids: bool = option(False, "positions begin anew with each document of a window")
    num_workers: int | None = option(
        None, f"loader processes per rank, {_if_not_given(NUM_WORKERS)}; with 0 training makes its batches itself"
    )
    tokenizer_type: str | None = option(
        None,
        "only for data that has no tokenizer beside it: as for prepare_data, or NullTokenizer for bare token ids",
    )
    vocab_size: int | None = option(None, "number of token ids (NullTokenizer)")
    tokenizer_model: str | None = option(None, "its model file or folder")
    vocab_file: str | None = option(None, "its vocabulary (GPT2BPETokenizer)")
    merge_file: str | None = option(None, "its merges (GPT2BPETokenizer)")

    def num_workers_on(self, device: str) -> int:
        """The number that counts on a `device` of this type, cpu or cuda."""
        return NUM_WORKERS[device] if self.num_workers is None else self.num_workers


# What a run must have in common with the checkpoint that it continues, unless --allow-changed names it.
CHANGES_TO_ALLOW = (
    "seed split seq_length data_path global_batch_size rampup_batch_size time_sampling time_eps reset_attention_mask "
    "reset_position_ids tokenizer"
).split()


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
    ckpt_step: int | None = option(None, "the iteration to start from, of those in --load; the newest if not given")
    finetune: bool = option(
        False, "of what --load holds take the weights alone, and train them from iteration 0, perhaps on other data"
    )
    load_optim: bool = option(
        True,
        "--no-load-optim leaves Adam's moments of what --load holds out: weights, their average and progress count",
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
class EndingOptions:
    """Stopping before the last step, saved"""

    exit_duration_in_mins: float | None = option(
        None, "stop after the step in which this many minutes since the start of the first rank are over"
    )
    exit_interval: int | None = option(None, "stop after each iteration that is a multiple of this")
    exit_signal_handler: bool = option(True, "stop at SIGTERM, SIGINT, SIGHUP or SIGUSR1; always on")


@dataclass(frozen=True)
class LoggingOptions:
    """Validation and logging"""

    eval_interval: int = option(1000, "steps between validations; 0 for none, and no test loss at the end")
    eval_iters: int = option(10, "global batches per validation, and of the test windows")
    log_interval: int = option(100, "steps between progress lines")
    log_dir: str | None = option(None, "folder for metrics.jsonl; the save folder if not given")
    tensorboard_dir: str | None = option(None, "folder for TensorBoard; needs the extra 'log'")
    wandb_project: str | None = option(None, "Weights & Biases project; needs the extra 'log'")
    wandb_exp_name: str | None = option(None, "name of the run there; the save folder's if not given")
    wandb_entity: str | None = option(None, "user or team there; the account's own if not given")
    wandb_save_dir: str | None = option(None, "folder for its files; wandb in the save folder if not given")
    mlflow_experiment: str | None = option(None, "MLflow experiment; needs the extra 'log'")
    mlflow_run_name: str | None = option(None, "name of the run there; the save folder's if not given")
    mlflow_tracking_uri: str | None = option(
        None, "MLflow's server, or a folder; what MLFLOW_TRACKING_URI says if not given"
    )
    sample_interval: int = option(
        0, "steps between samples that are drawn from the moving average, into samples.jsonl; 0 for none"
    )
    num_samples: int = option(4, "how many samples, each with the same draws every time")
    sampling_steps: int = option(128, "steps from noise to text of these samples")
    sampler: str | None = option(
        None,
        "how one of these steps is made; event-driven for the absorbing graph, analytic for the uniform if not given",
        choices=tuple(SAMPLERS),
    )

    def sampler_for(self, graph: str) -> str:
        """The sampler that counts for a graph of this name."""
        return self.sampler or SAMPLER[graph]


@dataclass(frozen=True)
class ProfilingOptions:
    """Profiling"""

    timing_log_level: int = option(
        0,
        "1: time passes, reductions and the optimizer, which makes the ranks wait for each other; 2: each micro-batch "
        "too",
    )
    log_throughput: bool = option(False, "write the operations per second and device to metrics.jsonl as well")
    profile: bool = option(False, "write what host and device do, by torch's profiler, into the log folder")
    profile_step_start: int = option(10, "steps of the run before those that are profiled")
    profile_step_end: int = option(12, "the last step that is profiled")
    profile_ranks: tuple[int, ...] = option((0,), "ranks that are profiled, each into a file of its own")
    manual_gc: bool = option(False, "collect Python's garbage at steps that all ranks have in common, and at no other")
    manual_gc_interval: int = option(0, "with --manual-gc: steps between collections; 0 for none")
    manual_gc_eval: bool = option(True, "with --manual-gc: collect before and after a validation")


@dataclass(frozen=True)
class FaultOptions:
    """Steps and ranks that go wrong"""

    check_for_nan_in_loss_and_grad: bool = option(
        True,
        "replay a step whose loss or gradient norm is not finite, and name the rank that computed otherwise; without "
        "it the run just ends there",
    )
    spike_factor: float | None = option(
        None, "a loss or gradient norm above this many times the median of the last steps is treated so too"
    )
    max_skipped_steps: int = option(0, "such steps that a run may go on without, before one more ends it")
    check_replicas_interval: int = option(
        0, "steps between comparisons of what several ranks hold alike, bit for bit; 0 for none"
    )


@dataclass(frozen=True)
class VerifyOptions:
    """Check of a layout, instead of a training run"""

    verify_layout: bool = option(False, "train a few steps in this layout and in one process, and compare")
    verify_layout_steps: int = option(5, "steps of the comparison")
    verify_layout_tolerance: float | None = option(
        None, "largest relative difference allowed; 1e-5 in float32, 2e-2 in bf16, 5e-2 in FP8 if not given"
    )
