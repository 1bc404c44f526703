"""Tokenizers under Megatron's names, and their description as a folder that is kept beside data and in checkpoints.

A description is description.json with the tokenizer's type, and the model files it needs. Reading one executes nothing.
"""

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import sentencepiece

from sedd_megatron.data.library_tokenizers import GPT2BPETokenizer, HuggingFaceTokenizer
from sedd_megatron.data.null_tokenizer import NullTokenizer
from sedd_megatron.data.tokenizer_folder import DESCRIPTION, MERGES, MODEL, VOCABULARY, write_description
from sedd_megatron.errors import UserError
from sedd_megatron.wording import read_errors

TRAINING_LINE_CHARACTERS = 8192
# SentencePiece's sign for it.
BLANK = "\u2581"


class Tokenizer(Protocol):
    """What training and sampling need of a tokenizer."""

    tokenizer_type: str
    num_tokens: int
    eod_id: int | None
    unknown_id: int | None  # what stands for text that there is no token for
    special_tokens: Mapping[str, int]  # by their names, which are text like any other where they stand in a text

    def encode(self, text: str) -> list[int]:
        """Token ids below num_tokens of a whole text, or of its beginning."""

    def encode_inside(self, text: str) -> list[int]:
        """Token ids of text that has something before it: without the blank that some tokenizers begin a text with.

        decode(encode(a) + encode_inside(b)) is a + b, if encode and decode keep a + b.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text; bytes that are not UTF-8 become the replacement character."""

    def save(self, directory: Path) -> None:
        """Write the description into a new folder."""


class ByteTokenizer:
    """The 256 bytes of UTF-8."""

    tokenizer_type = "ByteTokenizer"
    num_tokens = 256
    eod_id = None
    unknown_id = None
    special_tokens: Mapping[str, int] = MappingProxyType({})

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes."""
        return list(text.encode("utf-8"))

    def encode_inside(self, text: str) -> list[int]:
        """As encode."""
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of UTF-8 bytes."""
        return bytes(ids).decode("utf-8", errors="replace")

    def save(self, directory: Path) -> None:
        """Write the description into a new folder."""
        write_description(directory, self.tokenizer_type)


