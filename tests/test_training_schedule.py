"""Samples of each step, steps of a run, and the learning rate over a whole run: against brute force, Megatron-Core's
own calculator, and formulas written down a second time.
"""

import math
import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.config import PretrainOptions
from sedd_megatron.errors import UserError
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.training_config import TrainingOptions
from sedd_megatron.training_schedule import Progress, batch_size_at, end_of

cpu_backend.install()

from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator  # noqa: E402

from sedd_megatron.training.build import build_scheduler  # noqa: E402


def parse(*flags: str) -> PretrainOptions:
    return parse_pretrain_options(["--data-path", "x", "--micro-batch-size", "1", *flags])


def ramps(count: int) -> list[TrainingOptions]:
    rng = random.Random(3)
    found = []
    for _ in range(count):
        start, increment, increments = rng.randint(1, 6), rng.randint(1, 4), rng.randint(0, 5)
        ramp = (start, increment, rng.choice([0, 1, 5, 30, 77]))
        size, samples = start + increment * increments, rng.randint(start, 160)
        found.append(TrainingOptions(global_batch_size=size, rampup_batch_size=ramp, train_samples=samples))
    return found


def brute_force_size(training: TrainingOptions, consumed: int) -> int:
    """As Megatron's documentation has it: every so many samples the batch grows by the increment."""
    start, increment, ramp_samples = training.rampup_batch_size
    increments = (training.global_batch_size - start) // increment
    if consumed >= ramp_samples or increments == 0:
        return training.global_batch_size
    per_increment, size = Fraction(ramp_samples, increments), start
    while Fraction(consumed) >= per_increment:
        consumed, size = consumed - per_increment, size + increment
    return size


def test_a_ramp_is_that_of_its_definition_step_by_step():
    for training in ramps(300):
        steps = [Progress()]
        while True:
            iteration, samples = steps[-1]
            size = brute_force_size(training, samples)
            assert batch_size_at(training, samples) == size, (training, samples)
            if samples + size > training.train_samples:
                break
            steps.append(Progress(iteration + 1, samples + size))
        # From wherever it is asked.
        assert {end_of(training, start) for start in steps} == {steps[-1]}, training


