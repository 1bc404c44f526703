"""One run at a time saves to a folder, whoever died and however many start at once."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import psutil
import pytest

from sedd_megatron.arguments import LEAST_MINUTES_TO_SAVE
from sedd_megatron.errors import UserError
from sedd_megatron.parallel import cpu_backend

cpu_backend.install()

from sedd_megatron.training.run_lock import (  # noqa: E402
    FILE,
    SECONDS_TO_WRITE,
    WATCH_SECONDS,
    Owner,
    RunLock,
    _link,
)

QUICK = {"beat_seconds": 0.05, "watch_seconds": 0.5}


@pytest.fixture
def other_process():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def owner_of(pid: int) -> Owner:
    from psutil import Process

    from sedd_megatron.training.processes import started_at

    return replace(Owner.of_this_process(), process=pid, started=started_at(Process(pid)), token="0123")


def leave(folder, owner: Owner) -> None:
    (folder / FILE).write_text(json.dumps(asdict(owner)))


def test_a_requeued_job_of_slurm_knows_that_its_former_start_is_dead(tmp_path):
    """On whatever node that was, without watching; a start of another job, or a later one of this, may live."""
    job = {"job": "cluster 71", "machine": "of another node", "process": 1}
    for owner, restarts, is_dead in (
        (replace(Owner.of_this_process(), **job, token="0"), 1, True),
        (replace(Owner.of_this_process(), **job, token="1", restarts=1), 2, True),
        (replace(Owner.of_this_process(), **job | {"job": "cluster 72"}, token="2"), 1, False),
        (replace(Owner.of_this_process(), **job, token="3", restarts=1), 1, False),
    ):
        leave(tmp_path, owner)
        lock = RunLock(tmp_path, **QUICK)
        lock.owner = replace(lock.owner, job="cluster 71", restarts=restarts)
        start = time.monotonic()
        assert "whose run is dead" in lock.acquire()[0]
        assert (time.monotonic() - start < QUICK["watch_seconds"]) == is_dead
        lock.release()


def test_a_lock_names_the_job_that_holds_it(tmp_path, monkeypatch):
    for name, value in (("SLURM_CLUSTER_NAME", "c"), ("SLURM_JOB_ID", "71"), ("SLURM_RESTART_COUNT", "2")):
        monkeypatch.setenv(name, value)
    lock = RunLock(tmp_path)
    lock.acquire()
    held = json.loads((tmp_path / FILE).read_text())
    assert (held["job"], held["restarts"]) == ("c 71", 2)
    lock.release()


def test_a_live_run_is_named_and_keeps_its_lock(tmp_path, other_process):
    owner = owner_of(other_process.pid)
    leave(tmp_path, owner)
    with pytest.raises(UserError) as error:
        RunLock(tmp_path).acquire()
    assert str(error.value).startswith(
        f"--save {tmp_path}: another run saves there, process {other_process.pid} on {owner.host}, "
        f"since {owner.since}; wait for it or end that process"
    )
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert json.loads((tmp_path / FILE).read_text()) == asdict(owner)


def test_a_dead_runs_lock_is_taken_over_with_one_line(tmp_path, other_process):
    owner = owner_of(other_process.pid)
    other_process.kill()
    # Nobody has asked for its exit status: it still has its number.
    while other_process.pid in zombies_not_yet(other_process.pid):
        time.sleep(0.01)
    for left in (owner, replace(owner, process=2**22 - 3), replace(owner, process=os.getpid(), started=-1.0)):
        leave(tmp_path, left)
        lock = RunLock(tmp_path)
        assert lock.acquire() == [f"took over {tmp_path / FILE}, whose run is dead: {left}"]
        lock.check()
        lock.release()
        assert not list(tmp_path.iterdir())


def zombies_not_yet(pid: int) -> set[int]:
    from psutil import STATUS_ZOMBIE, Process

    return set() if Process(pid).status() == STATUS_ZOMBIE else {pid}


def test_an_owner_on_another_machine_is_watched(tmp_path, capsys):
    elsewhere = replace(owner_of(os.getpid()), machine="another", host="node7", process=7)
    leave(tmp_path, elsewhere)
    lock = RunLock(tmp_path, **QUICK)
    assert lock.acquire() == [f"took over {tmp_path / FILE}, whose run is dead: {elsewhere}"]
    assert "is held by process 7 on node7" in capsys.readouterr().out
    lock.release()

    leave(tmp_path, elsewhere)
    ended = threading.Event()

    def beat():
        while not ended.wait(0.05):
            os.utime(tmp_path / FILE)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="another run saves there, process 7 on node7"):
            RunLock(tmp_path, **QUICK).acquire()
    finally:
        ended.set()
        thread.join()


def test_the_owner_touches_its_lock_and_notices_when_it_is_gone(tmp_path):
    lock = RunLock(tmp_path, **QUICK)
    assert lock.acquire() == []
    os.utime(tmp_path / FILE, (1, 1))
    deadline = time.monotonic() + 10
    while (tmp_path / FILE).stat().st_mtime == 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.check()
    stolen = replace(lock.owner, host="node7", token="0")
    leave(tmp_path, stolen)
    with pytest.raises(UserError, match=r"was taken from this run and is held by process \d+ on node7"):
        lock.check()
    lock.release()
    assert json.loads((tmp_path / FILE).read_text()) == asdict(stolen), "another's lock was removed"


def test_a_lock_that_somebody_removed_is_made_again(tmp_path, capsys):
    lock = RunLock(tmp_path, **QUICK)
    lock.acquire()
    (tmp_path / FILE).unlink()
    lock.check()
    assert capsys.readouterr().out == f"{tmp_path / FILE}: was removed while its run goes on, and is made again\n"
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    lock.check()
    with pytest.raises(UserError, match="another run saves there"):
        RunLock(tmp_path).acquire()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_link_whose_answer_was_lost_is_this_runs_own(tmp_path, monkeypatch):
    link = os.link

    def without_answer(source, target):
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", without_answer)
    lock = RunLock(tmp_path, **QUICK)
    assert lock.acquire() == []
    lock.check()
    lock.release()
    leave(tmp_path, replace(lock.owner, process=2**22 - 3, token="0"))
    again = RunLock(tmp_path, **QUICK)
    assert len(again.acquire()) == 1
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    again.release()


@pytest.mark.parametrize("is_alive", [True, False])
def test_a_process_of_another_user_that_is_hidden_is_watched(tmp_path, is_alive):
    """As hidepid=2 has it: no process of that number is to be seen."""
    if os.geteuid() != 0:
        pytest.skip("only root may give a file to another user")
    hidden = replace(owner_of(os.getpid()), process=2**22 - 3)
    leave(tmp_path, hidden)
    os.chown(tmp_path / FILE, 12345, -1)
    ended = threading.Event()

    def beat():
        while not ended.wait(0.05):
            os.utime(tmp_path / FILE)

    thread = threading.Thread(target=beat)
    lock = RunLock(tmp_path, **QUICK)
    if not is_alive:
        assert lock.acquire() == [f"took over {tmp_path / FILE}, whose run is dead: {hidden}"]
        lock.release()
        return
    thread.start()
    try:
        with pytest.raises(UserError, match="another run saves there"):
            lock.acquire()
    finally:
        ended.set()
        thread.join()


def test_a_process_that_may_not_be_looked_at_is_alive(tmp_path, other_process, monkeypatch):
    """As hidepid=1 has it."""
    leave(tmp_path, owner_of(other_process.pid))

    def denied(process):
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "status", denied)
    with pytest.raises(UserError, match="another run saves there"):
        RunLock(tmp_path).acquire()


def test_no_collective_ends_while_a_lock_is_watched():
    assert WATCH_SECONDS + SECONDS_TO_WRITE < 0.8 * 60 * LEAST_MINUTES_TO_SAVE


def test_no_run_touches_the_lock_of_another(tmp_path):
    lock = RunLock(tmp_path, **QUICK)
    lock.acquire()
    leave(tmp_path, replace(lock.owner, token="0"))
    time.sleep(0.1)  # for a touch that had begun
    os.utime(tmp_path / FILE, (1, 1))
    time.sleep(0.3)
    lock.release()
    assert (tmp_path / FILE).stat().st_mtime == 1


def test_a_lock_that_is_being_written_is_waited_for(tmp_path, other_process):
    (tmp_path / FILE).touch()
    writer = threading.Timer(0.3, leave, (tmp_path, owner_of(other_process.pid)))
    writer.start()
    with pytest.raises(UserError, match="another run saves there"):
        RunLock(tmp_path).acquire()
    writer.join()


def test_a_lock_that_cannot_be_written_is_not_left(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_link)
    own = tmp_path / "own"
    own.write_bytes(b"0123456789" * 10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            _link(own, tmp_path / FILE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def no_link(source, target):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("left_behind", [False, True], ids=["free", "of a dead run"])
def test_of_many_starts_at_once_one_gets_the_lock(tmp_path, left_behind, links, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", no_link)

    def slowly(source, target, replace=os.replace):
        # Time for all to have found the same dead owner.
        time.sleep(0.05)
        replace(source, target)

    monkeypatch.setattr(os, "replace", slowly)
    for trial in range(5):
        folder = tmp_path / str(trial)
        folder.mkdir()
        if left_behind:
            leave(folder, replace(owner_of(os.getpid()), process=2**22 - 3))
        locks, barrier = [RunLock(folder) for _ in range(8)], threading.Barrier(8)

        def start(lock, barrier=barrier):
            barrier.wait()
            try:
                return lock.acquire(), lock
            except UserError as error:
                assert "another run saves there" in str(error)  # noqa: PT017
                return None

        with ThreadPoolExecutor(8) as pool:
            winners = [won for won in pool.map(start, locks) if won is not None]
        assert len(winners) == 1
        assert len(winners[0][0]) == left_behind
        winners[0][1].check()
        assert [path.name for path in folder.iterdir()] == [FILE]
        winners[0][1].release()


@pytest.mark.parametrize("content", [b"mine", b'{"hosts": []}', b"\xff\xfe", b'{"host": "a"}'[:9] + b"\xff"])
def test_what_is_no_lock_is_not_removed(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    lock = RunLock(tmp_path, **QUICK)
    with pytest.raises(UserError, match="is not the lock of a run; remove it if no run saves there"):
        lock.acquire()
    begin = time.monotonic()
    # On the way to the error's line, which a launcher does not wait for.
    lock.release()
    assert time.monotonic() - begin < 0.2
    assert (tmp_path / FILE).read_bytes() == content


@pytest.mark.parametrize("length", [0, 5, 16, 80])
def test_a_lock_that_was_not_written_to_its_end_is_watched_and_taken_over(tmp_path, length, capsys):
    whole = json.dumps(asdict(Owner.of_this_process()))
    (tmp_path / FILE).write_text(whole[:length])
    lock = RunLock(tmp_path, **QUICK)
    said = lock.acquire()
    unknown = "an unknown process (the lock was not written to its end)"
    assert said == [f"took over {tmp_path / FILE}, whose run is dead: {unknown}"]
    assert capsys.readouterr().out == f"{tmp_path / FILE} is held by {unknown}: watching it for 0 s\n"
    lock.check()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_not_written_to_its_end_and_is_touched_is_alive(tmp_path):
    (tmp_path / FILE).write_text('{"host"')
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.05):
            os.utime(tmp_path / FILE)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(UserError, match="another run saves there, an unknown process"):
            RunLock(tmp_path, **QUICK).acquire()
    finally:
        ended.set()
        thread.join()


def test_a_copy_of_a_live_runs_folder_is_not_locked_by_it(tmp_path, other_process):
    root, copy = tmp_path / "x", tmp_path / "copy"
    root.mkdir()
    owner = replace(owner_of(other_process.pid), folder=root.stat().st_ino)
    leave(root, owner)
    shutil.copytree(root, copy)
    lock = RunLock(copy, **QUICK)
    assert lock.acquire() == [f"took over {copy / FILE}, which is a copy of another folder's: {owner}"]
    lock.check()
    lock.release()
    with pytest.raises(UserError, match="another run saves there"):
        RunLock(root, **QUICK).acquire()
    # Moved, it is the same folder.
    root.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="another run saves there"):
        RunLock(tmp_path / "moved", **QUICK).acquire()


def test_a_folder_that_has_got_another_number_is_not_taken_from_its_run(tmp_path):
    lock = RunLock(tmp_path, **QUICK)
    lock.acquire()
    lock.owner = replace(lock.owner, folder=lock.owner.folder + 1)
    leave(tmp_path, lock.owner)
    with pytest.raises(UserError, match="another run saves there"):
        RunLock(tmp_path, **QUICK).acquire()
    lock.release()


def test_a_link_to_nothing_is_no_lock(tmp_path):
    (tmp_path / FILE).symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"training.lock: is a link to nothing, and no lock; remove it if no run saves"):
        RunLock(tmp_path, **QUICK).acquire()
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
