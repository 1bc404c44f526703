"""From frames to texts: batches, long texts block by block, the end of a document."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sedd_megatron.data.tokenizers import Tokenizer
from sedd_megatron.diffusion import AbsorbingGraph, GeometricSchedule, LogLinearSchedule, UniformGraph
from sedd_megatron.diffusion.sampling import Draws, SamplingProgress, SamplingSettings, run_sampler
from sedd_megatron.diffusion.score_reader import ScoreFn, ScoresNotFiniteError
from sedd_megatron.errors import scores_not_finite
from sedd_megatron.generation.requests import Frame


@dataclass(frozen=True)
class GeneratedText:
    """A finished sample."""

    sample: int
    seed: int
    text: str
    tokens: list[int]
    given: list[bool]  # of the tokens, which were given
    ended: bool  # at the tokenizer's end of document, which is left out
    network_calls: int
    seconds: float  # the batch's time over its number of samples
    line: int | None  # of the file of requests

    def record(self) -> dict[str, Any]:
        """As written to --output."""
        fields = ("sample", "seed", "text", "tokens", "ended", "network_calls", "seconds")
        record = {name: getattr(self, name) for name in fields}
        return record if self.line is None else record | {"line": self.line}


class Observer(Protocol):
    """Whoever watches a batch being made: a progress bar, a terminal, a trace."""

    def begin(self, frames: Sequence[Frame], num_blocks: int) -> None:
        """A batch begins."""

    def on_round(self, progress: SamplingProgress, rows: Sequence[int], block: int, start: int) -> None:
        """After each round of a block, and before its first (round 0): the progress of the batch's `rows`, whose
        first position is number `start` of the text.
        """

    def end(self, texts: Sequence[GeneratedText]) -> None:
        """The batch is finished."""


@dataclass(frozen=True)
class TextEngine:
    """A network and everything that stands between it and text."""

    score_fn: ScoreFn
    graph: AbsorbingGraph | UniformGraph
    schedule: LogLinearSchedule | GeometricSchedule
    tokenizer: Tokenizer
    seq_length: int
    device: torch.device

    def make(
        self,
        frames: Sequence[Frame],
        settings: SamplingSettings,
        stop_at_eod: bool = True,
        observers: Sequence[Observer] = (),
    ) -> list[GeneratedText]:
        """The samples of frames of one length, in one batch.

        A text longer than the trained length is made in blocks, each beginning with the second half of the one before:
        that is an approximation, since a block does not see what lies behind it. Where the tokenizer has an end of
        document, a text is cut at the first that comes after all given tokens, and gets no further blocks.

        Raises:
            UserError: the network's scores are not finite.
        """
        begin = time.monotonic()
        states = torch.tensor([frame.tokens for frame in frames], device=self.device)
        given = torch.tensor([frame.given for frame in frames], device=self.device)
        known, calls = given.clone(), torch.zeros(len(frames), dtype=torch.long)
        eod_id = self.tokenizer.eod_id if stop_at_eod else None
        windows = block_windows(states.shape[1], self.seq_length)
        for observer in observers:
            observer.begin(frames, len(windows))
        ends, rows = [states.shape[1]] * len(frames), list(range(len(frames)))
        for block, window in enumerate(windows):

            def on_round(progress: SamplingProgress, rows: list[int] = rows, block: int = block) -> None:
                for observer in observers:
                    observer.on_round(progress, rows, block, windows[block].start)

            draws = Draws([frames[i].seed for i in rows], [frames[i].sample for i in rows], window.start)
            try:
                result = run_sampler(
                    self.score_fn, self.graph, self.schedule, settings, draws, states[rows, window],
                    known[rows, window], on_round if observers else None,
                )  # fmt: skip
            except ScoresNotFiniteError as error:
                number = frames[rows[error.sequence]].sample
                raise scores_not_finite(f"sample {number}, round {error.round}", error.sigma) from error
            states[rows, window], known[rows, window] = result.states, result.states < self.graph.num_tokens
            calls[rows] += result.calls
            for i in rows:
                ends[i] = end_of_document(states[i, : window.stop].tolist(), frames[i].given, eod_id)
            # Every rank finds the same ends: they all have the same states.
            rows = [i for i in rows if ends[i] == window.stop]
            if not rows:
                break
        seconds = (time.monotonic() - begin) / len(frames)
        texts = self._texts(frames, states, given, ends, calls, seconds)
        for observer in observers:
            observer.end(texts)
        return texts

    def _texts(
        self, frames: Sequence[Frame], states: Tensor, given: Tensor, ends: list[int], calls: Tensor, seconds: float
    ) -> list[GeneratedText]:
        return [
            GeneratedText(
                frame.sample,
                frame.seed,
                decode_states(self.tokenizer, row[:end]),
                row[:end],
                mask[:end],
                end < len(row),
                num_calls,
                seconds,
                frame.line,
            )
            for frame, row, mask, end, num_calls in zip(
                frames, states.tolist(), given.tolist(), ends, calls.tolist(), strict=True
            )
        ]


def block_windows(length: int, seq_length: int) -> list[slice]:
    """Windows of seq_length (or of all, if it is shorter) that cover `length`, overlapping by half at least."""
    if length <= seq_length:
        return [slice(0, length)]
    last = length - seq_length
    starts = [*range(0, last, max(seq_length // 2, 1)), last]
    return [slice(start, start + seq_length) for start in starts]


def end_of_document(states: Sequence[int], given: Sequence[bool], eod_id: int | None) -> int:
    """Number of states before the first eod_id that comes after every given token; all, if there is none."""
    first_free = max((i + 1 for i, is_given in enumerate(given) if is_given), default=0)
    if eod_id is None or eod_id not in states[first_free:]:
        return len(states)
    return states.index(eod_id, first_free)


def decode_states(tokenizer: Tokenizer, states: Sequence[int]) -> str:
    """Text of a row of states; positions that are still masked are shown as a block."""
    parts, run = [], []
    for state in [*states, None]:
        if state is not None and state < tokenizer.num_tokens:
            run.append(state)
            continue
        parts.append(tokenizer.decode(run) + ("" if state is None else "\u2588"))
        run = []
    return "".join(parts)
