"""What becomes of a run's folder, command after command in this process."""

import shutil
from pathlib import Path

from tests.distributed.launch import own_jobs
from tests.distributed.run_resume_rules import Commands


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
    run.train(2, "--load", "@/unbroken", "--save", "@/again")
    assert run.tracker("again") == "4"


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


def check(folder: str) -> None:
    run = Commands(Path(folder))
    run.train(4, "--save", "@/unbroken", "--save-interval", "2")
    a_folder_of_checkpoints_that_were_set_aside_is_no_empty_one(run)
    a_checkpoint_is_no_folder_to_save_to(run)
    a_run_with_nothing_to_train_does_not_go_back(run)
    a_checkpoint_that_is_not_there_is_told_with_its_neighbours(run)


if __name__ == "__main__":
    for job in own_jobs():
        check(*job)
