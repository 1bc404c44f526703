"""How samplers read the network: only the positions that are asked for, only of sequences that have any."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# (x_t [B, S] int64, sigma [B] float32) -> log_score [B, S, num_states]
LogScoreFn = Callable[[Tensor, Tensor], Tensor]


class Scores(NamedTuple):
    """Scores of C positions for the tokens other than their own.

    On a tensor-parallel rank `values` has this rank's columns, and the functions are collectives (as in
    model/score_network.py).
    """

    values: Tensor  # [C, num_tokens] floating, 0 at the position's own token
    add_shards: Callable[[Tensor], Tensor] = lambda sums: sums  # [C] of this rank's columns -> [C] of all
    whole_rows: Callable[[Tensor], Tensor] = lambda values: values  # [R, columns] -> [R, num_tokens]
    # For likelihoods; samplers do without. Token of each position [C] -> its log-score [C] float64, and the sum of
    # log-scores over the tokens but the position's own, [C] float64.
    log_score_at: Callable[[Tensor], Tensor] | None = None
    log_score_sum: Callable[[], Tensor] | None = None

    def sum_of(self, values: Tensor) -> Tensor:
        """Sum over the tokens of something [C, columns] made from `values`; [C] float64."""
        return self.add_shards(values.sum(-1).double())


class Positions(NamedTuple):
    """C positions that the network is asked about."""

    sequence: Tensor  # [C] int64, which of the batch
    state: Tensor  # [C] int64, x_t there
    uniform: Tensor  # [C] float64, what is left of the position's uniform number


# Called with a chunk of the positions, and with which part of them it is; gives a number for each [C].
ChunkLaw = Callable[[Scores, slice], Tensor]


class ScoreFn(Protocol):
    """A network that is asked about some positions."""

    def __call__(
        self, x_t: Tensor, sigma: Tensor, index: Tensor, law: ChunkLaw, dtype: torch.dtype = torch.long
    ) -> Tensor:
        """What the law gives for the positions index [R] into the flattened x_t [B, S], at noise sigma [B] float32.

        It may cut the positions into chunks, and it alone decides on which rank the law is called: all ranks get what
        it gave, [R] of the dtype.
        """


PositionLaw = Callable[[Scores, Positions], Tensor]


def score_fn_of(log_score_fn: LogScoreFn, num_tokens: int) -> ScoreFn:
    """A ScoreFn from a function that gives all log-scores of all positions."""

    def score_fn(x_t: Tensor, sigma: Tensor, index: Tensor, law: ChunkLaw, dtype: torch.dtype = torch.long) -> Tensor:
        own = x_t.flatten()[index, None]
        # The log-score at a position's own state is 0, and so adds nothing to the sum.
        log_score = log_score_fn(x_t, sigma).flatten(0, 1)[index].scatter(-1, own, 0.0)[:, :num_tokens]
        all_states = F.pad(log_score.exp(), (0, 1)).scatter(-1, own, 0.0)
        scores = Scores(
            all_states[:, :num_tokens],
            log_score_at=lambda tokens: log_score.gather(-1, tokens[:, None])[:, 0].double(),
            log_score_sum=lambda: log_score.sum(-1).double(),
        )
        return law(scores, slice(None)).to(dtype)

    return score_fn


class ScoreReader:
    """The network as a step function sees it; counts how often each sequence went through it."""

    def __init__(self, score_fn: ScoreFn, num_sequences: int, device: torch.device | str) -> None:
        self.score_fn = score_fn
        self.calls = torch.zeros(num_sequences, dtype=torch.long, device=device)

    def draw(self, x: Tensor, sigma: Tensor, where: Tensor, uniform: Tensor, law: PositionLaw) -> Tensor:
        """New states of the positions `where` is True, by `law`; the others stay.

        Sequences without such a position are left out of the network's batch, and it is not called for none.

        Args:
            x: [B, S] int64.
            sigma: [B] floating.
            where: [B, S] bool.
            uniform: [B, S] float64, handed to the law.

        Returns:
            [B, S] int64.
        """
        active = where.any(1).nonzero()[:, 0]
        if len(active) == 0:
            return x
        self.calls[active] += 1
        index = where[active].flatten().nonzero()[:, 0]
        positions = Positions(
            active[torch.div(index, x.shape[1], rounding_mode="floor")], x[where], uniform[where].double()
        )

        def chunk_law(scores: Scores, part: slice) -> Tensor:
            return law(scores, Positions(*(field[part] for field in positions)))

        states = self.score_fn(x[active], sigma[active].float(), index, chunk_law)
        return x.masked_scatter(where, states)
