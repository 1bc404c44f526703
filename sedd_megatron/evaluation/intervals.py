"""Confidence intervals of ratios of sums over units: bits per character, nats per token and their exponentials."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

METHOD = "ratio estimate over units with Student's t"


class Interval(NamedTuple):
    """An estimate and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def map(self, function) -> "Interval":
        """A growing function of the estimate, and of the interval's ends."""
        return Interval(*(function(end) for end in self))

    @property
    def half_width(self) -> float:
        """Half of the interval's length."""
        return (self.high - self.low) / 2


def ratio_interval(totals: Sequence[float], sizes: Sequence[float], confidence: float = 0.95) -> Interval:
    """sum(totals) / sum(sizes), for units drawn independently (Cochran, Sampling Techniques, section 2.11).

    What is random in a total beside its unit, Monte Carlo error, is in the spread between units and so in the interval.
    With a single unit there is no spread and the interval is without bounds.
    """
    count, size = len(totals), sum(sizes)
    ratio = sum(totals) / size
    if count == 1:
        return Interval(ratio, -math.inf, math.inf)
    residuals = [total - ratio * n for total, n in zip(totals, sizes, strict=True)]
    variance = sum(residual**2 for residual in residuals) * count / (count - 1)
    half = student_t_quantile((1 + confidence) / 2, count - 1) * math.sqrt(variance) / size
    return Interval(ratio, ratio - half, ratio + half)


def monte_carlo_interval(total: float, variances: Sequence[float], size: float, confidence: float = 0.95) -> Interval:
    """total / size for these units and no others: what is random are the times and the noise."""
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(sum(variances)) / size
    return Interval(total / size, total / size - half, total / size + half)


def student_t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t, in closed form for 1 and 2 degrees of freedom, else by Cornish and Fisher's expansion
    (Abramowitz and Stegun, 26.7.5), within 1 percent from 3 on.
    """
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**order for order, term in enumerate(terms))
