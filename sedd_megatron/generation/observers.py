"""What watches samples being made: a progress bar, text that appears in the terminal, a trace for a page."""

import shutil
import time
import unicodedata
from collections.abc import Iterator, Sequence
from typing import IO

from tqdm import tqdm

from sedd_megatron.data.tokenizers import Tokenizer
from sedd_megatron.diffusion.sampling import SamplingProgress
from sedd_megatron.errors import KEPT_CONTROLS, output_errors, printable
from sedd_megatron.generation.engine import GeneratedText, decode_states
from sedd_megatron.generation.requests import Frame
from sedd_megatron.generation.trace import Trace

SECONDS_BETWEEN_FRAMES = 0.1
LINES_WITHOUT_TERMINAL = 10


class ProgressBar:
    """A bar of the rounds of each batch, on a terminal only."""

    def __init__(self) -> None:
        self.bar = None

    def begin(self, frames: Sequence[Frame], num_blocks: int) -> None:
        """A bar of its own for each batch."""
        numbers = [frame.sample for frame in frames]
        self.description = f"samples {min(numbers)} to {max(numbers)}"
        self.num_blocks = num_blocks

    def on_round(self, progress: SamplingProgress, rows: Sequence[int], block: int, start: int) -> None:
        """One round on; the first of a block tells how many it has."""
        if progress.round == 0:
            self._close()
            suffix = f", block {block + 1}/{self.num_blocks}" if self.num_blocks > 1 else ""
            self.bar = tqdm(
                total=progress.num_rounds, desc=self.description + suffix, unit="step", leave=False, disable=None
            )
        else:
            self.bar.update()

    def end(self, texts: Sequence[GeneratedText]) -> None:
        """Take the bar away."""
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class StreamPrinter:
    """The batch's texts as they are, again and again in one place of a terminal; elsewhere ten times one below the
    other.
    """

    def __init__(self, tokenizer: Tokenizer, output: IO[str]) -> None:
        self.tokenizer, self.output = tokenizer, output
        self.is_terminal = output.isatty()

    def begin(self, frames: Sequence[Frame], num_blocks: int) -> None:
        """Nothing is shown yet."""
        self.frames, self.num_blocks = frames, num_blocks
        # None where a later block is still to come.
        self.states: list[list[int | None]] = [
            [t if given else None for t, given in zip(frame.tokens, frame.given, strict=True)] for frame in frames
        ]
        self.drawn_lines, self.last_drawn = 0, 0.0

    def on_round(self, progress: SamplingProgress, rows: Sequence[int], block: int, start: int) -> None:
        """Draw, unless the eye could not follow."""
        is_last = progress.round == progress.num_rounds
        if self.is_terminal:
            if not is_last and time.monotonic() - self.last_drawn < SECONDS_BETWEEN_FRAMES:
                return
        elif not is_last and progress.round % max(progress.num_rounds // LINES_WITHOUT_TERMINAL, 1):
            return
        for row, states in zip(rows, progress.states.tolist(), strict=True):
            self.states[row][start : start + len(states)] = states
        title = f"step {progress.round}/{progress.num_rounds}"
        if self.num_blocks > 1:
            title += f" of block {block + 1}/{self.num_blocks}"
        self._draw(title)

    def end(self, texts: Sequence[GeneratedText]) -> None:
        """Leave a terminal as it was: the finished texts come after."""
        with output_errors():
            self._erase()
            self.output.flush()

    def _draw(self, title: str) -> None:
        lines = [f"--- {title} ---"]
        for frame, states in zip(self.frames, self.states, strict=True):
            text = decode_states(self.tokenizer, [state for state in states if state is not None])
            lines += [f"sample {frame.sample}: {text}" if len(self.frames) > 1 else text]
        text = printable("\n".join(lines), kept=KEPT_CONTROLS)
        with output_errors():
            if self.is_terminal:
                self._erase()
                text = self._fitting(text)
                self.drawn_lines = text.count("\n") + 1
            self.output.write(text + "\n")
            self.output.flush()
        self.last_drawn = time.monotonic()

    def _fitting(self, text: str) -> str:
        """Lines cut at the terminal's width, and no more of them than it has: the cursor cannot go further back."""
        columns, rows = shutil.get_terminal_size()
        lines = [piece for line in text.expandtabs().split("\n") for piece in _pieces_of(line, columns - 1)]
        return "\n".join(lines[: rows - 2])

    def _erase(self) -> None:
        if self.is_terminal and self.drawn_lines:
            # To the first of the lines drawn, and clear from there.
            self.output.write(f"\x1b[{self.drawn_lines}F\x1b[J")
        self.drawn_lines = 0


def _pieces_of(line: str, columns: int) -> Iterator[str]:
    """The line in pieces that a terminal shows in `columns` columns each."""
    piece, taken = "", 0
    for character in line:
        shown = character if character.isprintable() else "\ufffd"
        width = 2 if unicodedata.east_asian_width(shown) in "WF" else 1
        if taken + width > columns:
            yield piece
            piece, taken = "", 0
        piece, taken = piece + shown, taken + width
    yield piece


class TraceRecorder:
    """Which position changed at which step, of every sample."""

    def __init__(self, steps_per_block: int) -> None:
        self.steps_per_block = steps_per_block
        self.traces: list[Trace] = []

    def begin(self, frames: Sequence[Frame], num_blocks: int) -> None:
        """Blank records."""
        self.frames, self.num_blocks = frames, num_blocks
        self.now: list[list[int | None]] = [
            [t if given else None for t, given in zip(frame.tokens, frame.given, strict=True)] for frame in frames
        ]
        self.initial = [list(states) for states in self.now]
        self.changes: list[list[tuple[int, int, int]]] = [[] for _ in frames]
        self.calls: list[list[int]] = [[] for _ in frames]
        self.num_calls = [0] * len(frames)

    def on_round(self, progress: SamplingProgress, rows: Sequence[int], block: int, start: int) -> None:
        """Compare with what was there before."""
        table = zip(rows, progress.states.tolist(), progress.steps.tolist(), progress.calls.tolist(), strict=True)
        for row, states, step, calls in table:
            at = block * self.steps_per_block + step
            if progress.round == 0:
                self.num_calls[row] = 0
            elif calls > self.num_calls[row]:
                self.calls[row].append(at)
                self.num_calls[row] = calls
            self._compare(row, states, at, start)

    def end(self, texts: Sequence[GeneratedText]) -> None:
        """Keep what the page needs."""
        for row, text in enumerate(texts):
            self.traces.append(
                Trace(
                    f"sample {text.sample}",
                    self.num_blocks * self.steps_per_block,
                    self.initial[row],
                    self.changes[row],
                    self.frames[row].given,
                    self.calls[row],
                )
            )

    def _compare(self, row: int, states: Sequence[int], at: int, start: int) -> None:
        now = self.now[row]
        for position, state in enumerate(states, start=start):
            if now[position] == state:
                continue
            now[position] = state
            if at == 0:
                self.initial[row][position] = state
            else:
                self.changes[row].append((at, position, state))
