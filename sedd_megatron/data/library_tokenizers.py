"""Tokenizers of the library `tokenizers`: GPT-2's BPE from its two files, and any tokenizer.json."""

import json
import re
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import tokenizers as hf_tokenizers

from sedd_megatron.data.tokenizer_folder import (
    HUGGING_FACE,
    HUGGING_FACE_CONFIG,
    MERGES,
    VOCABULARY,
    write_description,
)
from sedd_megatron.errors import UserError, one_line

GPT2_END_OF_TEXT = "<|endoftext|>"
PIECE_CHARACTERS = 1 << 15
PIECES_AT_ONCE = 16
# Up to the first blank of those that the library's WhitespaceSplit knows; Python's are four more.
FIRST_WORD = re.compile(r"(?:\S|[\x1c-\x1f])*")


class GPT2BPETokenizer:
    """GPT-2's byte-level BPE from its vocabulary and merges files; <|endoftext|> ends a document."""

    tokenizer_type = "GPT2BPETokenizer"
    unknown_id = None

    def __init__(self, vocab_file: Path, merge_file: Path) -> None:
        self._files = {VOCABULARY: vocab_file.read_bytes(), MERGES: merge_file.read_bytes()}
        try:
            self._tokenizer = hf_tokenizers.Tokenizer(
                hf_tokenizers.models.BPE.from_file(str(vocab_file), str(merge_file))
            )
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(
                f"--vocab-file {vocab_file}, --merge-file {merge_file}: not a BPE vocabulary and its merges "
                f"({one_line(error)}); give GPT-2's encoder.json and vocab.bpe"
            ) from error
        # The library drops what it has no token for, without a word.
        missing = _missing_bytes(self._tokenizer.get_vocab())
        if missing:
            raise UserError(
                f"--vocab-file {vocab_file}: no token for {len(missing)} of the 256 bytes; give GPT-2's encoder.json"
            )
        self._tokenizer.pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = hf_tokenizers.decoders.ByteLevel()
        self.num_tokens = _num_ids(self._tokenizer)
        self.eod_id = self._tokenizer.token_to_id(GPT2_END_OF_TEXT)
        self.special_tokens = {} if self.eod_id is None else {GPT2_END_OF_TEXT: self.eod_id}

    def encode(self, text: str) -> list[int]:
        """Ids of the text, in which <|endoftext|> is text like any other."""
        return list(self.stream(text))

    def stream(self, text: str) -> Iterator[int]:
        """The same one after the other, for texts whose list of ids would fill the memory."""
        return chain.from_iterable(self._encoded_pieces(text))

    def _encoded_pieces(self, text: str) -> Iterator[list[int]]:
        # In pieces, because the library takes 130 bytes of memory per character.
        pieces = _pieces(text)
        while some := list(islice(pieces, PIECES_AT_ONCE)):
            yield from (encoding.ids for encoding in self._tokenizer.encode_batch_fast(some))

    def encode_inside(self, text: str) -> list[int]:
        """As encode: a text begins with no blank of its own."""
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def save(self, directory: Path) -> None:
        """Write the description into a new folder."""
        write_description(directory, self.tokenizer_type)
        for name, content in self._files.items():
            (directory / name).write_bytes(content)


