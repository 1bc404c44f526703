"""A run that goes on from an older checkpoint of its folder: once each time a person says so, and nothing is lost."""

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

from sedd_megatron.config import ParallelOptions
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import groups_of_this_process

cpu_backend.install()

from sedd_megatron.training import going_back  # noqa: E402
from sedd_megatron.training.checkpoint_format import read_manifest  # noqa: E402
from sedd_megatron.training.going_back import go_on_from, goes_back, set_aside_later  # noqa: E402
from sedd_megatron.training.run_folder import LATEST, find_checkpoint  # noqa: E402
from tests.training.test_run_folder import loaded, names, save  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def groups():
    return groups_of_this_process(ParallelOptions(device="cpu"))


@pytest.fixture
def under(monkeypatch):
    """Has this process be started by a launcher, and perhaps by Slurm."""
    monkeypatch.delenv("SLURM_CLUSTER_NAME", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)

    def set_launcher(name: str | None, job: str | None = None, restarts: int = 0) -> None:
        monkeypatch.setattr(going_back, "launcher", lambda: name)
        if job is not None:
            monkeypatch.setenv("SLURM_JOB_ID", job)
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))

    return set_launcher


def go_back(folder: Path, launchers: Collection[str] = ()) -> tuple[Path, list[str]]:
    """Load the folder that --load names and go on from it; where it is then, and what people are told."""
    found, lines = go_on_from(find_checkpoint(folder), True, launchers)
    return found.folder, lines


def test_later_checkpoints_are_set_aside_and_kept(tmp_path):
    save(tmp_path, 2, 4, 6, 8)
    lines = set_aside_later(tmp_path, 4, tmp_path / "iter_0000004")
    assert names(tmp_path) == ["iter_0000002", "iter_0000004", "iter_0000006.set-aside", "iter_0000008.set-aside",
                               LATEST]  # fmt: skip
    assert sorted(lines) == [f"set aside {tmp_path}/iter_000000{n} as iter_000000{n}.set-aside: the run goes on from "
                             "iteration 4" for n in (6, 8)]  # fmt: skip
    assert loaded(tmp_path) == (4, [])
    save(tmp_path, 6)
    set_aside_later(tmp_path, 4, tmp_path / "iter_0000004")
    assert "iter_0000006.set-aside-2" in names(tmp_path)
    assert read_manifest(tmp_path / "iter_0000006.set-aside-2")["state"]["iteration"] == 6
    assert set_aside_later(tmp_path, 4, tmp_path / "iter_0000004") == []


def test_a_run_goes_back_once_each_time_a_person_says_so(tmp_path, under):
    root = tmp_path / "x"
    save(root, 2, 4)
    folder = root / "iter_0000002"

    def start(launcher: str | None) -> Path | None:
        under(launcher)
        return goes_back(root, folder)

    # Killed before anything was set aside, and given again.
    assert [start("first"), start("first")] == [folder] * 2
    go_back(folder, ["first", "of another node"])
    # Whichever node has the first rank now.
    assert [start("first"), start("first"), start("of another node")] == [None] * 3
    assert goes_back(root, root / "iter_0000004") == root / "iter_0000004"
    # Refused, perhaps: nothing has changed until it is gone back to.
    assert start("first") is None
    go_back(root / "iter_0000004.set-aside")
    assert start("first") == folder
    go_back(folder, ["first"])
    # Another launch, whose first start died before it came to this.
    assert [start("second"), start("second")] == [folder] * 2
    go_back(folder)
    # Without a launcher nothing starts again by itself.
    assert [start(None), start(None)] == [folder] * 2
    # Slurm starts a job again, with another torchrun in it.
    under("third", job="7")
    go_back(folder, ["third"])
    under("fourth", job="7", restarts=1)
    assert goes_back(root, folder) is None
    under("fourth", job="8", restarts=1)
    assert goes_back(root, folder) == folder


