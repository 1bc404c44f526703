"""Texts in which the names of special tokens are these tokens."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from sedd_megatron.data.library_tokenizers import GPT2BPETokenizer, HuggingFaceTokenizer, names_pattern
from sedd_megatron.data.tokenizers import Tokenizer


class SpecialNamesTokenizer:
    """A tokenizer, but the names of its special tokens in a text become these tokens.

    What follows one is no beginning of a text: no blank is put before it, unless the tokenizer's own library does so.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.plain = tokenizer
        self.tokenizer_type: str = tokenizer.tokenizer_type
        self.num_tokens: int = tokenizer.num_tokens
        self.eod_id: int | None = tokenizer.eod_id
        self.unknown_id: int | None = tokenizer.unknown_id
        self.special_tokens: Mapping[str, int] = tokenizer.special_tokens
        self._names = names_pattern(tokenizer.special_tokens)
        # A tokenizer.json may have a name take the blanks before it.
        self._taking_blanks = tokenizer.taking_blanks if isinstance(tokenizer, HuggingFaceTokenizer) else frozenset()

    def encode(self, text: str) -> list[int]:
        """Token ids of a whole text, or of its beginning."""
        return list(self.stream(text))

    def stream(self, text: str) -> Iterator[int]:
        """The same one after the other, for texts whose list of ids would fill the memory."""
        if isinstance(self.plain, HuggingFaceTokenizer):
            yield from self.plain.encode_with_special(text)
            return
        end = 0
        for name in self._names.finditer(text):
            yield from self._encode_between(text[end : name.start()], end)
            yield self.special_tokens[name[0]]
            end = name.end()
        yield from self._encode_between(text[end:], end)

    def encode_inside(self, text: str) -> list[int]:
        """Token ids of text that has something before it."""
        name = self._names.search(text)
        start = len(text) if name is None else name.start()
        if name is not None and name[0] in self._taking_blanks:
            start = len(text[:start].rstrip())
        # Behind a name everything is as in a whole text.
        return [*self.plain.encode_inside(text[:start]), *self.encode(text[start:])]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, the names of special tokens in it."""
        hidden = [place for place, id in enumerate(ids) if id in self._hidden]
        whole = self.plain.decode(ids)
        # Decoded by itself what follows a name would lose a blank that it begins with.
        ends = [len(self.plain.decode(ids[:place])) for place in hidden]
        pieces = [whole[start:end] for start, end in pairwise([0, *ends, len(whole)])]
        names = [self._hidden[ids[place]] for place in hidden]
        return pieces[0] + "".join(name + piece for name, piece in zip(names, pieces[1:], strict=True))

    @cached_property
    def _hidden(self) -> dict[int, str]:
        """Names that the plain tokenizer does not show: SentencePiece decodes its control symbols to nothing."""
        return {id: name for name, id in self.special_tokens.items() if not self.plain.decode([id])}

    def save(self, directory: Path) -> None:
        """Write the plain tokenizer's description into a new folder."""
        self.plain.save(directory)

    def _encode_between(self, text: str, start: int) -> Iterable[int]:
        if isinstance(self.plain, GPT2BPETokenizer):
            return self.plain.stream(text)
        return self.plain.encode_inside(text) if start > 0 else self.plain.encode(text)
