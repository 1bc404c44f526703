"""Texts to token arrays, in this process or in several, in the order of the texts."""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sedd_megatron.data.library_tokenizers import GPT2BPETokenizer
from sedd_megatron.data.preparation import Preparation
from sedd_megatron.data.special_tokens import SpecialNamesTokenizer
from sedd_megatron.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer
from sedd_megatron.errors import UserError

CHUNK_CHARACTERS = 1 << 20
# Below this Megatron keeps 16 bits for a token (DType.optimal_dtype in indexed_dataset.py).
FIRST_NUM_TOKENS_OF_32_BITS = 65500
# Of a document in the index, which counts in 32 bits with a sign.
LONGEST_IN_INDEX = (1 << 31) - 1


class EncodedChunk(NamedTuple):
    """Consecutive texts as tokens, a document each unless they are longer than one may be; texts without tokens are
    counted and leave nothing else.
    """

    tokens: np.ndarray  # [sum of lengths] in the corpus' dtype
    lengths: np.ndarray  # [documents] int32
    num_texts: int
    num_bytes: int  # of the texts in UTF-8
    num_unknown: int  # of the tokens, those that stand for text without a token


def token_dtype(num_tokens: int) -> type[np.integer]:
    """Megatron's choice for a vocabulary."""
    return np.uint16 if num_tokens < FIRST_NUM_TOKENS_OF_32_BITS else np.int32


def encode_chunk(texts: Sequence[str], tokenizer: Tokenizer, preparation: Preparation) -> EncodedChunk:
    """Encode texts as `preparation` says: with an end of document behind each, names of special tokens as these."""
    dtype = token_dtype(tokenizer.num_tokens)
    encode = _array_encoder(preparation.tokenizer_of_texts(tokenizer))
    end = np.array([tokenizer.eod_id], dtype) if preparation.append_eod else np.empty(0, dtype)
    arrays, lengths = [np.empty(0, dtype)], []
    for text in texts:
        ids = encode(text)
        if len(ids) > 0:
            arrays += [ids, end]
            lengths.append(len(ids) + len(end))
    num_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
    tokens = np.concatenate(arrays)
    ends = cut_ends(np.cumsum(lengths, dtype=np.int64), LONGEST_IN_INDEX)
    return EncodedChunk(tokens, lengths_of(ends), len(texts), num_bytes, count_unknown(tokens, tokenizer))


def cut_ends(ends: np.ndarray, longest: int) -> np.ndarray:
    """These ends of documents, and one after every `longest` tokens of a document that has more."""
    if np.diff(ends, prepend=0).max(initial=0) <= longest:
        return ends
    cut, start = [], 0
    for end in ends.tolist():
        cut += [*range(start + longest, end, longest), end]
        start = end
    return np.array(cut, np.int64)


def lengths_of(ends: np.ndarray) -> np.ndarray:
    """The lengths of documents that end there, as the index keeps them."""
    return np.diff(ends, prepend=0).astype(np.int32)


def count_unknown(tokens: np.ndarray, tokenizer: Tokenizer) -> int:
    """How many of the tokens stand for text that the tokenizer has no token for.

    Where that token ends documents too, as in some tokenizers of bytes, which know all text, it is taken for an end.
    """
    if tokenizer.unknown_id in (None, tokenizer.eod_id):
        return 0
    return int(np.count_nonzero(tokens == tokenizer.unknown_id))


def encoded_chunks(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    preparation: Preparation,
    workers: int = 1,
    tokenizer_folder: Path | None = None,
) -> Iterator[EncodedChunk]:
    """All texts as chunks in their order, the same ones for any number of processes.

    With more than one worker each loads the tokenizer from `tokenizer_folder`, and no more than two chunks per worker
    wait.

    Raises:
        UserError: a text that the tokenizer refuses, or a process that was killed.
    """
    chunks = _chunks(texts)
    if workers == 1:
        yield from (encode_chunk(chunk, tokenizer, preparation) for chunk in chunks)
        return
    # Spawned, because a fork of a process with threads, as tokenizer libraries have, may hang.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin_worker)
    pending = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_encode_in_worker, chunk, tokenizer_folder, preparation))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"--workers {workers}: one of the processes was killed, most often for want of memory; give fewer"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk, characters = [], 0
    for text in texts:
        chunk.append(text)
        # One more for each text, so that texts without characters fill a chunk too.
        characters += len(text) + 1
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _array_encoder(tokenizer: Tokenizer):
    """tokenizer.encode as an array of the corpus' dtype, where it can be without a Python list of the whole text, which
    takes 18 times the memory.
    """
    dtype = token_dtype(tokenizer.num_tokens)
    if isinstance(tokenizer, ByteTokenizer):
        return lambda text: np.frombuffer(text.encode("utf-8"), np.uint8).astype(dtype)
    if isinstance(tokenizer, CharTokenizer) and tokenizer.num_tokens > 0:
        known = np.array([ord(character) for character in tokenizer.characters], np.uint32)
        ids = np.full(int(known.max()) + 2, -1, np.int64)
        ids[known] = np.arange(len(known))

        def encode(text: str) -> np.ndarray:
            points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            found = ids[np.minimum(points, len(ids) - 1)]
            # The tokenizer itself names what it does not know.
            return np.array(tokenizer.encode(text) if (found < 0).any() else found, dtype)

        return encode
    if isinstance(tokenizer, GPT2BPETokenizer | SpecialNamesTokenizer):
        return lambda text: np.fromiter(tokenizer.stream(text), dtype)
    return lambda text: np.array(tokenizer.encode(text), dtype)


def _begin_worker() -> None:
    # One process is one thread's work: the libraries' own threads would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C goes to all processes of a terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that was killed cannot end its workers, and they would wait for it forever.
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _encode_in_worker(texts: Sequence[str], tokenizer_folder: Path, preparation: Preparation) -> EncodedChunk:
    return encode_chunk(texts, _worker_tokenizer(tokenizer_folder), preparation)


@lru_cache(maxsize=1)
def _worker_tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)
