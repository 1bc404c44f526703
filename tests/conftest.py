"""Fixtures that several test folders share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def byte_corpus(tmp_path_factory) -> Path:
    """A small prepared corpus of bytes; its --data-path prefix."""
    from sedd_megatron.data.corpus import write_corpus
    from sedd_megatron.data.tokenizers import ByteTokenizer

    folder = tmp_path_factory.mktemp("corpus")
    documents = [Path(__file__).read_text(encoding="utf-8") * 4, "the quick brown fox jumps over the lazy dog. " * 200]
    write_corpus(iter(documents), ByteTokenizer(), folder / "bytes", append_eod=False)
    return folder / "bytes_text_document"
