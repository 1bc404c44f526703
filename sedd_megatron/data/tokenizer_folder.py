"""A tokenizer's description as a folder: description.json with its type, and the model files it needs."""

import json
import shutil
from pathlib import Path
from typing import Any

DESCRIPTION = "description.json"


def write_description(directory: Path, tokenizer_type: str, **extra: Any) -> None:
    """Write description.json into a new folder; the tokenizer adds its files."""
    directory.mkdir(parents=True)
    text = json.dumps({"tokenizer_type": tokenizer_type, **extra}, ensure_ascii=False, indent=1)
    (directory / DESCRIPTION).write_text(text, encoding="utf-8")


def replace_folder(new: Path, final: Path) -> None:
    """Put a finished folder in the place of another; for a moment there is neither, so hide it from readers first."""
    shutil.rmtree(final, ignore_errors=True)
    new.rename(final)
