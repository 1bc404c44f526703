"""From documents to Megatron's indexed token files, and back to their bare numbers."""

import codecs
import json
import os
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sedd_megatron.data.tokenizers import Tokenizer, replace_folder
from sedd_megatron.errors import UserError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".py", ".jsonl")
# Megatron's .idx file: magic, version 1, dtype code, number of sequences, number of documents + 1 (indexed_dataset.py).
INDEX_HEADER = struct.Struct("<9sQBQQ")
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


@dataclass(frozen=True)
class CorpusStats:
    """What is kept beside a corpus in PREFIX_stats.json."""

    num_documents: int
    num_tokens: int
    unigram_entropy_nats: float
    tokenizer_type: str


def input_files(inputs: Sequence[str]) -> list[Path]:
    """The files that --input names; a folder stands for the text files in it, in the order of their names.

    Files of a folder that are not UTF-8 are left out, with one warning on stderr; the check reads each file once.

    Raises:
        UserError: a path that is not there, or a folder without text files.
    """
    files = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files += _folder_files(path)
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"--input {name}: no such file or folder; check the path")
    return files


def documents(files: Iterable[Path], json_key: str = "text") -> Iterator[str]:
    """The texts: a .jsonl file gives one per line (the value at `json_key`), any other file is one.

    Raises:
        UserError: naming the file and line that is not UTF-8, not JSON or lacks the key.
    """
    for path in files:
        if path.suffix == ".jsonl":
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield _json_text(line, json_key, f"--input {path} line {number}")
        else:
            # Line ends as they are: text that is read back must be the text that was written.
            yield _utf8(path.read_bytes(), f"--input {path}")


def corpus_path(prefix: Path, key: str = "text") -> Path:
    """What --data-path has to be for the corpus that `write_corpus` writes."""
    return prefix.parent / f"{prefix.name}_{key}_document"


