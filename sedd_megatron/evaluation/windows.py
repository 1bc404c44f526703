"""From documents to the windows of at most the trained length whose likelihood is bounded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sedd_megatron.data.tokenizers import Tokenizer
from sedd_megatron.errors import UserError

WINDOWINGS = ("concatenate", "strided", "separate")
MAX_DRAWS = 1_000_000  # of a window at once: their numbers are in memory together


@dataclass(frozen=True)
class Window:
    """Tokens of one unit, a document or a piece of the concatenation; how many of the first are given as context."""

    number: int  # of the window: the key of its draws, unless they have one of their own
    unit: int
    tokens: tuple[int, ...]
    num_given: int = 0
    draws: int | None = None

    @property
    def draw_key(self) -> int:
        """What decides its draws."""
        return self.number if self.draws is None else self.draws

    @property
    def num_counted(self) -> int:
        """Tokens whose likelihood counts."""
        return len(self.tokens) - self.num_given


def windows_of(
    documents: Sequence[str],
    tokenizer: Tokenizer,
    seq_length: int,
    windowing: str,
    may_give: bool,
    append_eod: bool = True,
) -> list[Window]:
    """All windows, numbered in order.

    concatenate, as published: all documents in a row, each ended by the tokenizer's end of document where it has one,
    in windows without overlap, which are the units. strided: each document by itself, a unit; where it is longer than a
    window, each next one moves by half and has its first half given. separate: as strided, without overlap.

    Args:
        may_give: whether the model's graph can be given tokens (the absorbing graph).
        append_eod: whether concatenate ends the documents; not for a model whose data was prepared without ends.

    Raises:
        UserError: no tokens at all, or strided windows that the graph does not allow.
    """
    encoded = [tokenizer.encode(document) for document in documents]
    if not any(encoded):
        raise UserError("there is no token to evaluate; give documents with text")
    if windowing == "concatenate":
        end = [tokenizer.eod_id] if append_eod and tokenizer.eod_id is not None else []
        joined = [token for ids in encoded for token in [*ids, *end]]
        pieces = [(unit, *piece) for unit, piece in enumerate(cut(joined, seq_length))]
    elif windowing == "separate":
        pieces = [(unit, *piece) for unit, ids in enumerate(encoded) for piece in cut(ids, seq_length)]
    else:
        if not may_give:
            raise UserError(
                "--windowing strided: the uniform graph has no exact likelihood given a context; choose separate or "
                "concatenate"
            )
        pieces = [(unit, *piece) for unit, ids in enumerate(encoded) for piece in strided(ids, seq_length)]
    return [Window(n, unit, tuple(tokens), given) for n, (unit, tokens, given) in enumerate(pieces)]


def cut(tokens: Sequence[int], length: int) -> Iterator[tuple[Sequence[int], int]]:
    """Windows without overlap, and 0: none of their tokens is given."""
    return ((tokens[start : start + length], 0) for start in range(0, len(tokens), length))


def strided(tokens: Sequence[int], length: int, counted: int = 0) -> Iterator[tuple[Sequence[int], int]]:
    """Windows, and how many of their first tokens are given: an earlier one has counted them, or nobody is to, as the
    first `counted` tokens.
    """
    while counted < len(tokens):
        start = max(min(counted - length // 2, len(tokens) - length), 0)
        end = min(start + length, len(tokens))
        yield tokens[start:end], counted - start
        counted = end
