"""A toy small enough to write every law down: 3 tokens at 3 positions, 27 sequences.

Two things are exact here: the scores of every state at any noise, and the law of what a sampler gives in T steps with
them. The second multiplies transition matrices over all states; each is a product over the positions of categorical
probabilities from the graphs' dense formulas, which the golden values of the published code cover. The samplers go
another way: sums of scores, a floor, one uniform number for both whether to leave and where to.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sedd_megatron.diffusion import SAMPLERS, AbsorbingGraph, LogLinearSchedule, NoiseLevel, UniformGraph
from sedd_megatron.diffusion.score_reader import Asked, ChunkLaw, LogScoreFn, ScoreFn, Scores, answers
from tests.diffusion.laws import chi_squared_p_value

TOKENS, LENGTH = 3, 3
GRAPHS = {"absorb": AbsorbingGraph(TOKENS), "uniform": UniformGraph(TOKENS)}
# At t = 1 the uniform graph starts from independent uniform tokens, and the model's own law there is that only up to
# exp(-sigma) = eps: with the default 1e-3 the exact law of many steps would stop short of LAW by about as much.
SCHEDULES = {"absorb": LogLinearSchedule(), "uniform": LogLinearSchedule(eps=1e-5)}
CASES = [(name, sampler) for name, graph in GRAPHS.items() for sampler in SAMPLERS
         if isinstance(graph, SAMPLERS[sampler].graphs)]  # fmt: skip


def _law() -> Tensor:
    """The third token is mostly the sum of the first two: any two positions say little, all three much."""
    first = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    second = torch.tensor([[0.5, 0.3, 0.2], [0.3, 0.5, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64)
    third = torch.full((TOKENS, TOKENS, TOKENS), 0.15, dtype=torch.float64)
    for a, b in itertools.product(range(TOKENS), repeat=2):
        third[a, b, (a + b) % TOKENS] = 0.7
    return first[:, None, None] * second[:, :, None] * third


LAW = _law()  # [3, 3, 3] float64, all positive


def all_states(graph: AbsorbingGraph | UniformGraph) -> Tensor:
    """[M, S] int64, M = num_states ** S, in the order of `state_number`."""
    return torch.tensor(list(itertools.product(range(graph.num_states), repeat=LENGTH)))


def state_number(x: Tensor, graph: AbsorbingGraph | UniformGraph) -> Tensor:
    """[..., S] -> [...] int64, from 0 to M - 1."""
    return (x * torch.tensor([graph.num_states**k for k in reversed(range(LENGTH))])).sum(-1)


def law_of_states(graph: AbsorbingGraph | UniformGraph, law: Tensor = LAW) -> Tensor:
    """law [3, 3, 3] as probabilities of all states [M]: 0 where one is masked."""
    missing = graph.num_states - TOKENS
    return F.pad(law, (0, missing) * LENGTH).flatten()


def conditional_law(fixed: dict[int, int]) -> Tensor:
    """LAW given tokens {position: token}; [3, 3, 3]."""
    law = torch.zeros_like(LAW)
    where = tuple(fixed.get(position, slice(None)) for position in range(LENGTH))
    law[where] = LAW[where]
    return law / law.sum()


def total_variation(law: Tensor, other: Tensor) -> float:
    return (law - other).abs().sum().item() / 2


def p_value_of(samples: Tensor, law: Tensor, graph: AbsorbingGraph | UniformGraph) -> float:
    """Chi-squared of samples [B, k S], k copies of the toy in each row, under probabilities of all states [M]."""
    counts = torch.bincount(state_number(samples.view(-1, LENGTH), graph), minlength=len(law))
    return chi_squared_p_value(counts, law)


def marginal_law(graph: AbsorbingGraph | UniformGraph, sigma: Tensor) -> Tensor:
    """p_t of all states at noise sigma [K], summed over the clean sequences; [K, N, N, N]."""
    law = graph.transition_probs(torch.arange(TOKENS).expand(len(sigma), -1), sigma.double())
    return torch.einsum("abc,kax,kby,kcz->kxyz", LAW, law, law, law)


def exact_log_scores(graph: AbsorbingGraph | UniformGraph, sigma: Tensor) -> Tensor:
    """log p_t(x with y at position i) / p_t(x) of all states at noise sigma [K]; [K, M, S, N] float64."""
    law = marginal_law(graph, sigma).log()
    # The axis of position i is y's, and x's own token there makes no difference to the numerator.
    ratios = [law.movedim(1 + i, -1).unsqueeze(1 + i) - law[..., None] for i in range(LENGTH)]
    return torch.stack(torch.broadcast_tensors(*ratios), dim=-2).flatten(1, LENGTH)


def exact_log_score_fn(graph: AbsorbingGraph | UniformGraph) -> LogScoreFn:
    """A log_score_fn of LAW, or of its first S positions, each row at a noise of its own, by another way than the
    tables: log of p_t(x with y at position i) / p_t(x), both summed over the clean sequences.
    """

    def log_score(x: Tensor, sigma: Tensor) -> Tensor:
        batch, length = x.shape
        sequences = torch.tensor(list(itertools.product(range(TOKENS), repeat=length)))
        probs = LAW.sum(list(range(length, LENGTH))).flatten() if length < LENGTH else LAW.flatten()
        clean = len(sequences)
        law = graph.transition_probs(sequences.repeat(batch, 1), sigma.double().repeat_interleave(clean))
        law = law.view(batch, clean, length, -1)
        at_x = law.gather(-1, x[:, None, :, None].expand(-1, clean, -1, 1))[..., 0]
        rest = torch.stack([at_x[..., [j for j in range(length) if j != i]].prod(-1) for i in range(length)], dim=-1)
        joint = torch.einsum("n,bni,bnis->bis", probs, rest, law)
        marginal = (probs * at_x.prod(-1)).sum(-1)
        return (joint / marginal[:, None, None]).log().clamp_min(-80.0)

    return log_score


class ExactScores:
    """A log_score_fn of rows of k S positions: k copies of the toy, each independent of the others."""

    def __init__(self, graph: AbsorbingGraph | UniformGraph) -> None:
        self.graph = graph
        self.levels = torch.empty(0)
        self.tables = torch.empty(0, graph.num_states**LENGTH, LENGTH, graph.num_states, dtype=torch.float64)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        rows = self.rows_of(sigma)[:, None]
        return self.tables[rows, state_number(x.view(len(x), -1, LENGTH), self.graph)].flatten(1, 2)

    def rows_of(self, sigma: Tensor) -> Tensor:
        """Where each sigma [B] has its table; tables of noise that is new are made."""
        new = sigma[~torch.isin(sigma, self.levels)].unique()
        if len(new) > 0:
            self.levels, order = torch.cat([self.levels, new]).sort()
            self.tables = torch.cat([self.tables, exact_log_scores(self.graph, new)])[order]
        return torch.searchsorted(self.levels, sigma)


def independent_scores(probs: Tensor, chunk_rows: int = 64) -> ScoreFn:
    """A ScoreFn of the absorbing graph where every token is drawn from probs [V], whatever the others are."""

    def score_fn(x_t: Tensor, sigma: Tensor, asked: Asked, *laws: ChunkLaw | None) -> Tensor:
        levels, level = sigma.unique(return_inverse=True)
        rows = probs / torch.expm1(levels)[:, None].to(probs.dtype)

        def scores_of(part: slice | Tensor) -> Scores:
            which = level[asked.sequence[part]]
            # A view where all rows are the same: memory does not grow with the rows, and the cache keeps it.
            return Scores(rows.expand(len(which), -1) if len(levels) == 1 else rows[which])

        return answers(scores_of, torch.empty_like(asked.index), chunk_rows, *laws)

    return score_fn


class Steps(NamedTuple):
    """T steps of a sampler, of all states: B = T M rows."""

    graph: AbsorbingGraph | UniformGraph
    now: NoiseLevel  # [B]
    later: NoiseLevel  # [B]
    delta_t: Tensor  # [B]
    states: Tensor  # [B, S]
    log_score: Tensor  # [B, S, N] at `now`
    later_log_score: Tensor  # [B, S, N]
    corrector_strength: float


def _steps(graph, schedule, times: Tensor, corrector_strength: float) -> Steps:
    states = all_states(graph)
    rows = [level.repeat_interleave(len(states)) for level in (times[:-1], times[1:])]
    now, later = (schedule(level) for level in rows)
    log_score, later_log_score = (
        exact_log_scores(graph, schedule(level).sigma).flatten(0, 1) for level in (times[:-1], times[1:])
    )
    states = states.repeat(len(times) - 1, 1)
    return Steps(graph, now, later, rows[0] - rows[1], states, log_score, later_log_score, corrector_strength)


def _euler(steps: Steps) -> Tensor:
    rate_time = (steps.delta_t * steps.now.sigma_rate)[:, None, None]
    stay = F.one_hot(steps.states, steps.graph.num_states)
    return stay + rate_time * steps.graph.reverse_rate(steps.log_score, steps.states)


def _analytic(steps: Steps) -> Tensor:
    delta_sigma = steps.now.sigma - steps.later.sigma
    return steps.graph.analytic_step_probs(steps.log_score, steps.states, delta_sigma)


def _ancestral(steps: Steps) -> Tensor:
    """A mask stays with probability p(masked later) / p(masked now); its token is in the scores' proportion."""
    masked_now, masked_later = 1 - torch.exp(-steps.now.sigma), 1 - torch.exp(-steps.later.sigma)
    stay = (masked_later / masked_now)[:, None, None]
    mask = steps.graph.mask_token_id
    token = steps.log_score[..., :mask].softmax(-1) * (1 - stay)
    return _at_masks(steps, torch.cat([token, stay.expand(token.shape[0], LENGTH, 1)], dim=-1))


