"""The check of a GPU keeps its limits and its table whatever its steps do, and its steps are there to be run."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import pytest

from tests.distributed.launch import REPOSITORY, child_environment
from tests.gpu import check, runner
from tests.gpu.runner import Runner, Stage, Step

STEPS = {number: [step for stage in stages for step in stage.steps] for number, stages in check.PARTS.items()}
PYTEST_STEPS = [step for steps in STEPS.values() for step in steps if step.command[2] == "pytest"]
MODULE_STEPS = [step for steps in STEPS.values() for step in steps if step.command[2] != "pytest"]
# Collects for each argument list, in one process: torch is imported once.
COLLECT = """
import json, os, sys
import pytest

class Items:
    def pytest_collection_finish(self, session):
        self.ids = [item.nodeid for item in session.items]

found, output = [], os.dup(1)
os.dup2(2, 1)
for selection in json.loads(sys.argv[1]):
    items = Items()
    code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *selection], plugins=[items])
    found.append([int(code), items.ids])
os.write(output, json.dumps(found).encode())
"""
# Hangs, waiting for a child of its own session whose words it would report: as a test and its ranks.
HANGING = """
import signal, subprocess, sys, time
if "{mood}" == "deaf":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time\\ndef rank_waits(): time.sleep(600)\\nrank_waits()"],
                         start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
print("| pids |\\n|---|\\n", child.pid, flush=True)
def step_waits():
    print("the rank said:", child.communicate()[0])
    time.sleep(600)
