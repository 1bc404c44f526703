"""From documents to Megatron's indexed token files, and back to their bare numbers."""

import difflib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sedd_megatron.data.digests import write_digests
from sedd_megatron.data.encoding import EncodedChunk, encoded_chunks, token_dtype
from sedd_megatron.data.object_storage import RemoteTokens, remote_bin
from sedd_megatron.data.parts import Extent, PartialCorpus
from sedd_megatron.data.preparation import Preparation, stats_path
from sedd_megatron.data.publication import INDEX_MAGIC, publish
from sedd_megatron.data.tokenizers import Tokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.wording import read_errors

# Megatron's .idx file: magic, version 1, dtype code, number of sequences, number of documents + 1 (indexed_dataset.py).
INDEX_HEADER = struct.Struct("<9sQBQQ")
INDEX_BLOCK = 1 << 22
# Beyond these sizes in bytes an index is held against itself, and tokens against the vocabulary, while training goes on
# and not before it: on a disk of a gigabyte per second they take about this many seconds.
INDEX_READ_AT_START, TOKENS_READ_AT_START = 1 << 26, 4 << 30
MOST_NAMED = 3
INDEX_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


@dataclass(frozen=True)
class CorpusStats:
    """What is kept beside a corpus in PREFIX_stats.json."""

    num_documents: int
    num_tokens: int
    unigram_entropy_nats: float
    tokenizer_type: str
    append_eod: bool | None = None  # of Preparation, both
    allow_special_tokens: bool = False


def corpus_path(prefix: Path, key: str = "text") -> Path:
    """What --data-path has to be for the corpus that `write_corpus` writes; % and / of a key become %25 and %2F."""
    name = key.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return prefix.parent / f"{prefix.name}_{name}_document"


def write_corpus(
    texts: Iterable[str], tokenizer: Tokenizer, prefix: Path, *, append_eod: bool = False, key: str = "text"
) -> CorpusStats:
    """Write PREFIX_KEY_document.bin and .idx, the tokenizer and the statistics beside them, in one go.

    Raises:
        UserError: no tokens at all.
    """
    final = corpus_path(prefix, key)
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent) as folder:
        partial = Path(folder) / final.name
        preparation = Preparation(append_eod)
        append_chunks(encoded_chunks(texts, tokenizer, preparation), token_dtype(tokenizer.num_tokens), partial)
        stats = finish_corpus(partial, tokenizer, preparation)
        publish([(partial, final)])
        return stats


def append_chunks(
    chunks: Iterable[EncodedChunk],
    dtype: type[np.integer],
    partial: Path,
    *,
    part_bytes: int | None = None,
    on_progress: Callable[[Extent], None] | None = None,
) -> Extent:
    """Write tokens behind the finished parts of PARTIAL, as one more part or in parts of `part_bytes` of text.

    Args:
        chunks: those that the finished parts do not have yet.
        dtype: of the corpus' tokens.
        on_progress: called after each chunk with what there is now.

    Returns:
        What there is at the end.
    """
    corpus = PartialCorpus(partial, dtype)
    try:
        for chunk in chunks:
            corpus.append(chunk)
            if part_bytes is not None and corpus.extent.num_bytes - corpus.finished.num_bytes >= part_bytes:
                corpus.finish_part()
            if on_progress is not None:
                on_progress(corpus.extent)
        if corpus.extent.num_documents > 0:
            corpus.finish_part()
    finally:
        corpus.close()
    return corpus.extent


