"""How many samples each optimizer step takes, how many steps there are, and how long the learning rate warms up and
decays: the one place that everybody asks, and the rules. As in Megatron-LM (training/training.py of core_v0.16).

A run is counted in steps (--train-iters) or in samples (--train-samples), and its learning rate in the same.
"""

import dataclasses
from typing import NamedTuple

from sedd_megatron.errors import require
from sedd_megatron.options import flag_of
from sedd_megatron.training_config import TrainingOptions

DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainingOptions)}
OF_SAMPLES = "lr_decay_samples lr_warmup_samples lr_wsd_decay_samples rampup_batch_size".split()
# What counts steps, and what says the same in samples.
IN_SAMPLES = {
    "lr_decay_iters": "lr_decay_samples",
    "lr_warmup_iters": "lr_warmup_samples",
    "lr_wsd_decay_iters": "lr_wsd_decay_samples",
}
MOST_STEPS = 2**31 - 1


class Progress(NamedTuple):
    """How far a run is."""

    iteration: int = 0
    consumed_samples: int = 0


class LearningRateSamples(NamedTuple):
    """What Megatron's scheduler counts, in samples."""

    warmup: float
    decay: int  # the warm-up included
    wsd_decay: int | None  # the last of them, where WSD decays


def is_due(iteration: int, interval: int | None) -> bool:
    """Whether what is done every `interval` iterations is done after this one; never with 0 or None."""
    return bool(interval) and iteration % interval == 0


def batch_size_at(training: TrainingOptions, consumed_samples: int) -> int:
    """Samples of the step that comes after `consumed_samples`.

    In whole numbers: Megatron-Core's calculator, which divides by samples per increment, rounds one step down here and
    there.
    """
    if training.rampup_batch_size is None:
        return training.global_batch_size
    start, increment, ramp_samples = training.rampup_batch_size
    if consumed_samples >= ramp_samples:
        return training.global_batch_size
    return start + consumed_samples * _increments(training) // ramp_samples * increment


