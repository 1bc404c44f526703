"""Files of bare tokens, as nanoGPT's train.bin: numbers of one width, one after the other."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sedd_megatron.data.encoding import EncodedChunk, count_unknown, cut_ends, lengths_of, token_dtype
from sedd_megatron.data.input_files import InputFile
from sedd_megatron.data.tokenizers import Tokenizer
from sedd_megatron.errors import UserError

INPUT_DTYPES = ("uint16", "uint32", "int32", "int64")
TOKENS_AT_ONCE = 1 << 22
# Of a document, all of which is kept until it ends; windows do not ask where documents end.
LONGEST_DOCUMENT = 1 << 24


class TokenSource:
    """Token files one after the other; a document ends after the tokenizer's end of document, and with its file."""

    unit = "B"
    num_nulls = 0

    def __init__(self, files: Sequence[InputFile], dtype: str) -> None:
        self.files, self.dtype = tuple(files), np.dtype(dtype).newbyteorder("<")
        self.name = self.files[0].where
        self.total = sum(file.size for file in self.files)
        self.position = 0
        for file in self.files:
            if file.size % self.dtype.itemsize != 0:
                raise UserError(
                    f"{file.where}: has {file.size} bytes, no multiple of the {self.dtype.itemsize} of --input-dtype "
                    f"{dtype}; give the width of its tokens, or a whole file"
                )

    def identity(self) -> Any:
        """Of the files and their width."""
        return [self.dtype.str, [file.identity() for file in self.files]]

    def chunks(self, tokenizer: Tokenizer, skip: int = 0) -> Iterator[EncodedChunk]:
        """All tokens but the first `skip`, as they are; the last of them ended a document.

        Raises:
            UserError: naming the first token that is none of the tokenizer's, and its position.
        """
        self.position = 0
        for file in self.files:
            num_tokens = file.size // self.dtype.itemsize
            here = min(skip, num_tokens)
            skip -= here
            self.position += here * self.dtype.itemsize
            rest = np.empty(0, token_dtype(tokenizer.num_tokens))
            for tokens in self._read(file, here, tokenizer):
                self.position += len(tokens) * self.dtype.itemsize
                rest = np.concatenate([rest, tokens])
                ends = _document_ends(rest, tokenizer.eod_id)
                if len(ends) > 0:
                    yield _chunk(rest[: ends[-1]], ends, tokenizer, self.dtype)
                    rest = rest[ends[-1] :]
            if len(rest) > 0:
                yield _chunk(rest, np.array([len(rest)]), tokenizer, self.dtype)

    def _read(self, file: InputFile, first: int, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
        with file.open_packed() as content:
            content.seek(first * self.dtype.itemsize)
            while block := content.read(TOKENS_AT_ONCE * self.dtype.itemsize):
                tokens = np.frombuffer(block, self.dtype)
                foreign = np.flatnonzero((tokens < 0) | (tokens >= tokenizer.num_tokens))
                if len(foreign) > 0:
                    raise UserError(
                        f"{file.where}: token {tokens[foreign[0]]} at position {first + foreign[0]}, and "
                        f"{tokenizer.tokenizer_type} has tokens 0 to {tokenizer.num_tokens - 1}; give the tokenizer "
                        "that it was made with, or another --input-dtype"
                    )
                yield tokens.astype(token_dtype(tokenizer.num_tokens))
                first += len(tokens)


def _document_ends(tokens: np.ndarray, eod_id: int | None) -> np.ndarray:
    """Where documents end for certain: after each end of document, and after as many tokens as one may have."""
    found = np.empty(0, np.int64) if eod_id is None else np.flatnonzero(tokens == eod_id) + 1
    # Whatever comes after the last may go on.
    return cut_ends(np.append(found, len(tokens)), LONGEST_DOCUMENT)[:-1]


def _chunk(tokens: np.ndarray, ends: np.ndarray, tokenizer: Tokenizer, dtype: np.dtype) -> EncodedChunk:
    lengths = lengths_of(ends)
    return EncodedChunk(tokens, lengths, len(lengths), len(tokens) * dtype.itemsize, count_unknown(tokens, tokenizer))
