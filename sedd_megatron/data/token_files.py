"""Files of bare tokens, as nanoGPT's train.bin: numbers of one width, one after the other."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sedd_megatron.data.encoding import EncodedChunk, count_unknown, cut_ends, lengths_of, token_dtype
from sedd_megatron.data.input_files import InputFile
from sedd_megatron.data.packed_files import LONGEST_SIGN, PACKED_SUFFIXES, unpacker
from sedd_megatron.data.tokenizers import Tokenizer
from sedd_megatron.errors import UserError

INPUT_DTYPES = ("uint16", "uint32", "int32", "int64")
TOKENS_AT_ONCE = 1 << 22
# Of a document, all of which is kept until it ends; windows do not ask where documents end.
LONGEST_DOCUMENT = 1 << 24
NUMPY_SIGN = b"\x93NUMPY"
# Enough tokens that zeros in turn are no chance, and what is looked at.
FEWEST_SEEN, MOST_SEEN = 32, 1 << 16
# Upper halves of 32-bit tokens: of a vocabulary of up to 262,144, whose lower halves are larger now and then.
SMALL_HALF, LARGE_HALF = 3, 1000


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
            _check_beginning(file, dtype)

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


def _check_beginning(file: InputFile, dtype: str) -> None:
    """Raise if a file has a header, is packed and called so, or shows that its tokens are wider.

    By its beginning alone no file is packed: tokens may begin with any bytes.
    """
    with file.open_packed() as content:
        beginning = content.read(MOST_SEEN * np.dtype(dtype).itemsize)
    if beginning.startswith(NUMPY_SIGN):
        raise UserError(
            f"{file.where}: is a NumPy file, with a header before its tokens; write them bare, as "
            "numpy.load(FILE).tofile(OTHER) does, and give their type"
        )
    is_called_packed = file.path.suffix.lower() in PACKED_SUFFIXES
    if is_called_packed and unpacker(beginning[:LONGEST_SIGN], file.where) is not None:
        raise UserError(f"{file.where}: is packed, and bare tokens are taken as they are; unpack it")
    wider = _wider_dtype(beginning, np.dtype(dtype))
    if wider is not None:
        raise UserError(
            f"{file.where}: of its tokens as {dtype} all are 0 or small but for those that begin a {wider}; give "
            f"--input-dtype {wider}"
        )


def _wider_dtype(beginning: bytes, dtype: np.dtype) -> str | None:
    """The type whose numbers these are, if read as `dtype` they leave its upper parts between them."""
    tokens = np.frombuffer(beginning, dtype.newbyteorder("<"))
    for wider in ("int64", "uint32"):
        times = np.dtype(wider).itemsize // dtype.itemsize
        if times < 2 or len(tokens) < max(FEWEST_SEEN, 2 * times):
            continue
        numbers = tokens[: len(tokens) // times * times].reshape(-1, times)
        low, high, rest = numbers[:, 0], numbers[:, 1], numbers[:, 2:]
        is_half_of_large = dtype.itemsize == 2 and high.max() <= SMALL_HALF and low.max() >= LARGE_HALF
        if rest.any() or not low.any() or (high.any() and not is_half_of_large):
            continue
        return wider
    return None


def _document_ends(tokens: np.ndarray, eod_id: int | None) -> np.ndarray:
    """Where documents end for certain: after each end of document, and after as many tokens as one may have."""
    found = np.empty(0, np.int64) if eod_id is None else np.flatnonzero(tokens == eod_id) + 1
    # Whatever comes after the last may go on.
    return cut_ends(np.append(found, len(tokens)), LONGEST_DOCUMENT)[:-1]


def _chunk(tokens: np.ndarray, ends: np.ndarray, tokenizer: Tokenizer, dtype: np.dtype) -> EncodedChunk:
    lengths = lengths_of(ends)
    return EncodedChunk(tokens, lengths, len(lengths), len(tokens) * dtype.itemsize, count_unknown(tokens, tokenizer))
