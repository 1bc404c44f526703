"""How the texts of a corpus became tokens, beside its tokenizer: kept with the corpus and with every model trained on
it, so that texts which such a model is given later become tokens in the same way.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedd_megatron.data.special_tokens import SpecialNamesTokenizer
from sedd_megatron.data.tokenizers import Tokenizer
from sedd_megatron.errors import UserError


@dataclass(frozen=True)
class Preparation:
    """The flags of prepare_data that decide it."""

    append_eod: bool | None = None  # None where nobody wrote it down
    allow_special_tokens: bool = False

    @classmethod
    def of(cls, written: Any) -> "Preparation":
        """From what was written down, of which anything may be missing.

        Raises:
            ValueError: something else stands there.
        """
        if not isinstance(written, dict):
            raise ValueError("not an object")
        found = cls(written.get("append_eod"), written.get("allow_special_tokens", False))
        if not isinstance(found.append_eod, bool | None) or not isinstance(found.allow_special_tokens, bool):
            raise ValueError("append_eod and allow_special_tokens must be true or false")
        return found

    @property
    def ends_documents(self) -> bool:
        """Whether to end documents as its own were; as published where nobody knows."""
        return self.append_eod is not False

    def completed_by(self, known: "Preparation") -> "Preparation":
        """The preparation of data of which `known` was written down with a model that was trained on it."""
        return known if self.append_eod is None else self

    def tokenizer_of_texts(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer as texts went through it."""
        return SpecialNamesTokenizer(tokenizer) if self.allow_special_tokens else tokenizer


def stats_path(prefix: str) -> Path:
    """Where prepare_data writes down what it counted and how it was told to."""
    return Path(f"{prefix}_stats.json")


def preparation_of(prefixes: Sequence[str]) -> Preparation:
    """That of one or several corpora: what any of them has had, a model trained on all of them has seen.

    Raises:
        UserError: what was written down is damaged.
    """
    found = [_written(stats_path(prefix)) for prefix in prefixes]
    ends = {one.append_eod for one in found}
    append_eod = True if True in ends else None if None in ends else False
    return Preparation(append_eod, any(one.allow_special_tokens for one in found))


def _written(path: Path) -> Preparation:
    if not os.path.isfile(path):  # data of other programs; unlike Path.is_file, of any name
        return Preparation()
    try:
        return Preparation.of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        what = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else "damaged"
        raise UserError(
            f"{path}: {what}; copy it again, or delete it, and nothing is known of how the data was prepared"
        ) from error
