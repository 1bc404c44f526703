"""The commands as a person runs them: torchrun on the example, then generate, on one process from a TP2 checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.compare import metrics, whole_tensors
from tests.distributed.launch import REPOSITORY, free_ports
from tests.distributed.layouts import MODEL

ENVIRONMENT = dict(os.environ, PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS="1")


def torchrun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
            str(free_ports(1)[0]), str(REPOSITORY / "examples" / "pretrain_sedd.py"), *MODEL, *arguments]  # fmt: skip


def run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)


def generate(*arguments: str) -> subprocess.CompletedProcess:
    return run([sys.executable, "-m", "sedd_megatron.generate", *arguments, "--device", "cpu"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, byte_corpus) -> Path:
    """The save folder of a short TP2 run with TensorBoard and a log folder of its own."""
    folder = tmp_path_factory.mktemp("trained")
    done = run(torchrun("--data-path", str(byte_corpus), "--train-iters", "6", "--save", str(folder / "save"),
                        "--tensor-model-parallel-size", "2", "--log-interval", "2", "--eval-interval", "3",
                        "--log-dir", str(folder / "log"), "--tensorboard-dir", str(folder / "board")))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "iteration 6/6 | loss" in done.stdout
    assert "tokens/s" in done.stdout
    assert "left" in done.stdout
    return folder / "save"


def test_training_writes_the_promised_metrics(trained):
    lines = [json.loads(line) for line in (trained.parent / "log" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["iteration"] for line in steps] == [1, 2, 3, 4, 5, 6]
    expected = {"iteration", "loss", "learning_rate", "grad_norm", "tokens_per_second", "consumed_samples"}
    assert all(set(line) == expected for line in steps)
    assert [set(line) for line in lines if line not in steps] == [{"iteration", "validation_loss"}] * 2
    assert list((trained.parent / "board").glob("events*"))


def test_generate_keeps_prompt_and_suffix_and_does_not_depend_on_the_batch(trained, tmp_path):
    texts = []
    for batch_size in ("1", "3"):
        output = tmp_path / f"{batch_size}.jsonl"
        done = generate("--load", str(trained), "--num-samples", "3", "--sampling-steps", "5", "--prompt", "def",
                        "--suffix", "end", "--length", "12", "--batch-size", batch_size, "--output",
                        str(output))  # fmt: skip
        assert done.returncode == 0, done.stderr
        records = [json.loads(line) for line in output.read_text().splitlines()]
        assert [len(record["tokens"]) for record in records] == [12] * 3
        assert all(bytes(record["tokens"][:3]) == b"def" for record in records)
        assert all(bytes(record["tokens"][-3:]) == b"end" for record in records)
        assert all(record["text"] in done.stdout for record in records)
        texts.append([record["tokens"] for record in records])
    assert texts[0] == texts[1]
    assert len({tuple(tokens) for tokens in texts[0]}) == 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--prompt", "x" * 17], "--prompt and --suffix take 17 tokens and a sample has 16"),
        (["--length", "17"], "--length 17 is above the trained length of 16"),
        (["--sampling-steps", "0"], "--sampling-steps 0 must be at least 1"),
        (["--sampler", "heun"], "invalid choice: 'heun'"),
    ],
)
def test_generate_mistakes_get_one_line_and_code_2(trained, arguments, text):
    done = generate("--load", str(trained), *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert text in done.stderr


def test_generate_without_a_checkpoint(tmp_path):
    done = generate("--load", str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no checkpoint there" in done.stderr


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


def test_sigterm_saves_and_the_run_goes_on_from_there(tmp_path, byte_corpus):
    arguments = ["--data-path", str(byte_corpus), "--save", str(tmp_path / "save"), "--eval-interval", "0"]
    process = subprocess.Popen(torchrun(*arguments, "--train-iters", "100000"), env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    log = tmp_path / "save" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None, "the run ended by itself"
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    saved_at = int((tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text())
    assert saved_at == metrics(tmp_path / "save", "iteration")[-1]
    done = run(torchrun(*arguments, "--load", str(tmp_path / "save"), "--train-iters", str(saved_at + 2)))
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "save", "iteration").tolist() == list(range(1, saved_at + 3))