class CharTokenizer:
    """One token per character that occurs in the training text, in code point order."""

    tokenizer_type = "CharTokenizer"
    eod_id = None
    unknown_id = None
    special_tokens: Mapping[str, int] = MappingProxyType({})

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.num_tokens = len(characters)
        self._ids = {character: i for i, character in enumerate(characters)}

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> "CharTokenizer":
        """Collect the characters of a corpus."""
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return cls("".join(sorted(characters)))

    def encode(self, text: str) -> list[int]:
        """Ids of the characters.

        Raises:
            UserError: naming a character that the training text did not have.
        """
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise UserError(
                f"character {error.args[0]!r} is not among the {self.num_tokens} that this CharTokenizer knows; "
                "leave it out, or train with ByteTokenizer"
            ) from error

    def encode_inside(self, text: str) -> list[int]:
        """As encode."""
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of character ids."""
        return "".join(self.characters[i] for i in ids)

    def save(self, directory: Path) -> None:
        """Write the description into a new folder."""
        write_description(directory, self.tokenizer_type, characters=self.characters)


class SentencePieceTokenizer:
    """A SentencePiece model."""

    tokenizer_type = "SentencePieceTokenizer"

    def __init__(self, model: bytes, name: str = "model") -> None:
        self.model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.num_tokens = self._processor.get_piece_size()
        except RuntimeError as error:
            raise UserError(f"--tokenizer-model {name}: not a SentencePiece model; give a .model file") from error
        eos = self._processor.eos_id()
        self.eod_id = eos if eos >= 0 else None
        self.unknown_id = self._processor.unk_id()
        # Control symbols; the library finds their names in no text.
        controls = filter(self._processor.is_control, range(self.num_tokens))
        self.special_tokens = {self._processor.id_to_piece(id): id for id in controls}

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "SentencePieceTokenizer":
        """Train a unigram model on whole lines, so that decode(encode(text)) == text for anything but U+2581.

        Text is taken as it is (no normalisation, no dummy prefix, blanks kept): line feeds and tabs are tokens of
        their own, runs of blanks may become one token, and bytes stand in for rare characters. Learns from the first
        200,000 lines.

        Raises:
            UserError: the text is too small for the vocabulary, or the vocabulary too small for the bytes. What `texts`
                raises comes through.
        """
        model, failures = io.BytesIO(), []
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_training_lines(texts, failures), model_writer=model, vocab_size=vocab_size,
                model_type="unigram", normalization_rule_name="identity", remove_extra_whitespaces=False,
                add_dummy_prefix=False, allow_whitespace_only_pieces=True, split_by_whitespace=True, byte_fallback=True,
                character_coverage=0.9999, user_defined_symbols=["\n", "\t"], bos_id=-1, eos_id=1, unk_id=0,
                max_sentence_length=1 << 16, input_sentence_size=200_000, shuffle_input_sentence=False, num_threads=1,
                minloglevel=2,
            )  # fmt: skip
        except (RuntimeError, OSError, ValueError) as error:
            if failures:  # which the library makes an error of its own
                raise failures[0] from None
            raise UserError(f"--vocab-size {vocab_size}: {_training_fault(str(error))}") from error
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        """Ids of the most probable segmentation."""
        return self._processor.encode(text)

    def encode_inside(self, text: str) -> list[int]:
        """As encode, without a dummy prefix; a blank that the text begins with stays."""
        plain, keeping_blanks, prefixed = self._inside
        # A model that removes extra blanks takes the first one for extra; its dummy prefix is one.
        lost = keeping_blanks.normalize(text)[:1] == BLANK != plain.normalize(text)[:1]
        return (prefixed if lost else plain).encode(text)

    @cached_property
    def _inside(self) -> list[sentencepiece.SentencePieceProcessor]:
        """The model without a dummy prefix, without it and keeping extra blanks, and with it."""
        # A second normalizer_spec (field 3 of a ModelProto) is merged into the first: add_dummy_prefix is its field 3,
        # remove_extra_whitespaces its field 4.
        changes = (b"\x18\x00", b"\x18\x00\x20\x00", b"\x18\x01")
        models = (self.model + bytes([0x1A, len(change)]) + change for change in changes)
        return [sentencepiece.SentencePieceProcessor(model_proto=model) for model in models]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of pieces and bytes."""
        return self._processor.decode(list(ids))

    def save(self, directory: Path) -> None:
        """Write the description into a new folder."""
        write_description(directory, self.tokenizer_type)
        (directory / MODEL).write_bytes(self.model)


TOKENIZER_TYPES = (
    ByteTokenizer.tokenizer_type,
    CharTokenizer.tokenizer_type,
    SentencePieceTokenizer.tokenizer_type,
    GPT2BPETokenizer.tokenizer_type,
    HuggingFaceTokenizer.tokenizer_type,
)


