"""A bit that flips in one rank's gradients: the rank is named, the step is left out, and a resumed run is the same."""

import json

import torch

from tests.benchmarks.bit_flips import count, draw_flips
from tests.distributed.bit_flips import Flip
from tests.distributed.compare import whole_tensors
from tests.distributed.launch import launch
from tests.distributed.layouts import DIST_OPT, MODEL, OVERLAP, SP, TP2


def test_flips_are_named_and_a_run_that_skipped_them_resumes_bitwise(tmp_path, byte_corpus):
    def job(folder: str, flips: list[Flip], *flags: str):
        arguments = [*MODEL, "--data-path", str(byte_corpus), "--save", str(tmp_path / folder), "--eval-interval", "0",
                     "--train-iters", "26", "--max-skipped-steps", "99", "--spike-factor", "8",
                     "--check-replicas-interval", "5", *flags]  # fmt: skip
        return arguments, flips

    # Flips of one bit each that is clear in every number below 2.
    flips = [flip._replace(bit=30) for flip in draw_flips(6, 2, seed=3)]
    overlapped = [*DIST_OPT, *OVERLAP]
    launch("run_bit_flips.py", 2, [
        job("whole", flips, *overlapped, "--save-interval", "17", "--ema-interval", "2"),
        job("resumed", flips, *overlapped, "--load", str(tmp_path / "whole" / "iter_0000017"), "--ema-interval", "2"),
        job("sequence", flips, *TP2, *SP),
    ])  # fmt: skip
    for folder in ("whole", "sequence"):
        found = count(flips, tmp_path / folder)
        assert (found.bad, found.found, found.named, found.false_alarms) == (6, 6, 6, 0)
    whole, resumed = (whole_tensors(tmp_path / name / "iter_0000026") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    manifest = json.loads((tmp_path / "resumed" / "iter_0000026" / "manifest.json").read_text())
    state = manifest.get("body", manifest)["state"]
    assert (state["iteration"], state["skipped_steps"], state["consumed_samples"]) == (26, 6, 26 * 8)
    assert state["scheduler_samples"] == 20 * 8
