"""A model of finite weights whose scores are not: every way to use it ends with one line that says where."""

import contextlib
import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sedd_megatron.errors import UserError
from sedd_megatron.parallel import cpu_backend
from tests.commands import run, torchrun

cpu_backend.install()

from lm_eval.api.instance import Instance  # noqa: E402

from sedd_megatron import evaluate, generate, sample_quality  # noqa: E402
from sedd_megatron.harness_model import HarnessModel, Question, key_of  # noqa: E402
from sedd_megatron.pretrained import PretrainedModel, load_pretrained  # noqa: E402
from tests.training.test_convert import published_folder  # noqa: E402

# Its embedding overflows in the first norm of every sequence that has it; all other sequences are as they were.
POISON = 5
WAY_OUT = "its weights are damaged, or it diverged in training: take an earlier checkpoint"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = published_folder(tmp_path_factory.mktemp("poisoned") / "model", "absorb")
    weights = load_file(path / "model.safetensors")
    weights["vocab_embed.embedding"][POISON] = 3.4e38
    weights["output_layer.linear.bias"][POISON] = -1e4  # so that none is drawn
    save_file(weights, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def model(folder) -> PretrainedModel:
    return load_pretrained(folder, device="cpu")


@contextlib.contextmanager
def ends_with(beginning: str):
    with pytest.raises(UserError) as error:
        yield
    line = str(error.value)
    assert line.startswith(f"{beginning}: the model's scores are not finite at sigma ")
    assert line.endswith(f"; {WAY_OUT}")


def test_texts_and_bounds_in_python(model):
    clean = model.generate(2, "1 2", length=6, steps=3)
    assert all(POISON not in text.tokens for text in clean)
    with ends_with("sample 2, round 1"):
        model.generate(prompts=["1 2", "3 4", f"1 {POISON}"], length=6, steps=3)
    (bound,) = model.nll(["1 2 3 4"], mc_samples=8)
    assert 0 < bound.bound < 100
    with ends_with("window 1"):
        model.nll(["1 2 3 4", f"{POISON} {POISON} {POISON} {POISON}"], mc_samples=8)


def test_the_harness(model):
    harness = HarnessModel(model)
    good, bad = ("1 2", " 3"), (f"1 {POISON}", " 3")
    requests = [Instance("", {}, one, 0, ("task", number, 1)) for number, one in enumerate((good, bad))]
    assert harness.loglikelihood(requests[:1])[0][0] < 0
    with ends_with("window 1"):
        harness.loglikelihood(requests)
    questions = [request.args for request in requests]
    with ends_with("question 1"):
        harness._greedy([_question(model, *one) for one in questions])
    settings = {"until": [], "max_gen_toks": 3}
    with ends_with(f"sample {key_of('task/0/1')}, round 1"):
        harness.generate_until([Instance("", {}, (bad[0], settings), 0, ("task", 0, 1))])


def _question(model, context, continuation):
    tokens = [model.tokenizer.encode(text) for text in (context, continuation)]
    return Question("", (*tokens[0], *tokens[1]), len(tokens[0]))


def test_the_commands(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "texts.txt").write_text(f"{POISON} " * 9)
    cases = {
        generate: (["--prompt", f"{POISON}", "--length", "5", "--sampling-steps", "3"], "sample 0, round 1"),
        evaluate: (["--data", str(tmp_path / "texts.txt"), "--mc-samples", "4"], "window 0"),
        sample_quality: (["--prompt", f"{POISON}", "--length", "5", "--sampling-steps", "3"], "sample 0, round 1"),
    }
    for command, (flags, beginning) in cases.items():
        monkeypatch.setattr(sys, "argv", [command.__name__, "--load", str(folder), *flags, "--device", "cpu"])
        # Each leaves the groups that this process' models share.
        for name in ("parallel_groups", "joined_after_checks"):
            monkeypatch.setattr(command, name, _groups_of_this_process, raising=False)
        with ends_with(beginning):
            command.main()
        assert capsys.readouterr().out == ""


@contextlib.contextmanager
def _groups_of_this_process(options):
    from sedd_megatron.parallel.groups import groups_of_this_process

    yield groups_of_this_process(options)


def test_what_one_replica_meets_every_rank_ends_with(folder, tmp_path):
    """The second of two has the sample; the first alone speaks, and would else wait for it."""
    requests = [{"tokens": [1, None, None]}, {"tokens": [POISON, None, None]}]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(one) + "\n" for one in requests))
    done = run([*torchrun(2), "-m", "sedd_megatron.generate", "--load", str(folder), "--device", "cpu", "--batch-size",
                "1", "--sampling-steps", "3", "--requests", str(tmp_path / "requests.jsonl")])  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("error: sample 1, round 1: the model's scores are not finite at sigma 6.9") == 1
    assert "ScoresNotFiniteError" not in done.stderr
    assert done.stdout == ""
