"""From a run's records to the curves of a page, each with no more points than a screen shows."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sedd_megatron.reporting.records import RunRecords, Series
from sedd_megatron.run_files import NETWORK_PARTS, NUM_BANDS

# A curve is drawn from two points of each of these parts, its lowest and its highest.
PIXELS = 600
# A smoothed curve is the mean of the steps before, this share of them all.
SMOOTHED_SHARE = 50


@dataclass(frozen=True)
class Chart:
    """One chart: which fields it has, and as what they are told."""

    title: str
    unit: str
    fields: dict[str, str]  # field -> its name in the legend; empty where the run's name says all
    is_raw: bool = True  # the steps themselves, behind the smoothed curve
    is_log: bool = False
    points: str | None = None  # a field of few records, drawn as points
    scale: float = 1.0


CHARTS = (
    Chart("Loss", "nats per token", {"loss": ""}, points="validation_loss"),
    Chart(
        "Loss by noise",
        "nats per token",
        {f"loss_band_{k}": f"t {k / NUM_BANDS:.3f} to {(k + 1) / NUM_BANDS:.3f}" for k in range(NUM_BANDS)},
        is_raw=False,
    ),
    Chart("Learning rate", "", {"learning_rate": ""}, is_raw=False),
    Chart("Gradient norm", "before clipping", {"grad_norm": ""}, is_log=True),
    Chart(
        "Gradient norm by part",
        "before clipping",
        {f"grad_norm_{part}": part.replace("_", " ") for part in NETWORK_PARTS},
        is_raw=False,
        is_log=True,
    ),
    Chart("Throughput", "tokens per second", {"tokens_per_second": ""}),
    Chart("Memory", "GiB, of the rank that has most", {"memory_bytes": ""}, scale=2.0**-30),
    Chart("Wait for data", "seconds a step", {"data_wait_seconds": ""}),
    Chart("Noised tokens", "share", {"masked_share": "", "moved_share": ""}),
    Chart("Largest log-score", "", {"largest_log_score": ""}),
)


def chart_data(chart: Chart, runs: Sequence[RunRecords]) -> dict[str, Any] | None:
    """What the page draws: curves of {run, name, kind, x, y} with kind raw, smooth or points; None without any."""
    curves = []
    for number, run in enumerate(runs):
        for field, name in chart.fields.items():
            if field not in run.fields:
                continue
            series, smooth = run.fields[field], smoothed(run.fields[field])
            # A learning rate is no noisy number.
            pairs = [("smooth", series if field == "learning_rate" else smooth)]
            for kind, one in [("raw", series), *pairs] if chart.is_raw else pairs:
                curves.append(_curve(number, name, kind, thinned(one), chart.scale))
        if chart.points in run.fields:
            curves.append(_curve(number, "validation", "points", thinned(run.fields[chart.points]), chart.scale))
    if not curves:
        return None
    return {"title": chart.title, "unit": chart.unit, "log": chart.is_log, "curves": curves}


def smoothed(series: Series) -> Series:
    """The mean of each step and those before it, of a fiftieth of them all."""
    count = len(series.values)
    width = max(count // SMOOTHED_SHARE, 1)
    # By sums of blocks up to each of their places and from it on: the difference of two sums of all steps before would
    # lose what is small behind a spike.
    blocks = np.pad(series.values, (0, -count % width)).reshape(-1, width)
    sums = blocks.cumsum(axis=1).ravel()[:count]
    # Where a block ends, its own sum is the window's.
    rest = np.pad(blocks[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:], ((0, 0), (0, 1))).ravel()
    sums[width:] += rest[: count - width]
    return Series(series.iterations, sums / np.minimum(np.arange(1, count + 1), width))


def thinned(series: Series, pixels: int = PIXELS) -> Series:
    """The lowest and the highest point of each of `pixels` equal parts, the first and the last: nothing that stands out
    is lost.
    """
    count = len(series.values)
    if count <= 2 * pixels:
        return series
    edges = np.linspace(0, count, pixels + 1).astype(np.int64)
    kept = {0, count - 1}
    for start, stop in itertools.pairwise(edges.tolist()):
        part = series.values[start:stop]
        kept |= {int(start + part.argmin()), int(start + part.argmax())}
    chosen = np.array(sorted(kept))
    return Series(series.iterations[chosen], series.values[chosen])


def _curve(run: int, name: str, kind: str, series: Series, scale: float) -> dict[str, Any]:
    # Six digits are more than a screen has.
    values = [float(f"{value:.6g}") for value in series.values * scale]
    return {"run": run, "name": name, "kind": kind, "x": series.iterations.tolist(), "y": values}