def end_of(training: TrainingOptions, start: Progress = Progress()) -> Progress:  # noqa: B008, it is immutable
    """Where a run ends that is at `start` now.

    A last batch that --train-samples would cut is not trained: no step takes fewer samples than its size.
    """
    iteration, samples = start
    if training.train_samples is None:
        steps = max(training.train_iters - iteration, 0)
        return Progress(training.train_iters, samples + steps * training.global_batch_size)
    while samples + (size := batch_size_at(training, samples)) <= training.train_samples:
        # All steps of a size at once: a ramp may have millions.
        to = min(_size_changes_at(training, samples), training.train_samples - size + 1)
        steps = -(-(to - samples) // size)
        iteration, samples = iteration + steps, samples + steps * size
    return Progress(iteration, samples)


def learning_rate_samples(training: TrainingOptions) -> LearningRateSamples:
    """Warm-up and decay in samples, however they are given."""
    if training.train_samples is None:
        size = training.global_batch_size
        decay = (training.lr_decay_iters or training.train_iters) * size
        wsd_decay = None if training.lr_wsd_decay_iters is None else training.lr_wsd_decay_iters * size
    else:
        decay, wsd_decay = training.lr_decay_samples or training.train_samples, training.lr_wsd_decay_samples
    warmup = training.lr_warmup_iters * training.global_batch_size
    if training.lr_warmup_fraction is not None:
        warmup = training.lr_warmup_fraction * decay
    elif training.lr_warmup_samples is not None:
        warmup = training.lr_warmup_samples
    return LearningRateSamples(warmup, decay, wsd_decay)


def check_training_schedule(training: TrainingOptions) -> None:
    """Check that what is given goes together.

    Raises:
        UserError: naming the first that does not.
    """
    _check_one_count(training)
    _check_ramp(training)
    end = end_of(training)
    require(
        end.iteration <= MOST_STEPS,
        f"--train-samples {training.train_samples} are {end.iteration:,} steps, must be at most {MOST_STEPS:,}; raise "
        "--global-batch-size",
    )
    require(
        not training.train_samples or end.iteration >= 1,
        f"--train-samples {training.train_samples} are less than one batch of {batch_size_at(training, 0)}, so that "
        "nothing is trained; raise them, or lower --global-batch-size",
    )
    require(
        training.ema_interval <= max(end.iteration, 1),
        f"--ema-interval {training.ema_interval} is above {_length_in_words(training)}: the average, by which "
        "models are sampled and evaluated, would stay as it began; lower it",
    )
    _check_learning_rate(training)


def check_batch_sizes(training: TrainingOptions, data_parallel_size: int, interleaved_stages: int | None) -> None:
    """Check that the batch of every step divides into micro-batches; `interleaved_stages` where stages interleave.

    Raises:
        UserError: one does not.
    """
    per_step = training.micro_batch_size * data_parallel_size
    sizes = {"--global-batch-size": training.global_batch_size}
    if training.rampup_batch_size is not None:
        start, increment, _ = training.rampup_batch_size
        sizes |= {"--rampup-batch-size: its START": start}
        # Without an increment there is no size in between.
        sizes |= {"--rampup-batch-size: its INCREMENT": increment} if _increments(training) else {}
    for name, size in sizes.items():
        require(
            size % per_step == 0,
            f"{name} {size} is not a multiple of --micro-batch-size {training.micro_batch_size} times "
            f"{data_parallel_size} data-parallel ranks; make it a multiple of {per_step}",
        )
        num_microbatches = size // per_step
        require(
            interleaved_stages is None or num_microbatches % interleaved_stages == 0,
            f"{name} {size} makes {num_microbatches} micro-batch(es), and interleaved stages need multiples of "
            f"--pipeline-model-parallel-size {interleaved_stages}; make it a multiple of "
            f"{per_step * (interleaved_stages or 1)}",
        )


def _increments(training: TrainingOptions) -> int:
    start, increment, _ = training.rampup_batch_size
    return (training.global_batch_size - start) // increment


def _size_changes_at(training: TrainingOptions, consumed_samples: int) -> int:
    """The samples from which on the next steps are larger; those of the whole run where none will be."""
    if training.rampup_batch_size is None or consumed_samples >= training.rampup_batch_size[2]:
        return training.train_samples
    ramp_samples, increments = training.rampup_batch_size[2], _increments(training)
    if increments == 0:
        return training.train_samples
    level = consumed_samples * increments // ramp_samples
    return -(-(level + 1) * ramp_samples // increments)


def _length_in_words(training: TrainingOptions) -> str:
    if training.train_samples is None:
        return f"--train-iters {training.train_iters}"
    return f"the {end_of(training).iteration} steps of --train-samples {training.train_samples}"


def _check_one_count(training: TrainingOptions) -> None:
    if training.train_samples is None:
        for name in OF_SAMPLES:
            value = getattr(training, name)
            require(
                value is None,
                f"{flag_of(name)} {_listed(value)} counts samples, and the run steps (--train-iters "
                f"{training.train_iters}); give --train-samples, or leave it out",
            )
    else:
        for name, in_samples in IN_SAMPLES.items():
            value = getattr(training, name)
            require(
                value == DEFAULTS[name],
                f"{flag_of(name)} {value} counts steps, and the run samples (--train-samples "
                f"{training.train_samples}); give {flag_of(in_samples)} in its place",
            )


def _check_ramp(training: TrainingOptions) -> None:
    ramp, size = training.rampup_batch_size, training.global_batch_size
    if ramp is None:
        return
    words = f"--rampup-batch-size {_listed(ramp)}"
    require(
        len(ramp) == 3,
        f"{words}: is {len(ramp)} values, must be three: START INCREMENT SAMPLES, as 32 32 100000",
    )
    start, increment, ramp_samples = ramp
    for name, value, least in (("START", start, 1), ("INCREMENT", increment, 1), ("SAMPLES", ramp_samples, 0)):
        require(
            least <= value <= MOST_STEPS,
            f"{words}: its {name} {value} must be at least {least} and at most {MOST_STEPS:,}",
        )
    require(start <= size, f"{words}: its START {start} must not be above --global-batch-size {size}")
    require(
        (size - start) % increment == 0,
        f"{words}: its INCREMENT {increment} does not lead from {start} to --global-batch-size {size}; "
        f"make it divide {size - start}",
    )


def _check_learning_rate(training: TrainingOptions) -> None:
    for name in ("min_lr", "lr_warmup_init"):
        value = getattr(training, name)
        require(value <= training.lr, f"{flag_of(name)} {value} must not be above --lr {training.lr}")
    unit = "iters" if training.train_samples is None else "samples"
    warmup, decay, wsd_decay = learning_rate_samples(training)
    per_unit = training.global_batch_size if unit == "iters" else 1
    steps = f"{decay // per_unit} {'steps' if unit == 'iters' else 'samples'} of the decay"
    given = f"--lr-warmup-{unit} {warmup // per_unit}"
    if training.lr_warmup_fraction is not None:
        given = f"--lr-warmup-fraction {training.lr_warmup_fraction}"
    elif unit == "samples" and training.lr_warmup_samples is None:
        given += f", which is {training.lr_warmup_iters} batches where it is not given,"
    require(
        training.lr_decay_style == "constant" or warmup < decay,
        f"{given} must be below the {steps} (--lr-decay-{unit}, or --train-{unit})",
    )
    wsd_flag, wsd_given = f"--lr-wsd-decay-{unit}", wsd_decay is not None and wsd_decay // per_unit
    is_wsd = training.lr_decay_style == "WSD"
    require(
        is_wsd or wsd_decay is None,
        f"{wsd_flag} {wsd_given} is of --lr-decay-style WSD, which is {training.lr_decay_style}; change that, or leave "
        "it out",
    )
    require(
        not is_wsd or wsd_decay is not None,
        f"--lr-decay-style WSD decays at the end alone; give {wsd_flag}, how long that takes",
    )
    require(
        not is_wsd or wsd_decay <= decay - warmup,
        f"{wsd_flag} {wsd_given} is more than what the warm-up leaves of the {steps}; lower it",
    )


def _listed(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
