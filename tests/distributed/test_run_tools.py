"""Runs on made-up data, and what they are asked to find out about their speed: two ranks, started once."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.data.corpus import write_corpus
from sedd_megatron.data.tokenizers import ByteTokenizer
from tests.distributed.compare import metrics
from tests.distributed.launch import launch
from tests.distributed.layouts import DIST_OPT, MODEL, PP2

# --split belongs to --data-path.
UNSPLIT = [flag for flag in MODEL if flag not in ("--split", "80,20,0")]
MOCK = "--mock-data --tokenizer-type NullTokenizer --vocab-size 30".split()
TOOLS = ("--timing-log-level 2 --log-throughput --profile --profile-step-start 2 --profile-step-end 4 "
         "--profile-ranks 1 --manual-gc --manual-gc-interval 3 --log-interval 2").split()  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tools")
    base = [*UNSPLIT, *MOCK, "--num-layers", "2", "--eval-interval", "3", "--lr", "1e-2"]

    def job(name: str, steps: int, *flags: str) -> list[str]:
        return [*base, "--train-iters", str(steps), "--save", str(root / name), *flags]

    launch("run_pretrain.py", 2, [
        job("plain", 6, *PP2),
        job("tools", 6, *PP2, *TOOLS),
        job("halves", 3, *DIST_OPT),
        job("halves", 6, *DIST_OPT, "--profile", "--profile-step-start", "1", "--profile-step-end", "2"),
        job("whole", 6, *DIST_OPT, "--timing-log-level", "1", "--log-interval", "6"),
    ])  # fmt: skip
    return root


def test_tools_change_no_number(folders):
    for name in ("loss", "grad_norm", "validation_loss"):
        assert torch.equal(metrics(folders / "plain", name), metrics(folders / "tools", name))


def test_made_up_data_is_learned_and_gone_on_with(folders):
    for name in ("loss", "grad_norm", "validation_loss"):
        assert torch.equal(metrics(folders / "halves", name), metrics(folders / "whole", name))
    assert metrics(folders / "whole", "loss").isfinite().all()


def test_times_of_the_parts_are_in_the_metrics(folders):
    lines = [json.loads(line) for line in (folders / "tools" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    timed = [line["iteration"] for line in steps if "forward_backward_seconds" in line]
    assert timed == [2, 4, 6]
    for line in steps:
        # Model operations per second, over two devices; the model is too small for more.
        assert 0 < line["tflops_per_device"] < 1
        assert line["tflops_per_device"] / line["tokens_per_second"] == pytest.approx(
            steps[0]["tflops_per_device"] / steps[0]["tokens_per_second"]
        )
    last = steps[-1]
    assert {f"{name}_seconds" for name in ("forward_compute", "backward_compute", "batch_generator", "all_grads_sync",
                                           "forward_recv", "optimizer_inner_step")} <= last.keys()  # fmt: skip
    # A part is no longer than the whole, and the whole is most of the two steps that it is the mean of.
    whole = 16 * 8 / last["tokens_per_second"] + 16 * 8 / steps[-2]["tokens_per_second"]
    assert last["forward_compute_seconds"] < last["forward_backward_seconds"] <= whole / 2 * 1.05
    # Level 1 has no times of a micro-batch.
    whole = (folders / "whole" / "metrics.jsonl").read_text()
    assert "forward_backward_seconds" in whole
    assert "forward_compute_seconds" not in whole


def test_the_profile_is_of_the_steps_and_the_rank_that_were_asked_for(folders):
    assert [path.name for path in (folders / "tools").glob("profile*")] == ["profile-rank1-steps3-4.json.gz"]
    with gzip.open(folders / "tools" / "profile-rank1-steps3-4.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = [event for event in events if event.get("name") == "Optimizer.step#AdamW.step"]
    assert len(steps) == 2
    # Asked for behind where the run goes on: none.
    assert not list((folders / "halves").glob("profile*"))


def test_no_profile_takes_the_place_of_another(tmp_path):
    from sedd_megatron.output_files import unused_path

    for name in ("p.json.gz", "p.2.json.gz", "p.3.json.gz"):
        path = unused_path(tmp_path, "p", ".json.gz")
        assert path.name == name
        path.touch()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--profile"], "--profile writes into the log folder, and there is none; add --log-dir"),
        (["--profile", "--log-dir", "l", "--profile-step-end", "3"], "--profile-step-start 10 must be below"),
        (["--profile", "--log-dir", "l", "--profile-ranks", "0", "9"], "--profile-ranks 9 must be below 1, the number"),
        (["--timing-log-level", "3"], "--timing-log-level 3 must be 0, 1 or 2"),
        (["--manual-gc-interval", "5"], "--manual-gc-interval 5 belongs to --manual-gc; add that"),
    ],
)  # fmt: skip
def test_mistakes(flags, text):
    from sedd_megatron.errors import UserError

    with pytest.raises(UserError) as refused:
        parse_pretrain_options([*MOCK, *flags])
    assert str(refused.value).startswith(text)


def state_of(*flags: str) -> dict:
    from sedd_megatron.training.same_run import describe_run

    return describe_run(parse_pretrain_options([*UNSPLIT, *flags]), 256)


def test_a_run_on_other_parts_or_on_made_up_data_is_another_run(tmp_path):
    from sedd_megatron.training.same_run import changes, first_difference

    for name in "ab":
        write_corpus([name * 99], ByteTokenizer(), tmp_path / name)
    a, b = (str(tmp_path / f"{name}_text_document") for name in "ab")
    states = {
        "cut": state_of("--data-path", a),
        "whole": state_of("--train-data-path", a),
        "validated": state_of("--train-data-path", a, "--valid-data-path", b),
        "made up": state_of(*MOCK),
    }
    for name, saved in states.items():
        for other, own in states.items():
            difference = first_difference(saved, own, ())
            assert (difference is None) == (name == other), (name, other, difference)
            assert difference is None or difference[0] == "data_path"
    _, words = first_difference(states["cut"], states["validated"], ())
    assert words == f"was trained on other data than --train-data-path {a} --valid-data-path {b}"
    _, words = first_difference(states["cut"], states["made up"], ())
    assert words == "was trained on other data than --mock-data"
    assert changes(states["cut"], states["whole"]) == [f"--data-path {a} -> --train-data-path {a}"]
    assert changes(states["cut"], state_of("--data-path", b)) == [f"--data-path {a} -> {b}"]
    # As checkpoints of before have it.
    old = states["cut"] | {"options": {k: v for k, v in states["cut"]["options"].items() if "valid" not in k}}
    assert first_difference(old, states["cut"], ()) is None
