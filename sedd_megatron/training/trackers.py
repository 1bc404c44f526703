"""Weights & Biases and MLflow: whatever their servers, their libraries and the network do, training goes on."""

import importlib.util
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sedd_megatron.config import PretrainOptions
from sedd_megatron.errors import UserError, one_line, printable, say
from sedd_megatron.training_config import LoggingOptions
from sedd_megatron.wording import how_to_install

Records = Sequence[dict[str, Any]]
# How a run is found again in MLflow, which gives its runs names of its own.
RUN_TAG = "sedd_megatron.run_id"
# Of a service that answers slowly or not at all: records that wait for it, and how long the end of a run does.
MOST_WAITING = 100_000
SECONDS_TO_WAIT_AT_LAST = 30.0
# MLflow's own limits: metrics of a call, characters of a parameter, parameters of a call.
METRICS_OF_A_CALL, CHARACTERS, PARAMETERS_OF_A_CALL = 1000, 500, 100


class Tracker:
    """Sends records to a service from a thread of its own. The first thing that goes wrong is told in a line, and the
    service gets nothing more until the next start.
    """

    def __init__(self, name: str, connect: Callable[[], tuple[Callable[[Records], None], Callable[[], None]]]) -> None:
        """`connect` gives what sends records, and what ends the run there."""
        self._name = name
        self._waiting: queue.Queue[Records | None] = queue.Queue()
        self._number_given, self._number_sent = 0, 0  # each changed by one thread alone
        self._has_failed = threading.Event()
        # Ends with the process, whatever it waits for.
        self._thread = threading.Thread(target=self._work, args=(connect,), daemon=True)
        self._thread.start()

    def log(self, records: Records) -> None:
        """Have them sent; never waits."""
        if self._has_failed.is_set() or not records:
            return
        self._number_given += len(records)
        waiting = self._number_given - self._number_sent
        if waiting > MOST_WAITING:
            self._give_up(f"{waiting:,} records wait for it")
            return
        self._waiting.put(records)

    def close(self) -> None:
        """Wait for what is on its way, for a while."""
        self._waiting.put(None)
        self._thread.join(SECONDS_TO_WAIT_AT_LAST)
        if self._thread.is_alive():
            self._give_up(f"has not taken all records within {SECONDS_TO_WAIT_AT_LAST:.0f} s")

    def _work(self, connect: Callable[[], tuple[Callable[[Records], None], Callable[[], None]]]) -> None:
        try:
            send, finish = connect()
            while (records := self._waiting.get()) is not None and not self._has_failed.is_set():
                send(records)
                self._number_sent += len(records)
            finish()
        except BaseException as error:  # the libraries', their clients', the system's; some of them ask Python to exit
            self._give_up(one_line(error) or type(error).__name__)

    def _give_up(self, reason: str) -> None:
        if not self._has_failed.is_set():
            self._has_failed.set()
            line = f"warning: {self._name}: {reason}; training goes on without it until the next start"
            say(printable(line), to_stderr=True)


def check_trackers(options: LoggingOptions) -> None:
    """Check that the packages are there.

    Raises:
        UserError: one is not installed.
    """
    for flag, value, package in (
        ("--wandb-project", options.wandb_project, "wandb"),
        ("--mlflow-experiment", options.mlflow_experiment, "mlflow"),
    ):
        if value is not None and importlib.util.find_spec(package) is None:
            raise UserError(f"{flag} {value} needs {package}; {how_to_install('log')}")


def open_trackers(options: PretrainOptions, run_id: str | None) -> list[Tracker]:
    """Those that the options name. A run of this id goes on there with what it has written before."""
    trackers = []
    if options.logging.wandb_project is not None:
        trackers.append(Tracker("Weights & Biases", lambda: _connect_wandb(options, run_id)))
    if options.logging.mlflow_experiment is not None:
        trackers.append(Tracker("MLflow", lambda: _connect_mlflow(options, run_id)))
    return trackers


def _connect_wandb(
    options: PretrainOptions, run_id: str | None
) -> tuple[Callable[[Records], None], Callable[[], None]]:
    import wandb

    logging, save = options.logging, options.checkpoint.save
    run = wandb.init(
        project=logging.wandb_project,
        name=logging.wandb_exp_name or _name_of(save),
        entity=logging.wandb_entity,
        # It makes a folder wandb in there, which is Megatron-LM's place.
        dir=logging.wandb_save_dir or (None if save is None else _made(Path(save))),
        id=run_id,
        resume=None if run_id is None else "allow",
        config=options.to_dict(),
        # Our own lines stay our own.
        settings=wandb.Settings(console="off", silent=True),
    )
    # Not its own count, which does not go back where a run does.
    run.define_metric("iteration")
    run.define_metric("*", step_metric="iteration")

    def send(records: Records) -> None:
        for record in records:
            run.log(record)

    return send, run.finish


def _connect_mlflow(
    options: PretrainOptions, run_id: str | None
) -> tuple[Callable[[Records], None], Callable[[], None]]:
    # Or MLflow refuses a folder, which people without a server name.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client, name = MlflowClient(options.logging.mlflow_tracking_uri), options.logging.mlflow_experiment
    experiment = client.get_experiment_by_name(name)
    number = client.create_experiment(name) if experiment is None else experiment.experiment_id
    found = [] if run_id is None else client.search_runs([number], f"tags.`{RUN_TAG}` = '{run_id}'", max_results=1)
    if found:
        run = found[0].info.run_id
        client.update_run(run, status="RUNNING")
    else:
        run_name = options.logging.mlflow_run_name or _name_of(options.checkpoint.save)
        tags = {} if run_id is None else {RUN_TAG: run_id}
        run = client.create_run(number, tags=tags, run_name=run_name).info.run_id
        params = [Param(key, str(value)[:CHARACTERS]) for key, value in options.to_dict().items()]
        for start in range(0, len(params), PARAMETERS_OF_A_CALL):
            client.log_batch(run, params=params[start : start + PARAMETERS_OF_A_CALL])

    def send(records: Records) -> None:
        now = int(time.time() * 1000)
        metrics = [
            Metric(key, value, now, record["iteration"])
            for record in records
            for key, value in record.items()
            if key != "iteration" and math.isfinite(value)
        ]
        for start in range(0, len(metrics), METRICS_OF_A_CALL):
            client.log_batch(run, metrics=metrics[start : start + METRICS_OF_A_CALL])

    return send, lambda: client.set_terminated(run)


def _name_of(save: str | None) -> str | None:
    return None if save is None else Path(save).resolve().name


def _made(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)
