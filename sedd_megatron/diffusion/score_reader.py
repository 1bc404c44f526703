"""How samplers read the network: only the positions that are asked for, only of sequences that have any."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sedd_megatron.diffusion.graph import AbsorbingGraph, UniformGraph
from sedd_megatron.diffusion.transfers import to_device, to_host

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


class Asked(NamedTuple):
    """R positions of a batch [B, S], in its order, as a network takes them; all int64 and on its device."""

    index: Tensor  # [R] into the flattened batch
    sequence: Tensor  # [R]
    table: Tensor  # [Q, B], the positions of each sequence; Q is the largest number of them, and 0 fills up the others
    row: Tensor  # [R], of each position in its sequence's column of the table


# Called with a chunk of the positions, and with which of all asked they are; gives a number for each [C].
ChunkLaw = Callable[[Scores, slice | Tensor], Tensor]
# What a law gives for a position whose scores are to be looked at again, and for one whose scores are no law at all.
AGAIN, NO_LAW = -1, -2
NEVER = 2**62


class ScoresNotFiniteError(FloatingPointError):
    """Scores that are NaN or infinite, or add up to such a number, or are 0 for every token where one must be taken.

    A log-score of -inf is none of these: it says that a token is impossible.

    Attributes:
        sequence: the first sequence of the batch that has such scores.
        sigma: the noise at which it had them first; of sampling, that at the round's beginning.
        round: of sampling, from 1; None outside of it.
    """

    def __init__(self, sequence: int, sigma: float, round: int | None = None) -> None:
        super().__init__(f"the scores of sequence {sequence} are not finite at sigma {sigma:.4g}")
        self.sequence, self.sigma, self.round = sequence, sigma, round


class ScoreFn(Protocol):
    """A network that is asked about some positions."""

    def __call__(
        self,
        x_t: Tensor,
        sigma: Tensor,
        asked: Asked,
        law: ChunkLaw,
        again: ChunkLaw | None = None,
        dtype: torch.dtype = torch.long,
    ) -> Tensor:
        """What the laws give for the asked positions of x_t [B, S], at noise sigma [B] float32; [R] of the dtype.

        Laws as for `answers`. It may cut the positions into chunks, and it alone decides on which rank the laws are
        called: all ranks get what they gave.
        """


PositionLaw = Callable[[Scores, Positions], Tensor]


def answers(
    scores_of: Callable[[slice | Tensor], Scores],
    given: Tensor,
    chunk_rows: int,
    law: ChunkLaw,
    again: ChunkLaw | None = None,
) -> Tensor:
    """Fill `given` [R] with what the law gives, from the scores of at most chunk_rows positions at a time.

    Where that is AGAIN, with what `again` gives instead, once all are through the law: how many they are the host has
    to wait for, and so waits once and not for every chunk.
    """
    for start in range(0, len(given), chunk_rows):
        part = slice(start, start + chunk_rows)
        given[part] = law(scores_of(part), part)
    if again is not None:
        (left,) = torch.nonzero(given == AGAIN, as_tuple=True)
        for start in range(0, len(left), chunk_rows):
            rows = left[start : start + chunk_rows]
            given[rows] = again(scores_of(rows), rows)
    return given


def asked_positions(where: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor, Asked]:
    """The positions that are True in where [B, S], for a network that is given no other sequences of the batch.

    `where` is on the host, which so knows every shape without having to wait.

    Returns:
        The sequences [A] that have a position, the positions' indices [R] into the flattened batch, and what the
        network is asked about the A sequences; all sent to the device in one copy.
    """
    length, (active,) = where.shape[1], where.any(1).nonzero(as_tuple=True)
    sequence, position = where[active].nonzero(as_tuple=True)
    counts = where.sum(1)[active]
    row = torch.arange(len(sequence)) - (counts.cumsum(0) - counts)[sequence]
    table = torch.zeros(int(counts.max()) if len(active) else 0, len(active), dtype=torch.long)
    table[row, sequence] = position
    parts = (active, active[sequence] * length + position, sequence * length + position, sequence, table, row)
    sent = to_device(torch.cat([part.flatten() for part in parts]), device).split([part.numel() for part in parts])
    active, index, *asked = (flat.view(part.shape) for flat, part in zip(sent, parts, strict=True))
    return active, index, Asked(*asked)


def score_fn_of(log_score_fn: LogScoreFn, num_tokens: int) -> ScoreFn:
    """A ScoreFn from a function that gives all log-scores of all positions."""

    def score_fn(
        x_t: Tensor,
        sigma: Tensor,
        asked: Asked,
        law: ChunkLaw,
        again: ChunkLaw | None = None,
        dtype: torch.dtype = torch.long,
    ) -> Tensor:
        own = x_t.flatten()[asked.index, None]
        # The log-score at a position's own state is 0, and so adds nothing to the sum.
        log_score = log_score_fn(x_t, sigma).flatten(0, 1)[asked.index].scatter(-1, own, 0.0)[:, :num_tokens]
        values = F.pad(log_score.exp(), (0, 1)).scatter(-1, own, 0.0)[:, :num_tokens]

        def scores_of(rows: slice | Tensor) -> Scores:
            of_rows = log_score[rows]
            return Scores(
                values[rows],
                log_score_at=lambda tokens: of_rows.gather(-1, tokens[:, None])[:, 0].double(),
                log_score_sum=lambda: of_rows.sum(-1).double(),
            )

        given = torch.empty(len(own), dtype=dtype, device=x_t.device)
        return answers(scores_of, given, max(len(own), 1), law, again)

    return score_fn


class ScoreReader:
    """The network as a step function sees it; counts how often each sequence went through it.

    Which positions are masked it keeps on the host, where nobody waits for them, as long as the host can know. Scores
    that are no law leave a position as it is and are noted on the device, for `first_fault` to read once.
    """

    def __init__(self, score_fn: ScoreFn, num_sequences: int, device: torch.device | str) -> None:
        self.score_fn, self.device = score_fn, device
        self.calls = torch.zeros(num_sequences, dtype=torch.long)
        self._changeable: Tensor | None = None
        self.round = 1  # of the loop, which counts it on
        # The round in which each sequence first met scores that are no law.
        self._faulty_round = torch.full((num_sequences,), NEVER, device=device)

    def can_change(self, graph: AbsorbingGraph | UniformGraph, x: Tensor) -> Tensor:
        """graph.can_change of the states x [B, S] that were returned last, or of the first: [B, S] bool on the host.

        Read from the device where the last call of the network left it open.
        """
        if graph.mask_token_id is None:
            return torch.ones(x.shape, dtype=torch.bool)
        if self._changeable is None:
            self._changeable = to_host(graph.can_change(x))
        return self._changeable

    def know(self, changeable: Tensor) -> None:
        """What `can_change` is from here on, if not all can: [B, S] bool on the host."""
        self._changeable = changeable

    def draw(
        self,
        x: Tensor,
        sigma: Tensor,
        where: Tensor,
        uniform: Tensor,
        law: PositionLaw,
        again: PositionLaw | None = None,
    ) -> Tensor:
        """New states of the positions `where` is True, by the laws (as `answers` calls them); the others stay.

        Sequences without such a position are left out of the network's batch, and it is not called for none.

        Args:
            x: [B, S] int64.
            sigma: [B] floating.
            where: [B, S] bool on the host.
            uniform: [B, S] float64, handed to the laws.

        Returns:
            [B, S] int64.
        """
        if not where.any():
            return x
        self._changeable = None
        self.calls += where.any(1)
        active, index, asked = asked_positions(where, self.device)
        positions = Positions(active[asked.sequence], x.flatten()[index], uniform.flatten()[index].double())

        def of_chunk(law: PositionLaw | None) -> ChunkLaw | None:
            return law and (lambda scores, rows: law(scores, Positions(*(field[rows] for field in positions))))

        states = self.score_fn(x[active], sigma[active].float(), asked, of_chunk(law), of_chunk(again))
        is_faulty = states == NO_LAW
        rounds = torch.where(is_faulty, self.round, NEVER)
        self._faulty_round.scatter_reduce_(0, positions.sequence, rounds, "amin")
        states = torch.where(is_faulty, positions.state, states)
        return x.flatten().index_copy(0, index, states).view_as(x)

    def first_fault(self) -> tuple[int, int] | None:
        """The round, from 1, and the sequence that first met scores that are no law; waits for the device."""
        rounds = to_host(self._faulty_round).tolist()
        first = min(rounds, default=NEVER)
        return None if first == NEVER else (first, rounds.index(first))
