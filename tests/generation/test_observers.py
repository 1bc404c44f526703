"""What watches a text being made shows what was there: a trace against another observer, a stream on a terminal that is
played by a few lines of Python.
"""

import dataclasses
import io
import re
import unicodedata
from collections.abc import Sequence

import pytest

from sedd_megatron.data.tokenizers import CharTokenizer
from sedd_megatron.diffusion import SamplingSettings
from sedd_megatron.generation import observers
from sedd_megatron.generation.observers import StreamPrinter, TraceRecorder
from sedd_megatron.generation.requests import TextRequest
from sedd_megatron.generation.trace import Trace
from tests.generation.toy import (
    CASES,
    LETTERS,
    Watcher,
    alphabet,
    any_letters,
    engine_of,
    frames,
    scripts,
)

REQUESTS = {
    "one block": (TextRequest(infill="a[MASK*3]b[MASK*2]c", num_samples=3),),
    "blocks": (TextRequest(infill="a[MASK*12]b[MASK*4]c[MASK]", num_samples=2), TextRequest(length=20, seed=4)),
    "all given": (TextRequest(prompt="abcdefgh", num_samples=2),),
}


def replay(trace: Trace, step: int) -> list[int | None]:
    states = list(trace.initial)
    for when, position, state in trace.changes:
        if when <= step:
            assert states[position] != state
            states[position] = state
    return states


def recorder_of(settings: SamplingSettings) -> TraceRecorder:
    return TraceRecorder(settings.num_steps + settings.denoise)


@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize("wanted", REQUESTS)
@pytest.mark.parametrize(("graph", "sampler"), CASES)
def test_a_trace_replays_to_what_was_there_after_every_step(graph, sampler, wanted, denoise):
    settings = SamplingSettings(sampler=sampler, num_steps=7, denoise=denoise, corrector_strength=4.0)
    recorder, watcher, made = recorder_of(settings), Watcher(settings), frames(*REQUESTS[wanted])
    engine = engine_of(any_letters, graph)
    # A batch before, whose records must not get into those of the next.
    engine.make(frames(TextRequest(num_samples=2, seed=8)), settings, observers=[recorder])
    texts = engine.make(made, settings, observers=[recorder, watcher])
    traces = recorder.traces[2:]
    assert [trace.title for trace in traces] == [f"sample {frame.sample}" for frame in made]
    for row, (trace, frame, text) in enumerate(zip(traces, made, texts, strict=True)):
        assert trace.num_steps == watcher.num_blocks * watcher.steps_per_block
        assert tuple(trace.given) == frame.given
        assert [when for when, _, _ in trace.changes] == sorted(when for when, _, _ in trace.changes)
        assert all(1 <= when <= trace.num_steps for when, _, _ in trace.changes)
        assert trace.initial == watcher.history[row][0].states
        for step in range(1, trace.num_steps + 1):
            assert replay(trace, step) == watcher.states_at(row, step)
        assert replay(trace, trace.num_steps)[: len(text.tokens)] == text.tokens


@pytest.mark.parametrize(("graph", "sampler"), CASES)
def test_a_trace_has_the_steps_at_which_the_network_was_called(graph, sampler):
    settings = SamplingSettings(sampler=sampler, num_steps=7)
    for frame in frames(*REQUESTS["blocks"]):
        engine, recorder = engine_of(any_letters, graph, ends=False), recorder_of(settings)
        watcher = Watcher(settings, engine.score_fn)
        engine.make([frame], settings, observers=[recorder, watcher])
        table = zip([0, *watcher.calls], watcher.calls, watcher.history[0], strict=False)
        assert recorder.traces[0].calls == [seen.step for before, after, seen in table if after > before]
        assert watcher.calls[-1] > 0


def test_a_text_that_has_ended_has_no_more_steps_in_its_trace():
    settings = SamplingSettings(num_steps=3)
    recorder = recorder_of(settings)
    made = frames(TextRequest(prompt="a", length=12), TextRequest(prompt="b", length=12))
    engine_of(scripts("abcdefgh", "bcdefg|a")).make(made, settings, observers=[recorder])
    going_on, ended = recorder.traces
    assert replay(going_on, 8)[8:] == [LETTERS.index(letter) for letter in "efgh"]
    assert replay(ended, 8)[8:] == [None] * 4
    assert max(when for when, _, _ in ended.changes) <= 4 >= max(ended.calls)


