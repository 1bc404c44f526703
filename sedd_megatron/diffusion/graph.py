"""The two noising graphs of arXiv 2310.16834, section 3.3: rates, transitions, score entropy and reverse steps.

A graph's rate matrix Q has Q[y, x] = rate of x -> y, so that columns sum to 0 and p_t = expm(sigma Q) p_0. Shapes: B
batch, S sequence, N = num_states. Everything works in the dtype it is given.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sedd_megatron.diffusion.score_entropy import ScoreEntropyCoefficients, score_sums


class StepLaw(NamedTuple):
    """Where a position goes in one reverse step, as weights: `stay` where it is, scale * max(score_y - floor, 0) at y.

    Each [R], of R positions. Few numbers per position: whether it leaves needs the sum of its scores, and only one that
    leaves needs them one by one.
    """

    scale: Tensor
    floor: Tensor | None  # None where the scores are taken as they are
    stay: Tensor


class _Graph:
    """What both graphs share: formulas in terms of their rates and coefficients."""

    num_tokens: int
    num_states: int

    def score_entropy(self, log_score: Tensor, sigma: Tensor, x_t: Tensor, x_0: Tensor) -> Tensor:
        """Score entropy of each position (equation 5 with the weights of equation 10), 0 where the score is true.

        Args:
            log_score: [B, S, num_states] floating.
            sigma: [B], total noise.
            x_t, x_0: [B, S] int64.

        Returns:
            [B, S] in nats, not yet times sigma_rate.
        """
        return self.coefficients(sigma, x_t, x_0).apply(score_sums(log_score, x_t, x_0))

    def reverse_rate(self, log_score: Tensor, x_t: Tensor) -> Tensor:
        """Rates out of x_t of the reverse process, score_y * Q[x_t, y] (equation 3).

        Returns:
            [B, S, num_states]; rows sum to 0.
        """
        rate = log_score.exp() * self._rate_into(x_t, log_score)
        rate = rate.scatter(-1, x_t[..., None], 0.0)
        return rate.scatter(-1, x_t[..., None], -rate.sum(-1, keepdim=True))

    def analytic_step_probs(self, log_score: Tensor, x_t: Tensor, delta_sigma: Tensor) -> Tensor:
        """Tweedie step (theorem 4.2): (expm(-delta_sigma Q) score)_y * expm(delta_sigma Q)[x_t, y], delta_sigma [B].

        Returns:
            [B, S, num_states], unnormalised as in the paper.
        """
        return self._staggered_score(log_score.exp(), delta_sigma) * self._transition_into(x_t, delta_sigma, log_score)

    def euler_law(self, score_sum: Tensor, rate_time: Tensor) -> StepLaw:
        """A step that stays with what rate_time * reverse_rate leaves of 1 (arXiv 2310.16834, section 4.2).

        Args:
            score_sum: [R], sum of score_y over the tokens y != x_t of positions that can change.
            rate_time: [R], sigma_rate times the step's length in t.
        """
        scale = rate_time * self.entry_rate
        # A step too long for its rate would leave less than nothing where it was.
        return StepLaw(scale, None, (1 - scale * score_sum).clamp_min(0))


@dataclass(frozen=True)
class AbsorbingGraph(_Graph):
    """Every token decays into one mask state, with number num_tokens, and stays there."""

    num_tokens: int

    @property
    def num_states(self) -> int:
        """Tokens and the mask."""
        return self.num_tokens + 1

    @property
    def mask_token_id(self) -> int:
        """The mask, the last state."""
        return self.num_tokens

    @property
    def entry_rate(self) -> float:
        """Rate into the mask from each token: what a position at the mask has in its row of Q."""
        return 1.0

    def can_change(self, x_t: Tensor) -> Tensor:
        """Which positions a reverse step may move: the masked ones; a bool of x_t's shape."""
        return x_t == self.mask_token_id

    def analytic_law(self, score_sum: Tensor, delta_sigma: Tensor) -> StepLaw:
        """`analytic_step_probs` of masked positions: expm1(delta_sigma) score_y, and 1 less their sum; each [R]."""
        scale = torch.expm1(delta_sigma)
        return StepLaw(scale, None, (1 - scale * score_sum).clamp_min(0))

    def rate_matrix(self) -> Tensor:
        """Q [N, N] float64: -1 on the diagonal of every token, 1 in the mask's row."""
        rates = -torch.eye(self.num_states, dtype=torch.float64)
        rates[self.mask_token_id] += 1
        return rates

    def transition_probs(self, x: Tensor, sigma: Tensor) -> Tensor:
        """expm(sigma Q)[:, x]: where a token x [B, S] is after noise sigma [B]; [B, S, N] in sigma's dtype."""
        survival = torch.exp(-sigma)[:, None, None]
        mask = F.one_hot(torch.full_like(x, self.mask_token_id), self.num_states)
        return F.one_hot(x, self.num_states) * survival + mask * (1 - survival)

    def corrupt_tokens(self, x_0: Tensor, sigma: Tensor, uniforms: Tensor) -> Tensor:
        """x_t [B, S] from x_0 [B, S], sigma [B] float64 and uniforms [B, 2, S] float64 (the second row is not used)."""
        is_masked = uniforms[:, 0] < -torch.expm1(-sigma)[:, None]
        return torch.where(is_masked, self.mask_token_id, x_0)

    def prior(self, uniforms: Tensor) -> Tensor:
        """States at t = 1 of uniforms' shape [B, S]: all masked."""
        return torch.full(uniforms.shape, self.mask_token_id)

    def coefficients(self, sigma: Tensor, x_t: Tensor, x_0: Tensor) -> ScoreEntropyCoefficients:
        """A - a/e + (1/e)(log(1/e) - 1) at masks, 0 elsewhere, with e = expm1(sigma); [B, S] in sigma's dtype."""
        is_masked = (x_t == self.mask_token_id).to(sigma.dtype)
        e = torch.expm1(sigma)[:, None]
        return ScoreEntropyCoefficients(
            exp_sum=is_masked,
            log_sum=torch.zeros_like(is_masked),
            target=-is_masked / e,
            constant=is_masked * (-torch.log(e) - 1) / e,
        )

    def _rate_into(self, x_t: Tensor, like: Tensor) -> Tensor:
        # Only the mask can be entered from elsewhere; the entry at x_t itself is replaced by the caller.
        return (x_t == self.mask_token_id).to(like.dtype)[..., None].expand_as(like)

    def _staggered_score(self, score: Tensor, delta_sigma: Tensor) -> Tensor:
        growth = torch.exp(delta_sigma)[:, None, None]
        staggered = score * growth
        into_mask = -torch.expm1(delta_sigma)[:, None] * score.sum(-1)
        mask = torch.full_like(into_mask, self.mask_token_id, dtype=torch.long)[..., None]
        return staggered.scatter_add(-1, mask, into_mask[..., None])

    def _transition_into(self, x_t: Tensor, delta_sigma: Tensor, like: Tensor) -> Tensor:
        survival = torch.exp(-delta_sigma).to(like.dtype)[:, None, None]
        is_masked = (x_t == self.mask_token_id)[..., None]
        return F.one_hot(x_t, self.num_states) * survival + is_masked * (1 - survival)