def _denoise(steps: Steps) -> Tensor:
    """The Tweedie step over all the noise that is left, and no mask (as published)."""
    probs = steps.graph.analytic_step_probs(steps.log_score, steps.states, steps.now.sigma)
    if steps.graph.mask_token_id is not None:
        probs = probs.index_fill(-1, torch.tensor([steps.graph.mask_token_id]), 0.0)
    return probs


def _at_masks(steps: Steps, probs: Tensor) -> Tensor:
    masked = (steps.states == steps.graph.mask_token_id)[..., None]
    return torch.where(masked, probs, F.one_hot(steps.states, steps.graph.num_states).double())


def _product(steps: Steps, probs: Tensor, free: Tensor) -> Tensor:
    """Transition matrices [T, M, M] of positions that move by themselves, by weights [B, S, N]."""
    probs = probs.clamp_min(0)
    probs = probs / probs.sum(-1, keepdim=True)
    probs = torch.where(free[:, None], probs, F.one_hot(steps.states, steps.graph.num_states).double())
    matrix = functools.reduce(lambda left, right: (left[..., None] * right[:, None]).flatten(1), probs.unbind(1))
    return matrix.view(-1, matrix.shape[1], matrix.shape[1])


def _corrections(steps: Steps, free: Tensor) -> Tensor:
    """Transition matrices [T, M, M] of the Gibbs corrector at the later noise."""
    resampled = (steps.corrector_strength * steps.delta_t).clamp_max(1)[:, None, None]
    if steps.graph.mask_token_id is None:
        # The law given the others: scores with the 1 of the position's own token among them.
        stay = F.one_hot(steps.states, steps.graph.num_states)
        probs = (1 - resampled) * stay + resampled * steps.later_log_score.softmax(-1)
        return _product(steps, probs, free)
    return _absorbing_corrections(steps, resampled[:, 0, 0], free)


