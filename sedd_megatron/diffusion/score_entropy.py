"""Score entropy (arXiv 2310.16834, equation 5) as an affine form in three sums over the vocabulary.

For x_t with log-scores s_y, both graphs' losses are

    c_exp * A + c_log * L + c_target * a + constant
    A = sum_{y != x_t} exp(s_y),  L = sum_{y != x_t} s_y,  a = s_{x_0}

with coefficients that depend on (sigma, x_t, x_0) alone. So the vocabulary may be split anywhere, and the gradient at
y is c_exp * exp(s_y) + c_log + c_target * [y = x_0], which needs nothing but s_y.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ScoreSums(NamedTuple):
    """The three sums of each position, [B, S]."""

    exp_sum: Tensor
    log_sum: Tensor
    target: Tensor


class ScoreEntropyCoefficients(NamedTuple):
    """What multiplies the three sums, and what is added, [B, S] each."""

    exp_sum: Tensor
    log_sum: Tensor
    target: Tensor
    constant: Tensor

    def apply(self, sums: ScoreSums) -> Tensor:
        """Score entropy [B, S] in nats, not yet times sigma_rate."""
        return self.exp_sum * sums.exp_sum + self.log_sum * sums.log_sum + self.target * sums.target + self.constant


def score_sums(
    log_score: Tensor, x_t: Tensor, x_0: Tensor, first_state: int = 0, num_states: int | None = None
) -> ScoreSums:
    """The sums over the states in this shard of the vocabulary.

    Args:
        log_score: [B, S, N], floating: the states first_state .. first_state + N - 1.
        x_t, x_0: [B, S] int64, corrupted and clean tokens.
        first_state: the state of column 0.
        num_states: columns of states from here on are padding and do not count; none if not given.

    Returns:
        ScoreSums in log_score's dtype; target is 0 where x_0 is not in the shard or equals x_t.
    """
    states = torch.arange(first_state, first_state + log_score.shape[-1], device=log_score.device)
    counts = states != x_t[..., None]
    if num_states is not None:
        counts &= states < num_states
    # Left out before the exp and not after it: an infinite exp times 0 would be NaN.
    counted = log_score.masked_fill(~counts, -torch.inf)
    is_target = counts & (states == x_0[..., None])
    return ScoreSums(
        exp_sum=counted.exp().sum(-1),
        log_sum=log_score.masked_fill(~counts, 0.0).sum(-1),
        target=log_score.masked_fill(~is_target, 0.0).sum(-1),
    )


def weighted_loss(score_entropy: Tensor, sigma_rate: Tensor) -> Tensor:
    """The integrand of the bound, sigma_rate * score entropy (equation 10): [B, S] from [B, S] and [B]."""
    return sigma_rate[:, None] * score_entropy
