"""What becomes of a run's folder, command after command in this process."""

import dataclasses
import errno
import shutil
from pathlib import Path
from unittest import mock

import torch

from sedd_megatron.config import DiffusionOptions, ModelOptions
from sedd_megatron.training import checkpoint, summary
from sedd_megatron.training.checkpoint_format import read_manifest
from tests.distributed.compare import metrics, whole_tensors
from tests.distributed.launch import own_jobs
from tests.distributed.run_resume_rules import FIXTURES, FOX, Commands
from tests.training.resigned import resign


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def a_folder_of_checkpoints_that_were_set_aside_is_no_empty_one(run: Commands) -> None:
    """As a kill leaves it between two renames of going back to one that was set aside."""
    folder = run.root / "aside"
    shutil.copytree(run.root / "unbroken", folder)
    for name in ("iter_0000002", "iter_0000004"):
        (folder / name).rename(folder / f"{name}.set-aside")
    before = contents(folder)
    refused = f"--save {folder}: only checkpoints that were set aside are here: iter_0000004.set-aside, "
    refused += "iter_0000002.set-aside; name one of them by --load, or save to another folder"
    for flags in ([], ["--load", "@/aside"], ["--load", "@/unbroken"], ["--no-resume"]):
        assert run.refusal("--save", "@/aside", *flags) == refused
        assert contents(folder) == before
    assert run.refusal("--load", "@/aside").startswith(
        f"--load {folder}: only checkpoints that were set aside are here: iter_0000004.set-aside, iter_0000002.set-as"
    )
    (folder / "went_back.txt").write_text('{"to": "iter_0000002.set-aside", "launchers": [], "job": null}\n')
    assert "and --no-resume does not go on from it" in run.refusal("--save", "@/aside", "--no-resume")
    lines = run.train(4, "--save", "@/aside")
    assert lines[0] == f"resumes from {folder}/iter_0000002.set-aside"
    assert run.losses("aside") == run.losses("unbroken")[:4]
    names = sorted(path.name for path in folder.glob("iter_*"))
    assert names == ["iter_0000002", "iter_0000004", "iter_0000004.set-aside"]


def a_checkpoint_is_no_folder_to_save_to(run: Commands) -> None:
    root = run.root / "unbroken"
    (root / "best").symlink_to("iter_0000002")
    before = contents(root)
    for name in ("iter_0000002", "iter_0000099", "best"):
        assert run.refusal("--save", f"@/unbroken/{name}", "--load", "@/unbroken") == (
            f"--save {root}/{name}: that is a checkpoint; give its folder {root}, and the checkpoint by --load"
        )
    assert contents(root) == before
    (root / "best").unlink()


def a_run_with_nothing_to_train_does_not_go_back(run: Commands) -> None:
    folder = run.root / "unbroken"
    before = contents(folder)
    for train_iters in (1, 2):
        refused = run.refusal("--load", "@/unbroken/iter_0000002", "--save", "@/unbroken", train_iters=train_iters)
        assert refused.startswith(
            f"--train-iters {train_iters} is not above the iteration 2 of {folder}/iter_0000002, to which the run "
        )
        assert contents(folder) == before
    # But what is loaded from elsewhere is saved in the layout at hand.
    with mock.patch.object(summary, "say") as said:
        run.train(2, "--load", "@/unbroken", "--save", "@/again")
    told = said.call_args_list[0].args[0]
    assert told.endswith(
        "at iteration 4 of 2: nothing left to train, since --train-iters counts what is trained already"
    )
    assert run.tracker("again") == "4"
    # And nothing is set aside for the newest.
    run.train(2, "--load", "@/again/iter_0000004", "--save", "@/again")


def a_checkpoint_that_is_not_there_is_told_with_its_neighbours(run: Commands) -> None:
    folder = run.root / "many"
    for number in (2, 10, 20, 30, 40):
        (folder / f"iter_{number:07d}").mkdir(parents=True)
    (folder / "iter_0000021.set-aside").mkdir()
    for name in ("iter_0000024", "iter_24"):
        assert run.refusal("--load", f"@/many/{name}") == (
            f"--load {folder}/{name}: no such folder; beside it there are iter_0000021.set-aside, iter_0000020, "
            "iter_0000030 and 3 more; give one of them"
        )
    assert run.refusal("--load", "@/none/iter_0000024").endswith(
        "/iter_0000024: no such folder; give a folder that training saved to"
    )


