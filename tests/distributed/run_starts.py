"""What a run starts from, command after command in this process: an iteration, the weights, all but the moments."""

import contextlib
import io
import json
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.training.pretrain import pretrain
from tests.distributed.compare import metrics, whole_tensors
from tests.distributed.launch import own_jobs
from tests.distributed.run_resume_rules import MODEL, Commands

EVALUATED = ["--split", "80,10,10", "--eval-interval", "2", "--eval-iters", "2"]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train_samples(run: Commands, *arguments: str) -> list[str]:
    """Run a command that counts in samples; what it printed."""
    at = MODEL.index("--lr-warmup-iters")
    command = [*MODEL[:at], *MODEL[at + 2 :], "--data-path", run.corpus, *arguments]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        pretrain(parse_pretrain_options([argument.replace("@", str(run.root)) for argument in command]))
    return said.getvalue().splitlines()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in whole_tensors(folder).items() if not key.startswith(("optimizer.", "ema."))}


def part_of(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in whole_tensors(folder).items() if key.startswith(prefix)}


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key


def an_iteration_is_named_by_its_number(run: Commands) -> None:
    run.train(6, "--save", "@/old", "--save-interval", "2", *EVALUATED)
    start = ["--save", "@/step", "--load", "@/old", "--ckpt-step", "2", *EVALUATED]
    assert run.train(4, *start)[0] == f"resumes from {run.root}/old/iter_0000002 with --train-iters 6 -> 4"
    assert run.losses("step") == run.losses("old")[2:4]
    assert run.refusal("--save", "@/other", "--load", "@/old", "--ckpt-step", "3", *EVALUATED) == (
        f"--load {run.root}/old/iter_0000003: no such folder; beside it there are iter_0000004, iter_0000002, "
        "iter_0000006; give one of them"
    )
    # Of its own folder it is going back, as by the checkpoint's name.
    shutil.copytree(run.root / "old", run.root / "back")
    lines = run.train(6, "--save", "@/back", "--load", "@/back", "--ckpt-step", "2", *EVALUATED)
    assert (
        f"set aside {run.root}/back/iter_0000006 as iter_0000006.set-aside: the run goes on from iteration 2" in lines
    )
    assert run.losses("back") == run.losses("old")


def fine_tuning_takes_the_weights_alone(run: Commands) -> None:
    texts = run.write("other", "dogs jump over foxes. " * 60)
    start = ["--save", "@/tuned", "--load", "@/old/iter_0000006", "--finetune", "--split", "60,20,20", "--seed", "7"]
    lines = run.train(0, *start, corpus=texts)
    assert lines[0] == f"starts at iteration 0 with the weights of {run.root}/old/iter_0000006"
    old, tuned = run.root / "old" / "iter_0000006", run.root / "tuned" / "iter_0000000"
    weights = weights_of(old)
    assert_equal(weights_of(tuned), weights)
    # The average begins as the weights; nothing of Adam's is left.
    assert_equal(part_of(tuned, "ema."), {f"ema.{key}": tensor for key, tensor in weights.items()})
    moments = part_of(tuned, "optimizer.")
    assert moments
    assert not any(tensor.any() for tensor in moments.values())
    # Given again it goes on, and does not begin anew; what it gives is one run.
    assert run.train(2, *start, corpus=texts)[:2] == [
        f"--save {run.root}/tuned holds this run already, so that --load {run.root}/old/iter_0000006 is not read",
        f"resumes from {tuned} with --train-iters 0 -> 2",
    ]
    again = run.train(4, *start, corpus=texts)
    assert again[1] == f"resumes from {run.root}/tuned/iter_0000002 with --train-iters 2 -> 4"
    run.train(4, *start, "--save", "@/tuned at once", corpus=texts)
    assert run.losses("tuned") == run.losses("tuned at once")
    assert metrics(run.root / "tuned", "learning_rate")[0] == 0
    assert run.losses("tuned") != run.losses("old")[:4]
    assert "was trained with --num-layers 1, this run has 2" in run.refusal(*start[2:], "--num-layers", "2")


