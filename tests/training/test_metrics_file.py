"""metrics.jsonl over kills, resumptions and disks that refuse: whole records, each iteration once, nothing lost."""

import json
import math
import resource

import pytest

from sedd_megatron.reporting.records import read_run
from sedd_megatron.run_files import LOST
from sedd_megatron.training import metrics_file
from sedd_megatron.training.metrics import MetricsWriter
from sedd_megatron.training.metrics_file import WRITERS, MetricsFile
from sedd_megatron.training_config import LoggingOptions


def lines(*iterations: int) -> str:
    return "".join(f'{{"iteration": {i}, "loss": {i}.5}}\n' for i in iterations)


def content_after(folder, before: str, continued_at: int | None) -> str:
    """What a run that starts on this file, and writes record 7, leaves."""
    path = folder / "metrics.jsonl"
    path.write_text(before)
    file = MetricsFile(path, continued_at)
    file.write({"iteration": 7, "loss": 7.5})
    file.close()
    return path.read_text()


def test_a_torn_last_line_is_cut_and_one_that_lacks_its_end_is_kept(tmp_path):
    assert content_after(tmp_path, lines(1, 2) + '{"iteration": 3, "lo', None) == lines(1, 2, 7)
    assert content_after(tmp_path, lines(1, 2) + "\0" * 50, None) == lines(1, 2, 7)
    assert content_after(tmp_path, lines(1, 2).rstrip(), None) == lines(1, 2, 7)
    assert content_after(tmp_path, lines(1, 2) + "lowered lr", None) == lines(1, 2) + "lowered lr\n" + lines(7)
    assert content_after(tmp_path, '{"iter', None) == lines(7)
    assert content_after(tmp_path, "", None) == lines(7)


def test_records_of_lost_iterations_move_aside_and_no_others(tmp_path, capsys):
    validation = '{"iteration": 6, "validation_loss": 3.0}\n'
    lost = '{"iteration": 9, "validation_loss": 2.0}\n' + lines(10)
    before = lines(5, 6) + validation + lines(7, 8, 9) + lost
    path, link = tmp_path / "metrics.jsonl", tmp_path / "log" / "metrics.jsonl"
    path.touch(mode=0o640)
    link.parent.mkdir()
    link.symlink_to(path)
    path.write_text(before)
    file = MetricsFile(link, 6)
    assert path.read_text() == lines(5, 6) + validation
    assert (tmp_path / LOST).read_text() == lines(7, 8, 9) + lost
    assert "5 records after iteration 6 moved to metrics-lost.jsonl" in capsys.readouterr().out
    file.write({"iteration": 7, "loss": 7.5})
    file.close()
    assert path.read_text() == lines(5, 6) + validation + lines(7)
    assert path.stat().st_mode & 0o777 == 0o640
    assert link.is_symlink()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["log", LOST, "metrics.jsonl"]
    # Of a run that does not continue the one that wrote them nothing is known to be lost.
    assert content_after(tmp_path, before, None) == before + lines(7)


def test_what_other_runs_write_to_one_file_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0, "a")
    for iteration in (1, 2, 3):
        first.write({"iteration": iteration, "loss": iteration + 0.5})
    first.close()
    # Alone in the folder, a run that goes on from iteration 2 has each iteration once.
    MetricsFile(path, 2, "a").close()
    assert path.read_text() == lines(1, 2)
    assert (tmp_path / LOST).read_text() == lines(3)
    other = MetricsFile(path, 0, "b")
    other.write({"iteration": 9, "loss": 9.5})
    again = MetricsFile(path, 1, "a")
    other.write({"iteration": 10, "loss": 10.5})
    again.close()
    other.close()
    assert path.read_text() == lines(1, 2, 9, 10)
    assert (tmp_path / WRITERS).read_text() == "a\nb\n"
    # Of a file that nobody is known to have begun nothing is moved.
    (tmp_path / WRITERS).unlink()
    MetricsFile(path, 1, "a").close()
    assert path.read_text() == lines(1, 2, 9, 10)


def test_a_file_that_is_replaced_meanwhile_is_written_to_in_its_new_place(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, None)
    file.write({"iteration": 1, "loss": 1.5})
    (tmp_path / "new").write_text(lines(5))
    (tmp_path / "new").replace(path)
    file.write({"iteration": 2, "loss": 2.5})
    assert path.read_text() == lines(5, 2)
    path.unlink()
    file.write({"iteration": 3, "loss": 3.5})
    file.close()
    assert path.read_text() == lines(3)


