"""What lies in a run's folder: which checkpoint counts, what is kept, and that nothing wrong is loaded or saved."""

import errno
import os
import shutil
import stat
import threading
from pathlib import Path

import pytest
import torch

from sedd_megatron.config import ParallelOptions
from sedd_megatron.data.tokenizers import ByteTokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import groups_of_this_process

cpu_backend.install()

from sedd_megatron.training import checkpoint_format  # noqa: E402
from sedd_megatron.training.checkpoint import save_checkpoint  # noqa: E402
from sedd_megatron.training.checkpoint_checks import DamagedCheckpointError  # noqa: E402
from sedd_megatron.training.checkpoint_format import MANIFEST, Shard, read_manifest, verify_files  # noqa: E402
from sedd_megatron.training.checkpoint_reading import read_shards  # noqa: E402
from sedd_megatron.training.run_folder import (  # noqa: E402
    LATEST,
    FoundCheckpoint,
    find_checkpoint,
    load_first_whole,
    remove_leftovers,
    remove_old,
)
from tests.training.resigned import resign, resign_files  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def groups():
    return groups_of_this_process(ParallelOptions(device="cpu"))


def shard(key: str, data: torch.Tensor) -> Shard:
    shape = tuple(data.shape)
    return Shard(key, data, shape, (0,) * len(shape), shape, is_first_replica=True)


def save(root: Path, *iterations: int, own: str = "ours", value: float = 1.0) -> None:
    for iteration in iterations:
        state = {"options": {"run": own}, "num_tokens": 256, "iteration": iteration, "consumed_samples": 0,
                 "scheduler_samples": 0}  # fmt: skip
        weights = [shard("w", torch.full((2, 3), float(iteration))), shard("ema.w", torch.full((4,), value))]
        save_checkpoint(root, weights, state, ByteTokenizer(), iteration)


def loaded(root: Path, exact: bool = False) -> tuple[int, list[str]]:
    """The iteration whose tensors are read from `root`, and what people are told."""
    data, said = torch.full((2, 3), torch.nan), []

    def load(found: FoundCheckpoint) -> None:
        verify_files(found.folder, found.body)
        read_shards(found.folder, found.body, [shard("w", data)])

    found = find_checkpoint(root, exact=exact)
    said += found.lines
    found = load_first_whole(found, load, lambda found: None, said.extend)
    assert (data == found.iteration).all()
    return found.iteration, said


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize(
    ("tracker", "says"),
    [(b"2\n", "says '2'"), (b"25", "says '25'"), (b"\xff\xfe7", r"says '\\xff\\xfe7'"), (b"three", "says 'three'"),
     (b"", "says ''"), (None, "cannot be read (No such file or directory)")],
)  # fmt: skip
def test_the_newest_whole_checkpoint_counts_whatever_the_tracker_says(tmp_path, tracker, says):
    save(tmp_path, 2, 9, 10)
    assert loaded(tmp_path) == (10, [])
    (tmp_path / LATEST).unlink() if tracker is None else (tmp_path / LATEST).write_bytes(tracker)
    line = f"{tmp_path / LATEST} {says}, and the newest whole checkpoint is iter_0000010, which is taken"
    assert loaded(tmp_path) == (10, [line])


def test_iterations_are_numbers_and_other_names_no_checkpoints(tmp_path):
    save(tmp_path, 9_999_999, 10_000_000)
    for name in ("iter_0000005.set-aside", "iter_99", "iter_00000010x", ".iter_0000099.partial"):
        shutil.copytree(tmp_path / "iter_9999999", tmp_path / name)
    assert loaded(tmp_path)[0] == 10_000_000