def test_a_torchrun_is_known_over_the_starts_of_its_ranks(tmp_path):
    """Ranks started by it and through a script; a second one is another, and without any there is none."""
    rank = f"{sys.executable} -c 'from sedd_megatron.training.processes import launcher; print(launcher())'"
    script = tmp_path / "script.sh"
    script.write_text(f"{rank}\ntrue\n")
    agent = f"""import os, subprocess
environment = {{**os.environ, "TORCHELASTIC_RUN_ID": "none"}}
for command in ({rank!r}, {rank!r}, "sh {script}"):
    subprocess.run(command, shell=True, env=environment, check=True)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}

    def said(*command: str) -> list[str]:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    first, second = (said(sys.executable, "-c", agent) for _ in range(2))
    assert [len(first), len(set(first)), len(set(second))] == [3, 1, 1]
    assert first[0].startswith("none ")
    assert first[0] != second[0]
    assert said("sh", "-c", rank) == ["None"]


def test_a_checkpoint_on_another_disk_is_gone_back_to(tmp_path):
    save(tmp_path / "x", 2, 4)
    folder = tmp_path / "x" / "iter_0000002"
    (tmp_path / "disk").mkdir()
    folder.symlink_to(folder.rename(tmp_path / "disk" / "iter_0000002"))
    (tmp_path / "link").symlink_to(tmp_path / "x")
    (tmp_path / "best").symlink_to(tmp_path / "x" / "iter_0000004")
    assert goes_back(tmp_path / "x", folder) == folder
    assert goes_back(tmp_path / "link", folder) == tmp_path / "link" / "iter_0000002"
    assert goes_back(tmp_path / "x", tmp_path / "best") == tmp_path / "x" / "iter_0000004"
    assert goes_back(tmp_path / "x", tmp_path / "disk" / "iter_0000002") is None
    assert goes_back(tmp_path / "x", tmp_path / "x") is None
    assert goes_back(tmp_path / "x", None) is None


@pytest.mark.parametrize("is_link", [False, True], ids=["folder", "on another disk"])
def test_one_that_was_set_aside_gets_its_name_back(tmp_path, under, is_link):
    root = tmp_path / "x"
    save(root, 2, 4, 6)
    if is_link:
        (tmp_path / "disk").mkdir()
        (root / "iter_0000004").symlink_to((root / "iter_0000004").rename(tmp_path / "disk" / "iter_0000004"))
    under("first")
    go_back(root / "iter_0000002", ["first"])
    # The other lineage.
    save(root, 4, 6, value=2.0)
    named = root / "iter_0000004.set-aside"
    under("second")
    assert goes_back(root, named) == named
    folder, lines = go_back(named, ["second"])
    assert folder == root / "iter_0000004"
    assert lines[-1] == f"{named} is iter_0000004 from here on"
    assert [name for name in names(root) if name.startswith("iter_")] == [
        "iter_0000002", "iter_0000004", "iter_0000004.set-aside-2", "iter_0000006.set-aside",
        "iter_0000006.set-aside-2"]  # fmt: skip
    # Killed before its next save: the restart goes on from where this one did.
    assert goes_back(root, named) is None
    assert loaded(root) == (4, [])
    assert (average(root / "iter_0000004"), average(root / "iter_0000004.set-aside-2")) == (1.0, 2.0)


def test_a_kill_before_it_has_its_name_back_is_made_good(tmp_path, under, monkeypatch):
    save(tmp_path, 2, 4)
    named = tmp_path / "iter_0000004.set-aside"
    (tmp_path / "iter_0000004").rename(named)
    save(tmp_path, 4)
    under("first")
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path == named:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        go_back(named, ["first"])
    monkeypatch.setattr(Path, "rename", rename)
    assert goes_back(tmp_path, named) == named
    go_back(named, ["first"])
    assert goes_back(tmp_path, named) is None
    assert loaded(tmp_path) == (4, [])


def test_a_copy_with_a_persons_name_keeps_it(tmp_path, under):
    save(tmp_path, 2, 4, value=2.0)
    (tmp_path / "iter_0000004").rename(tmp_path / "best")
    save(tmp_path, 4, 6, value=1.0)
    under("first")
    assert goes_back(tmp_path, tmp_path / "best") == tmp_path / "best"
    for _ in range(2):
        folder, _ = go_back(tmp_path / "best", ["first"])
        assert names(tmp_path) == ["best", "iter_0000002", "iter_0000004", "iter_0000004.set-aside",
                                   "iter_0000006.set-aside", LATEST, going_back.WENT_BACK]  # fmt: skip
        assert folder == tmp_path / "iter_0000004"
        assert loaded(tmp_path) == (4, [])
        assert average(folder) == 2.0
    assert goes_back(tmp_path, tmp_path / "best") is None


def average(folder: Path) -> float:
    """What `save` was given as a value."""
    import torch
    from safetensors.torch import load_file

    assert read_manifest(folder)["state"]["iteration"] == 4
    tensors = load_file(folder / "shards-00000.safetensors")
    (values,) = (tensor for name, tensor in tensors.items() if name.startswith("ema.w@"))
    assert isinstance(values, torch.Tensor)
    return values[0].item()
