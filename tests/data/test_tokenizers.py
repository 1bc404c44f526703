"""Tokenizers give back the text, and their description gives back the tokenizer."""

import json
import sysconfig
from pathlib import Path

import pytest
import tokenizers as hf_tokenizers

from sedd_megatron.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    GPT2BPETokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    build_tokenizer,
    load_tokenizer,
)
from sedd_megatron.errors import UserError

PYTHON_SOURCE = Path(sysconfig.get_path("stdlib"), "argparse.py").read_text(encoding="utf-8")
TEXTS = [PYTHON_SOURCE[:5000], "", " ", "\n\n\tdef f():\n        return  'ä€😀'  \n", "a\r\nb", "\x00\x7f"]


@pytest.fixture(scope="module")
def gpt2_files(tmp_path_factory) -> tuple[Path, Path]:
    """A GPT-2 style vocabulary: the 256 byte characters, two merges, and the end of text."""
    folder = tmp_path_factory.mktemp("gpt2")
    alphabet = sorted(hf_tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "re", "Ġre", "<|endoftext|>"])}
    (folder / "encoder.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "vocab.bpe").write_text("#version: 0.2\nr e\nĠ re\n", encoding="utf-8")
    return folder / "encoder.json", folder / "vocab.bpe"


@pytest.fixture(scope="module")
def all_tokenizers(gpt2_files, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("hugging")
    gpt2 = GPT2BPETokenizer(*gpt2_files)
    gpt2._tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return {
        "byte": ByteTokenizer(),
        "char": CharTokenizer.from_texts(TEXTS),
        "sentencepiece": SentencePieceTokenizer.train([PYTHON_SOURCE], 500),
        "gpt2": gpt2,
        "hugging": HuggingFaceTokenizer.from_name(str(folder)),
    }


KINDS = ["byte", "char", "sentencepiece", "gpt2", "hugging"]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back(all_tokenizers, kind, text):
    tokenizer = all_tokenizers[kind]
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.num_tokens for i in ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_description_gives_back_the_tokenizer(all_tokenizers, kind, tmp_path):
    tokenizer = all_tokenizers[kind]
    tokenizer.save(tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert type(loaded) is type(tokenizer)
    assert (loaded.num_tokens, loaded.eod_id) == (tokenizer.num_tokens, tokenizer.eod_id)
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_sentencepiece_learns_more_than_characters(all_tokenizers):
    ids = all_tokenizers["sentencepiece"].encode(PYTHON_SOURCE)
    assert len(ids) < 0.6 * len(PYTHON_SOURCE)


def test_gpt2_merges_and_end_of_text(all_tokenizers):
    gpt2 = all_tokenizers["gpt2"]
    assert gpt2.encode("re re") == [256, 257]
    assert gpt2.eod_id == 258
    assert gpt2.num_tokens == 259


def test_unknown_character_is_named():
    with pytest.raises(UserError, match=r"character 'z' is not among the 2"):
        CharTokenizer.from_texts(["ab"]).encode("abz")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("GPT3", None, None, None), "choose one of ByteTokenizer"),
        (("SentencePieceTokenizer", None, None, None), "needs --tokenizer-model"),
        (("SentencePieceTokenizer", "/nowhere.model", None, None), "no such file"),
        (("GPT2BPETokenizer", None, None, None), "needs --vocab-file"),
        (("HuggingFaceTokenizer", None, None, None), "needs --tokenizer-model"),
        (("CharTokenizer", None, None, None), "made by prepare_data"),
    ],
)
def test_errors_say_what_is_missing(arguments, text):
    with pytest.raises(UserError, match=text):
        build_tokenizer(*arguments)


def test_files_that_are_no_models_are_refused(tmp_path):
    junk = tmp_path / "junk"
    junk.write_bytes(b"\x80\x04junk")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        build_tokenizer("SentencePieceTokenizer", str(junk), None, None)
    with pytest.raises(UserError, match="not a BPE vocabulary"):
        build_tokenizer("GPT2BPETokenizer", None, str(junk), str(junk))
    with pytest.raises(UserError, match="no tokenizer there"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "description.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path / "broken")