DAMAGES = {
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "iter_0000003: no manifest.json"),
    "manifest": (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json: damaged"),
    "nested manifest": (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), "manifest.json: damaged"),
    "empty folder": (lambda folder: [shutil.rmtree(folder), folder.mkdir()], "iter_0000003: no manifest.json"),
    "file gone": (lambda folder: (folder / "shards-00000.safetensors").unlink(), "shards-00000.safetensors: missing"),
    "file cut": (lambda folder: (folder / "shards-00000.safetensors").write_bytes(b""), "safetensors: damaged"),
    "tokenizer": (lambda folder: (folder / "tokenizer" / "description.json").write_text("{}"), "description.json: dam"),
    "NaN": (lambda folder: resign_files(folder, lambda t: t["ema.w@0"].fill_(float("nan"))), "ema.w is not finite"),
    "infinity": (lambda folder: resign_files(folder, lambda t: t["w@0.0"][1].fill_(-float("inf"))), "w is not finite"),
    "dtype": (lambda folder: resign_files(folder, lambda t: t.update({"w@0.0": t["w@0.0"].half()})), "w@0.0 is F16"),
    "shape": (lambda folder: resign_files(folder, lambda t: t.update({"w@0.0": t["w@0.0"].view(3, 2)})), "[3, 2]"),
    "left out": (lambda folder: resign_files(folder, lambda t: t.pop("w@0.0")), "shards-00000.safetensors: damaged"),
    "gap": (lambda folder: resign(folder, lambda body: body["tensors"]["w"].update(shards=[])), "w: its pieces have 0"),
    "renamed": (lambda folder: resign(folder, lambda body: body["state"].update(iteration=2)), "holds iteration 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_of_the_newest_is_named_and_the_one_before_is_taken(tmp_path, name):
    save(tmp_path, 1, 2, 3)
    damage, text = DAMAGES[name]
    damage(tmp_path / "iter_0000003")
    iteration, said = loaded(tmp_path)
    assert iteration == 2
    told = [line for line in said if text in line]
    assert len(told) == 1, said
    assert told[0].endswith("; falls back to iter_0000002")
    with pytest.raises(DamagedCheckpointError) as error:
        loaded(tmp_path, exact=True)
    assert text in str(error.value)
    if name != "renamed":
        with pytest.raises(DamagedCheckpointError) as error:
            loaded(tmp_path / "iter_0000003")
        assert text in str(error.value)
    assert loaded(tmp_path / "iter_0000001") == (1, [])


def test_a_checkpoint_of_a_later_format_is_refused_and_not_passed_over(tmp_path):
    save(tmp_path, 1, 2)
    resign(tmp_path / "iter_0000002", lambda body: body.update(format_version=2))
    with pytest.raises(UserError, match=r"manifest.json: has format 2, and this version reads 1; load it with the"):
        loaded(tmp_path)


def test_nothing_whole_is_an_error_that_names_the_newest(tmp_path):
    save(tmp_path, 1, 2)
    for folder in tmp_path.glob("iter_*"):
        (folder / MANIFEST).write_text("{}")
    with pytest.raises(DamagedCheckpointError, match=r"iter_0000002/manifest.json: damaged"):
        loaded(tmp_path)
    save(tmp_path / "one", 1, 2)
    (tmp_path / "one" / "iter_0000001" / MANIFEST).unlink()
    (tmp_path / "one" / "iter_0000002" / "shards-00000.safetensors").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"iter_0000002/shards-00000.safetensors: missing"):
        loaded(tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "iter_0000001")
    with pytest.raises(DamagedCheckpointError, match=r"iter_0000002/shards-00000.safetensors: missing"):
        loaded(tmp_path / "one")
    with pytest.raises(UserError, match=r"--load .*/none: no such folder; give a folder that training saved to$"):
        loaded(tmp_path / "none")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"--load .*/none: no checkpoint there \(no folder iter_\*\)"):
        loaded(tmp_path / "none")
    with pytest.raises(UserError, match="cannot be read"):
        find_checkpoint(Path("x" * 5000))


def test_a_checkpoint_that_vanishes_while_it_is_read_gives_way_to_a_newer_one(tmp_path):
    save(tmp_path, 1)
    found, said = find_checkpoint(tmp_path), []

    def load(found: FoundCheckpoint) -> None:
        if found.iteration == 1:
            # What a run with --keep-last 1 does meanwhile.
            save(tmp_path, 2)
            shutil.rmtree(tmp_path / "iter_0000001")
        verify_files(found.folder, found.body)

    assert load_first_whole(found, load, lambda found: None, said.extend).iteration == 2
    assert len(said) == 1
    assert "missing from the checkpoint; falls back to iter_0000002" in said[0]


def test_a_reader_beside_a_run_that_saves_and_deletes_gets_one_whole_checkpoint_each_time(tmp_path):
    save(tmp_path, 1)

    def run() -> None:
        for iteration in range(2, 80):
            save(tmp_path, iteration)
            remove_old(tmp_path, iteration, 2, None, lambda body: True)

    thread, seen = threading.Thread(target=run), []
    thread.start()
    while thread.is_alive() or not seen:
        # Its tensors hold its number: see `loaded`.
        seen.append(loaded(tmp_path)[0])
    thread.join()
    assert seen == sorted(seen)
    assert len(set(seen)) > 5
    assert loaded(tmp_path) == (79, [])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_that_is_not_finite_is_saved(tmp_path, bad, dtype):
    save(tmp_path, 1)
    weights = torch.ones(50, dtype=dtype)
    weights[37] = bad
    state = read_manifest(tmp_path / "iter_0000001")["state"]
    with pytest.raises(UserError, match=r"the tensor exp_avg is not finite at iteration 2, which is not saved"):
        save_checkpoint(tmp_path, [shard("w", torch.ones(3)), shard("exp_avg", weights)], state, ByteTokenizer(), 2)
    assert names(tmp_path) == ["iter_0000001", LATEST]
    assert (tmp_path / LATEST).read_text() == "1\n"