class HuggingFaceTokenizer:
    """A tokenizer.json of the `tokenizers` library, from a local folder or a hub name."""

    tokenizer_type = "HuggingFaceTokenizer"

    def __init__(self, tokenizer: hf_tokenizers.Tokenizer, eod_token: str | None) -> None:
        self._tokenizer = tokenizer
        # A tokenizer.json may ask for documents to be cut at a model's length; a corpus wants all of them.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None) is not None:
            # Of use in training of models that see a text many times; a corpus has each once, and is to be the same.
            tokenizer.model.dropout = None
        # Names of special tokens in a text are text. The library keeps this out of what it saves.
        tokenizer.encode_special_tokens = True
        self.eod_token = eod_token
        self.num_tokens = _num_ids(tokenizer)
        self.eod_id = tokenizer.token_to_id(eod_token) if eod_token else None
        model = json.loads(tokenizer.to_str())["model"]
        self.unknown_id = _unknown_id(tokenizer, model)
        self._alphabet = _incomplete_alphabet(model) if self.unknown_id is None else None
        added = tokenizer.get_added_tokens_decoder().items()
        self.special_tokens = {token.content: id for id, token in added if token.special}
        self.taking_blanks = frozenset(token.content for _, token in added if token.special and token.lstrip)
        if self.eod_id is not None:
            self.special_tokens[eod_token] = self.eod_id
        self._added = names_pattern(token.content for _, token in added if not token.special)
        self._never_text = set(self.special_tokens.values()) - {self.unknown_id}
        # Where a model has other tokens for what continues a word: a word to continue.
        continues = model.get("continuing_subword_prefix")
        self._letters = [letter for letter in string.ascii_lowercase if continues and letter in model["vocab"]]

    @classmethod
    def from_name(cls, name: str) -> "HuggingFaceTokenizer":
        """Read a folder, or fetch a hub name where there is a network; no code is fetched or run.

        Raises:
            UserError: there is no tokenizer.json, or a damaged one.
        """
        folder = Path(name)
        try:
            if not folder.is_dir():
                # Imported here: with its HTTP client it takes longer than all the rest.
                from huggingface_hub import snapshot_download

                folder = Path(snapshot_download(name, allow_patterns=[HUGGING_FACE, HUGGING_FACE_CONFIG]))
            tokenizer = hf_tokenizers.Tokenizer.from_file(str(folder / HUGGING_FACE))
        except Exception as error:  # the libraries raise bare Exceptions
            raise UserError(
                f"--tokenizer-model {name}: neither a folder with a tokenizer.json nor a hub name that can be fetched "
                f"({one_line(error)}); download the tokenizer and name its folder"
            ) from error
        return cls(tokenizer, _configured_eod(folder / HUGGING_FACE_CONFIG))

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without the special tokens that a model's template would add.

        Raises:
            UserError: the text has a character that there is no token for, known or unknown.
        """
        return self._encode(text, self._encode_beginning)

    def encode_inside(self, text: str) -> list[int]:
        """Ids of text inside a text: without the blank that a text begins with, and inside a word where it begins with
        a letter.

        Raises:
            UserError: as for encode.
        """
        for letter in self._letters:
            start, ids = (self._encode(one, self._encode_continuation) for one in (letter, letter + text))
            if ids[: len(start)] == start:
                return ids[len(start) :]
        return self._encode(text, self._encode_continuation)

    def encode_with_special(self, text: str) -> list[int]:
        """Ids of the text in which the names of special tokens are these tokens; the library itself finds them.

        Raises:
            UserError: as for encode.
        """
        if self._alphabet is not None:
            for part in names_pattern(self.special_tokens).split(text):
                self._refuse_unknown(part, self._alphabet)
        return self._encode_by(self._with_special, text)

    def _encode(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        ids = encode(text)
        if self._never_text.isdisjoint(ids):
            return ids
        # A name among the model's own words, or an end of document that was not added as special, is found in text all
        # the same (where a normalizer makes capitals small, in capitals too), but not in two halves of it.
        first, *others = _halved(names_pattern(self.special_tokens, re.IGNORECASE), text)
        ids = encode(first)
        for other in others:
            ids += self._encode_continuation(other)
        return ids

    def _encode_beginning(self, text: str) -> list[int]:
        return self._encode_piece(text, self._tokenizer)

    def _encode_continuation(self, text: str) -> list[int]:
        if not self._prefixes_words:
            return self._encode_piece(text, self._inside)
        # The first word alone continues one; of the blanks before the others nothing but their prefixes remains.
        end = FIRST_WORD.match(text).end()
        return self._encode_piece(text[:end], self._inside) + self._encode_beginning(text[end:])

    def _encode_piece(self, text: str, tokenizer: hf_tokenizers.Tokenizer) -> list[int]:
        if self._alphabet is not None:
            self._refuse_unknown(text, self._alphabet)
        return self._encode_by(tokenizer, text)

    def _encode_by(self, tokenizer: hf_tokenizers.Tokenizer, text: str) -> list[int]:
        try:
            return tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(
                f"the text has a character that this tokenizer has no token for ({one_line(error)}); leave it out, or "
                "use a tokenizer with an unknown token or with bytes"
            ) from error

    @cached_property
    def _inside(self) -> hf_tokenizers.Tokenizer:
        """The tokenizer without what puts a blank before a text, or takes one away there."""
        description = json.loads(self._tokenizer.to_str())
        changed = {part: _without_prefix(description[part]) for part in ("normalizer", "pre_tokenizer")}
        if all(changed[part] == description[part] for part in changed):
            return self._tokenizer
        tokenizer = hf_tokenizers.Tokenizer.from_str(json.dumps(description | changed))
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def _with_special(self) -> hf_tokenizers.Tokenizer:
        tokenizer = hf_tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        # An end of document may be a word of the model alone.
        tokenizer.add_special_tokens([name for name in self.special_tokens if name == self.eod_token])
        return tokenizer

    @cached_property
    def _prefixes_words(self) -> bool:
        """Whether each word has a blank before it put there, in place of one that was dropped, as T5's have."""
        if self._inside is self._tokenizer or self._tokenizer.pre_tokenizer is None:
            return False
        whole, inside = ("".join(word for word, _ in one.pre_tokenizer.pre_tokenize_str("a b"))
                         for one in (self._tokenizer, self._inside))  # fmt: skip
        return not whole.endswith(inside)

    def _refuse_unknown(self, text: str, alphabet: set[str]) -> None:
        # The library drops such characters from a BPE without a word.
        for part in self._added.split(text):
            if self._tokenizer.normalizer is not None:
                part = self._tokenizer.normalizer.normalize_str(part)
            words = [part]
            if self._tokenizer.pre_tokenizer is not None:
                words = [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(part)]
            missing = set().union(*words) - alphabet
            if missing:
                raise UserError(
                    f"character {min(missing)!r} has no token in this tokenizer; leave it out, or use a tokenizer with "
                    "an unknown token or with bytes"
                )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def save(self, directory: Path) -> None:
        """Write the description into a new folder."""
        write_description(directory, self.tokenizer_type, eod_token=self.eod_token)
        # The bytes of the library's own save, which raises a bare Exception where the disk is full.
        (directory / HUGGING_FACE).write_bytes(self._tokenizer.to_str(pretty=True).encode("utf-8"))


