"""The campaign itself: a few attempts of nearly every row, and that its judges see what is wrong."""

import re
import subprocess
import sys

import numpy as np
import pytest

from tests.campaign.__main__ import ROWS, Score, scorecard
from tests.campaign.attempts import FailedError, SilentlyWrongError
from tests.campaign.checks import expect_no_traceback, expect_refused
from tests.campaign.order import expect_once_each
from tests.campaign.processes import Done
from tests.campaign.runs import GLOBAL_BATCH, STEPS, Result, metrics
from tests.distributed.launch import REPOSITORY, child_environment

# R2 is torchrun itself, and R15 a minute of waiting.
QUICK = [row.id for row in ROWS if row.id not in ("R2", "R15")]


def test_a_few_attempts_of_each_row_pass():
    command = [sys.executable, "-m", "tests.campaign", "--rows", *QUICK, "--attempts", "2"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=child_environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert re.findall(r"^\| (R\d+) \|.*\| 2 \| 2 \| 0 \|$", done.stdout, re.MULTILINE) == QUICK
    assert "100.00% passed (goal 99.9%), 0 silently wrong (goal 0)" in done.stdout


def test_a_bit_or_a_record_that_differs_is_seen():
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    whole = Result({("training", 1): {"loss": 2.0}}, {"weight": weight})
    flipped = weight.copy()
    flipped.view(np.uint32)[1, 2] ^= 1
    assert whole.first_difference(Result(dict(whole.records), {"weight": weight.copy()})) is None
    assert "tensor weight" in whole.first_difference(Result(whole.records, {"weight": flipped}))
    assert whole.first_difference(Result(whole.records, {"weight": flipped}), 1e-6) is None
    assert "loss of" in whole.first_difference(Result({("training", 1): {"loss": 2.0000001}}, whole.tensors))
    assert "other entries" in whole.first_difference(Result({}, whole.tensors))


def test_an_iteration_that_stands_twice_is_seen(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "loss": 1.0}\n' * 2)
    with pytest.raises(ValueError, match="twice"):
        metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "loss": NaN}\n')
    with pytest.raises(ValueError, match="NaN"):
        metrics(tmp_path)


@pytest.mark.parametrize(
    ("second", "error"),
    [
        (range(3 * GLOBAL_BATCH, STEPS * GLOBAL_BATCH), None),
        (range(5 * GLOBAL_BATCH, STEPS * GLOBAL_BATCH), SilentlyWrongError),  # a step left out
        (range(3 * GLOBAL_BATCH, STEPS * GLOBAL_BATCH - 1), SilentlyWrongError),  # not to the end
        (range(3 * GLOBAL_BATCH + 1, STEPS * GLOBAL_BATCH), SilentlyWrongError),  # within a step
    ],
)
def test_samples_left_out_are_seen(tmp_path, second, error):
    for name, numbers in (("0-one-0", range(4 * GLOBAL_BATCH)), ("1-tp2-0", second), ("1-tp2-1", second)):
        (tmp_path / name).write_text("".join(f"{n}\n" for n in numbers))
    if error is None:
        expect_once_each(tmp_path)
    else:
        with pytest.raises(error):
            expect_once_each(tmp_path)


def test_a_refusal_is_one_line_and_no_traceback():
    expect_refused(Done([2], "warning: something\nerror: --lr 0 must be above it\n"), "--lr")
    for codes, said in (
        ([1], "error: --lr 0"),
        ([2], "error: a\nerror: b"),
        ([2], "error: a\nand more"),
        ([2], ""),
        ([2], "error: another flag"),
    ):
        with pytest.raises(FailedError):
            expect_refused(Done(codes, said), "--lr")
    frame = f'Traceback (most recent call last):\n  File "{REPOSITORY}/sedd_megatron/errors.py", line 1, in <module>\n'
    with pytest.raises(FailedError):
        expect_no_traceback(Done([0], frame))
    expect_no_traceback(Done([0], frame.replace("sedd_megatron/errors.py", ".venv/torch/distributed/run.py")))


def test_the_totals_are_of_all_rows():
    card = scorecard([Score(ROWS[0], 10, 9, 1), Score(ROWS[1], 30, 30, 0)], "command", 60)
    assert f"| R1 | {ROWS[0].what} | 10 | 9 | 1 |" in card
    assert "| | all | 40 | 39 | 1 |" in card
    assert "97.50% passed (goal 99.9%), 1 silently wrong (goal 0), in 1 minutes" in card