def a_full_disk_gets_room_by_what_is_not_to_be_kept(run: Commands) -> None:
    write, rename, refused = checkpoint.write_own_shards, Path.rename, []

    def write_to_full_disk(directory: Path, own):
        if len(list(directory.parent.glob("iter_*"))) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(directory, own)

    def refuse_once(path: Path, target: Path) -> Path:
        if target.name.endswith(".removed") and not refused:
            refused.append(target)
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    flags = ["--save-interval", "1", "--keep-last", "1"]
    shutil.copytree(run.root / "unbroken", run.root / "full")
    shutil.copytree(run.root / "unbroken", run.root / "refused")
    with mock.patch.object(checkpoint, "write_own_shards", write_to_full_disk):
        run.train(6, "--save", "@/full", *flags)
        # At the start the disk refuses to delete it.
        with mock.patch.object(Path, "rename", refuse_once):
            lines = run.train(6, "--save", "@/refused", *flags)
    assert sum("cannot delete" in line for line in lines) == 1
    for name in ("full", "refused"):
        assert [path.name for path in (run.root / name).glob("iter_*")] == ["iter_0000006"]
    # Whatever the disk, no more than that is deleted.
    shutil.copytree(run.root / "unbroken", run.root / "kept")
    for keep, kept in ((["--keep-last", "2"], [2, 4]), (["--keep-last", "1", "--keep-every", "2"], [2, 4]),
                       (["--keep-last", "1"], [4])):  # fmt: skip
        run.train(4, "--save", "@/kept", *keep)
        assert sorted(path.name for path in (run.root / "kept").glob("iter_*")) == [f"iter_000000{k}" for k in kept]


def a_model_that_was_converted_is_kept(run: Commands) -> None:
    folder = run.root / "converted"
    shutil.copytree(run.root / "unbroken" / "iter_0000002", folder / "iter_0000000")
    names = {field.name for cls in (ModelOptions, DiffusionOptions) for field in dataclasses.fields(cls)}

    def change(body: dict) -> None:
        options = {name: value for name, value in body["state"]["options"].items() if name in names}
        body["state"] |= {"options": options, "iteration": 0, "ema_last_update": 0}

    resign(folder / "iter_0000000", change)
    run.train(4, "--save", "@/converted", "--save-interval", "1", "--keep-last", "1")
    assert sorted(path.name for path in folder.glob("iter_*")) == ["iter_0000000", "iter_0000004"]


def data_that_has_changed_is_told_from_other_data(run: Commands) -> None:
    corpus = run.write("renewed", FOX * 40)
    run.train(1, "--save", "@/renewed", corpus=corpus)
    assert run.write("renewed", FOX[::-1] * 40) == corpus
    refused = run.refusal("--save", "@/renewed", corpus=corpus)
    assert f"was trained on other data than --data-path {corpus}, whose content has changed since; give" in refused


def an_interval_that_is_changed_twice_gives_the_unbroken_average(run: Commands) -> None:
    """By the definition of the average: an update at step 4, and the one at step 6 takes in 5 and 6."""
    run.train(4, "--save", "@/interval", "--ema-interval", "4")
    shutil.copytree(run.root / "interval", run.root / "saved")
    run.train(5, "--save", "@/saved", "--ema-interval", "3")
    state = read_manifest(run.root / "saved" / "iter_0000005")["state"]
    assert state["ema_last_update"] == 4
    for name in ("interval", "saved"):
        run.train(6, "--save", f"@/{name}", "--ema-interval", "3")
    unbroken, resumed = (whole_tensors(run.root / name / "iter_0000006") for name in ("interval", "saved"))
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in unbroken.items())


def a_folder_that_was_moved_has_each_iteration_once(run: Commands) -> None:
    run.train(3, "--save", "@/here", "--log-dir", "@/log", "--save-interval", "2")
    copy = run.root / "copy"
    shutil.copytree(run.root / "here", copy)
    for name in ("here", "copy"):
        shutil.rmtree(run.root / name / "iter_0000003")
    (run.root / "here").rename(run.root / "there")
    # As if on another disk: another number.
    shutil.copytree(run.root / "there", run.root / "moved")
    shutil.rmtree(run.root / "there")
    run.train(4, "--save", "@/moved", "--log-dir", "@/log")
    assert metrics(run.root / "log", "iteration").tolist() == [1, 2, 3, 4]
    # The original is still there: this one's records are its own.
    run.train(4, "--save", "@/copy", "--log-dir", "@/log")
    assert metrics(run.root / "log", "iteration").tolist() == [1, 2, 3, 4, 3, 4]
    # Of before there were run_id.txt: by its folder, as it was.
    release = FIXTURES / "checkpoint_0.6.0"
    shutil.copytree(release, run.root / "old")
    for train_iters in (3, 4):
        run.train(train_iters, "--save", "@/old", "--log-dir", "@/old log")
    assert metrics(run.root / "old log", "iteration").tolist() == [3, 4]


def check(folder: str) -> None:
    run = Commands(Path(folder))
    run.train(4, "--save", "@/unbroken", "--save-interval", "2")
    a_folder_of_checkpoints_that_were_set_aside_is_no_empty_one(run)
    a_checkpoint_is_no_folder_to_save_to(run)
    a_run_with_nothing_to_train_does_not_go_back(run)
    a_checkpoint_that_is_not_there_is_told_with_its_neighbours(run)
    a_full_disk_gets_room_by_what_is_not_to_be_kept(run)
    a_model_that_was_converted_is_kept(run)
    data_that_has_changed_is_told_from_other_data(run)
    an_interval_that_is_changed_twice_gives_the_unbroken_average(run)
    a_folder_that_was_moved_has_each_iteration_once(run)


if __name__ == "__main__":
    for job in own_jobs():
        check(*job)
