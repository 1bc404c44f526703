"""Greedy decoding of the absorbing graph, and whether it gives a certain text."""

import math

import torch
from torch import Tensor

from sedd_megatron.diffusion import AbsorbingGraph, GeometricSchedule, LogLinearSchedule
from sedd_megatron.diffusion.score_reader import ScoreFn, Scores, ScoresNotFiniteError, asked_positions
from sedd_megatron.diffusion.transfers import to_host


@torch.no_grad()
def greedy_gives(
    score_fn: ScoreFn,
    graph: AbsorbingGraph,
    schedule: LogLinearSchedule | GeometricSchedule,
    x_0: Tensor,
    given: Tensor,
) -> Tensor:
    """Whether greedy decoding around the given positions gives x_0: [B] bool.

    All other positions begin masked. One step fills in one: the position whose most probable token has the largest
    share of the scores, with that token. With m of L positions masked the noise is that of t = m / L, at which as many
    are expected to be. A sequence leaves with its first token that is not x_0's.

    Args:
        x_0, given: [B, S] int64 and bool.

    Raises:
        ScoresNotFiniteError: the network's scores are NaN or infinite.
    """
    x_t = x_0.masked_fill(~given, graph.mask_token_id)
    num_free = (~given).sum(1)
    gives = torch.ones(len(x_0), dtype=torch.bool, device=x_0.device)
    faulty_sigma = torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device)
    active = num_free.nonzero()[:, 0]
    while len(active) > 0:
        x, masked = x_t[active], x_t[active] == graph.mask_token_id
        sigma = schedule((masked.sum(1) / num_free[active]).double()).sigma
        _, index, asked = asked_positions(to_host(masked), x.device)
        wanted = x_0[active].flatten()[index]

        def share_if_right(scores: Scores, part: slice | Tensor, wanted: Tensor = wanted) -> Tensor:
            """The largest share of each position's scores; negative where it is not the wanted token's."""
            largest, token = scores.whole_rows(scores.values).max(-1)
            share = largest.double() / scores.sum_of(scores.values)
            # NaN over NaN or infinite scores; of finite ones that add up to infinity the share would be 0.
            share = torch.where(share > 0, share, math.nan)
            return torch.where(token == wanted[part], share, -share)

        shares = score_fn(x, sigma.float(), asked, share_if_right, dtype=torch.float64)
        by_position = torch.zeros_like(x, dtype=torch.float64).flatten().scatter(0, index, shares).view_as(x)
        first = by_position.abs().argmax(1, keepdim=True)
        # NaN is the largest of all, and its sequence leaves.
        share = by_position.gather(1, first)[:, 0]
        faulty_sigma[active] = torch.where(share.isnan(), sigma, faulty_sigma[active])
        right = share > 0
        gives[active] = right
        x_t[active] = x.scatter(1, first, x_0[active].gather(1, first))
        active = active[right & (masked.sum(1) > 1)]
    faulty = to_host(faulty_sigma).tolist()
    if any(faulty):
        sequence = next(row for row, sigma in enumerate(faulty) if sigma)
        raise ScoresNotFiniteError(sequence, faulty[sequence])
    return gives