def finish_corpus(partial: Path, tokenizer: Tokenizer, preparation: Preparation) -> CorpusStats:
    """Write all that belongs to a corpus beside the finished parts of PARTIAL, ready to be published.

    Raises:
        UserError: there are no tokens.
    """
    dtype = token_dtype(tokenizer.num_tokens)
    lengths = np.fromfile(f"{partial}.lengths", dtype=np.int32)
    if len(lengths) == 0:
        raise UserError("the input has no text; give files or a dataset with at least one character")
    _write_index(Path(f"{partial}.idx"), lengths, dtype)
    # Counted from the file: one count of the vocabulary per short document would cost more than the rest.
    counts = _token_counts(np.memmap(f"{partial}.bin", dtype=dtype, mode="r"), tokenizer.num_tokens)
    stats = CorpusStats(
        len(lengths), int(counts.sum()), unigram_entropy(counts), tokenizer.tokenizer_type, **asdict(preparation)
    )
    stats_path(str(partial)).write_text(json.dumps(asdict(stats), indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(f"{partial}_tokenizer", ignore_errors=True)
    tokenizer.save(Path(f"{partial}_tokenizer"))
    write_digests(str(partial))
    return stats


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats per token of the token frequencies: the loss of a model that knows nothing else."""
    frequencies = counts[counts > 0] / max(int(counts.sum()), 1)
    return float((frequencies * np.log(1 / frequencies)).sum()) if len(frequencies) else 0.0


def open_tokens(data_path: str, flag: str = "--data-path", is_read_whole: bool = True) -> np.memmap | RemoteTokens:
    """All tokens of a .bin/.idx pair, which `flag` names, as one read-only array in the order of the documents.

    Of an index above INDEX_READ_AT_START only the beginning and the end are read, unless `is_read_whole`.

    Raises:
        UserError: a file is missing, foreign or damaged; named.
    """
    find_corpus(data_path, flag)
    index, tokens = Path(f"{data_path}.idx"), Path(f"{data_path}.bin")
    with read_errors(index):
        dtype, num_tokens = _read_index(index, is_read_whole)
    remote = remote_bin(data_path)
    size = tokens.stat().st_size if remote is None else remote.size
    if size != num_tokens * dtype.itemsize:
        raise UserError(
            f"{tokens if remote is None else remote.url}: has {size} bytes, its index says "
            f"{num_tokens * dtype.itemsize}; it is cut short or belongs to another index: prepare the data again"
        )
    if num_tokens == 0:
        raise UserError(f"{tokens}: holds no tokens; prepare the data again from files with text")
    if remote is not None:
        return RemoteTokens(remote.url, remote.version, dtype, num_tokens)
    with read_errors(tokens):
        return np.memmap(tokens, dtype=dtype, mode="r")


def find_corpus(data_path: str, flag: str = "--data-path") -> None:
    """Raise unless both files of a corpus are there.

    Raises:
        UserError: naming the one that is missing, and what else lies there.
    """
    for suffix in (".idx", ".bin"):
        if os.path.isfile(f"{data_path}{suffix}"):  # unlike Path.is_file, of any name
            continue
        if suffix == ".bin" and remote_bin(data_path) is not None:
            continue
        bare = data_path.removesuffix(".bin").removesuffix(".idx")
        if bare != data_path and os.path.isfile(f"{bare}.idx"):
            raise UserError(f"{flag} {data_path}: is a file of a corpus; leave {data_path.removeprefix(bare)} out")
        others = ", ".join(_similar_prefixes(data_path))
        way_out = f"that folder has {others}" if others else "give the prefix that sedd_megatron.prepare_data printed"
        raise UserError(f"{flag} {data_path}: no file {data_path}{suffix}; {way_out}")


def _similar_prefixes(data_path: str) -> list[str]:
    """Up to three corpora of that folder whose names are nearest."""
    folder, name = os.path.split(data_path)
    try:
        names = [found.removesuffix(".idx") for found in os.listdir(folder or ".") if found.endswith(".idx")]
    except OSError:
        return []
    begun = sorted(found for found in names if name and found.startswith(name) and found != name)
    near = [found for found in difflib.get_close_matches(name, names, MOST_NAMED) if found != name]
    return [os.path.join(folder, found) for found in dict.fromkeys([*begun, *near])][:MOST_NAMED]


def are_read_at_start(prefixes: Iterable[str]) -> bool:
    """Whether the tokens of all these corpora are on disks, and together few enough to be read before training."""
    prefixes = set(prefixes)
    if any(remote_bin(prefix) for prefix in prefixes):
        return False
    return sum(os.path.getsize(f"{prefix}.bin") for prefix in prefixes) <= TOKENS_READ_AT_START


def is_index_read_at_start(prefix: str) -> bool:
    """Whether a corpus' index is held against itself whenever it is opened."""
    return os.path.getsize(f"{prefix}.idx") <= INDEX_READ_AT_START


def _read_index(index: Path, is_read_whole: bool) -> tuple[np.dtype, int]:
    """The type and number of the tokens; every pointer is held against the lengths."""
    with index.open("rb") as file:
        header = file.read(INDEX_HEADER.size)
    if len(header) < INDEX_HEADER.size or not header.startswith(INDEX_MAGIC):
        raise UserError(f"{index}: not a Megatron index file; make one with sedd_megatron.prepare_data")
    _, version, dtype_code, num_sequences, num_documents = INDEX_HEADER.unpack(header)
    if version != 1 or dtype_code not in INDEX_DTYPES:
        what = f"of version {version}" if version != 1 else f"of numbers that are no tokens (type {dtype_code})"
        raise UserError(f"{index}: is {what}, which Megatron-Core 0.16 does not write for text; prepare the data again")
    # Sizes first: a damaged count would ask for any amount of memory.
    size, expected_size = index.stat().st_size, INDEX_HEADER.size + num_sequences * (4 + 8) + num_documents * 8
    if num_sequences > 0 and size == expected_size + num_sequences:
        raise UserError(
            f"{index}: is of a multimodal dataset, with a mode for each sequence, and this trains on text; prepare its "
            "text by itself"
        )
    if size != expected_size:
        raise UserError(
            f"{index}: has {size} bytes, its header says {expected_size}; it is damaged: prepare the data again"
        )
    dtype = np.dtype(INDEX_DTYPES[dtype_code])
    checked = num_sequences if is_read_whole or size <= INDEX_READ_AT_START else 0
    return dtype, _check_pointers(index, num_sequences, num_documents, dtype.itemsize, checked)


def _check_pointers(index: Path, num_sequences: int, num_documents: int, itemsize: int, checked: int) -> int:
    """The number of tokens, if sequences follow each other as their lengths say, and documents are runs of them.

    All are read if `checked` is num_sequences; the last alone if it is 0.
    """
    offsets = [INDEX_HEADER.size + num_sequences * bytes_before for bytes_before in (0, 4, 4 + 8)]
    counts, num_tokens = (num_sequences, num_sequences, num_documents), 0
    lengths, pointers, documents = (
        np.memmap(index, dtype, "r", offset, (count,)) if count > 0 else np.empty(0, dtype)
        for dtype, offset, count in zip((np.int32, np.int64, np.int64), offsets, counts, strict=True)
    )
    is_sound = num_documents > 0 and documents[0] == 0 and documents[-1] == num_sequences
    # In blocks, because every rank of a machine does so at once.
    for start in range(0, checked, INDEX_BLOCK):
        block = slice(start, start + INDEX_BLOCK)
        ends = num_tokens + np.cumsum(lengths[block], dtype=np.int64)
        is_sound &= bool(lengths[block].min() >= 0 and (pointers[block] == (ends - lengths[block]) * itemsize).all())
        num_tokens = int(ends[-1])
    for start in range(0, num_documents if checked else 0, INDEX_BLOCK):
        is_sound &= bool((np.diff(documents[start : start + INDEX_BLOCK + 1]) >= 0).all())
    if num_sequences > 0 and not checked:
        is_sound &= bool(pointers[0] == 0 and lengths[-1] >= 0 and pointers[-1] % itemsize == 0)
        num_tokens = int(pointers[-1]) // itemsize + int(lengths[-1])
    if not is_sound:
        raise UserError(f"{index}: its pointers are not those of its lengths: it is damaged; prepare the data again")
    return num_tokens


def _write_index(path: Path, lengths: np.ndarray, dtype: type[np.integer]) -> None:
    """Megatron's .idx of documents that are one sequence each, as its IndexedDatasetBuilder writes it."""
    codes = {np.dtype(known): code for code, known in INDEX_DTYPES.items()}
    sizes = lengths.astype(np.int64) * np.dtype(dtype).itemsize
    with path.open("wb") as file:
        file.write(INDEX_HEADER.pack(INDEX_MAGIC, 1, codes[np.dtype(dtype)], len(lengths), len(lengths) + 1))
        file.write(lengths.data)
        file.write((np.cumsum(sizes) - sizes).data)
        file.write(np.arange(len(lengths) + 1, dtype=np.int64).data)
        file.flush()
        os.fsync(file.fileno())


def _token_counts(tokens: np.ndarray, num_tokens: int) -> np.ndarray:
    counts = np.zeros(num_tokens, dtype=np.int64)
    chunk = 1 << 24
    for start in range(0, len(tokens), chunk):
        counts += np.bincount(tokens[start : start + chunk], minlength=num_tokens)
    return counts
