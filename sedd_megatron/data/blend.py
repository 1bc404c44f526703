"""Several corpora in proportion: whose sample n is, and the tokenizer that they must share."""

import filecmp
import heapq
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from sedd_megatron.data.tokenizer_folder import DESCRIPTION
from sedd_megatron.data.tokenizers import Tokenizer, load_tokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.wording import read_errors

LONGEST_PERIOD = 1 << 16


@dataclass(frozen=True)
class Assignment:
    """Whose sample n is: a period of corpora that repeats, made so that every beginning is in proportion.

    Of the first n samples a corpus has n times its share, up to less than one sample; so any run of samples has its
    share of them up to less than two.
    """

    corpora: np.ndarray  # [period] whose each sample is
    ranks: np.ndarray  # [period] how many samples of that corpus come before it in the period
    counts: tuple[int, ...]  # of each corpus in a period

    @classmethod
    def of(cls, weights: Sequence[Fraction]) -> "Assignment":
        """For weights in proportion; exact if a period of at most 65536 samples can be, else to 1/65536."""
        counts = _whole_shares(weights)
        period = sum(counts)
        # Earliest deadline first: sample j of a corpus with share p may come from j / p on and has to by (j + 1) / p.
        # With unit tasks and a full processor that schedule is always met (Baruah et al., Algorithmica 1996).
        done, corpora, ranks = [0] * len(counts), np.empty(period, np.int64), np.empty(period, np.int64)
        unreleased, released = [(0, i) for i in range(len(counts))], []
        for n in range(period):
            while unreleased and unreleased[0][0] <= n:
                _, i = heapq.heappop(unreleased)
                heapq.heappush(released, (-(-(done[i] + 1) * period // counts[i]), i))
            _, corpus = heapq.heappop(released)
            corpora[n], ranks[n] = corpus, done[corpus]
            done[corpus] += 1
            if done[corpus] < counts[corpus]:
                heapq.heappush(unreleased, (done[corpus] * period // counts[corpus], corpus))
        return cls(corpora, ranks, tuple(counts))

    def locate(self, n: int) -> tuple[int, int]:
        """(corpus, position in the corpus' own order) of sample n."""
        period, place = divmod(n, len(self.corpora))
        corpus = int(self.corpora[place])
        return corpus, period * self.counts[corpus] + int(self.ranks[place])


def common_tokenizer(prefixes: Sequence[str]) -> Tokenizer:
    """The tokenizer beside every one of the corpora.

    Raises:
        UserError: one has none, or another one; with the first difference.
    """
    folders = [Path(f"{prefix}_tokenizer") for prefix in prefixes]
    tokenizer = load_tokenizer(folders[0])
    for prefix, folder in zip(prefixes[1:], folders[1:], strict=True):
        with read_errors(folder):
            is_same = _has_the_same_files(folders[0], folder)
        if is_same:
            continue
        # To have what is missing or damaged called so.
        load_tokenizer(folder)
        difference = _first_difference(folders[0], folder)
        if difference is not None:
            raise UserError(
                f"{prefix}: its tokenizer is not that of {prefixes[0]}: {difference}; prepare it again with "
                f"--tokenizer-model {folders[0]}"
            )
    return tokenizer


def _whole_shares(weights: Sequence[Fraction]) -> list[int]:
    denominator = math.lcm(*(weight.denominator for weight in weights))
    shares = [int(weight * denominator) for weight in weights]
    shares = [share // math.gcd(*shares) for share in shares]
    if sum(shares) <= LONGEST_PERIOD:
        return shares
    # The largest rests are rounded up, and nobody gets nothing.
    total = sum(weights)
    exact = [weight / total * LONGEST_PERIOD for weight in weights]
    rounded = [max(1, int(share)) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: rounded[i] - exact[i])
    for i in by_rest[: max(0, LONGEST_PERIOD - sum(rounded))]:
        rounded[i] += 1
    return rounded


def _has_the_same_files(one: Path, other: Path) -> bool:
    if not os.path.isdir(other):  # unlike Path.is_dir, of any name
        return False
    names = [sorted(path.name for path in folder.iterdir()) for folder in (one, other)]
    return names[0] == names[1] and all(filecmp.cmp(one / name, other / name, shallow=False) for name in names[0])


def _first_difference(one: Path, other: Path) -> str | None:
    descriptions = [json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")) for folder in (one, other)]
    for key in sorted(descriptions[0].keys() | descriptions[1].keys()):
        values = [description.get(key) for description in descriptions]
        if values[0] != values[1]:
            return f"{key} is {_short(values[1])}, not {_short(values[0])}"
    for name in sorted({path.name for folder in (one, other) for path in folder.iterdir()} - {DESCRIPTION}):
        contents = [(folder / name).read_bytes() if (folder / name).is_file() else None for folder in (one, other)]
        if contents[0] != contents[1]:
            return f"{name} differs"
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
