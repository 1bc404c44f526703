"""Weights & Biases and MLflow themselves, without a network: what reaches them, resumed runs, what goes wrong."""

import re
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.errors import UserError
from sedd_megatron.training import trackers
from sedd_megatron.training.metrics import MetricsWriter
from sedd_megatron.training.metrics_file import run_id_of
from sedd_megatron.training.trackers import Tracker, check_trackers, open_trackers
from sedd_megatron.wording import how_to_install
from tests.distributed.layouts import MODEL

WANDB = ["--wandb-project", "project"]
MLFLOW = ["--mlflow-experiment", "experiment", "--log-interval", "2"]


def options_of(*flags: str):
    return parse_pretrain_options(["--data-path", "x", *MODEL, *flags])


def record(iteration: int) -> dict[str, float]:
    fields = {"loss": 5.0 - iteration, "learning_rate": 1e-3, "grad_norm": 1.0, "loss_band_3": 0.1 * iteration}
    return {"iteration": iteration, **fields}


def write_run(options, first: int, last: int) -> None:
    """The records of one start of a run, through all that a run has."""
    opened = open_trackers(options, run_id_of_save(options))
    writer = MetricsWriter(options.logging, None, last, first - 1, trackers=opened)
    for iteration in range(first, last + 1):
        writer.train_step(record(iteration), 8, 0)
    writer.held_out("validation", {"iteration": last, "validation_loss": 2.5})
    writer.close()


def run_id_of_save(options) -> str:
    Path(options.checkpoint.save).mkdir(exist_ok=True)
    return run_id_of(Path(options.checkpoint.save))


def test_mlflow_has_every_number_of_both_starts_in_one_run(tmp_path, monkeypatch, capsys):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    uri = (tmp_path / "store").as_uri()
    options = options_of(*MLFLOW, "--mlflow-tracking-uri", uri, "--save", str(tmp_path / "mine"))
    write_run(options, 1, 3)
    write_run(options, 3, 5)
    assert "warning" not in capsys.readouterr().err
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("experiment").experiment_id])
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.params["hidden_size"] == "32"
    steps = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss_band_3")]
    assert sorted(steps) == [(n, pytest.approx(0.1 * n)) for n in (1, 2, 3, 3, 4, 5)]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "validation_loss")] == [3, 5]


def records_of(content: bytes) -> Iterator[bytes]:
    """Of a .wandb file: LevelDB's log, whose blocks of 32 KiB have records cut into (CRC, length, kind, data)."""
    at, record = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        # 1 is a whole record, 4 the last piece of one.
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb_has_every_number_of_both_starts_under_one_id(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    options = options_of(*WANDB, "--log-interval", "2", "--save", str(tmp_path / "mine"))
    write_run(options, 1, 3)
    write_run(options, 3, 5)
    said = capsys.readouterr()
    assert "warning" not in said.err
    assert "wandb" not in said.out
    found, names = [], set()
    files = sorted((tmp_path / "mine" / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.stem for file in files] == 2 * [f"run-{run_id_of(tmp_path / 'mine')}"]
    for file in files:
        for data in records_of(file.read_bytes()):
            message = wandb_internal_pb2.Record()
            message.ParseFromString(data)
            if message.WhichOneof("record_type") == "run":
                names.add((message.run.project, message.run.display_name))
            if message.WhichOneof("record_type") == "history":
                found.append({item.key or item.nested_key[0]: item.value_json for item in message.history.item})
    assert names == {("project", "mine")}
    assert [float(row["loss_band_3"]) for row in found if "loss_band_3" in row] == [
        pytest.approx(0.1 * n) for n in (1, 2, 3, 3, 4, 5)
    ]
    assert [row["iteration"] for row in found if "validation_loss" in row] == ["3", "5"]


def test_a_server_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    write_run(options_of(*MLFLOW, "--mlflow-tracking-uri", "http://127.0.0.1:9", "--save", str(tmp_path / "x")), 1, 4)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line.startswith("warning: MLflow: API request to http://127.0.0.1:9/api/2.0/mlflow/experiments/get-by-name")
    assert line.endswith("; training goes on without it until the next start")


def test_what_goes_wrong_is_told_once_and_holds_nothing_up(capsys, monkeypatch):
    monkeypatch.setattr(trackers, "SECONDS_TO_WAIT_AT_LAST", 0.2)
    monkeypatch.setattr(trackers, "MOST_WAITING", 3)

    def full(records) -> None:
        raise OSError(28, "No space left on device")

    def leaves():
        raise SystemExit("no key")

    forever = threading.Event()
    for connect, words in (
        (lambda: (full, lambda: None), "[Errno 28] No space left on device"),
        (leaves, "no key"),
        (lambda: (lambda records: forever.wait(), lambda: None), "4 records wait for it"),
        (lambda: (lambda records: None, forever.wait), "has not taken all records within 0 s"),
    ):
        tracker, start = Tracker("Name", connect), time.monotonic()
        for _ in range(4):
            tracker.log([record(1)] if "wait for it" in words else [])
        tracker.log([record(1)])
        tracker.close()
        assert time.monotonic() - start < 5
        assert capsys.readouterr().err == f"warning: Name: {words}; training goes on without it until the next start\n"
    forever.set()


def test_flags_that_say_nothing_and_missing_packages_are_refused(monkeypatch):
    with pytest.raises(UserError, match="--wandb-entity me says nothing without --wandb-project; add that, or leave"):
        options_of("--wandb-entity", "me")
    with pytest.raises(UserError, match="--mlflow-run-name me says nothing without --mlflow-experiment"):
        options_of("--mlflow-run-name", "me")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    for flags, words in (
        (WANDB, "--wandb-project project needs wandb; " + how_to_install("log")),
        (MLFLOW, "--mlflow-experiment experiment needs mlflow; " + how_to_install("log")),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            check_trackers(options_of(*flags).logging)