step_waits()
"""


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def run(folder: Path, stages: list[Stage], budget: float) -> tuple[bool, str]:
    """Whether all was ok, and the table."""
    environment = child_environment(PYTHONFAULTHANDLER="1", PYTHONUNBUFFERED="1")
    all_ok = Runner(folder, folder / "logs", environment, time.monotonic() + budget, "# Steps").run(stages)
    return all_ok, (folder / "table.md").read_text()


def rows(table: str) -> dict[str, list[str]]:
    lines = table.split("\n\n")[1].splitlines()[2:]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_table_has_every_step_and_what_it_said(tmp_path):
    fine = "print('noise'); print('| speed |'); print('|---|'); print('| 7 |'); print('3 passed in 1.2s')"
    steps = [
        Step("fine", python(fine), 20, goal="8"),
        Step("none", python("print('2 skipped in 0.1s')"), 20),
        Step("bad", python("print('why'); raise SystemExit(3)"), 20),
        Step("broken", python("print('| row |\\n|---|\\n| failed |\\nValueError: reason'); raise SystemExit(1)"), 20),
        Step("crash", python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"), 20),
    ]
    all_ok, table = run(tmp_path, [Stage((*steps[:2],), 2), Stage((*steps[2:],), 1)], 60)
    assert not all_ok
    found = rows(table)
    assert {name: cells[0] for name, cells in found.items()} == {
        "fine": "ok", "none": "skipped", "bad": "failed with code 3", "broken": "failed with code 1",
        "crash": "failed with code -11",
    }  # fmt: skip
    assert found["fine"][2:] == ["20", "8"]
    assert "## fine: ok\n\n| speed |\n|---|\n| 7 |\n\n```\n3 passed in 1.2s\n```\n" in table
    assert "noise" not in table
    assert "## broken: failed with code 1\n\n| row |\n|---|\n| failed |\n\n```\nValueError: reason\n" in table
    assert "## bad: failed with code 3\n\n```\nwhy\n```" in table
    assert "Segmentation fault" in table
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert {name for name in archive.getnames() if name.endswith(".log")} == {
            "logs/fine.log", "logs/none.log", "logs/bad.log", "logs/broken.log", "logs/crash.log"
        }  # fmt: skip
    assert [run(tmp_path / step.name, [Stage((step,), 1)], 60)[0] for step in steps] == [
        True,
        False,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("mood", ["willing", "deaf"])
def test_a_step_over_its_limit_ends_with_its_children_and_says_where_it_was(mood, tmp_path):
    step = Step("hang", python(HANGING.replace("{mood}", mood)), 2)
    start = time.monotonic()
    all_ok, table = run(tmp_path, [Stage((step,), 1)], 60)
    assert time.monotonic() - start < 2 + runner.SECONDS_TO_SPEAK + runner.SECONDS_TO_DIE + 2
    assert not all_ok
    assert rows(table)["hang"][0] == "timed out"
    log = (tmp_path / "logs" / "hang.log").read_text()
    assert "in rank_waits" in log
    assert "in step_waits" in log
    child = int(log.splitlines()[2])
    assert not is_running(child)


def test_what_a_step_leaves_behind_ends_with_it(tmp_path):
    leaving = HANGING.split("def step_waits")[0]
    all_ok, _ = run(tmp_path, [Stage((Step("leave", python(leaving), 20),), 1)], 60)
    assert all_ok
    assert not is_running(int((tmp_path / "logs" / "leave.log").read_text().splitlines()[2]))


def test_the_budget_is_kept_and_time_is_left_for_the_next_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "SECONDS_TO_SPEAK", 1.5)
    monkeypatch.setattr(runner, "SECONDS_TO_DIE", 0.5)
    sleep = python("import time; time.sleep(600)")
    stages = [
        Stage((Step("long", sleep, 100), Step("short", python(""), 1), Step("late", sleep, 8)), 1, leave=4.0),
        Stage((Step("last", python("print('1 passed')"), 8),), 1),
    ]
    start = time.monotonic()
    _, table = run(tmp_path, stages, 30)
    seconds = time.monotonic() - start
    assert {name: cells[0] for name, cells in rows(table).items()} == {
        "long": "no time left", "short": "ok", "late": "timed out", "last": "ok"
    }  # fmt: skip
    assert seconds < 30
    start = time.monotonic()
    all_ok, table = run(tmp_path, [Stage((Step("cut", sleep, 8), Step("not begun", sleep, 8)), 1)], 6)
    assert time.monotonic() - start < 6
    assert {name: cells[0] for name, cells in rows(table).items()} == {"cut": "cut short", "not begun": "no time left"}
    assert not all_ok


def test_a_signal_ends_the_check_with_its_table(tmp_path):
    sleep = Step("sleeping", python("import time; time.sleep(600)"), 60)
    table = tmp_path / "table.md"
    seen = []

    def stop() -> None:
        seen.append(table.read_text())
        os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Timer(2.0, stop)
    timer.start()
    _, after = run(tmp_path, [Stage((sleep, Step("next", sleep.command, 60)), 1)], 100)
    # Had the check been killed, this is what would have been there.
    assert rows(seen[0])["sleeping"][0] == "running"
    assert {name: cells[0] for name, cells in rows(after).items()} == {"sleeping": "cut short", "next": "no time left"}


def test_the_steps_are_the_tests_that_need_a_gpu_each_once():
    folder = ["tests/gpu"]
    selections = [[part for part in step.command[3:] if part not in check.PYTEST_OPTIONS] for step in PYTEST_STEPS]
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, json.dumps([folder, *selections])], cwd=REPOSITORY, env=child_environment(),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    (_, everything), *found = json.loads(done.stdout)
    for step, (code, ids) in zip(PYTEST_STEPS, found, strict=True):
        assert code == 0, (step.name, done.stderr)
        assert ids, step.name
    named = [one for _, ids in found for one in ids]
    assert len(named) == len(set(named))
    # The tables are steps by themselves, without pytest.
    assert sorted(named) == sorted(one for one in everything if not one.endswith("_table"))
    assert len(everything) - len(named) == 3
    modules = {step.command[2] for step in STEPS[2]}
    assert {f"tests.benchmarks.{name}" for name in ("loss", "sampling", "training_throughput")} < modules


@pytest.mark.parametrize("step", MODULE_STEPS, ids=lambda step: step.name)
def test_every_module_takes_the_arguments_of_its_step(step, capsys):
    module = importlib.import_module(step.command[2])
    if step.command[2] == "tests.gpu.probe":
        assert step.command[3] in {probe.__name__ for probe in module.PROBES}
        return
    # Read up to --help, which ends it.
    with pytest.raises(SystemExit) as ended:
        module.main([*step.command[3:], "--help"])
    assert ended.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("part", ["1", "2"])
def test_a_dry_run_prints_the_plan(part):
    done = subprocess.run(["bash", "tests/gpu/check.sh", part, "--dry-run"], cwd=REPOSITORY, capture_output=True,
                          env={**os.environ, "PYTHON": sys.executable}, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for step in STEPS[int(part)]:
        assert any(line.startswith(f"  {step.name}, at most {step.limit:.0f} s: python -m ") for line in lines)
    assert str(REPOSITORY) not in done.stdout
    # Alone at a time, and with room for what is measured.
    assert all(stage.at_once == 1 for stage in check.PARTS[2])
    assert [stage.at_once for stage in check.PARTS[1]] == [check.AT_ONCE, 1]


def test_without_a_gpu_or_megatron_it_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check.main(["2", "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: no GPU: nvidia-smi is not there; --dry-run prints what would be run\n"
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"no tarball there, and megatron-core is not installed"):
        check.unpacked_packages(tmp_path)


def test_packages_come_out_of_the_tarball_behind_the_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    carried = tmp_path / "carried"
    carried.mkdir()
    with tarfile.open(carried / "site.tar.xz", "w:xz") as archive:
        for name in ("only_in_tarball", "sedd_megatron"):
            text = b"WORD = 'carried'\n"
            entry = tarfile.TarInfo(f"{name}.py")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    packages = check.unpacked_packages(carried)
    assert check.unpacked_packages(carried) == packages
    code = "import only_in_tarball, sedd_megatron; print(only_in_tarball.WORD, sedd_megatron.__file__)"
    done = subprocess.run(
        python(code), env=check.step_environment(packages), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == f"carried {REPOSITORY / 'sedd_megatron' / '__init__.py'}\n", done.stderr
    assert "torch missing" not in check.heading(1, "a GPU", packages, ["1"])
    (carried / "site.tar.xz").write_bytes((carried / "site.tar.xz").read_bytes()[:60])
    with pytest.raises(tarfile.ReadError, match=r"site\.tar\.xz: damaged"):
        check.unpacked_packages(carried)