def test_large_finite_numbers_are_saved(tmp_path):
    # Their sum is infinite, and they are not.
    largest = torch.full((5,), torch.finfo(torch.float32).max)
    state = {"options": {}, "num_tokens": 1, "iteration": 1, "consumed_samples": 0, "scheduler_samples": 0}
    save_checkpoint(tmp_path, [shard("w", largest), shard("empty", torch.ones(0))], state, ByteTokenizer(), 1)
    verify_files(tmp_path / "iter_0000001", read_manifest(tmp_path / "iter_0000001"))


def test_what_dead_runs_left_is_removed_and_the_only_copy_put_back(tmp_path):
    save(tmp_path, 1, 2, 3, 4)
    shutil.copytree(tmp_path / "iter_0000001", tmp_path / ".iter_0000001.replaced")
    (tmp_path / "iter_0000002").rename(tmp_path / ".iter_0000002.replaced")
    shutil.copytree(tmp_path / "iter_0000003", tmp_path / ".iter_0000003.replaced")
    (tmp_path / "iter_0000003" / MANIFEST).write_text("{}")
    shutil.copytree(tmp_path / "iter_0000004", tmp_path / ".iter_0000005.partial.0123456789abcdef")
    (tmp_path / ".iter_0000000.removed").mkdir()
    for name in (".iter_5.partial", ".mine.partial", "iter_0000009.set-aside"):
        (tmp_path / name).mkdir()
    lines = remove_leftovers(tmp_path)
    assert names(tmp_path) == [".iter_5.partial", ".mine.partial", "iter_0000001", "iter_0000002", "iter_0000003",
                               "iter_0000003.set-aside", "iter_0000004", "iter_0000009.set-aside", LATEST]  # fmt: skip
    assert [read_manifest(tmp_path / f"iter_000000{n}")["state"]["iteration"] for n in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert sum(line.startswith("put ") for line in lines) == 2
    assert sum(line.startswith("removed ") for line in lines) == 3
    assert remove_leftovers(tmp_path) == []


def kept(root: Path) -> list[int]:
    return sorted(int(name.removeprefix("iter_")) for name in names(root) if name.startswith("iter_"))


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "expected"),
    [
        (None, None, [1, 2, 3, 4, 5, 6, 7]),
        (1, None, [7]),
        (2, None, [6, 7]),
        (2, 3, [3, 6, 7]),
        (1, 2, [2, 4, 6, 7]),
        (9, None, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_retention_keeps_the_newest_and_the_multiples(tmp_path, keep_last, keep_every, expected):
    save(tmp_path, *range(1, 8))
    assert remove_old(tmp_path, 7, keep_last, keep_every, lambda body: True) == []
    assert kept(tmp_path) == expected
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_retention_deletes_whole_checkpoints_of_its_run_alone(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5, 8)
    save(tmp_path, 2, own="theirs")
    (tmp_path / "iter_0000003" / MANIFEST).write_text("{}")
    (tmp_path / "iter_0000001.set-aside").mkdir()
    remove_old(tmp_path, 5, 1, None, lambda body: body["state"]["options"]["run"] == "ours")
    # 8 is later than what was saved, 3 is not whole, 2 another run's.
    assert [name for name in names(tmp_path) if name.startswith("iter")] == [
        "iter_0000001.set-aside", "iter_0000002", "iter_0000003", "iter_0000005", "iter_0000008"]  # fmt: skip


def test_of_a_checkpoint_that_is_a_link_the_link_alone_is_deleted(tmp_path):
    save(tmp_path, 1, 2, 3)
    disk = tmp_path / "disk"
    disk.mkdir()
    for name in ("iter_0000001", "iter_0000003"):
        (tmp_path / name).symlink_to((tmp_path / name).rename(disk / name))
    assert remove_old(tmp_path, 3, 1, None, lambda body: True) == []
    assert names(tmp_path) == ["disk", "iter_0000003", LATEST]
    # One that is saved again takes the link's place.
    save(tmp_path, 3, value=2.0)
    assert not (tmp_path / "iter_0000003").is_symlink()
    (tmp_path / ".iter_0000001.removed").symlink_to(disk / "iter_0000001")
    assert remove_leftovers(tmp_path) == [
        f"removed {tmp_path}/.iter_0000001.removed: a run that died left it unfinished"
    ]
    assert names(tmp_path) == ["disk", "iter_0000003", LATEST]
    assert all(read_manifest(disk / f"iter_000000{n}")["state"]["iteration"] == n for n in (1, 3))


def test_what_cannot_be_removed_does_not_keep_a_run_from_starting(tmp_path):
    save(tmp_path, 1)
    left = tmp_path / ".iter_0000002.removed"
    left.write_text("no folder")
    (tmp_path / f".{LATEST}").mkdir()
    line, other = remove_leftovers(tmp_path)
    assert line.startswith(f"cannot remove {left}, which a run that died left: [Errno 20] Not a directory")
    assert other.startswith(f"cannot remove {tmp_path}/.{LATEST}: ")
    assert loaded(tmp_path) == (1, [])


def test_a_deletion_that_fails_is_told_and_no_more(tmp_path, monkeypatch):
    save(tmp_path, 1, 2, 3)

    def fail(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", fail)
    lines = remove_old(tmp_path, 3, 1, None, lambda body: True)
    assert len(lines) == 2
    assert all("cannot delete" in line and "training goes on" in line for line in lines)


def test_a_tracker_that_cannot_be_written_keeps_no_checkpoint_from_being_there(tmp_path, capsys):
    (tmp_path / LATEST).mkdir()
    save(tmp_path, 1)
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {tmp_path}/iter_0000001 is whole, and [Errno 21] Is a directory")
    assert loaded(tmp_path)[0] == 1


def test_one_that_cannot_be_replaced_is_put_back_at_once(tmp_path, monkeypatch):
    save(tmp_path, 1, value=1.0)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UserError, match=r"cannot write .*iter_0000001: .*input/output error"):
        save(tmp_path, 1, value=2.0)
    assert names(tmp_path) == ["iter_0000001", LATEST]
    assert loaded(tmp_path) == (1, [])


def test_a_folder_that_cannot_be_listed_keeps_all(tmp_path, monkeypatch):
    def fail(path: Path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "iterdir", fail)
    (line,) = remove_old(tmp_path, 3, 1, None, lambda body: True)
    assert line.startswith(f"cannot look for what to delete in {tmp_path} (--keep-last 1)")


@pytest.mark.parametrize("fault", [errno.ESTALE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("name", [MANIFEST, "description.json", "shards-00000.safetensors"])
def test_a_file_that_the_disk_does_not_give_is_no_damage(tmp_path, name, fault, monkeypatch):
    save(tmp_path, 1, 2)
    monkeypatch.setattr(checkpoint_format, "SECONDS_BETWEEN_READINGS", 0.0)
    opened, refusals = Path.open, [3]

    def refuse(path: Path, *arguments, **keywords):
        if path.name == name and path.parent.name != "iter_0000001" and refusals[0] > 0:
            refusals[0] -= 1
            raise OSError(fault, os.strerror(fault), str(path))
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", refuse)
    assert loaded(tmp_path) == (2, [])
    assert refusals == [0]
    refusals[0] = 4
    with pytest.raises(UserError, match=rf"{name}: cannot be read \(.*{os.strerror(fault)}.*\); start again") as error:
        loaded(tmp_path)
    assert not isinstance(error.value, DamagedCheckpointError)
    assert kept(tmp_path) == [1, 2]


def test_what_a_dead_run_replaced_waits_where_the_new_one_cannot_be_read(tmp_path, monkeypatch):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "iter_0000001", tmp_path / ".iter_0000001.replaced")
    monkeypatch.setattr(checkpoint_format, "SECONDS_BETWEEN_READINGS", 0.0)

    def refuse(path: Path, *arguments, **keywords):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match="Stale file handle"):
        remove_leftovers(tmp_path)
    assert names(tmp_path) == [".iter_0000001.replaced", "iter_0000001", LATEST]


def test_a_file_system_that_cannot_sync_folders_takes_checkpoints(tmp_path, monkeypatch):
    sync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    save(tmp_path, 1)
    assert loaded(tmp_path) == (1, [])

    def refuse_all(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse_all)
    with pytest.raises(UserError, match="invalid argument"):
        save(tmp_path, 2)
