"""Training as a person runs it: torchrun on the example, and a model loaded in one process from a TP2 checkpoint."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.commands import ENVIRONMENT, EXAMPLE, run, train_command
from tests.distributed.compare import metrics, whole_tensors


def test_training_writes_the_promised_metrics(trained):
    lines = [json.loads(line) for line in (trained.parent / "log" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["iteration"] for line in steps] == [1, 2, 3, 4, 5, 6]
    expected = {"iteration", "loss", "learning_rate", "grad_norm", "tokens_per_second", "consumed_samples"}
    assert all(expected <= set(line) for line in steps)
    assert ["started" in line for line in steps] == [True, *[False] * 5]
    assert [set(line) for line in lines if line not in steps] == [{"iteration", "validation_loss"}] * 2
    assert list((trained.parent / "board").glob("events*"))


def test_load_pretrained_gives_the_moving_average_and_log_scores(trained):
    from sedd_megatron import load_pretrained

    model = load_pretrained(trained, device="cpu")
    saved = whole_tensors(trained / "iter_0000006")
    weights = model.network.state_dict()
    assert torch.equal(weights["embedding.weight"], saved["ema.embedding.weight"])
    assert not torch.equal(weights["embedding.weight"], saved["embedding.weight"])
    assert torch.equal(
        weights["decoder.layers.1.mlp.linear_fc1.weight"], saved["ema.decoder.layers.mlp.linear_fc1.weight"][1]
    )
    x_t = torch.randint(0, 257, (2, 9))
    log_score = model.log_score(x_t, torch.tensor([0.1, 2.0]))
    assert (log_score.shape, log_score.dtype) == ((2, 9, 257), torch.float32)
    assert (log_score.gather(-1, x_t[..., None]) == 0).all()
    assert (model.graph.num_tokens, model.tokenizer.num_tokens, model.schedule.eps) == (256, 256, 1e-3)


def wait_for_records(process: subprocess.Popen, log: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= count):
        assert time.monotonic() < deadline
        assert process.poll() is None, "the run ended by itself"
        time.sleep(0.2)


@pytest.mark.parametrize("to_all", [False, True], ids=["SIGTERM by torchrun", "SIGINT to every process"])
def test_a_signal_saves_and_the_run_goes_on_from_there(to_all, tmp_path, byte_corpus):
    arguments = ["--data-path", str(byte_corpus), "--save", str(tmp_path / "save"), "--eval-interval", "0"]
    command = train_command(*arguments, "--train-iters", "100000")
    if to_all:
        # As a terminal does; the loader's processes get it as well.
        command = [sys.executable, *command[command.index(str(EXAMPLE)) :], "--num-workers", "2"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)  # fmt: skip
    log = tmp_path / "save" / "metrics.jsonl"
    try:
        wait_for_records(process, log, 3)
        if to_all:
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(timeout=60) == 0
        else:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    saved_at = int((tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text())
    assert saved_at == metrics(tmp_path / "save", "iteration")[-1]
    # As if it had gone on, and been killed in the middle of a line before the next checkpoint.
    with log.open("a") as file:
        file.write(f'{{"iteration": {saved_at + 1}, "loss": 1.0}}\n{{"iteration": {saved_at + 2}, "lo')
    done = run(train_command(*arguments, "--load", str(tmp_path / "save"), "--train-iters", str(saved_at + 2)))
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "save", "iteration").tolist() == list(range(1, saved_at + 3))
    assert (tmp_path / "save" / "metrics-lost.jsonl").read_text() == f'{{"iteration": {saved_at + 1}, "loss": 1.0}}\n'


def test_a_signal_breaks_a_validation_off_and_the_next_start_makes_it(tmp_path, byte_corpus):
    arguments = ["--data-path", str(byte_corpus), "--eval-interval", "4"]
    save = ["--save", str(tmp_path / "save")]
    # Of an hour or two.
    command = train_command(*arguments, *save, "--train-iters", "100000", "--eval-iters", "100000")
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)  # fmt: skip
    try:
        wait_for_records(process, tmp_path / "save" / "metrics.jsonl", 4)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=25)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "save" / "iter_0000004").is_dir()
    ending = ["--train-iters", "5", "--eval-iters", "2"]
    for folder in (save, ["--save", str(tmp_path / "unbroken")]):
        done = run(train_command(*arguments, *ending, *folder))
        assert done.returncode == 0, done.stderr
    losses = [[json.loads(line).get("validation_loss") for line in (tmp_path / name / "metrics.jsonl").open()]
              for name in ("save", "unbroken")]  # fmt: skip
    assert losses[0] == losses[1]
    assert [loss is not None for loss in losses[0]] == [False] * 4 + [True, False]
