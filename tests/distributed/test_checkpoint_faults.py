"""Invariant 5: damaged checkpoints are named and never used; a save that dies leaves the last one whole."""

from tests.distributed.launch import launch
from tests.distributed.test_layouts import MODEL


def test_damaged_foreign_and_unfinished_checkpoints(tmp_path, byte_corpus):
    arguments = [*MODEL, "--data-path", str(byte_corpus)]
    launch("run_checkpoint_faults.py", 1, [[arguments, str(tmp_path / "run")]])