def _num_ids(tokenizer: hf_tokenizers.Tokenizer) -> int:
    # Not the number of tokens: a vocabulary may leave ids out, and the ids index the model's rows.
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def names_pattern(names: Iterable[str], flags: int = 0) -> re.Pattern[str]:
    """What finds any of these names; nothing, if there are none."""
    # The longest first: one may begin with another.
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)", flags)


def _halved(names: re.Pattern[str], text: str) -> list[str]:
    """The text cut in the middle of each name."""
    middles = [(found.start() + found.end()) // 2 for found in names.finditer(text)]
    return [text[first:last] for first, last in pairwise([0, *middles, len(text)])]


def _without_prefix(component: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer of a tokenizer.json, without what it does to the beginning of a text."""
    if component is None or component["type"] == "Prepend":
        return None
    changes = {"prepend_scheme": "never", "add_prefix_space": False, "strip_left": False}
    component = component | {name: value for name, value in changes.items() if name in component}
    for parts in {"normalizers", "pretokenizers"} & component.keys():
        component[parts] = [part for part in map(_without_prefix, component[parts]) if part is not None]
    return component


def _missing_bytes(tokens: Iterable[str]) -> set[str]:
    """The characters that stand for bytes and are no tokens."""
    return set(hf_tokenizers.pre_tokenizers.ByteLevel.alphabet()) - set(tokens)


def _unknown_id(tokenizer: hf_tokenizers.Tokenizer, model: dict[str, Any]) -> int | None:
    # Unigram models name it by its id, the others by its text.
    unknown = model.get("unk_token")
    return tokenizer.token_to_id(unknown) if unknown else model.get("unk_id")


def _incomplete_alphabet(model: dict[str, Any]) -> set[str] | None:
    """The characters of a BPE that has not all bytes to make others from; None where nothing can be missing unsaid."""
    if model["type"] != "BPE":
        return None
    prefix, suffix = model["continuing_subword_prefix"] or "", model["end_of_word_suffix"] or ""
    tokens = set(model["vocab"])
    alphabet = {token.removeprefix(prefix).removesuffix(suffix) for token in tokens}
    fallback = {f"<0x{byte:02X}>" for byte in range(256)}
    if not _missing_bytes(alphabet) or (model["byte_fallback"] and fallback <= tokens):
        return None
    return alphabet


def _configured_eod(config: Path) -> str | None:
    if not config.is_file():
        return None
    try:
        eod = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        eod = eod["content"] if isinstance(eod, dict) else eod
        if not isinstance(eod, str | None):
            raise ValueError(f"eos_token must be text: {eod!r}")
        return eod
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{config}: damaged ({one_line(error)}); use another copy, or leave it out") from error


def _pieces(text: str) -> Iterator[str]:
    """Pieces whose ids, one after the other, are the ids of the whole.

    Every word of GPT-2's pattern that ends in a character that is not blank ends before a blank, whatever follows.
    """
    word_end = re.compile(r"(?<=\S)(?=[ \n])")
    start = 0
    while (found := word_end.search(text, start + PIECE_CHARACTERS)) is not None:
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]
