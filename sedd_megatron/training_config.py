"""How a run trains, on which data, and what it keeps and logs: the options that no model has."""

from dataclasses import MISSING, dataclass
from fractions import Fraction
from typing import NamedTuple

from sedd_megatron.options import option

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


def is_in_object_storage(prefix: str) -> bool:
    """Whether a corpus is read from there, and not from a disk."""
    return prefix.startswith(("s3://", "msc://"))


@dataclass(frozen=True)
class DataOptions:
    """Data"""

    data_path: tuple[str, ...] = option(
        MISSING,
        "prefix of a .bin/.idx pair, as printed by sedd_megatron.prepare_data; or a blend of several, weights and "
        "prefixes in turn: 0.7 data/a 0.3 data/b",
    )
    object_storage_cache_path: str | None = option(
        None, "folder for the indexes and tokenizers of corpora in object storage, s3://BUCKET/PREFIX or msc://..."
    )
    split: str = option("969,30,1", "weights of training, validation and test windows, for each corpus of a blend")
    reset_attention_mask: bool = option(
        False, "documents that share a window do not see each other; they end at end-of-document tokens"
    )
    reset_position_ids: bool = option(False, "positions begin anew with each document of a window")
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
CHANGES_TO_ALLOW = (
    "seed split seq_length data_path global_batch_size time_sampling time_eps reset_attention_mask reset_position_ids "
    "tokenizer"
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