def test_a_ramp_is_that_of_megatron_core():
    for start, increment, increments, per_increment in [(2, 2, 3, 10), (4, 1, 8, 3), (1, 7, 2, 64), (16, 16, 15, 1000)]:
        size, ramp_samples = start + increment * increments, increments * per_increment
        training = TrainingOptions(
            global_batch_size=size, rampup_batch_size=(start, increment, ramp_samples), train_samples=10**6
        )
        theirs = RampupBatchsizeNumMicroBatchesCalculator(size, 1, 1, False, 1, start, increment, ramp_samples)
        for samples in range(0, ramp_samples + 40, 1 + ramp_samples // 500):
            theirs.update(samples, consistency_check=True)
            assert batch_size_at(training, samples) == theirs.get_current_global_batch_size(), (training, samples)


def test_a_run_of_millions_of_steps_is_counted_at_once():
    training = TrainingOptions(global_batch_size=2**20, rampup_batch_size=(1, 1, 2**31 - 1), train_samples=2**50)
    end = end_of(training)
    assert end.consumed_samples <= 2**50 < end.consumed_samples + 2**20
    assert end_of(TrainingOptions(global_batch_size=512, train_samples=512 * 7 + 511)) == (7, 512 * 7)
    assert end_of(TrainingOptions(global_batch_size=8, train_iters=10), Progress(4, 100)) == (10, 148)


def rates(*flags: str, step: int = 4) -> list[float]:
    """The learning rate of each step of a run of 400 samples, 4 a step."""
    options = parse("--global-batch-size", "4", "--lr", "0.5", "--min-lr", "0.05", *flags)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = build_scheduler(options, optimizer), []
    for _ in range(0, 400, step):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(step)
    return found


WSD = {
    "exponential": lambda x: 2 * 2**-x - 1,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "minus_sqrt": lambda x: 1 - x**0.5,
}
DECAYS = {
    "constant": ([], lambda n: 0.5),
    "linear": ([], lambda n: 0.5 - 0.45 * (n - 40) / 360),
    "cosine": ([], lambda n: 0.05 + 0.225 * (1 + math.cos(math.pi * (n - 40) / 360))),
    "inverse-square-root": ([], lambda n: max(0.05, 0.5 * math.sqrt(40 / n))),
} | {
    f"WSD, {style}": (
        ["--lr-wsd-decay-style", style],
        lambda n, shape=shape: 0.05 + 0.45 * (1 if n <= 320 else shape((n - 320) / 80)),
    )
    for style, shape in WSD.items()
}  # fmt: skip
# The same warm-up of 40 samples, and decay of 400, of which WSD's are the last 80.
LENGTHS = {
    "iters": "--train-iters 100 --lr-warmup-iters 10",
    "samples": "--train-samples 400 --lr-warmup-samples 40",
    "fraction of iters": "--train-iters 100 --lr-warmup-fraction 0.1",
    "fraction of samples": "--train-samples 400 --lr-warmup-fraction 0.1",
    "decay iters": "--train-iters 999 --lr-decay-iters 100 --lr-warmup-iters 10",
    "decay samples": "--train-samples 999 --lr-decay-samples 400 --lr-warmup-samples 40",
}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("decay", DECAYS)
def test_every_decay_has_its_formula_however_its_length_is_given(decay, length):
    flags, formula = DECAYS[decay]
    style = decay.split(",")[0]
    if style == "WSD":
        flags = [*flags, *(["--lr-wsd-decay-iters", "20"] if "iters" in length else ["--lr-wsd-decay-samples", "80"])]
    expected = [0.1 + 0.4 * n / 40 if n <= 40 else formula(n) for n in range(0, 400, 4)]
    found = rates("--lr-decay-style", style, "--lr-warmup-init", "0.1", *LENGTHS[length].split(), *flags)
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_published_warm_up_is_counted_in_batches_where_nothing_is_given():
    found = rates("--train-samples", "400")
    assert found == pytest.approx([0.5 * n / (2500 * 4) for n in range(0, 400, 4)], rel=1e-12)


def test_a_flag_wins_over_what_says_the_same_in_a_file(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("train_iters: 7\nlr_warmup_iters: 3\nlr_decay_iters: 6\nglobal_batch_size: 4\n")
    file = ["--config", str(config)]
    samples = ["--train-samples", "80", "--lr-decay-samples", "60"]
    training = parse(*file, *samples, "--lr-warmup-fraction", "0.5").training
    assert (training.train_samples, training.lr_warmup_fraction, training.lr_decay_iters) == (80, 0.5, None)
    assert training == replace(training, train_iters=400_000, lr_warmup_iters=2500)
    with pytest.raises(UserError, match="--lr-warmup-iters 3 counts steps, and the run samples"):
        parse(*file, *samples)
    config.write_text("train_samples: 80\nlr_warmup_samples: 3\nrampup_batch_size: [2, 2, 8]\nglobal_batch_size: 4\n")
    assert parse(*file).training.rampup_batch_size == (2, 2, 8)
    assert parse(*file, "--train-iters", "9", "--lr-warmup-iters", "2").training == TrainingOptions(
        micro_batch_size=1, global_batch_size=4, train_iters=9, lr_warmup_iters=2
    )


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--train-samples 99 --train-iters 9", "--train-samples 99 stands in place of --train-iters 9; leave one of"),
        # Which is what it would be without the flag.
        ("--train-samples 9999 --train-iters 400000", "--train-samples 9999 stands in place of --train-iters 400000"),
        ("--train-samples 9999 --lr-decay-iters 9", "--lr-decay-iters 9 counts steps, and the run samples"),
        ("--train-samples 9999 --lr-warmup-iters 9", "give --lr-warmup-samples in its place"),
        ("--train-samples 9999 --lr-wsd-decay-iters 9", "give --lr-wsd-decay-samples in its place"),
        ("--train-iters 9 --lr-warmup-samples 9", "--lr-warmup-samples 9 counts samples, and the run steps "
         "(--train-iters 9); give --train-samples, or leave it out"),
        ("--lr-decay-samples 9", "--lr-decay-samples 9 counts samples, and the run steps (--train-iters 400000)"),
        ("--lr-wsd-decay-samples 9", "--lr-wsd-decay-samples 9 counts samples"),
        ("--rampup-batch-size 8 8 90", "--rampup-batch-size 8 8 90 counts samples, and the run steps"),
        ("--lr-warmup-iters 9 --lr-warmup-fraction 0.1", "--lr-warmup-iters 9 stands in place of "
         "--lr-warmup-fraction 0.1; leave one of them out"),
        ("--train-samples 9999 --lr-warmup-samples 9 --lr-warmup-fraction 0.1", "--lr-warmup-samples 9 stands in "),
        ("--lr-warmup-fraction 1", "--lr-warmup-fraction 1.0 must be at least 0 and below 1"),
        ("--lr-warmup-init 1", "--lr-warmup-init 1.0 must not be above --lr 0.0003"),
        ("--train-samples 511", "--train-samples 511 are less than one batch of 512, so that nothing is trained"),
        ("--train-samples 9007199254740993", "--train-samples 9007199254740993 must be at most 9,007,199,254,740,992"),
        ("--train-samples 9007199254740992 --global-batch-size 1", "are 9,007,199,254,740,992 steps, must be at most"),
        ("--train-samples 5120 --ema-interval 11", "--ema-interval 11 is above the 10 steps of --train-samples 5120"),
        ("--train-samples 9999 --lr-decay-style cosine", "--lr-warmup-samples 1280000, which is 2500 batches where it "
         "is not given, must be below the 9999 samples of the decay (--lr-decay-samples, or --train-samples)"),
        ("--train-samples 9999 --lr-warmup-samples 9999 --lr-decay-style WSD --lr-wsd-decay-samples 1",
         "--lr-warmup-samples 9999 must be below the 9999 samples of the decay"),
        ("--train-iters 0 --lr-warmup-fraction 0.5 --lr-decay-style linear", "--lr-warmup-fraction 0.5 must be below"),
        ("--lr-decay-style WSD", "--lr-decay-style WSD decays at the end alone; give --lr-wsd-decay-iters"),
        ("--lr-wsd-decay-iters 9", "--lr-wsd-decay-iters 9 is of --lr-decay-style WSD, which is constant"),
        ("--train-iters 3000 --lr-decay-style WSD --lr-wsd-decay-iters 501", "--lr-wsd-decay-iters 501 is more than "
         "what the warm-up leaves of the 3000 steps of the decay"),
        ("--train-samples 9999 --rampup-batch-size 8 8", "--rampup-batch-size 8 8: is 2 values, must be three: START"),
        ("--train-samples 9999 --rampup-batch-size 0 8 9", "its START 0 must be at least 1"),
        ("--train-samples 9999 --rampup-batch-size 8 0 9", "its INCREMENT 0 must be at least 1"),
        ("--train-samples 9999 --rampup-batch-size 8 8 -1", "its SAMPLES -1 must be at least 0"),
        ("--train-samples 9999 --rampup-batch-size 520 8 9", "its START 520 must not be above --global-batch-size 512"),
        ("--train-samples 9999 --rampup-batch-size 500 8 9", "its INCREMENT 8 does not lead from 500 to "
         "--global-batch-size 512; make it divide 12"),
        ("--train-samples 9999 --rampup-batch-size 4 4 9 --micro-batch-size 8", "--rampup-batch-size: its START 4 is "
         "not a multiple of --micro-batch-size 8 times 1 data-parallel ranks; make it a multiple of 8"),
        ("--train-samples 9999 --rampup-batch-size 8 4 9 --micro-batch-size 8", "its INCREMENT 4 is not a multiple of"),
        ("--ckpt-step 5", "--ckpt-step 5 is of what --load names; add --load, or leave it out"),
        ("--finetune", "--finetune is of what --load names; add --load"),
        ("--no-load-optim", "--no-load-optim is of what --load names; add --load"),
        ("--ckpt-step 5 --load runs/iter_0000004", "--load runs/iter_0000004 names a checkpoint, and --ckpt-step 5 one "
         "in a folder of them; give the folder, or leave --ckpt-step out"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_gets_one_line(flags, text):
    with pytest.raises(UserError) as error:
        parse(*flags.split())
    assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ramp", "text"),
    [
        ("8 16 99", None),
        ("4 4 99", "--rampup-batch-size: its START 4 makes 1 micro-batch(es), and interleaved stages need multiples of "
         "--pipeline-model-parallel-size 2; make it a multiple of 8"),
        ("8 4 99", "--rampup-batch-size: its INCREMENT 4 makes 1 micro-batch(es), and interleaved stages"),
    ],
)  # fmt: skip
def test_interleaved_stages_have_their_micro_batches_at_every_step(monkeypatch, ramp, text):
    monkeypatch.setenv("WORLD_SIZE", "4")
    flags = ["--micro-batch-size", "2", "--global-batch-size", "40", "--train-samples", "999", "--rampup-batch-size",
             *ramp.split(), "--pipeline-model-parallel-size", "2",
             "--num-layers-per-virtual-pipeline-stage", "2"]  # fmt: skip
    if text is None:
        assert parse(*flags).training.rampup_batch_size == (8, 16, 99)
        return
    with pytest.raises(UserError) as error:
        parse(*flags)
    assert text in str(error.value)


def test_presets_take_a_length_in_samples():
    config = Path(__file__).resolve().parent.parent / "examples" / "configs" / "tiny.yaml"
    options = parse("--config", str(config), "--train-samples", "1000", "--lr-warmup-fraction", "0.1")
    assert end_of(options.training) == (62, 992)
