"""What a run wrote while it trained, read for people who watch it: damaged lines are named and left out."""

import json
import math
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sedd_megatron.errors import UserError, one_line
from sedd_megatron.run_files import LOST, METRICS, SAMPLES, STARTED

# What a sum of all of them stays finite for; nothing else has a place on a chart.
LARGEST = 1e290


@dataclass(frozen=True)
class Series:
    """One field over the iterations."""

    iterations: np.ndarray  # [N] int64, rising
    values: np.ndarray  # [N] float64, below LARGEST


@dataclass(frozen=True)
class RunRecords:
    """One run."""

    name: str
    fields: dict[str, Series]
    restarts: list[int]  # the iterations from which a later start went on, or went back to
    skipped: list[int]  # steps that were not taken
    samples: list[dict[str, Any]]  # iteration, sample, text
    faults: list[str]  # lines of its files that could not be read


def read_run(path: Path) -> RunRecords:
    """A save folder, or the metrics.jsonl of a run.

    Raises:
        UserError: there is no such file, or no record in it.
    """
    # Path.is_dir raises of what may not be looked at.
    metrics = path / METRICS if os.path.isdir(path) else path
    if not os.path.isfile(metrics):
        raise UserError(f"{path}: has no {METRICS}; name the folder of --save or --log-dir, or the file itself")
    faults: list[str] = []
    restarts, skipped = set(), set()
    # By field, of two numbers a record: a long run has half a million records of some twenty fields.
    columns: dict[str, tuple[array, array]] = {}
    last = 0
    for record in _records(metrics, faults):
        iteration = record["iteration"]
        if iteration < last or (last and STARTED in record):
            restarts.add(iteration - 1)
        last = iteration
        (skipped.add if "skipped" in record else skipped.discard)(iteration)
        for name, value in record.items():
            if name != "iteration" and type(value) in (int, float) and abs(value) < LARGEST:
                iterations, values = columns.setdefault(name, (array("q"), array("d")))
                iterations.append(iteration)
                values.append(value)
    if not columns:
        raise UserError(f"{metrics}: has no record of a step; is it the {METRICS} of a run?")
    newest = max(iterations[-1] for iterations, _ in columns.values())
    lost = metrics.with_name(LOST)
    last = math.inf
    for record in _records(lost, faults) if os.path.isfile(lost) else ():
        if record["iteration"] < last:
            restarts.add(record["iteration"] - 1)
        last = record["iteration"]
    return RunRecords(
        name=(path if os.path.isdir(path) else path.resolve().parent).resolve().name,
        fields={name: _series(*column) for name, column in columns.items()},
        restarts=sorted(restarts),
        skipped=sorted(skipped),
        samples=_samples(metrics.with_name(SAMPLES), newest, faults),
        faults=faults,
    )


def _records(path: Path, faults: list[str]) -> Iterator[dict[str, Any]]:
    """The file's objects that have an iteration, one after the other; what else stands there is added to `faults`."""
    damaged = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                is_record = isinstance(record, dict) and type(record.get("iteration")) is int
                if is_record and 0 <= record["iteration"] < 2**53:
                    yield record
                elif line.strip():
                    damaged.append(number)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from error
    if damaged:
        others = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        faults.append(f"{path}: line {damaged[0]}{others}: no record, left out")


def _series(iterations: array, values: array) -> Series:
    """In the order of iterations; of what stands there twice the later counts."""
    iterations, values = np.asarray(iterations), np.asarray(values)
    order = np.argsort(iterations, kind="stable")
    iterations, values = iterations[order], values[order]
    is_last = np.append(iterations[1:] != iterations[:-1], True)
    return Series(iterations[is_last], values[is_last])


def _samples(path: Path, newest: int, faults: list[str]) -> list[dict[str, Any]]:
    """Of each iteration the last ones, without those that the run has gone back behind."""
    if not os.path.isfile(path):
        return []
    found = {}
    for record in _records(path, faults):
        if isinstance(record.get("text"), str) and record["iteration"] <= newest:
            found[record["iteration"], str(record.get("sample"))] = record
    return [{"iteration": iteration, "sample": sample, "text": record["text"]}
            for (iteration, sample), record in sorted(found.items(), key=lambda item: item[0][0])]  # fmt: skip
