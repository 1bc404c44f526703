"""Fixtures that the tests of data share."""

import json
from pathlib import Path

import pytest
import tokenizers as hf

MERGES = ["l o", "lo w", "Ġ low", "e r", "Ċ Ċ"]


@pytest.fixture
def hugging_face_folder(tmp_path) -> Path:
    """A tokenizer of four words with gaps between their ids, cut at 4 tokens and padded to 16; </s> ends."""
    folder = tmp_path / "hugging_face"
    folder.mkdir()
    vocabulary = {"[UNK]": 0, "the": 1, "fox": 2, "</s>": 7}
    tokenizer = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    return folder


@pytest.fixture(scope="session")
def gpt2_files(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("gpt2")
    tokens = [*sorted(hf.pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    tokens.append("<|endoftext|>")
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    return folder / "encoder.json", folder / "vocab.bpe"
