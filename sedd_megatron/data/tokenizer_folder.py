"""A tokenizer's description as a folder: description.json with its type, and the model files it needs."""

import json
from pathlib import Path
from typing import Any

DESCRIPTION = "description.json"
MODEL, VOCABULARY, MERGES = "tokenizer.model", "vocab.json", "merges.txt"
HUGGING_FACE, HUGGING_FACE_CONFIG = "tokenizer.json", "tokenizer_config.json"
# All that is read of a folder with a tokenizer; a whole model may lie beside it.
TOKENIZER_FILES = (DESCRIPTION, MODEL, VOCABULARY, MERGES, HUGGING_FACE, HUGGING_FACE_CONFIG)


def write_description(directory: Path, tokenizer_type: str, **extra: Any) -> None:
    """Write description.json into a new folder; the tokenizer adds its files."""
    directory.mkdir(parents=True)
    text = json.dumps({"tokenizer_type": tokenizer_type, **extra}, ensure_ascii=False, indent=1)
    (directory / DESCRIPTION).write_text(text, encoding="utf-8")


def holds_tokenizer(directory: Path) -> bool:
    """Whether somebody has written a description into a folder."""
    try:
        description = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(description, dict) and "tokenizer_type" in description
