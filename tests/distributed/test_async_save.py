"""--async-save: training goes on while a checkpoint is written, and what is written is the state of its own step."""

import torch

from tests.distributed.compare import whole_tensors
from tests.distributed.launch import launch
from tests.distributed.layouts import DIST_OPT, MODEL, OVERLAP


def arguments(corpus, folder) -> list[str]:
    return [*MODEL, *DIST_OPT, *OVERLAP, "--data-path", str(corpus), "--save", str(folder), "--train-iters", "9",
            "--save-interval", "3", "--eval-interval", "0"]  # fmt: skip


def test_a_slow_disk_does_not_stop_training_nor_change_what_is_saved(tmp_path, byte_corpus):
    launch("run_pretrain.py", 2, [arguments(byte_corpus, tmp_path / "sync")])
    # Each checkpoint is written two steps late: a save that waited for it would never end.
    launch("run_async_save.py", 2, [("slow", [*arguments(byte_corpus, tmp_path / "async"), "--async-save"])])
    for iteration in (3, 6, 9):
        expected = whole_tensors(tmp_path / "sync" / f"iter_{iteration:07d}")
        actual = whole_tensors(tmp_path / "async" / f"iter_{iteration:07d}")
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), (iteration, name)
    assert (tmp_path / "async" / "latest_checkpointed_iteration.txt").read_text().strip() == "9"


def test_checkpoints_that_cannot_be_finished_leave_nothing(tmp_path, byte_corpus):
    launch("run_async_save.py", 2, [("no manifest", [*arguments(byte_corpus, tmp_path), "--async-save"])])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_diverges_keeps_the_checkpoint_under_way(tmp_path, byte_corpus):
    launch("run_async_save.py", 2, [("diverges", [*arguments(byte_corpus, tmp_path), "--async-save"])])
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text().strip() == "3"
    assert not any(tensor.isnan().any() for tensor in whole_tensors(tmp_path / "iter_0000003").values())