class Terminal:
    """A screen that knows what StreamPrinter writes: characters, line feeds, n lines up, clear to the end."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.lines, self.row, self.used, self.top = [""], 0, 0, 0

    def isatty(self) -> bool:
        return True

    def flush(self) -> None: ...

    def write(self, text: str) -> None:
        for count, command, character in re.findall(r"\x1b\[(\d*)([FJ])|(.)", text, re.DOTALL):
            if command == "F":
                self.row, self.used = max(self.row - int(count), self.top), 0
            elif command == "J":
                assert self.used == 0
                self.lines[self.row :] = [""]
            elif character == "\n":
                self._next_line()
            else:
                self._put(character)

    def _put(self, character: str) -> None:
        assert character.isprintable(), repr(character)
        width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if self.used + width > self.columns:
            self._next_line()
        self.lines[self.row] += character
        self.used += width

    def _next_line(self) -> None:
        self.row, self.used = self.row + 1, 0
        if self.row == len(self.lines):
            self.lines.append("")
        # What has scrolled out at the top is out of the cursor's reach.
        self.top = max(self.top, self.row - self.rows + 1)


class Screens:
    """An observer behind a StreamPrinter: what the terminal shows after every round."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal, self.seen = terminal, []

    def begin(self, frames: Sequence, num_blocks: int) -> None: ...

    def on_round(self, progress, rows, block, start) -> None:
        self.seen.append(list(self.terminal.lines))

    def end(self, texts: Sequence) -> None: ...


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    """40 columns and 12 rows, with a command line on it; every round is drawn."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "12")
    monkeypatch.setattr(observers, "SECONDS_BETWEEN_FRAMES", 0.0)
    terminal = Terminal(40, 12)
    terminal.write("$ generate\n")
    return terminal


def text_of(states: Sequence[int | None], letters: str = LETTERS + "█") -> str:
    return "".join("" if state is None else letters[state] for state in states)


def test_a_terminal_shows_every_round_in_one_place_and_ends_clean(terminal):
    settings = SamplingSettings(num_steps=5)
    watcher, screens = Watcher(settings), Screens(terminal)
    made = frames(*REQUESTS["blocks"])
    printer = StreamPrinter(alphabet(), terminal)
    engine = engine_of(any_letters, ends=False)
    for _ in range(2):
        screens.seen.clear()
        engine.make(made, settings, observers=[watcher, printer, screens])
        assert terminal.lines == ["$ generate", ""]
        assert (terminal.row, terminal.used) == (1, 0)
    rounds = iter(range(len(screens.seen)))
    for block in range(watcher.num_blocks):
        for number in range(7):
            at = next(rounds)
            expected = [f"sample {row}: {text_of(watcher.history[row][at].states)}" for row in range(3)]
            title = f"--- step {number}/6 of block {block + 1}/{watcher.num_blocks} ---"
            assert screens.seen[at] == ["$ generate", title, *expected, ""]
    assert len(set(map(tuple, screens.seen))) == len(screens.seen)


ALPHABETS = {
    "narrow": "abcdefghi",
    "wide": "世界平和日月ａ😀字",
    "line feeds": "\n\n\n\n\n\nab\n",
    "control": "\x1b\r\t\x07\x08\u2028\u200b\x00a",
    "accents": "e\u0301\u0300\u0302\u0303\u0304\u0306\u0307x",
}


@pytest.mark.parametrize("name", ALPHABETS)
def test_no_text_leaves_a_terminal_with_anything_on_it(terminal, name):
    tokenizer = CharTokenizer(ALPHABETS[name])
    engine = dataclasses.replace(engine_of(any_letters), tokenizer=tokenizer)
    screens, settings = Screens(terminal), SamplingSettings(num_steps=9)
    # Longer than a line, and in all than the screen.
    made = frames(TextRequest(length=150, num_samples=4))
    engine.make(made, settings, observers=[StreamPrinter(tokenizer, terminal), screens])
    assert terminal.lines == ["$ generate", ""]
    assert all(len(screen) <= 12 and screen[1].startswith("--- step ") for screen in screens.seen)
    assert max(map(len, screens.seen)) == 12


def test_a_terminal_shows_the_last_round_however_soon_it_comes(terminal, monkeypatch):
    monkeypatch.setattr(observers, "SECONDS_BETWEEN_FRAMES", 1e9)
    screens = Screens(terminal)
    (text,) = engine_of(any_letters, ends=False).make(
        frames(TextRequest()), SamplingSettings(num_steps=9), observers=[StreamPrinter(alphabet(), terminal), screens]
    )
    assert screens.seen[-1] == ["$ generate", "--- step 10/10 ---", text.text, ""]
    assert len(set(map(tuple, screens.seen))) == 2


TITLE = re.compile(r"--- step (\d+)/\d+(?: of block (\d+)/\d+)? ---")


@pytest.mark.parametrize("wanted", REQUESTS)
@pytest.mark.parametrize("num_steps", [3, 97])
@pytest.mark.parametrize(("graph", "sampler"), [("absorb", "event-driven"), ("uniform", "euler")])
def test_without_a_terminal_some_rounds_and_the_last_stand_one_below_the_other(graph, sampler, wanted, num_steps):
    settings = SamplingSettings(sampler=sampler, num_steps=num_steps)
    watcher, output, made = Watcher(settings), io.StringIO(), frames(*REQUESTS[wanted])
    printer = StreamPrinter(alphabet(), output)
    texts = engine_of(any_letters, graph, ends=False).make(made, settings, observers=[watcher, printer])
    lines = output.getvalue().splitlines()
    assert lines[-len(made) :] == [f"sample {text.sample}: {text.text}" for text in texts]
    blocks = [block for block, _ in watcher.rounds]
    rounds = [[] for _ in range(watcher.num_blocks)]
    for start in range(0, len(lines), len(made) + 1):
        title = TITLE.fullmatch(lines[start])
        block = int(title[2] or 1) - 1
        rounds[block].append(int(title[1]))
        seen = [history[blocks.index(block) + int(title[1])] for history in watcher.history]
        expected = [f"sample {frame.sample}: {text_of(one.states)}" for frame, one in zip(made, seen, strict=True)]
        assert lines[start + 1 : start + 1 + len(made)] == expected
    for block, shown in enumerate(rounds):
        count = blocks.count(block)
        assert shown == sorted(set(shown))
        assert (shown[0], shown[-1]) == (0, count - 1)
        assert min(count, 10) <= len(shown) <= 21


def test_one_sample_is_shown_by_itself():
    output = io.StringIO()
    (text,) = engine_of(any_letters, ends=False).make(
        frames(TextRequest(prompt="ab")), SamplingSettings(num_steps=2), observers=[StreamPrinter(alphabet(), output)]
    )
    lines = output.getvalue().splitlines()
    assert lines[:2] == ["--- step 0/3 ---", "ab██████"]
    assert lines[-1] == text.text
