"""Whichever signal asks whichever rank to end, all ranks save the same step and end, and the first says so."""

from sedd_megatron.errors import STOP_SIGNALS
from tests.distributed.compare import metrics, whole_tensors
from tests.distributed.launch import start
from tests.distributed.layouts import DIST_OPT, MODEL


def test_each_signal_to_one_rank_saves_and_ends_them_all(tmp_path, byte_corpus):
    def job(name: str, *flags: str):
        arguments = [*MODEL, *DIST_OPT, "--data-path", str(byte_corpus), "--save", str(tmp_path / name),
                     "--train-iters", "1000", "--eval-interval", "0", *flags]  # fmt: skip
        return arguments, name.split()[0]

    names = [number.name for number in STOP_SIGNALS]
    # In the second a checkpoint is under way when the signal comes.
    jobs = [*map(job, names), job("SIGINT async", "--async-save", "--save-interval", "1")]
    codes, (said, other) = start("run_signals.py", 2, jobs)
    assert codes == [0, 0], said + other
    for name in [*names, "SIGINT async"]:
        folder = tmp_path / name
        steps = metrics(folder, "iteration").tolist()
        # The listening thread may note it only during the next step.
        assert steps in ([1, 2, 3], [1, 2, 3, 4])
        assert (folder / "latest_checkpointed_iteration.txt").read_text().strip() == str(len(steps))
        assert all(tensor.isfinite().all() for tensor in whole_tensors(folder / f"iter_{len(steps):07d}").values())
        last = folder / f"iter_{len(steps):07d}"
        line = f"{name.split()[0]}: stopped at iteration {len(steps)} of 1000, saved {last}\n"
        assert line in said
    assert said.count(": stopped at ") == len(jobs)
    assert ": stopped at " not in other
