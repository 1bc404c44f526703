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

from sedd_megatron.data.special_tokens import SpecialNamesTokenizer
from sedd_megatron.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer
from sedd_megatron.errors import UserError

CHUNK_CHARACTERS = 1 << 20
# Below this Megatron keeps 16 bits for a token (DType.optimal_dtype in indexed_dataset.py).
FIRST_NUM_TOKENS_OF_32_BITS = 65500


class EncodedChunk(NamedTuple):
    """Consecutive texts as tokens; texts without tokens are counted and leave nothing else."""

    tokens: np.ndarray  # [sum of lengths] in the corpus' dtype
    lengths: np.ndarray  # [documents] int32
    num_texts: int
    num_bytes: int  # of the texts in UTF-8
    num_unknown: int  # of the tokens, those that stand for text without a token


def token_dtype(num_tokens: int) -> type[np.integer]:
    """Megatron's choice for a vocabulary."""
    return np.uint16 if num_tokens < FIRST_NUM_TOKENS_OF_32_BITS else np.int32


def encode_chunk(
    texts: Sequence[str], tokenizer: Tokenizer, append_eod: bool, allow_special_tokens: bool = False
) -> EncodedChunk:
    """Encode texts; with append_eod each document ends with the tokenizer's eod_id, and with allow_special_tokens the
    names of special tokens in a text become these tokens.
    """
    dtype = token_dtype(tokenizer.num_tokens)
    encode = _array_encoder(SpecialNamesTokenizer(tokenizer) if allow_special_tokens else tokenizer)
    end = np.array([tokenizer.eod_id], dtype) if append_eod else np.empty(0, dtype)
    arrays, lengths = [np.empty(0, dtype)], []
    for text in texts:
        ids = encode(text)
        if len(ids) > 0:
            arrays += [ids, end]
            lengths.append(len(ids) + len(end))
    num_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
    tokens = np.concatenate(arrays)
    return EncodedChunk(tokens, np.array(lengths, np.int32), len(texts), num_bytes, count_unknown(tokens, tokenizer))


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
    append_eod: bool,
    workers: int = 1,
    tokenizer_folder: Path | None = None,
    allow_special_tokens: bool = False,
) -> Iterator[EncodedChunk]:
    """All texts as chunks in their order, the same ones for any number of processes.

    With more than one worker each loads the tokenizer from `tokenizer_folder`, and no more than two chunks per worker
    wait.

    Raises:
        UserError: a text that the tokenizer refuses, or a process that was killed.
    """
    chunks = _chunks(texts)
    if workers == 1:
        yield from (encode_chunk(chunk, tokenizer, append_eod, allow_special_tokens) for chunk in chunks)
        return
    # Spawned, because a fork of a process with threads, as tokenizer libraries have, may hang.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin_worker)
    pending = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_encode_in_worker, chunk, tokenizer_folder, append_eod, allow_special_tokens))
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
    """tokenizer.encode as an array of the corpus' dtype; without a Python list where a table does it."""
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


def _encode_in_worker(
    texts: Sequence[str], tokenizer_folder: Path, append_eod: bool, allow_special_tokens: bool
) -> EncodedChunk:
    return encode_chunk(texts, _worker_tokenizer(tokenizer_folder), append_eod, allow_special_tokens)


@lru_cache(maxsize=1)
def _worker_tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)
