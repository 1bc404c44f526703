"""A page that replays how samples came out of noise: one HTML file that needs neither a server nor a network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sedd_megatron.output_files import script_json, write_whole

TEMPLATE = "trace.html"
PLACEHOLDER = "__TRACE_DATA__"


@dataclass(frozen=True)
class Trace:
    """What one sample was at every step.

    Attributes:
        title: what the page calls the sample.
        num_steps: steps in all.
        initial: [S] state of each position before step 1; None where there is nothing yet (a later block of a text).
        changes: (step in 1..num_steps, position, new state), ordered by step.
        given: [S] True where the position was given by the user.
        calls: steps at which the network was called.
    """

    title: str
    num_steps: int
    initial: Sequence[int | None]
    changes: Sequence[tuple[int, int, int]]
    given: Sequence[bool]
    calls: Sequence[int]


def write_trace(
    path: Path,
    traces: Sequence[Trace],
    token_text: Callable[[int], str],
    mask_token_id: int | None,
    settings: Mapping[str, str],
) -> None:
    """Write the page that replays the traces: all of it, or nothing (output_files.py).

    Args:
        token_text: the text of one token id; asked once for each token that occurs, and never for the mask.
        mask_token_id: the mask's state; None for a graph without one.
        settings: shown in the page's header.

    Raises:
        UserError: the file cannot be written. What was at the path is still there, whole.
    """
    template = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    data = script_json(_page_data(traces, token_text, mask_token_id, settings))
    write_whole("--trace", path, template.replace(PLACEHOLDER, data))


def _page_data(
    traces: Sequence[Trace],
    token_text: Callable[[int], str],
    mask_token_id: int | None,
    settings: Mapping[str, str],
) -> dict[str, Any]:
    states = {state for trace in traces for state in trace.initial}
    states |= {state for trace in traces for _, _, state in trace.changes}
    return {
        "settings": list(settings.items()),
        "mask": mask_token_id,
        "tokens": {token: token_text(token) for token in sorted(states - {None, mask_token_id})},
        "samples": [
            {
                "title": trace.title,
                "steps": trace.num_steps,
                "initial": list(trace.initial),
                "changes": list(trace.changes),
                "given": [position for position, given in enumerate(trace.given) if given],
                "calls": list(trace.calls),
            }
            for trace in traces
        ],
    }
