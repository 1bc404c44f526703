"""The last steps of a run, by which the next one is judged a spike."""

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

KEPT = 32
# Fewer than this say nothing yet.
LEAST = 8


def _last() -> deque[float]:
    return deque(maxlen=KEPT)


@dataclass
class RecentSteps:
    """Losses and gradient norms of the last steps that were taken. They go into checkpoints, so that a resumed run
    judges as the unbroken one does.
    """

    losses: deque[float] = field(default_factory=_last)
    grad_norms: deque[float] = field(default_factory=_last)

    def add(self, loss: float, grad_norm: float) -> None:
        """Take in a step that was taken."""
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)

    def state(self) -> dict[str, list[float]]:
        """As JSON keeps it, which gives back the same bits."""
        return {"losses": list(self.losses), "grad_norms": list(self.grad_norms)}

    @classmethod
    def of(cls, state: Mapping[str, Sequence[float]]) -> "RecentSteps":
        """What `state` gave; without any step from an empty one."""
        return cls(*(deque(state.get(name, ()), maxlen=KEPT) for name in ("losses", "grad_norms")))


def spike(name: str, value: float, before: Sequence[float], factor: float) -> str | None:
    """In words, that a finite `value` is above `factor` times the median of those `before`; None if it is not."""
    if len(before) < LEAST:
        return None
    median = statistics.median(before)
    if value <= factor * median:
        return None
    return f"the {name} is {value:.4g}, above {factor:g} times {median:.4g}, the median of the steps before,"
