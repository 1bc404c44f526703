"""Noise schedules: time t in [0, 1] -> total noise sigma and its rate d sigma / dt (arXiv 2310.16834, appendix C.1)."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class NoiseLevel(NamedTuple):
    """sigma and sigma_rate at some times, each of the times' shape and dtype."""

    sigma: Tensor
    sigma_rate: Tensor


@dataclass(frozen=True)
class LogLinearSchedule:
    """sigma = -log(1 - (1 - eps) t): a token survives until t with probability 1 - (1 - eps) t."""

    eps: float = 1e-3

    def __call__(self, t: Tensor) -> NoiseLevel:
        """Noise at times t of any shape, in t's dtype."""
        sigma = -torch.log1p(-(1 - self.eps) * t)
        sigma_rate = (1 - self.eps) / (1 - (1 - self.eps) * t)
        return NoiseLevel(sigma, sigma_rate)


@dataclass(frozen=True)
class GeometricSchedule:
    """sigma = sigma_min^(1 - t) sigma_max^t."""

    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def __call__(self, t: Tensor) -> NoiseLevel:
        """Noise at times t of any shape, in t's dtype."""
        log_ratio = math.log(self.sigma_max) - math.log(self.sigma_min)
        sigma = self.sigma_min ** (1 - t) * self.sigma_max**t
        sigma_rate = sigma * log_ratio
        return NoiseLevel(sigma, sigma_rate)


def make_schedule(
    name: str, *, eps: float = 1e-3, sigma_min: float = 1e-4, sigma_max: float = 20.0
) -> LogLinearSchedule | GeometricSchedule:
    """The schedule of a name; each takes what concerns it.

    Raises:
        ValueError: the name is not loglinear or geometric.
    """
    schedules = {"loglinear": LogLinearSchedule(eps), "geometric": GeometricSchedule(sigma_min, sigma_max)}
    if name not in schedules:
        raise ValueError(f"noise schedule {name!r} does not exist; choose one of {', '.join(schedules)}")
    return schedules[name]