def build_tokenizer(
    tokenizer_type: str, tokenizer_model: str | None, vocab_file: str | None, merge_file: str | None
) -> Tokenizer:
    """A tokenizer from flags, for the types that need no text to learn from.

    Raises:
        UserError: an unknown type, a missing flag or file.
    """
    if tokenizer_type == ByteTokenizer.tokenizer_type:
        return ByteTokenizer()
    if tokenizer_type == SentencePieceTokenizer.tokenizer_type:
        path = _required_file(tokenizer_type, "--tokenizer-model", tokenizer_model)
        return SentencePieceTokenizer(path.read_bytes(), str(path))
    if tokenizer_type == GPT2BPETokenizer.tokenizer_type:
        return GPT2BPETokenizer(
            _required_file(tokenizer_type, "--vocab-file", vocab_file),
            _required_file(tokenizer_type, "--merge-file", merge_file),
        )
    if tokenizer_type == HuggingFaceTokenizer.tokenizer_type:
        if tokenizer_model is None:
            raise UserError(f"--tokenizer-type {tokenizer_type} needs --tokenizer-model: a local folder or a hub name")
        return HuggingFaceTokenizer.from_name(tokenizer_model)
    if tokenizer_type == CharTokenizer.tokenizer_type:
        raise UserError(
            f"--tokenizer-type {tokenizer_type} is made by prepare_data from its input; train without the flag"
        )
    raise UserError(f"--tokenizer-type {tokenizer_type} does not exist; choose one of {', '.join(TOKENIZER_TYPES)}")


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that a description folder holds.

    Raises:
        UserError: there is no folder, or a file of it is missing or unreadable.
    """
    path = directory / DESCRIPTION
    if not os.path.isfile(path):  # unlike Path.is_file, of any name
        raise UserError(
            f"{path}: no tokenizer there; prepare the data with sedd_megatron.prepare_data, or give --tokenizer-type"
        )
    with read_errors(path):
        return _described_tokenizer(directory)


def _described_tokenizer(directory: Path) -> Tokenizer:
    path = directory / DESCRIPTION
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        tokenizer_type = description["tokenizer_type"]
        if tokenizer_type == CharTokenizer.tokenizer_type:
            return CharTokenizer(description["characters"])
        if tokenizer_type == NullTokenizer.tokenizer_type:
            return NullTokenizer(int(description["num_tokens"]))
        if tokenizer_type == HuggingFaceTokenizer.tokenizer_type:
            tokenizer = HuggingFaceTokenizer.from_name(str(directory))
            return HuggingFaceTokenizer(tokenizer._tokenizer, description["eod_token"])
        if tokenizer_type not in TOKENIZER_TYPES:
            raise ValueError(f"there is no {str(tokenizer_type)[:40]!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); prepare the data again, or use another copy") from error
    return build_tokenizer(tokenizer_type, *(str(directory / name) for name in (MODEL, VOCABULARY, MERGES)))


def _training_lines(texts: Iterable[str], failures: list[BaseException]) -> Iterator[str]:
    """Lines in pieces, because the trainer leaves out those beyond its limit: a text without line feeds would teach it
    nothing. What `texts` raises is kept in `failures` as well.
    """
    try:
        for text in texts:
            for line in text.splitlines():
                for start in range(0, len(line), TRAINING_LINE_CHARACTERS):
                    yield line[start : start + TRAINING_LINE_CHARACTERS]
    except GeneratorExit:  # the trainer has enough
        raise
    except BaseException as error:
        failures.append(error)
        raise


def _training_fault(message: str) -> str:
    """What SentencePiece's trainer says, without where in its C++ it says so."""
    most = re.search(r"too high .*value <= (\d+)", message)
    if most is not None:
        return f"is more than this input has pieces for; give at most {most[1]}, or more text"
    fewest = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if fewest is not None:
        return f"is less than bytes and characters of this input need; give at least {fewest[1]}"
    if "sentences_.empty()" in message:
        return "the input has no text to learn from; give files or a dataset with at least one line"
    reason = re.sub(r"^\w+: \S+\(\d+\) (\[.*\] ?)?", "", " ".join(message.split()))
    said = f" ({reason})" if reason else ""
    return f"does not suit this input{said}; take between about 400 and a few thousand per megabyte of text"


def _required_file(tokenizer_type: str, flag: str, value: str | None) -> Path:
    if value is None:
        raise UserError(f"--tokenizer-type {tokenizer_type} needs {flag}: the file of a trained tokenizer")
    if not os.path.isfile(value):
        raise UserError(f"{flag} {value}: no such file; {tokenizer_type} needs one")
    return Path(value)
