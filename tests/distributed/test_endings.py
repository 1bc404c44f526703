"""Stopped, finished, and nothing left to do: what a run says, DIR/finished, and that all ranks decide alike."""

import re

from tests.distributed.compare import metrics
from tests.distributed.launch import start
from tests.distributed.layouts import DIST_OPT, MODEL


def test_a_folder_is_finished_when_its_run_is_and_no_longer(tmp_path, byte_corpus):
    save = tmp_path / "run"

    def job(name: str, steps: int, *flags: str, ahead: int | None = None):
        arguments = [*MODEL, *DIST_OPT, "--data-path", str(byte_corpus), "--save", str(tmp_path / name),
                     "--train-iters", str(steps), "--eval-interval", "0", "--save-interval", "2", *flags]  # fmt: skip
        return arguments, ahead

    jobs = [
        job("run", 4, "--exit-interval", "3"),
        job("run", 4, "--exit-interval", "2"),  # its last step is no stop
        job("run", 4),
        job("run", 6, "--exit-interval", "5", "--exit-signal-handler"),
        job("run", 6, "--exit-duration-in-mins", "30", ahead=1),  # not by the second rank's clock
        job("run", 5, "--load", str(save / "iter_0000002"), "--exit-interval", "3"),
        job("other", 6, "--exit-duration-in-mins", "30", ahead=0),
    ]
    codes, (said, other) = start("run_endings.py", 2, jobs)
    assert codes == [0, 0], said + other
    told = [line for line in said.splitlines() if re.search("LEFT|stopped at|finished at|nothing left", line)]
    assert told == [
        f"--exit-interval 3: stopped at iteration 3 of 4, saved {save}/iter_0000003",
        "LEFT 0 None",
        f"finished at iteration 4 of 4, saved {save}/iter_0000004",
        "LEFT 0 4",
        f"nothing left to do: {save} has its 4 iterations; a greater --train-iters goes on",
        "LEFT 0 4",
        f"--exit-interval 5: stopped at iteration 5 of 6, saved {save}/iter_0000005",
        "LEFT 0 None",
        f"finished at iteration 6 of 6, saved {save}/iter_0000006",
        "LEFT 0 6",
        f"--exit-interval 3: stopped at iteration 3 of 5, saved {save}/iter_0000003",
        "LEFT 0 None",
        f"--exit-duration-in-mins 30.0: stopped at iteration 1 of 6, saved {tmp_path}/other/iter_0000001",
        "LEFT 0 None",
    ]
    assert "stopped" not in other
    # What has nothing left to do builds no model.
    assert said.count(" parameters, ") == len(jobs) - 1
    assert metrics(save, "iteration").tolist() == [1, 2, 3]
