"""Whether a corpus' tokens are those of the vocabulary."""

import numpy as np

from sedd_megatron.data.digests import has_digests
from sedd_megatron.errors import UserError

TOKENS_AT_ONCE = 1 << 24


def range_of_blocks(tokens: np.ndarray, first: int = 0, step: int = 1) -> tuple[tuple[int, int], int]:
    """The least and the greatest token of every `step`-th block from the block `first` on, and how many blocks there
    are in all.
    """
    starts = range(0, len(tokens), TOKENS_AT_ONCE)
    blocks = (tokens[start : start + TOKENS_AT_ONCE] for start in starts[first::step])
    # Both of one block before the next, so that the file is read once.
    extremes = [(int(block.min()), int(block.max())) for block in blocks]
    found = min((low for low, _ in extremes), default=0), max((high for _, high in extremes), default=0)
    return found, len(starts)


def check_range(low: int, high: int, num_tokens: int, filename: str) -> None:
    """Raise unless the tokens `low` to `high` of a file are below `num_tokens`.

    Raises:
        UserError: with the way out.
    """
    if low >= 0 and high < num_tokens:
        return
    prefix = filename.removesuffix(".bin")
    whether = f", or see by prepare_data --check {prefix} whether it is damaged" if has_digests(prefix) else ""
    raise UserError(
        f"{filename}: has tokens {low} to {high}, the tokenizer's vocabulary has tokens 0 to {num_tokens - 1}; "
        f"prepare the data with this tokenizer{whether}"
    )