def without_the_optimizers_state_the_first_step_is_adams_first(run: Commands) -> None:
    start = ["--load", "@/old", "--ckpt-step", "2", "--no-load-optim", *EVALUATED]
    lines = run.train(3, *start, "--save", "@/fresh")
    assert lines[0] == (
        f"resumes from {run.root}/old/iter_0000002, without the optimizer's state with --train-iters 6 -> 3"
    )
    before, after = run.root / "old" / "iter_0000002", run.root / "fresh" / "iter_0000003"
    # The weights, the data and the progress are there: the loss of that step is that of the run.
    assert run.losses("fresh") == run.losses("old")[2:3]
    assert torch.equal(
        metrics(run.root / "fresh", "consumed_samples"), metrics(run.root / "old", "consumed_samples")[2:3]
    )
    # Adam's first step moves every weight by the learning rate; one of a warm optimizer does not.
    rate = metrics(run.root / "fresh", "learning_rate").item()
    moved = torch.cat([(weights_of(after)[key] - tensor).abs().flatten() for key, tensor in weights_of(before).items()])
    warm = torch.cat([
        (weights_of(run.root / "step" / "iter_0000004")[key] - tensor).abs().flatten()
        for key, tensor in weights_of(before).items()
    ])  # fmt: skip
    assert (moved[moved > 0] / rate - 1).abs().quantile(0.9) < 1e-2
    assert (warm[warm > 0] / rate - 1).abs().quantile(0.9) > 1e-1
    # The average goes on from what it was: decay (1 + n) / (10 + n) after step n = 3.
    for key, average in part_of(before, "ema.").items():
        expected = torch.lerp(average, whole_tensors(after)[key.removeprefix("ema.")], 1 - 4 / 13)
        torch.testing.assert_close(whole_tensors(after)[key], expected, rtol=1e-5, atol=1e-7)
    # A restart has the optimizer's state, which --save holds.
    run.train(4, *start, "--save", "@/fresh")
    run.train(4, *start, "--save", "@/fresh at once")
    assert run.losses("fresh") == run.losses("fresh at once")


def a_part_comes_from_another_folder(run: Commands) -> None:
    for flag, load in (("--finetune", "@/old"), ("--finetune", "@/old/iter_0000002"), ("--no-load-optim", "@/old")):
        assert run.refusal("--save", "@/old", "--load", load, flag, *EVALUATED) == (
            f"{flag}: --load {load.replace('@', str(run.root))} is of --save {run.root}/old, from which the same "
            "command goes on with all that it holds; save to another folder"
        )


def evaluation_alone_tells_what_training_told(run: Commands) -> None:
    old = records(run.root / "old")
    assert [line for line in old if "test_loss" in line] == [{"iteration": 6, "test_loss": old[-1]["test_loss"]}]
    before = {path: path.stat().st_mtime_ns for path in (run.root / "old").rglob("*")}
    told = run.train(6, "--save", "@/old", "--load", "@/x", "--skip-train", "--log-dir", "@/alone", *EVALUATED)
    assert told[0] == f"evaluates {run.root}/old/iter_0000006"
    alone = records(run.root / "alone")
    assert alone == [line for line in old if line["iteration"] == 6 and "loss" not in line]
    assert [line.split(" | ")[0] for line in told[1:]] == ["validation at iteration 6", "test at iteration 6"]
    # Nothing of the run is touched, whatever is asked.
    run.train(6, "--save", "@/old", "--load", "@/old", "--ckpt-step", "2", "--skip-train", *EVALUATED)
    run.train(6, "--load", "@/old/iter_0000004", "--skip-train", "--log-dir", "@/fourth", *EVALUATED)
    (validation,) = [line for line in old if line["iteration"] == 4 and "validation_loss" in line]
    assert records(run.root / "fourth")[0] == validation
    assert {path: path.stat().st_mtime_ns for path in (run.root / "old").rglob("*")} == before
    assert run.refusal("--skip-train", "--save", "@/nothing", *EVALUATED) == (
        "--skip-train: neither --save nor --load holds a checkpoint; name one by --load"
    )
    assert not (run.root / "nothing").exists()
    assert run.refusal("--skip-train", "--load", "@/old", "--split", "1,0,0") == (
        "--skip-train: --split 1,0,0 leaves no window for validation or test; give them a share"
    )


