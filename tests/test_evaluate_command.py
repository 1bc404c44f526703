"""The likelihood command: the same number every time and in every layout, as many times as it takes, mistakes."""

import json
import math
import re
import sys
from pathlib import Path

import pytest

from sedd_megatron.config import DiffusionOptions, ModelOptions
from sedd_megatron.data.preparation import Preparation
from sedd_megatron.data.tokenizers import ByteTokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.parallel import cpu_backend
from tests.commands import run
from tests.distributed.launch import free_ports

cpu_backend.install()

from sedd_megatron import evaluate  # noqa: E402
from sedd_megatron.evaluation.bounds import UnitBound  # noqa: E402
from sedd_megatron.saved_model import SavedModel  # noqa: E402

NUMBER = r"([\d.]+) \[([\d.]+|-?inf), ([\d.]+|inf)\]"


def evaluated(*arguments) -> str:
    """What the command prints."""
    done = run([sys.executable, "-m", "sedd_megatron.evaluate", *map(str, arguments), "--device", "cpu"])
    assert done.returncode == 0, done.stderr
    return done.stdout


def interval(text: str, label: str) -> tuple[float, float, float]:
    return tuple(map(float, re.search(rf"^ *{label} +{NUMBER}", text, re.MULTILINE).groups()))


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": "a line of text, number " + str(n)}) + "\n" for n in range(6)))
    return path


def test_the_same_number_twice_with_any_batch_and_on_two_ranks(trained, texts, tmp_path):
    arguments = ["--load", trained, "--data", texts, "--mc-samples", "4"]
    one = evaluated(*arguments, "--output", tmp_path / "one.jsonl")
    again = evaluated(*arguments, "--output", tmp_path / "again.jsonl", "--batch-size", "3")
    units, others = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("one.jsonl", "again.jsonl")
    )
    for unit, other in zip(units, others, strict=True):
        assert math.isclose(unit["bound"], other["bound"], rel_tol=1e-6)
        assert math.isclose(unit["bound"], unit["prior"] + unit["diffusion"] + unit["reconstruction"])
    assert one == again
    value, low, high = interval(one, "nats per token")
    total, tokens = sum(unit["bound"] for unit in units), sum(unit["num_tokens"] for unit in units)
    assert math.isclose(value, total / tokens, abs_tol=6e-5)
    assert low < value < high
    assert math.isclose(interval(one, "perplexity at most")[0], math.exp(total / tokens), rel_tol=1e-4)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_ports(1)[0])]
    command = ["-m", "sedd_megatron.evaluate", *map(str, arguments), "--device", "cpu"]
    done = run([sys.executable, *launcher, *command])
    assert done.returncode == 0, done.stderr
    assert done.stdout == one


def test_further_times_until_the_interval_is_narrow(trained, texts):
    arguments = ["--load", trained, "--data", texts, "--mc-samples", "4", "--windowing", "separate"]
    arguments += ["--integrate-over", "mask-count"]
    _, low, high = interval(evaluated(*arguments), "on this text alone")
    wanted = (high - low) / 3
    said = evaluated(*arguments, "--until-half-width", wanted)
    _, low, high = interval(said, "on this text alone")
    assert (high - low) / 2 <= wanted


def test_corpora_by_name(trained, tmp_path):
    (tmp_path / "ptb-test.txt").write_text(" the company said it is <unk> \n it is n't so \n")
    arguments = ["--load", trained, "--corpora", "ptb", "--data-dir", tmp_path, "--mc-samples", "2"]
    said = evaluated(*arguments)
    assert said.startswith("ptb: 2 documents, ")
    assert said.endswith("published perplexities are per token of GPT-2's 50,257, and this model has 256\n")


