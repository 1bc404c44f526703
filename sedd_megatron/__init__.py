"""Score entropy discrete diffusion (arXiv 2310.16834) on Megatron-Core."""

from typing import Any

__all__ = ["load_pretrained"]


def __getattr__(name: str) -> Any:
    # Found on first use: importing torch and Megatron takes seconds that --help and prepare_data need not wait for.
    if name == "load_pretrained":
        from sedd_megatron.pretrained import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
