"""A tokenizer for models that came without one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from sedd_megatron.data.tokenizer_folder import write_description
from sedd_megatron.errors import UserError

LONGEST_SHOWN = 40


class NullTokenizer:
    """Text is token ids in decimal, with blanks between them; Megatron-LM's name for such a tokenizer."""

    tokenizer_type = "NullTokenizer"
    eod_id = None
    unknown_id = None
    special_tokens: Mapping[str, int] = MappingProxyType({})

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def encode(self, text: str) -> list[int]:
        """Ids of numbers.

        Raises:
            UserError: naming what is not an id.
        """
        return [self._id_of(word) for word in text.split()]

    def encode_inside(self, text: str) -> list[int]:
        """As encode."""
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Numbers with blanks between them."""
        return " ".join(map(str, ids))

    def save(self, directory: Path) -> None:
        """Write the description into a new folder."""
        write_description(directory, self.tokenizer_type, num_tokens=self.num_tokens)

    def _id_of(self, word: str) -> int:
        if word.isascii() and word.isdigit():
            # Python reads no numbers of thousands of digits.
            digits = word.lstrip("0") or "0"
            if len(digits) <= len(str(self.num_tokens)) and int(digits) < self.num_tokens:
                return int(digits)
        shown = word if len(word) <= LONGEST_SHOWN else f"{word[:LONGEST_SHOWN]}..."
        raise UserError(
            f"{shown!r} is not a token id from 0 to {self.num_tokens - 1}, which is all that this model knows without "
            "its tokenizer; give ids, or put the tokenizer's files beside the model"
        )
