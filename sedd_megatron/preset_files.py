"""Presets by name: examples/configs of a checkout, which a wheel has as sedd_megatron/presets (setup.py)."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
FOLDERS = (PACKAGE.parent / "examples" / "configs", PACKAGE / "presets")


def is_checkout() -> bool:
    """Whether there are examples beside the package."""
    return FOLDERS[0].is_dir()


def presets() -> dict[str, Path]:
    """Each preset's file by its name."""
    return {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("*.yaml"))}


def config_file(given: str) -> Path:
    """The file that --config names; the preset of that name where there is no such file."""
    if os.path.isfile(given):  # unlike Path.is_file, of any name
        return Path(given)
    return presets().get(given.removesuffix(".yaml"), Path(given))
