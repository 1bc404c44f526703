"""Statistics for the law tests."""

import torch


def chi_squared_p_value(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """P(chi-squared at least this large) for counts [N] under probs [N]; cells expected below 5 are put together."""
    assert counts[probs == 0].sum() == 0, "an impossible outcome was drawn"
    expected = probs.double() * counts.sum()
    rare = expected < 5
    counts = torch.cat([counts[~rare].double(), counts[rare].double().sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    statistic = ((counts[keep] - expected[keep]) ** 2 / expected[keep]).sum()
    return torch.special.gammaincc((keep.sum().double() - 1) / 2, statistic / 2).item()
