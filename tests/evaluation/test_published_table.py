"""Published figures beside ours: as in the papers, nothing lost or moved to another column."""

from typing import NamedTuple

import pytest

from sedd_megatron.errors import UserError
from sedd_megatron.evaluation.published_table import PUBLISHED, published_table


class Result(NamedTuple):
    value: float
    low: float
    high: float


def cells(table: str) -> list[list[str]]:
    lines = [line for line in table.split("\n") if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("metric", PUBLISHED)
def test_every_row_has_a_figure_or_a_gap_for_each_column_and_a_source(metric):
    table = PUBLISHED[metric]
    rows = cells(published_table({}, metric))
    assert len({len(row) for row in rows}) == 1
    assert rows[0][1:-1] == list(table.columns.values())
    assert len(rows) == len(table.rows) + 3
    assert all(row[-1].startswith("arXiv ") for row in rows[2:-1])
    assert rows[-1] == ["**this model**", *[""] * len(table.columns), "measured"]


def test_our_results_stand_in_their_columns_below_the_published_ones():
    ours = {"wikitext103": Result(41.234, 40.9, 41.6), "lambada": Result(51.0, 50.0, 52.009)}
    table = published_table(ours, "zero-shot", "small")
    rows = cells(table)
    assert rows[0] == ["model", "LAMBADA", "WikiText2", "PTB", "WikiText103", "1BW", "source"]
    assert ["SEDD absorb small", "≤ 50.92", "≤ 41.84", "≤ 114.24", "≤ 40.62", "≤ 79.29", "arXiv 2310.16834"] in rows
    assert ["GPT-2 medium", "35.66", "31.80", "123.14", "31.39", "55.72", "arXiv 2310.16834"] in rows
    own = ["**small**", "**51.00** (50.00 to 52.01)", "", "", "**41.23** (40.90 to 41.60)", "", "measured"]
    assert rows[-1] == own
    assert table.endswith("WikiText2's train split.")


@pytest.mark.parametrize(
    ("metric", "row"),
    [
        ("text8", ["SEDD uniform", "≤ 1.47", "arXiv 2310.16834"]),
        ("lm1b", ["D3PM absorb", "≤ 77.50", "arXiv 2310.16834"]),
        ("openwebtext", ["autoregressive", "17.5", "arXiv 2506.10892"]),
        ("mauve", ["SEDD", "0.957", "0.942", "arXiv 2310.16834"]),
    ],
)
def test_other_metrics(metric, row):
    assert row in cells(published_table({}, metric))


def test_more_steps_lower_the_perplexity_but_the_entropy_only_where_draws_are_coarse():
    perplexity, entropy = PUBLISHED["generative"], PUBLISHED["entropy"]
    for (exact, coarse), least_fall in (((perplexity.rows[:2]), 0.4), (entropy.rows, 0.05)):
        falls = [1 - row.values[-1] / row.values[4] for row in (exact, coarse)]
        assert "float64" in exact.model
        assert "float32" in coarse.model
        assert falls[1] > least_fall
        assert falls[0] < falls[1] / 2


def test_unknown_names_are_refused():
    with pytest.raises(
        UserError, match=r"^metric text9 has no published figures; choose one of zero-shot, text8, lm1b,"
    ):
        published_table({}, "text9")
    with pytest.raises(UserError, match=r"^ptb is no column of text8; choose from text8$"):
        published_table({"ptb": Result(1, 1, 1)}, "text8")
