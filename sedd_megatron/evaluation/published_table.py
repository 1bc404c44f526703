"""What others reached, as published, and our results beside it in one Markdown table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from sedd_megatron.errors import UserError

SEDD = "arXiv 2310.16834"
RADD = "arXiv 2406.03736"
DUO = "arXiv 2506.10892"
MD4 = "arXiv 2406.04329"


class HasInterval(Protocol):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PublishedRow:
    """One model's figures, one for each column of its table; None where none was published."""

    model: str
    values: tuple[float | None, ...]
    source: str
    is_bound: bool = True  # diffusion models: the figure is an upper bound of the quantity


@dataclass(frozen=True)
class PublishedTable:
    """The published figures of one metric.

    Attributes:
        columns: key of a result -> heading.
        digits: after the decimal point, as published.
        conditions: how it has to be measured to be comparable.
    """

    title: str
    columns: Mapping[str, str]
    rows: tuple[PublishedRow, ...]
    digits: int
    conditions: str


def _exact(model: str, values: tuple[float | None, ...], source: str) -> PublishedRow:
    return PublishedRow(model, values, source, is_bound=False)


_STEPS = {str(steps): f"{steps} steps" for steps in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)}

PUBLISHED = {
    "zero-shot": PublishedTable(
        "Zero-shot perplexity",
        {"lambada": "LAMBADA", "wikitext2": "WikiText2", "ptb": "PTB", "wikitext103": "WikiText103", "lm1b": "1BW"},
        (
            _exact("GPT-2 small", (45.04, 42.43, 138.43, 41.60, 75.20), SEDD),
            PublishedRow("SEDD absorb small", (50.92, 41.84, 114.24, 40.62, 79.29), SEDD),
            PublishedRow("SEDD uniform small", (65.40, 50.27, 140.12, 49.60, 101.37), SEDD),
            PublishedRow("D3PM small", (93.47, 77.28, 200.82, 75.16, 138.92), SEDD),
            PublishedRow("PLAID small", (57.28, 51.80, 142.60, 50.86, 91.12), SEDD),
            _exact("GPT-2 medium", (35.66, 31.80, 123.14, 31.39, 55.72), SEDD),
            PublishedRow("SEDD absorb medium", (42.77, 31.04, 87.12, 29.98, 61.19), SEDD),
            PublishedRow("SEDD uniform medium", (51.28, 38.93, 102.28, 36.81, 79.12), SEDD),
        ),
        2,
        "length 1024, 1000 random times per document, test splits but for WikiText2's train split",
    ),
    "text8": PublishedTable(
        "text8, bits per character",
        {"text8": "bits per character"},
        (
            _exact("autoregressive", (1.23,), SEDD),
            PublishedRow("SEDD absorb", (1.39,), SEDD),
            PublishedRow("SEDD uniform", (1.47,), SEDD),
            PublishedRow("D3PM absorb", (1.45,), SEDD),
            PublishedRow("D3PM uniform", (1.61,), SEDD),
            PublishedRow("MD4", (1.37,), MD4),
            PublishedRow("GenMD4", (1.34,), MD4),
        ),
        2,
        "trained on text8, test split",
    ),
    "lm1b": PublishedTable(
        "One Billion Words, perplexity",
        {"lm1b": "perplexity"},
        (
            _exact("autoregressive", (31.98,), SEDD),
            PublishedRow("SEDD absorb", (32.79,), SEDD),
            PublishedRow("SEDD uniform", (40.25,), SEDD),
            PublishedRow("D3PM absorb", (77.50,), SEDD),
            PublishedRow("SEDD absorb, trained again", (32.7,), DUO),
            PublishedRow("SEDD uniform, trained again", (40.3,), DUO),
        ),
        2,
        "trained on One Billion Words, test split",
    ),
    "openwebtext": PublishedTable(
        "OpenWebText, validation perplexity",
        {"openwebtext": "perplexity"},
        (
            _exact("autoregressive", (17.5,), DUO),
            PublishedRow("MDLM", (23.2,), DUO),
            PublishedRow("SEDD absorb", (24.1,), DUO),
            PublishedRow("UDLM", (27.4,), DUO),
            PublishedRow("SEDD uniform", (29.7,), DUO),
        ),
        1,
        "small models, trained on OpenWebText, length 1024",
    ),
    "mauve": PublishedTable(
        "MAUVE of continuations",
        {"standard": "prompt in front", "infilling": "prompt at both ends"},
        (
            _exact("SEDD", (0.957, 0.942), SEDD),
            _exact("GPT-2, nucleus 0.95", (0.955, None), SEDD),
            _exact("GPT-2", (0.802, None), SEDD),
        ),
        3,
        "50 prompt tokens",
    ),
    "generative": PublishedTable(
        "Generative perplexity by number of steps",
        _STEPS,
        (
            _exact("SEDD absorb medium, analytic, float64", (None, None, 159, 113, 94, 87, 84, 86, 82, 81), RADD),
            _exact("SEDD absorb medium, analytic, float32", (None, None, 125, 85, 62, 51, 41, 34, 27, 22), RADD),
            _exact("SEDD absorb 170M, float64", (748, 316, 185, 138, 117, 110, 104, 105, None, None), DUO),
            _exact("SEDD uniform 170M, float64", (277, 166, 125, 113, 106, 103, 100, 100, None, None), DUO),
        ),
        0,
        "samples of 1024 tokens, judged by GPT-2 large; float32 draws lower it, and the entropy with it",
    ),
    "entropy": PublishedTable(
        "Unigram entropy of a sample by number of steps, bits",
        _STEPS,
        (
            _exact(
                "SEDD absorb medium, analytic, float64",
                (None, None, 8.26, 8.18, 8.14, 8.12, 8.09, 8.10, 8.09, 8.07),
                RADD,
            ),
            _exact(
                "SEDD absorb medium, analytic, float32",
                (None, None, 8.18, 8.07, 7.96, 7.86, 7.73, 7.60, 7.44, 7.25),
                RADD,
            ),
        ),
        2,
        "samples of 1024 tokens; above ln 1024 = 6.93, so published in bits",
    ),
}


def published_table(ours: Mapping[str, HasInterval], metric: str, name: str = "this model") -> str:
    """Our results and the published ones, as a Markdown table with a line on the conditions below it.

    Args:
        ours: column -> result, for the columns that were measured; in the metric's unit. Intervals are of 95 %.
        metric: a key of PUBLISHED.
        name: what our row is called.

    Raises:
        UserError: an unknown metric or column.
    """
    table = PUBLISHED.get(metric)
    if table is None:
        raise UserError(f"metric {metric} has no published figures; choose one of {', '.join(PUBLISHED)}")
    unknown = [column for column in ours if column not in table.columns]
    if unknown:
        raise UserError(f"{unknown[0]} is no column of {metric}; choose from {', '.join(table.columns)}")
    lines = [
        ["model", *table.columns.values(), "source"],
        ["---", *["---:"] * len(table.columns), "---"],
        *([row.model, *_published(row, table.digits), row.source] for row in table.rows),
        [f"**{name}**", *(_own(ours.get(column), table.digits) for column in table.columns), "measured"],
    ]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{body}\n\n{table.title}: {table.conditions}."


def _published(row: PublishedRow, digits: int) -> list[str]:
    bound = "≤ " if row.is_bound else ""
    return ["" if value is None else f"{bound}{value:.{digits}f}" for value in row.values]


def _own(result: HasInterval | None, digits: int) -> str:
    if result is None:
        return ""
    return f"**{result.value:.{digits}f}** ({result.low:.{digits}f} to {result.high:.{digits}f})"