def test_a_line_that_is_no_record_stays_with_a_warning(tmp_path, capsys):
    strange = "notes of mine\n" + "[" * 10_000 + "\n" + '["iteration", 9]\n{"iteration": "late"}\n'
    assert content_after(tmp_path, lines(5) + strange + lines(8), 6) == lines(5) + strange + lines(7)
    assert "metrics.jsonl: 3 lines are no records and stay as they are" in capsys.readouterr().err


@pytest.mark.parametrize("continued_at", [None, 0], ids=["adds", "begins a run"])
def test_a_disk_that_fills_up_and_is_freed_loses_and_tears_nothing(tmp_path, capsys, monkeypatch, continued_at):
    monkeypatch.setattr(metrics_file, "SECONDS_BETWEEN_TRIES", 0.0)
    path, (_, hard) = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    file = MetricsFile(path, continued_at)
    file.write({"iteration": 1, "loss": 1.5})
    # The kernel takes the first bytes of the next line and refuses the rest, as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(lines(1)) + 10, hard))
    try:
        for iteration in (2, 3):
            file.write({"iteration": iteration, "loss": iteration + 0.5})
            assert path.read_text() == lines(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    file.write({"iteration": 4, "loss": 4.5})
    assert path.read_text() == lines(1, 2, 3, 4)
    file.write({"iteration": 5, "loss": 5.5})
    file.close()
    assert path.read_text() == lines(1, 2, 3, 4, 5)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert capsys.readouterr().err == (
        f"warning: {path}: File too large; training goes on and its records wait\n{path}: is written again\n"
    )


def test_setting_records_aside_waits_for_room(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_file, "SECONDS_BETWEEN_TRIES", 0.0)
    path, (_, hard) = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_text(lines(1, 2, 3, 4))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        file = MetricsFile(path, 2)
        file.write({"iteration": 3, "loss": 3.5})
        assert path.read_text() == lines(1, 2, 3, 4)
        assert [entry.name for entry in tmp_path.iterdir() if entry.stat().st_size > 0] == ["metrics.jsonl"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    file.close()
    assert path.read_text() == lines(1, 2, 3)
    assert (tmp_path / LOST).read_text() == lines(3, 4)


def test_the_first_step_of_each_start_says_when(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for first in (1, 3):
        writer = MetricsWriter(LoggingOptions(log_interval=9), MetricsFile(path, first - 1), 10, first - 1)
        # A validation that a kill has broken off comes before any step.
        writer.held_out("validation", {"iteration": first - 1, "validation_loss": 1.0})
        writer.train_step({"iteration": first, "skipped": "the loss is nan"}, 8, 0)
        writer.train_step({"iteration": first + 1, "loss": 1.0}, 8, 0)
        writer.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert ["started" in record for record in records] == 2 * [False, True, False]
    assert read_run(tmp_path).restarts == [2]
    assert read_run(tmp_path).skipped == [1, 3]
    # What it goes back to is lost, and with it that it had started there.
    MetricsFile(path, 1).close()
    assert read_run(tmp_path).restarts == [1]


def test_a_place_that_cannot_be_written_is_told_once(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "file").touch()
    options = LoggingOptions(log_interval=1, tensorboard_dir=str(tmp_path / "file" / "board"))
    writer = MetricsWriter(options, MetricsFile(tmp_path / "metrics.jsonl", 0), 10)
    for iteration in (1, 2):
        writer.train_step({"iteration": iteration, "loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0}, 1000, 0)
    writer.close()
    said = capsys.readouterr()
    assert said.out.count("| loss 1.0000 |") == 2
    assert [line.split(": ", 2)[2] for line in said.err.splitlines()] == [
        "Is a directory; training goes on and its records wait",
        "Not a directory; training goes on without it until the next start",
        "2 records were not written",
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_has_no_word_for_is_null(value, tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", None)
    file.write({"iteration": 1, "loss": value})
    file.close()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse) == {"iteration": 1, "loss": None}


def test_tensorboard_shows_each_iteration_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, end, loss in ((0, 5, 1.0), (3, 7, 2.0)):
        writer = MetricsWriter(LoggingOptions(tensorboard_dir=str(tmp_path)), None, 10, start)
        for iteration in range(start + 1, end + 1):
            writer.held_out("validation", {"iteration": iteration, "validation_loss": loss})
        writer.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("validation_loss")
    assert [(event.step, event.value) for event in events] == [(i, 1.0 if i <= 3 else 2.0) for i in range(1, 8)]