def write_corpus(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    prefix: Path,
    *,
    append_eod: bool = False,
    key: str = "text",
    on_progress: Callable[[int, int], None] | None = None,
) -> CorpusStats:
    """Write PREFIX_KEY_document.bin and .idx, the tokenizer and the statistics beside them.

    Everything is written into a hidden folder and renamed, the .idx last: a prefix either is a whole corpus or is not
    there. A corpus of that name stays until then.

    Args:
        on_progress: called with (documents, tokens) after each document.

    Raises:
        UserError: no tokens at all.
    """
    # Imported here: Megatron takes seconds to import, and a mistake in the flags should show before. It warns of what
    # training on this machine would lack; preparing data lacks nothing.
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed.*")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    final = corpus_path(prefix, key)
    final.parent.mkdir(parents=True, exist_ok=True)
    dtype = DType.optimal_dtype(tokenizer.num_tokens)
    # In the same folder: a rename within one file system is atomic.
    with tempfile.TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent) as folder:
        partial = Path(folder) / final.name
        builder = IndexedDatasetBuilder(f"{partial}.bin", dtype=dtype)
        num_documents = num_tokens = 0
        for text in texts:
            ids = tokenizer.encode(text)
            if not ids:
                continue
            if append_eod:
                ids.append(tokenizer.eod_id)
            builder.add_document(np.array(ids, dtype=dtype), [len(ids)])
            num_documents += 1
            num_tokens += len(ids)
            if on_progress is not None:
                on_progress(num_documents, num_tokens)
        if num_documents == 0:
            raise UserError("--input has no text; give files with at least one character")
        builder.finalize(f"{partial}.idx")
        # Counted from the file: one count of the vocabulary per short document would cost more than the rest.
        counts = _token_counts(np.memmap(f"{partial}.bin", dtype=dtype, mode="r"), tokenizer.num_tokens)
        stats = CorpusStats(num_documents, num_tokens, unigram_entropy(counts), tokenizer.tokenizer_type)
        Path(f"{partial}_stats.json").write_text(json.dumps(asdict(stats), indent=1) + "\n", encoding="utf-8")
        tokenizer.save(Path(f"{partial}_tokenizer"))
        _publish(partial, final)
    return stats


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats per token of the token frequencies: the loss of a model that knows nothing else."""
    frequencies = counts[counts > 0] / max(int(counts.sum()), 1)
    return float((frequencies * np.log(1 / frequencies)).sum()) if len(frequencies) else 0.0


def open_tokens(data_path: str) -> np.memmap:
    """All tokens of a .bin/.idx pair as one read-only array in the order of the documents.

    Raises:
        UserError: a file is missing, foreign or damaged; named.
    """
    index, tokens = Path(f"{data_path}.idx"), Path(f"{data_path}.bin")
    for path in (index, tokens):
        if not path.is_file():
            raise UserError(
                f"--data-path {data_path}: no file {path}; give the prefix that sedd_megatron.prepare_data printed"
            )
    with index.open("rb") as file:
        header = file.read(INDEX_HEADER.size)
    if len(header) < INDEX_HEADER.size or not header.startswith(INDEX_MAGIC):
        raise UserError(f"{index}: not a Megatron index file; make one with sedd_megatron.prepare_data")
    _, version, dtype_code, num_sequences, num_documents = INDEX_HEADER.unpack(header)
    expected_size = INDEX_HEADER.size + num_sequences * (4 + 8) + num_documents * 8
    if version != 1 or dtype_code not in INDEX_DTYPES or index.stat().st_size != expected_size:
        raise UserError(
            f"{index}: damaged, or of a version that Megatron-Core 0.16 does not write; prepare the data again"
        )
    dtype = np.dtype(INDEX_DTYPES[dtype_code])
    lengths = np.fromfile(index, dtype=np.int32, count=num_sequences, offset=INDEX_HEADER.size)
    num_tokens = int(lengths.sum(dtype=np.int64))
    if tokens.stat().st_size != num_tokens * dtype.itemsize:
        raise UserError(
            f"{tokens}: has {tokens.stat().st_size} bytes, its index says {num_tokens * dtype.itemsize}; it is cut "
            "short or belongs to another index: prepare the data again"
        )
    if num_tokens == 0:
        raise UserError(f"{tokens}: holds no tokens; prepare the data again from files with text")
    return np.memmap(tokens, dtype=dtype, mode="r")


class ProgressLine:
    """Documents, tokens and rate on stderr every few seconds of a long preparation."""

    def __init__(self, seconds_between: float = 5.0) -> None:
        self.start = self.last = None
        self.seconds_between = seconds_between

    def __call__(self, num_documents: int, num_tokens: int) -> None:
        """Print if it is time."""
        now = time.monotonic()
        if self.start is None:
            # From the first document on, and not from before Megatron's import.
            self.start = self.last = now
        if now - self.last >= self.seconds_between:
            self.last = now
            rate = num_tokens / (now - self.start)
            print(f"{num_documents:,} documents, {num_tokens:,} tokens, {rate:,.0f} tokens/s", file=sys.stderr)


def _folder_files(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
    skipped = {path for path in found if not _is_utf8(path)}
    readable = [path for path in found if path not in skipped]
    if not readable:
        raise UserError(
            f"--input {folder}: no UTF-8 file in it ends with {', '.join(TEXT_SUFFIXES)}; name the files one by one"
        )
    if skipped:
        print(f"warning: left out {len(skipped)} files that are not UTF-8, first {min(skipped)}", file=sys.stderr)
    return readable


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _token_counts(tokens: np.ndarray, num_tokens: int) -> np.ndarray:
    counts = np.zeros(num_tokens, dtype=np.int64)
    chunk = 1 << 24
    for start in range(0, len(tokens), chunk):
        counts += np.bincount(tokens[start : start + chunk], minlength=num_tokens)
    return counts


def _publish(partial: Path, final: Path) -> None:
    # Without its index a corpus does not exist: take the old one away before anything beside it changes.
    Path(f"{final}.idx").unlink(missing_ok=True)
    replace_folder(Path(f"{partial}_tokenizer"), Path(f"{final}_tokenizer"))
    for suffix in ("_stats.json", ".bin", ".idx"):
        os.replace(f"{partial}{suffix}", f"{final}{suffix}")


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}; convert it or leave it out") from error


def _json_text(line: bytes, key: str, where: str) -> str:
    try:
        value = json.loads(_utf8(line, where))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON; each line must be an object") from error
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        raise UserError(f"{where}: no text at key {key!r}; name the right one with --json-keys")
    try:
        # JSON can write half of a surrogate pair, as \ud800; no tokenizer can.
        value[key].encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} of {key!r} is half a surrogate pair; mend the line"
        ) from error
    return value[key]