def _absorbing_corrections(steps: Steps, resampled: Tensor, free: Tensor) -> Tensor:
    """First some tokens are masked anew; then those that were masks before take a token, knowing which are left."""
    graph, mask = steps.graph, steps.graph.mask_token_id
    states = all_states(graph)
    num_states = len(states)
    masked_probability = (1 - torch.exp(-steps.later.sigma)).view(-1, num_states)[:, 0]
    resampled = resampled.view(-1, num_states)[:, 0]
    to_mask, to_token = resampled * masked_probability, resampled * (1 - masked_probability)
    token_law = steps.later_log_score[..., :mask].softmax(-1).view(-1, num_states, LENGTH, TOKENS)
    token_law = F.pad(token_law, (0, 1))
    before, after = states[:, None], states[None]
    was_masked = before == mask
    seen = state_number(torch.where(was_masked, mask, after), graph)  # [M, M], what the network is shown
    matrix = torch.ones(len(resampled), num_states, num_states, dtype=torch.float64)
    for i in range(LENGTH):
        old, new = before[..., i].expand(num_states, -1), after[..., i].expand(num_states, -1)
        stays = (old == new).double()
        from_token = torch.where(new == mask, to_mask[:, None, None], (1 - to_mask)[:, None, None] * stays)
        from_mask = torch.where(
            new == mask, (1 - to_token)[:, None, None], to_token[:, None, None] * token_law[:, seen, i, new]
        )
        matrix *= torch.where(old == mask, from_mask, from_token) if free[i] else stays
    return matrix


STEP_PROBS = {
    "euler": _euler,
    "analytic": _analytic,
    "ancestral": _ancestral,
    "event-driven": _ancestral,
    "predictor-corrector": _analytic,
}


def exact_law(
    graph: AbsorbingGraph | UniformGraph,
    schedule,
    sampler: str,
    num_steps: int,
    *,
    time_grid: str = "uniform",
    denoise: bool = True,
    time_eps: float = 1e-5,
    corrector_strength: float = 1.0,
    fixed: dict[int, int] | None = None,
) -> Tensor:
    """The law [M] of what `num_steps` steps with exact scores give, with tokens {position: token} given."""
    fixed = fixed or {}
    k = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    times = time_eps + (1 - time_eps) * {"uniform": 1 - k, "cosine": torch.cos(k * math.pi / 2)}[time_grid]
    free = torch.tensor([position not in fixed for position in range(LENGTH)])
    steps = _steps(graph, schedule, times, corrector_strength)
    matrices = _product(steps, STEP_PROBS[sampler](steps), free)
    if sampler == "predictor-corrector":
        matrices = matrices @ _corrections(steps, free)
    matrices = list(matrices)
    if denoise:
        last = _steps(graph, schedule, times[-1:].repeat(2), corrector_strength)
        matrices += list(_product(last, _denoise(last), free))
    law = _start(graph, fixed)
    for matrix in matrices:
        law = law @ matrix
    return law


def _start(graph: AbsorbingGraph | UniformGraph, fixed: dict[int, int]) -> Tensor:
    """All masked, or uniform; [M]."""
    states, law = all_states(graph), torch.ones(graph.num_states**LENGTH, dtype=torch.float64)
    for position in range(LENGTH):
        if position in fixed:
            law *= states[:, position] == fixed[position]
        elif graph.mask_token_id is not None:
            law *= states[:, position] == graph.mask_token_id
    return law / law.sum()
