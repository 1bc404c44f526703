"""Where sampling stops on its way from t = 1 to the data."""

import math

import torch
from torch import Tensor


def uniform_grid(num_steps: int) -> Tensor:
    """Equal steps in t, as published: 1 - k / T; [T + 1] float64 from 1 to 0."""
    return torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)


def cosine_grid(num_steps: int) -> Tensor:
    """cos(pi k / 2T): short steps while little is known, long ones at the end (arXiv 2202.04200, section 3.2).

    [T + 1] float64 from 1 to 0.
    """
    grid = torch.cos(uniform_grid(num_steps).flip(0) * math.pi / 2)
    # cos(pi / 2) rounds to 6e-17.
    grid[-1] = 0.0
    return grid


TIME_GRIDS = {"uniform": uniform_grid, "cosine": cosine_grid}


def sampling_times(name: str, num_steps: int, time_eps: float) -> Tensor:
    """[T + 1] float64, falling from 1 to time_eps.

    Raises:
        ValueError: an unknown grid or fewer than one step.
    """
    if name not in TIME_GRIDS:
        raise ValueError(f"time grid {name!r} does not exist; choose one of {', '.join(TIME_GRIDS)}")
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps} must be at least 1")
    return time_eps + (1 - time_eps) * TIME_GRIDS[name](num_steps)
