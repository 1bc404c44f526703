"""What a step is judged by, and the last steps of a run, which show how large that usually is."""

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

KEPT = 32
# Fewer than this say nothing yet.
LEAST = 8


class StepResult(NamedTuple):
    """Of one step, the same on every rank; nan and inf where a fault makes them so."""

    loss: float  # nats per token
    grad_norm: float  # before clipping
    # The largest norm that a rank's own gradients have, before any are summed; 0 where nobody looks. Of what several
    # ranks hold alike the norm above counts one copy.
    rank_grad_norm: float = 0.0

    def named(self) -> Iterator[tuple[str, str, float]]:
        """Field, its name for people, and value."""
        names = ("loss", "gradient norm", "largest gradient norm of a rank")
        return zip(self._fields, names, self, strict=True)


class RecentSteps:
    """Results of the last steps that were taken. They go into checkpoints, so that a resumed run judges as the unbroken
    one does.
    """

    def __init__(self, state: Mapping[str, Any] | None = None, layout: str = "") -> None:
        """With what `state` gave; without any step if not given. How large a rank's own gradients are depends on the
        `layout`: of another one they are forgotten.
        """
        self._last = {name: deque((state or {}).get(name, ()), maxlen=KEPT) for name in StepResult._fields}
        if state is not None and state.get("layout") != layout:
            self._last["rank_grad_norm"].clear()

    def add(self, result: StepResult) -> None:
        """Take in a step that was taken."""
        for name, value in result._asdict().items():
            self._last[name].append(value)

    def state(self, layout: str) -> dict[str, Any]:
        """As JSON keeps it, which gives back the same bits."""
        return {"layout": layout, **{name: list(values) for name, values in self._last.items()}}

    def fault(self, result: StepResult, spike_factor: float | None) -> str | None:
        """In words, which of the numbers is not finite, or above `spike_factor` times its median; None if none is."""
        for field, name, value in result.named():
            if not math.isfinite(value):
                return f"the {name} is {value}"
            before = self._last[field]
            median = statistics.median(before) if len(before) >= LEAST else math.inf
            if spike_factor is not None and value > spike_factor * median > 0:
                return f"the {name} is {value:.4g}, above {spike_factor:g} times the median before ({median:.4g})"
        return None