@dataclass(frozen=True)
class UniformGraph(_Graph):
    """Every token moves to every other at rate 1 / num_tokens; there is no state beyond the tokens."""

    num_tokens: int

    @property
    def num_states(self) -> int:
        """The tokens."""
        return self.num_tokens

    @property
    def mask_token_id(self) -> None:
        """There is no mask."""
        return None

    @property
    def entry_rate(self) -> float:
        """Rate into any state from each other one."""
        return 1 / self.num_states

    def can_change(self, x_t: Tensor) -> Tensor:
        """Which positions a reverse step may move: all; a bool of x_t's shape."""
        return torch.ones_like(x_t, dtype=torch.bool)

    def analytic_law(self, score_sum: Tensor, delta_sigma: Tensor) -> StepLaw:
        """`analytic_step_probs` cut at 0, with m = (1 - exp(-delta_sigma)) / N and A = score_sum; each [R]:

        at y: expm1(delta_sigma) / N (score_y - m (A + 1));  at x_t: (exp(-delta_sigma) + m) exp(delta_sigma)
        (1 - m (A + 1)).
        """
        m = -torch.expm1(-delta_sigma) / self.num_states
        floor = m * (score_sum + 1)
        stay = (1 + m * torch.exp(delta_sigma)) * (1 - floor)
        return StepLaw(torch.expm1(delta_sigma) / self.num_states, floor, stay.clamp_min(0))

    def rate_matrix(self) -> Tensor:
        """Q [N, N] float64: 1/N everywhere, less 1 on the diagonal."""
        return torch.full((self.num_states, self.num_states), 1 / self.num_states, dtype=torch.float64) - torch.eye(
            self.num_states, dtype=torch.float64
        )

    def transition_probs(self, x: Tensor, sigma: Tensor) -> Tensor:
        """expm(sigma Q)[:, x]: where a token x [B, S] is after noise sigma [B]; [B, S, N] in sigma's dtype."""
        move = -torch.expm1(-sigma)[:, None, None]
        return F.one_hot(x, self.num_states) * (1 - move) + move / self.num_states

    def corrupt_tokens(self, x_0: Tensor, sigma: Tensor, uniforms: Tensor) -> Tensor:
        """x_t [B, S] from x_0, sigma [B] float64 and uniforms [B, 2, S] float64: whether to move, and where to."""
        moves = uniforms[:, 0] < -torch.expm1(-sigma)[:, None]
        return torch.where(moves, self._uniform_token(uniforms[:, 1]), x_0)

    def prior(self, uniforms: Tensor) -> Tensor:
        """States at t = 1, independent and uniform, from uniforms [B, S] float64."""
        return self._uniform_token(uniforms)

    def coefficients(self, sigma: Tensor, x_t: Tensor, x_0: Tensor) -> ScoreEntropyCoefficients:
        """[B, S] in sigma's dtype, with e = expm1(sigma), D = num_states and r = e / (e + D):

        x_t = x_0:  A/D - r L/D + ((D-1)/D) r (log r - 1);  x_t != x_0:  A/D - a/e - L/D + ((-log r - 1)/r - (D-2))/D.
        """
        D = self.num_states
        e = torch.expm1(sigma)[:, None]
        # The published 1 - D / (e + D) cancels in float32 and gives logarithms of 0 for most vocabularies.
        r = e / (e + D)
        unmoved = x_t == x_0
        constant_unmoved = (D - 1) / D * r * (torch.log(r) - 1)
        constant_moved = ((-torch.log(r) - 1) / r - (D - 2)) / D
        return ScoreEntropyCoefficients(
            exp_sum=torch.full_like(e, 1 / D).expand(x_t.shape),
            log_sum=torch.where(unmoved, -r / D, -1 / D),
            target=torch.where(unmoved, 0.0, -1 / e),
            constant=torch.where(unmoved, constant_unmoved, constant_moved),
        )

    def _uniform_token(self, uniforms: Tensor) -> Tensor:
        # The product may round up to num_tokens itself.
        return (uniforms * self.num_tokens).long().clamp_max(self.num_tokens - 1)

    def _rate_into(self, x_t: Tensor, like: Tensor) -> Tensor:
        return torch.full_like(like, 1 / self.num_states)

    def _staggered_score(self, score: Tensor, delta_sigma: Tensor) -> Tensor:
        growth = torch.exp(delta_sigma)[:, None, None]
        return score * growth - torch.expm1(delta_sigma)[:, None, None] / self.num_states * score.sum(-1, keepdim=True)

    def _transition_into(self, x_t: Tensor, delta_sigma: Tensor, like: Tensor) -> Tensor:
        # Q is symmetric, and so are its exponentials.
        return self.transition_probs(x_t, delta_sigma.to(like.dtype))


def make_graph(name: str, num_tokens: int) -> AbsorbingGraph | UniformGraph:
    """The graph of a name.

    Raises:
        ValueError: the name is not absorb or uniform.
    """
    graphs = {"absorb": AbsorbingGraph, "uniform": UniformGraph}
    if name not in graphs:
        raise ValueError(f"graph {name!r} does not exist; choose one of {', '.join(graphs)}")
    return graphs[name](num_tokens)


class _ForGraphs(Protocol):
    graphs: tuple[type, ...]


Choice = TypeVar("Choice", bound=_ForGraphs)


def find_for_graph(choices: dict[str, Choice], name: str, graph: AbsorbingGraph | UniformGraph, what: str) -> Choice:
    """The choice of a name that is for this graph; `what` opens the message of an error.

    Raises:
        ValueError: there is none, or it is not for this graph.
    """
    fitting = ", ".join(known for known, choice in choices.items() if isinstance(graph, choice.graphs))
    if name not in choices:
        raise ValueError(f"{what} {name!r} does not exist; choose one of {fitting}")
    if not isinstance(graph, choices[name].graphs):
        raise ValueError(f"{what} {name!r} is not for the {type(graph).__name__}; choose one of {fitting}")
    return choices[name]
