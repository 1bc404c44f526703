"""What a row of the scorecard is, and one attempt of it."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.campaign.runs import Base


class FailedError(Exception):
    """The product did not do what it says: another exit code, a traceback, lost work."""


class SilentlyWrongError(FailedError):
    """Exit code 0, and the result is wrong."""


@dataclass(frozen=True)
class Attempt:
    """One attack: what it does is a function of (seed, row, number), as far as timing allows."""

    seed: int
    row: str
    number: int
    base: Base
    folder: Path  # empty, and its own
    case: Any = None  # where a row lists its cases: this one

    @property
    def random(self) -> random.Random:
        """A new generator of this attempt's numbers; take it once."""
        return random.Random(f"{self.seed} {self.row} {self.number}")


@dataclass(frozen=True)
class Row:
    """A line of the scorecard; `run` raises FailedError or SilentlyWrongError, and returns nothing else."""

    id: str
    what: str
    run: Callable[[Attempt], None]
    attempts: int  # of the full form; with `cases` at most that many
    short: int  # of the form of two minutes
    cases: Callable[[Base], Sequence[Any]] | None = None
    seconds: float = 120  # an attempt that takes longer hangs
    only_waits: bool = False  # takes no processor, so that it runs beside the others


def expect(holds: bool, what: str) -> None:
    """Fail the attempt unless it holds."""
    if not holds:
        raise FailedError(what)


def expect_right(holds: bool, what: str) -> None:
    """The attempt is silently wrong unless it holds."""
    if not holds:
        raise SilentlyWrongError(what)