def test_data_is_read_for_what_it_holds(tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text('{"text": "one", "n": 1}\n{"text": null}\n{"text": ""}\n{"text": "two"}\n')

    def texts(**change) -> list[str]:
        return evaluate._texts_of_files(evaluate.EvaluateOptions(load="x", data=(str(path),), **change))

    assert texts() == ["one", "two"]
    assert capsys.readouterr().err == "left out 1 document with null at key 'text'\n"
    assert texts(max_documents=1) == ["one"]
    assert texts(input_format="text") == [path.read_text()]
    with pytest.raises(UserError) as error:
        texts(json_key="body")
    assert str(error.value) == f"--data {path} line 1: no text at key 'body'; name the right one with --json-key"
    path.write_text('{\n"text": "one"\n}\n')
    with pytest.raises(UserError, match=r"^--data \S+x.json: is JSON, but not one object in each line; write it so"):
        texts()


def test_a_bound_that_is_infinite_is_not_waited_for_and_is_null_in_json(monkeypatch):
    unit = UnitBound(0, 4, 0.0, math.inf, 0.0, math.nan)
    rounds = []
    monkeypatch.setattr("sedd_megatron.evaluation.bounds.bound_on_replicas", lambda *given: rounds.append(given))
    monkeypatch.setattr("sedd_megatron.evaluation.bounds.mean_of_rounds", lambda rounds: rounds)
    monkeypatch.setattr("sedd_megatron.evaluation.bounds.unit_bounds", lambda windows, bounds: [unit])
    options = evaluate.EvaluateOptions(load="x", data=("x",), until_half_width=0.1)
    model = type("Model", (), {"bound_estimator": lambda self, **how: None, "groups": None})()
    assert evaluate._bound_units(model, [], options, 1e-3) == [unit]
    assert len(rounds) == 1
    assert json.loads(json.dumps(unit.record(), allow_nan=False))["bound"] is None


@pytest.mark.parametrize(
    ("of_data", "has_end", "change", "expected", "is_said"),
    [
        (None, True, {}, True, True),
        (None, False, {}, True, False),  # and the windows find no end to append
        (None, True, {"windowing": "separate"}, True, False),
        (None, True, {"append_eod": False}, False, False),
        (True, True, {}, True, False),
        (False, True, {}, False, False),
        (False, True, {"append_eod": True}, True, False),
    ],
)
def test_documents_are_ended_as_those_of_the_data_were(capsys, of_data, has_end, change, expected, is_said):
    tokenizer = ByteTokenizer()
    tokenizer.eod_id = 0 if has_end else None
    preparation = Preparation(of_data)
    saved = SavedModel(Path("x"), ModelOptions(), DiffusionOptions(), 256, tokenizer, preparation, lambda: None)
    options = evaluate.EvaluateOptions(load="x", data=("x",), **change)
    assert evaluate._append_eod(options, saved) is expected
    said = (
        "documents are joined by the end-of-document token, as published; for a model whose data had none give "
        "--no-append-eod\n"
    )
    assert capsys.readouterr().err == (said if is_said else "")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "give --data FILES or --corpora NAMES, one of the two"),
        (["--data", "x", "--mc-samples", "3"], "--mc-samples 3 must be even and at least 2"),
        (["--data", "x", "--until-half-width", "0"], "--until-half-width 0.0 must be above 0"),
        (
            ["--data", "x", "--output", "/dev/null/x"],
            "--output /dev/null/x: cannot be written (File exists); name another file",
        ),
        (["--corpora", "ptb", "--input-format", "text"], "--input-format text: belongs to --data; leave it out"),
        (["--data", "nowhere.txt"], "--data nowhere.txt: no such file or folder; check the path"),
        (["--data", ""], "argument --data: '' must not be empty: leave it out, or give what it names (--help "
         "lists every flag)"),
        (["--data", "x", "--mc-samples", "1000000000000"],
         "--mc-samples 1000000000000 must be at most 1000000; see --until-half-width"),
        (["--data", "x", "--pipeline-model-parallel-size", "0"],
         "--pipeline-model-parallel-size 0 must be at least 1 and at most 2,147,483,647"),
    ],
)  # fmt: skip
def test_mistakes(trained, monkeypatch, arguments, text):
    # Found before the model is loaded, so that they need no process of their own.
    monkeypatch.setattr(sys, "argv", ["evaluate", "--load", str(trained), "--device", "cpu", *arguments])
    with pytest.raises(UserError) as error:
        evaluate.main()
    assert str(error.value) == text


def test_a_key_is_asked_for_by_this_commands_own_flag(trained, texts, monkeypatch):
    flags = ["--load", str(trained), "--data", str(texts), "--json-key", "body", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *flags])
    with pytest.raises(UserError) as error:
        evaluate.main()
    assert str(error.value) == f"--data {texts} line 1: no text at key 'body'; name the right one with --json-key"
