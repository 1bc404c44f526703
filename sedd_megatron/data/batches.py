"""Batches of token sequences of one length."""

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar


class HasTokens(Protocol):
    """A sequence with whatever belongs to it."""

    tokens: Sequence[int]


Item = TypeVar("Item", bound=HasTokens)


def batches_of(items: Sequence[Item], batch_size: int) -> Iterator[list[Item]]:
    """Items of one length together, batch_size at a time: shorter ones cannot be filled up, for every position sees
    every other.
    """
    by_length: dict[int, list[Item]] = {}
    for item in items:
        by_length.setdefault(len(item.tokens), []).append(item)
    for same in by_length.values():
        for start in range(0, len(same), batch_size):
            yield same[start : start + batch_size]
