"""A disk that refuses checkpoints: training goes on, those before it stay, nothing of the failed ones does."""

from tests.distributed.compare import metrics, whole_tensors
from tests.distributed.launch import start
from tests.distributed.layouts import DIST_OPT, MODEL

REFUSED = r"^rank 1 cannot save iteration {} to \S+( \S+)*: file too large; "
ENOUGH = r"it is failure 3 in a row \(--max-save-failures\), the checkpoints before are whole: make room"
LAST = REFUSED + "the checkpoints before are whole: make room"
# The steps whose checkpoints are refused, those that are saved in the end, failures that are told, the last error.
CASES = {
    "for a while": ([2, 3], [1, 4, 5, 6], [(2, 1), (3, 2)], None),
    "now and then": ([1, 2, 4], [3, 5, 6], [(1, 1), (2, 2), (4, 1)], None),
    "for good": (
        [2, 3, 4, 5, 6],
        [1],
        [(2, 1), (3, 2)],
        REFUSED.format(4) + ENOUGH,
    ),
    "at the end": ([6], [1, 2, 3, 4, 5], [], LAST.format(6)),
}


def test_training_goes_on_without_checkpoints_for_a_while(tmp_path, byte_corpus):
    def job(name: str, refused: list[int], error: str | None, *flags: str):
        arguments = [*MODEL, *DIST_OPT, "--data-path", str(byte_corpus), "--save", str(tmp_path / name),
                     "--train-iters", "6", "--save-interval", "1", "--eval-interval", "0", *flags]  # fmt: skip
        return arguments, refused, error

    cases = CASES | {f"{name}, async": case for name, case in CASES.items()}
    jobs = [job(name, case[0], case[3], *(["--async-save"] if "async" in name else [])) for name, case in cases.items()]
    codes, (said, other) = start("run_full_disk.py", 2, jobs)
    assert codes == [0, 0], said + other
    for name, (_, saved, told, _) in cases.items():
        folder = tmp_path / name
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [f"iter_000000{k}" for k in saved]
        assert (folder / "latest_checkpointed_iteration.txt").read_text().strip() == str(saved[-1])
        assert all(tensor.isfinite().all() for tensor in whole_tensors(folder / f"iter_000000{saved[-1]}").values())
        lines = [line for line in said.splitlines() if f" to {folder}: " in line]
        assert len(lines) == len(told)
        for line, (iteration, count) in zip(lines, told, strict=True):
            assert line == (
                f"warning: rank 1 cannot save iteration {iteration} to {folder}: file too large; training goes on and "
                f"saves again at the next interval (failure {count} of 3 in a row)"
            )
        # Of what is written beside training, the failure is met a step or two later.
        steps = len(metrics(folder, "iteration"))
        assert steps == 6 if "for good" not in name else 4 <= steps <= (6 if "async" in name else 4)
