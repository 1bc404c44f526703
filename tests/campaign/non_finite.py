"""R9: numbers that are not finite, put where a digest says that they belong there."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.campaign import runs
from tests.campaign.attempts import Attempt, Row, expect, expect_right
from tests.campaign.checks import expect_done, expect_no_traceback, expect_refused, expect_same_run, metrics_of, tail
from tests.campaign.processes import Job, fork, run
from tests.campaign.saves import copy_run
from tests.campaign.signatures import record, sign

NO_SCORE = "no position has finite scores"
VALUES = (np.nan, np.inf, -np.inf)
KINDS = {
    "weights": lambda key: not key.startswith(("optimizer.", "ema.")),
    "moments": lambda key: key.startswith("optimizer."),
    "average": lambda key: key.startswith("ema."),
}


def inject(attempt: Attempt) -> None:
    """One kind of number, in one kind of place."""
    kinds = (into_checkpoint, into_checkpoint, into_published, by_learning_rate, by_scores)
    kinds[attempt.number % len(kinds)](attempt)


def into_checkpoint(attempt: Attempt) -> None:
    """One element of one tensor of the newest checkpoint, with valid digests."""
    dice, save, base = attempt.random, attempt.folder / "run", attempt.base
    copy_run(base.run, save, (3, 6))
    kind = dice.choice(list(KINDS))
    key = change_tensor(save / "iter_0000006", dice, KINDS[kind], lambda values: dice.choice(VALUES))
    if dice.random() < 0.5:
        done = run(runs.train(save, base.data), attempt.folder)
        if done.code:
            expect_refused(done, key)
        else:
            expect(key in done.said, f"{key} is not finite, and not a word of it: {tail(done)}")
            expect_same_run(base.references["one"], save)
        expect_nothing_saved(save, except_iteration=6)
        return
    output = attempt.folder / "samples.jsonl"
    done = run(runs.generate(save, output), attempt.folder)
    expect_no_traceback(done)
    if done.code:
        expect_refused(done, key)
    elif runs.records(output) == base.samples[3]:
        expect(key in done.said, f"an older checkpoint's samples, and not a word of {key}")
    else:
        # Sampling needs the average alone.
        expect_right(kind != "average" and runs.records(output) == base.samples[6], f"samples of {key}")


def into_published(attempt: Attempt) -> None:
    """One element of the weights of a published folder."""
    dice, folder = attempt.random, attempt.folder / "model"
    command = ["convert", "--load", str(attempt.base.run), "--to-published", str(folder)]
    expect_done(run(command, attempt.folder))
    weights = load_file(folder / "model.safetensors")
    name = dice.choice(sorted(name for name in weights if "rotary" not in name))
    weights[name].reshape(-1)[dice.randrange(weights[name].size)] = dice.choice(VALUES)
    save_file(weights, folder / "model.safetensors")
    if dice.random() < 0.5:
        command = runs.generate(folder, attempt.folder / "samples.jsonl")
    else:
        command = ["convert", "--from-published", str(folder), "--save", str(attempt.folder / "converted")]
    done = run(command, attempt.folder)
    expect_right(done.code != 0, f"{command[0]} with {name} not finite: exit code 0")
    expect_refused(done, name)


def by_learning_rate(attempt: Attempt) -> None:
    """A learning rate at which training bursts."""
    dice, save = attempt.random, attempt.folder / "run"
    rate = 10.0 ** dice.uniform(4, 38)
    flags = ["--lr", repr(rate), "--lr-warmup-iters", str(dice.randint(0, 3)), "--clip-grad", dice.choice(("0", "1"))]
    done = run(runs.train(save, attempt.base.data, "one", *flags, "--save-interval", "1"), attempt.folder)
    if done.code:
        expect_refused(done)
    expect_nothing_saved(save)
    if (save / "metrics.jsonl").exists():
        metrics_of(save)


def by_scores(attempt: Attempt) -> None:
    """Finite weights whose scores are not: sampling and bounds end."""
    dice, save, base = attempt.random, attempt.folder / "run", attempt.base
    copy_run(base.run, save, (3, 6))
    factor = np.float32(10.0 ** dice.uniform(36, 38))
    for _ in range(3):
        change_tensor(save / "iter_0000006", dice, KINDS["average"], lambda values: factor, whole=True)
    if dice.random() < 0.5:
        output = attempt.folder / "samples.jsonl"
        done = run(runs.generate(save / "iter_0000006", output), attempt.folder)
    else:
        text = attempt.folder / "text.txt"
        text.write_text("the quick brown fox")
        output = attempt.folder / "bounds.jsonl"
        done = run(["evaluate", "--load", str(save / "iter_0000006"), "--data", str(text), "--mc-samples", "8",
                    "--device", "cpu", "--output", str(output)], attempt.folder)  # fmt: skip
    if done.code:
        expect_refused(done)
        return
    said = done.said + output.read_text()
    expect_right("nan" not in said.lower(), f"a result of scores that are not finite: {tail(done)}")
    scores = fork(lambda: _look_at_scores(save / "iter_0000006"), attempt.folder / "scores.txt")
    look = Job([scores]).wait()
    expect_done(look)
    expect_right(NO_SCORE not in look.said, f"exit code 0 with no score that is finite: {tail(done)}")


def _look_at_scores(checkpoint: Path) -> None:
    """Say so if the scores of a masked sequence are nowhere finite, whatever the noise."""
    import torch

    from sedd_megatron import load_pretrained

    model = load_pretrained(checkpoint, "cpu")
    x_t = torch.full((3, model.seq_length), model.graph.mask_token_id)
    scores = model.log_score(x_t, torch.tensor([0.01, 1.0, 6.0]))
    if not scores.isfinite().all(dim=-1).any():
        print(NO_SCORE)


def expect_nothing_saved(save: Path, except_iteration: int = -1) -> None:
    """No checkpoint has a number that is not finite."""
    for iteration in runs.saved_iterations(save):
        for key, values in runs.tensors(save / f"iter_{iteration:07d}").items():
            is_own = iteration == except_iteration
            expect_right(is_own or bool(np.isfinite(values).all()), f"checkpoint {iteration} has {key} not finite")


def change_tensor(checkpoint: Path, dice, is_wanted, value_of, whole: bool = False) -> str:
    """Change an element, or all, of a random tensor of a kind, and sign the checkpoint again; returns its key."""
    body = json.loads((checkpoint / "manifest.json").read_text())["body"]
    key = dice.choice(sorted(filter(is_wanted, body["tensors"])))
    shard = dice.choice(body["tensors"][key]["shards"])
    tensors = load_file(checkpoint / shard["file"])
    values = tensors[shard["name"]].reshape(-1)
    values[slice(None) if whole else dice.randrange(len(values))] = value_of(values)
    save_file(tensors, checkpoint / shard["file"])
    sign(checkpoint, lambda body: body["files"][shard["file"]].update(record(checkpoint / shard["file"])))
    return key


ROWS = [Row("R9", "NaN and infinity in checkpoints, weights, rates and scores", inject, attempts=100, short=10)]
