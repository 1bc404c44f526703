"""Steps that are not taken: what is left as it was, what is written down, and what the replay says of the cause."""

import json
import math

import pytest
import torch

from sedd_megatron.arguments import weighted_corpora
from sedd_megatron.data.windows import open_windows
from sedd_megatron.errors import UserError
from sedd_megatron.training.recent_steps import KEPT, LEAST, RecentSteps, StepResult
from tests.distributed.bit_flips import Flip, arm
from tests.training.test_optimizer_step import build


def guarded(byte_corpus, *flags: str):
    """A run with its guard and its batches, four steps on."""
    run = build("--data-path", str(byte_corpus), *flags)
    from sedd_megatron.training.iterators import training_iterators
    from sedd_megatron.training.step import train_step
    from sedd_megatron.training.step_guard import StepGuard

    windows = open_windows(weighted_corpora(run.options.data), seq_length=run.options.model.seq_length,
                           split="1,0,0", num_tokens=256, seed=0)  # fmt: skip
    run.guard = StepGuard(run, windows.train)
    batches = training_iterators(run, windows.train)
    for _ in range(4):
        train_step(run, batches)
    return run, batches


def state_of(run) -> list:
    """Everything that a step changes, but for the count of steps and samples."""
    from sedd_megatron.training.checkpoint import run_shards

    inner = run.optimizer.chained_optimizers[0].optimizer
    steps = [state["step"].item() for state in inner.state.values()]
    tensors = [shard.data.clone() for shard in run_shards(run)]
    return [tensors, steps, run.scheduler.num_steps, run.ema.last_update, run.recent.state("")]


def assert_same(one: list, other: list) -> None:
    for a, b in zip(one[0], other[0], strict=True):
        assert torch.equal(a, b)
    assert one[1:] == other[1:]


@pytest.mark.parametrize("flags", [[], ["--bf16", "--use-distributed-optimizer"]], ids=" ".join)
def test_a_skipped_step_changes_nothing_and_is_written_down(flags, byte_corpus, tmp_path, capfd):
    run, batches = guarded(byte_corpus, *flags, "--max-skipped-steps", "2", "--log-dir", str(tmp_path))
    from sedd_megatron.training.step import train_step

    before = state_of(run)
    # The first layer's first bias, whose values are small: the highest bit of their exponents is clear.
    arm(run, Flip(5, 0, 0.5, 0.0, 30))
    metrics, flags = train_step(run, batches, [0, 7])
    assert_same(before, state_of(run))
    assert (run.iteration, run.skipped_steps, run.consumed_samples, flags) == (5, 1, 40, [0, 7])
    assert set(metrics) == {"iteration", "skipped", "consumed_samples"}
    assert "is inf: replayed, rank 0 on " in metrics["skipped"]
    said = capfd.readouterr().err
    assert "at iteration 5, which is skipped (1 of --max-skipped-steps 2): replayed, rank 0 on " in said
    record = json.loads((tmp_path / "skipped_steps" / "iter_0000005.json").read_text())
    (report,) = record["ranks"]
    assert [sample for batch in report["samples"] for sample in batch] == list(range(32, 40))
    assert all(0 < time <= 1 for times in report["times"] for time in times)
    assert report["first"]["losses"] == report["replayed"]["losses"]
    assert "inf" in report["first"]["gradient_norms"]
    assert all(isinstance(norm, float) for norm in report["replayed"]["gradient_norms"])
    # The next batch, and the fifth update.
    metrics, _ = train_step(run, batches)
    assert (metrics["iteration"], metrics["consumed_samples"], run.optimizer_steps) == (6, 48, 5)
    assert state_of(run)[1] == [5.0] * len(before[1])


def test_the_same_result_twice_is_the_data_or_the_model(byte_corpus):
    run, batches = guarded(byte_corpus)
    from sedd_megatron.training.step import train_step

    with torch.no_grad():
        next(run.model_chunks[0].parameters()).fill_(math.inf)
    with pytest.raises(UserError) as error:
        train_step(run, batches)
    assert str(error.value) == (
        "the loss is nan at iteration 5; nothing is saved from here on: replayed, every rank computed the same, which "
        "is the data or the model; go on from the last checkpoint, or start anew, with a lower --lr or "
        "--clip-grad, and look at the data, or go on without such steps by --max-skipped-steps 1"
    )


def test_a_fault_of_the_reduction_is_no_rank_s(byte_corpus):
    """What is summed changes on its way: each rank's own gradients are the same twice, and the second sum is good."""
    run, batches = guarded(byte_corpus, "--max-skipped-steps", "1")
    from sedd_megatron.training.step import train_step

    group = run.ddp_chunks[0].bucket_groups[0]
    start = group.start_grad_sync

    def spoilt_start(*arguments, **keywords):
        group.start_grad_sync = start
        start(*arguments, **keywords)
        group.buckets[0].grad_data[3] = math.nan

    group.start_grad_sync = spoilt_start
    metrics, _ = train_step(run, batches)
    assert metrics["skipped"].startswith(
        "the gradient norm is nan: replayed, every rank computed the same and the loss"
    )
    assert metrics["skipped"].endswith("which is hardware between the ranks")


def test_without_the_check_a_step_is_not_taken_either(byte_corpus):
    run, batches = guarded(byte_corpus)
    from sedd_megatron.training.step import train_step

    run.guard = None
    before = state_of(run)
    arm(run, Flip(5, 0, 0.5, 0.0, 30))
    with pytest.raises(
        UserError, match=r"^the gradient norm is inf at iteration 5; nothing is saved from here on: resume"
    ):
        train_step(run, batches)
    assert_same(before, state_of(run))


def test_a_spike_is_more_than_a_factor_above_the_median():
    recent = RecentSteps()
    for number in range(LEAST - 1):
        recent.add(StepResult(1.0 + number, 10.0))
    assert recent.fault(StepResult(1e9, 10.0), 2.0) is None, "too few to judge by"
    recent.add(StepResult(8.0, 10.0))
    # The median of 1 to 8 is 4.5.
    assert recent.fault(StepResult(9.0, 20.0), 2.0) is None
    assert recent.fault(StepResult(9.01, 20.0), 2.0) == "the loss is 9.01, above 2 times the median before (4.5)"
    assert "gradient norm is 20.1, above 2 times" in recent.fault(StepResult(9.0, 20.1), 2.0)
    assert recent.fault(StepResult(1e9, 1e9), None) is None
    assert recent.fault(StepResult(1.0, math.nan), None) == "the gradient norm is nan"
    for _ in range(KEPT):
        recent.add(StepResult(100.0, 10.0))
    assert recent.fault(StepResult(150.0, 10.0), 2.0) is None, "older steps are forgotten"
    again = RecentSteps(json.loads(json.dumps(recent.state("two ranks"))), "two ranks")
    assert again.state("two ranks") == recent.state("two ranks")
    # What a rank's own gradients usually are says nothing about other ranks' in another layout.
    for _ in range(KEPT):
        again.add(StepResult(100.0, 10.0, 5.0))
    assert "of a rank is 11" in again.fault(StepResult(100.0, 10.0, 11.0), 2.0)
    elsewhere = RecentSteps(again.state("two ranks"), "one rank")
    assert elsewhere.fault(StepResult(100.0, 10.0, 11.0), 2.0) is None
    assert elsewhere.fault(StepResult(201.0, 10.0, 11.0), 2.0) is not None