def a_test_loss_that_was_broken_off_is_made_up_for_once(run: Commands) -> None:
    from sedd_megatron.training import held_out

    flags = ["--save", "@/tested", *EVALUATED, "--sample-interval", "2", "--sampling-steps", "2", "--num-samples", "1"]
    with mock.patch.object(held_out, "request_to_any_rank", return_value=signal.SIGTERM):
        run.train(3, *flags)
    finished = run.root / "tested" / "finished"
    # The validation after the second step was broken off, and with it the run: its samples are left out as well.
    assert (run.losses("tested"), finished.exists()) == (run.losses("old")[:2], False)
    assert not (run.root / "tested" / "samples.jsonl").exists()
    with mock.patch.object(held_out, "request_to_any_rank", lambda run, requests: signal.SIGTERM * (run.iteration > 2)):
        run.train(3, *flags)
    assert (len(run.losses("tested")), finished.exists()) == (3, False)
    assert not [line for line in records(run.root / "tested") if "test_loss" in line]
    run.train(3, *flags)
    (test,) = [line for line in records(run.root / "tested") if "test_loss" in line]
    (validation,) = [line for line in records(run.root / "tested") if "validation_loss" in line]
    assert (test["iteration"], validation["iteration"], finished.exists()) == (3, 2, True)
    (sample,) = (run.root / "tested" / "samples.jsonl").read_text().splitlines()
    assert json.loads(sample)["iteration"] == 2
    # Killed before it could say that it is finished, or asked to keep less.
    finished.unlink()
    told = run.train(3, *flags)
    assert told == [f"resumes from {run.root}/tested/iter_0000003"]
    told = run.train(3, *flags, "--keep-last", "1")
    assert [line.split(" | ")[0] for line in told] == [f"resumes from {run.root}/tested/iter_0000003"]
    assert ([line for line in records(run.root / "tested") if "test_loss" in line], finished.exists()) == ([test], True)


def a_run_resumes_in_the_middle_of_a_ramp(run: Commands) -> None:
    ramp = ["--global-batch-size", "12", "--train-samples", "70", "--rampup-batch-size", "2", "2", "36",
            "--lr-decay-style", "WSD", "--lr-wsd-decay-samples", "30", "--lr-warmup-samples", "8"]  # fmt: skip
    unbroken = train_samples(run, *ramp, "--save", "@/ramp", "--lr-decay-samples", "70")
    assert unbroken[-1] == f"finished at iteration 11 of 11, saved {run.root}/ramp/iter_0000011"
    sizes = metrics(run.root / "ramp", "consumed_samples").diff(prepend=torch.zeros(1)).tolist()
    assert sizes == [2, 2, 2, 2, 4, 4, 6, 8, 10, 12, 12]
    assert unbroken[-3].startswith("iteration 11/11 |")
    # Two samples are less than the last batch.
    again = train_samples(run, *ramp, "--train-samples", "72", "--save", "@/ramp", "--lr-decay-samples", "70")
    assert again[-1] == f"nothing left to do: {run.root}/ramp has its 11 iterations; a greater --train-samples goes on"
    # Stopped at 8, 16 and 30 samples: the first has a step of the next size, the others lie in the middle of one.
    for samples in ("8", "20", "37", "70"):
        train_samples(run, *ramp, "--train-samples", samples, "--lr-decay-samples", "70", "--save", "@/ramp in parts")
    for name in ("loss", "grad_norm", "learning_rate", "consumed_samples"):
        assert torch.equal(metrics(run.root / "ramp in parts", name), metrics(run.root / "ramp", name)), name
    name = f"iter_{len(sizes):07d}"
    assert_equal(whole_tensors(run.root / "ramp in parts" / name), whole_tensors(run.root / "ramp" / name))
    assert "was trained with --rampup-batch-size [2, 2, 36], this run has None; give the same, --allow-changed" in (
        run.refusal("--save", "@/ramp", "--global-batch-size", "12")
    )


if __name__ == "__main__":
    (root,) = own_jobs()
    run = Commands(Path(root[0]))
    for step in (
        an_iteration_is_named_by_its_number,
        fine_tuning_takes_the_weights_alone,
        without_the_optimizers_state_the_first_step_is_adams_first,
        a_part_comes_from_another_folder,
        evaluation_alone_tells_what_training_told,
        a_test_loss_that_was_broken_off_is_made_up_for_once,
        a_run_resumes_in_the_middle_of_a_ramp,
    ):
        step(run)
