"""The bound of every unit of a corpus, and what it says of the corpus."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from sedd_megatron.data.batches import batches_of
from sedd_megatron.diffusion.likelihood import Bound, BoundEstimator
from sedd_megatron.diffusion.score_reader import ScoresNotFiniteError
from sedd_megatron.errors import scores_not_finite
from sedd_megatron.evaluation.intervals import Interval, monte_carlo_interval, ratio_interval
from sedd_megatron.evaluation.windows import Window
from sedd_megatron.parallel.groups import (
    ParallelGroups,
    errors_of_all_replicas,
    gathered_from_replicas,
    is_first_rank,
)


@dataclass(frozen=True)
class UnitBound:
    """The bound on -log p of one document, or of one window of the concatenation, in nats."""

    unit: int
    num_tokens: int
    prior: float
    diffusion: float
    reconstruction: float
    standard_error: float  # of Monte Carlo

    @property
    def bound(self) -> float:
        """The three terms together."""
        return self.prior + self.diffusion + self.reconstruction

    def record(self) -> dict[str, Any]:
        """As written to --output; a number that is not finite, for which JSON has no word, becomes null."""
        names = ("unit", "num_tokens", "bound", "prior", "diffusion", "reconstruction", "standard_error")
        values = ((name, getattr(self, name)) for name in names)
        return {name: value if math.isfinite(value) else None for name, value in values}


def tensors_of(windows: Sequence[Window], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """x_0 [B, S] int64, and which positions are given [B, S] bool, of windows of one length."""
    x_0 = torch.tensor([window.tokens for window in windows], dtype=torch.long, device=device)
    num_given = torch.tensor([[window.num_given] for window in windows], device=device)
    return x_0, torch.arange(x_0.shape[1], device=device) < num_given


def bound_windows(
    estimator: BoundEstimator,
    windows: Sequence[Window],
    device: torch.device,
    first_draw: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> dict[int, Bound]:
    """The bound of each window by its number, as tensors of one element; on_batch gets how many are done.

    Raises:
        UserError: the network's scores are not finite.
    """
    found: dict[int, Bound] = {}
    for batch in batches_of(windows, estimator.batch_size):
        try:
            bound = estimator(*tensors_of(batch, device), [window.draw_key for window in batch], first_draw)
        except ScoresNotFiniteError as error:
            raise scores_not_finite(f"window {batch[error.sequence].number}", error.sigma) from error
        for row, window in enumerate(batch):
            found[window.number] = Bound(*(field[row] for field in bound))
        if on_batch is not None:
            on_batch(len(batch))
    return found


def bound_on_replicas(
    estimator: BoundEstimator, windows: Sequence[Window], groups: ParallelGroups, first_draw: int = 0
) -> dict[int, Bound]:
    """`bound_windows` with the replicas sharing the windows; every rank gets all."""
    own = windows[groups.data_rank :: groups.data_size]
    hidden = None if is_first_rank() else True
    with (
        errors_of_all_replicas(groups),
        tqdm(total=len(own), unit="window", leave=False, disable=hidden) as bar,
    ):
        found = bound_windows(estimator, own, groups.device, first_draw, bar.update)
    return gathered_from_replicas(found, groups)


def mean_of_rounds(rounds: Sequence[dict[int, Bound]]) -> dict[int, Bound]:
    """Independent estimates of the same windows, averaged."""
    count = len(rounds)
    return {
        number: Bound(
            *(sum(one[number][field] for one in rounds) / count for field in range(3)),
            sum(one[number].standard_error ** 2 for one in rounds).sqrt() / count,
        )
        for number in rounds[0]
    }


def unit_bounds(windows: Sequence[Window], bounds: dict[int, Bound]) -> list[UnitBound]:
    """Windows added up to units, in their order: sums in a fixed order are the same in every layout."""
    by_unit: dict[int, list[Window]] = {}
    for window in windows:
        by_unit.setdefault(window.unit, []).append(window)
    found = []
    for unit, parts in by_unit.items():
        terms = [bounds[window.number] for window in parts]
        sums = [math.fsum(float(term[field]) for term in terms) for field in range(3)]
        error = math.sqrt(math.fsum(float(term.standard_error) ** 2 for term in terms))
        found.append(UnitBound(unit, sum(window.num_counted for window in parts), *sums, error))
    return found


def corpus_interval(units: Sequence[UnitBound]) -> Interval:
    """Nats per token of the corpus that the units were drawn from, with its 95 % interval."""
    return ratio_interval([unit.bound for unit in units], [unit.num_tokens for unit in units])


def sample_interval(units: Sequence[UnitBound]) -> Interval:
    """Nats per token of these units alone: Monte Carlo error and no other."""
    total = math.fsum(unit.bound for unit in units)
    return monte_carlo_interval(
        total, [unit.standard_error**2 for unit in units], sum(unit.num_tokens for unit in units)
    )
