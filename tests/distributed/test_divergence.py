"""A loss or a gradient norm that is not finite ends every rank at its step, and nothing is saved of that step."""

import json
import shutil

import pytest

from tests.distributed.compare import whole_tensors
from tests.distributed.launch import launch
from tests.distributed.layouts import DIST_OPT, MODEL, PP2, TP2

# The first step has a learning rate of 0, the second ruins the weights: a little, so that the loss is finite still and
# the squares of its gradients are not, or wholly; so that their average is ruined too, which a validation shows before
# the step is saved, or without one the save itself. Learning rate, steps between validations, the error, what is saved.
HELD = "the {} is (inf|nan) at iteration {}; nothing is saved from here on"
CASES = {
    "gradient norm": ("8", 0, HELD.format("gradient norm", 3), 2),
    "loss": ("1e3", 0, HELD.format("loss", 3), 2),
    "validation loss": ("1e38", 2, HELD.format("validation loss", 2), 1),
    "tensor": ("1e40", 0, r"the tensor [\w.]+ is not finite at iteration 2, which is not saved", 1),
}


@pytest.mark.parametrize("flags", [PP2, TP2, DIST_OPT], ids=" ".join)
def test_every_rank_ends_at_the_step_that_is_not_finite(flags, tmp_path, byte_corpus):
    def job(name: str, rate: str, interval: int, message: str):
        arguments = [*MODEL, *flags, "--lr", rate, "--data-path", str(byte_corpus), "--save", str(tmp_path / name),
                     "--train-iters", "9", "--save-interval", "1", "--eval-interval", str(interval)]  # fmt: skip
        return arguments, f"^{message}"

    launch("run_divergence.py", 2, [job(name, *case[:3]) for name, case in CASES.items()])
    for name, (*_, saved) in CASES.items():
        # Every line has a loss, and none a number that is not JSON.
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
        assert [(record["iteration"], "loss" in record) for record in records] == [(1, True), (2, True)]
        folders = sorted(path.name for path in (tmp_path / name).glob("iter_*"))
        assert folders == ["iter_0000001", "iter_0000002"][:saved]
        assert all(tensor.isfinite().all() for tensor in whole_tensors(tmp_path / name / folders[-1]).values())


def test_every_rank_ends_where_the_data_is_not_what_was_written(tmp_path, byte_corpus):
    """A flipped bit leaves a token that is one; nothing but its digest tells."""
    for path in byte_corpus.parent.glob(f"{byte_corpus.name}*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    changed = tmp_path / f"{byte_corpus.name}.bin"
    content = bytearray(changed.read_bytes())
    content[len(content) // 2 & ~1] ^= 1
    changed.write_bytes(content)
    arguments = [*MODEL, "--data-path", str(tmp_path / byte_corpus.name), "--save", str(tmp_path / "save"),
                 "--train-iters", "9", "--save-interval", "1", "--eval-interval", "0"]  # fmt: skip
    # The first rank alone reads it all, and knows which file it is.
    message = (
        rf"^({changed}: is not what was written: its sha256 is |the data is not what was written).*; nothing is saved"
    )
    launch("run_divergence.py", 2, [(arguments, message)])
    assert not list((tmp_path / "save").glob("iter_*"))
