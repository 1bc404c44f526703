"""A corpus while it is written, in parts that a kill leaves whole.

    .PREFIX.parts/
        command.json                 digest of the options and inputs
        tokenizer/                   the tokenizer, learnt or given
        NAME.bin, NAME.lengths       tokens and int32 lengths of documents, one part after the other
        NAME.json                    how far the last finished part goes

A part is finished when NAME.json says so, which it does only after the tokens are on the disk; what was written after
it is cut away when the same command goes on.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from sedd_megatron.data.encoding import EncodedChunk
from sedd_megatron.data.tokenizer_folder import DESCRIPTION
from sedd_megatron.data.tokenizers import Tokenizer, load_tokenizer
from sedd_megatron.errors import UserError, say

COMMAND = "command.json"
LOCK = "lock"


@dataclass(frozen=True)
class Extent:
    """How much of a corpus there is."""

    num_texts: int = 0  # read from the source, those without tokens among them
    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0  # of text
    num_unknown: int = 0  # of the tokens

    def plus(self, chunk: EncodedChunk) -> "Extent":
        """After one more chunk."""
        return Extent(
            self.num_texts + chunk.num_texts,
            self.num_documents + len(chunk.lengths),
            self.num_tokens + len(chunk.tokens),
            self.num_bytes + chunk.num_bytes,
            self.num_unknown + chunk.num_unknown,
        )


class PartialCorpus:
    """Writes PARTIAL.bin and PARTIAL.lengths, from the last finished part on if there is one."""

    def __init__(self, partial: Path, dtype: type[np.integer]) -> None:
        self._state = Path(f"{partial}.json")
        self.extent = self.finished = self.finished_extent(partial, dtype)
        paths = (Path(f"{partial}.bin"), Path(f"{partial}.lengths"))
        self._files = [path.open("r+b" if path.exists() else "w+b") for path in paths]
        for file, size in zip(self._files, _sizes(self.extent, dtype), strict=True):
            file.truncate(size)
            file.seek(size)

    def append(self, chunk: EncodedChunk) -> None:
        """Write a chunk; it is lost in a kill unless a part is finished after it."""
        for file, array in zip(self._files, (chunk.tokens, chunk.lengths), strict=True):
            file.write(array.data)
        self.extent = self.extent.plus(chunk)

    def finish_part(self) -> None:
        """Bring everything to the disk and say so."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        write_whole(self._state, json.dumps(asdict(self.extent)))
        self.finished = self.extent

    def close(self) -> None:
        """Close the files; call it whatever happened."""
        for file in self._files:
            file.close()

    @staticmethod
    def finished_extent(partial: Path, dtype: type[np.integer]) -> Extent:
        """How far the finished parts go; nowhere if their files were published, or cut by someone."""
        extent = _written_extent(Path(f"{partial}.json")) or Extent()
        paths = (Path(f"{partial}.bin"), Path(f"{partial}.lengths"))
        there = [path.stat().st_size if path.is_file() else 0 for path in paths]
        is_whole = all(size >= needed for size, needed in zip(there, _sizes(extent, dtype), strict=True))
        if not is_whole or extent == Extent():
            return Extent()
        lengths = (
            np.memmap(paths[1], np.int32, "r", shape=(extent.num_documents,)) if extent.num_documents else np.empty(0)
        )
        return extent if int(lengths.sum(dtype=np.int64)) == extent.num_tokens else Extent()


@contextlib.contextmanager
def parts_folder(folder: Path, digest: str, resume: bool) -> Iterator[Path]:
    """The folder of a command's parts: emptied first, unless the same command left finished ones and `resume` is set.

    It goes away at the end, and after an error that no part was finished before; what cannot be removed stays.

    Raises:
        UserError: it has finished parts of another command, or another process writes there now.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    try:
        with _locked(folder):
            _begin(folder, digest, resume)
            try:
                yield folder
            except BaseException:
                if not has_finished_parts(folder):
                    _empty_with_lock(folder)
                raise
            _empty_with_lock(folder)
    finally:
        # Not before the lock is closed: NFS keeps an open file in its folder, under another name. With anything in it,
        # of ours or of another process that has begun since, it stays.
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder}: another preparation of this --output-prefix is running; wait for it, or give another prefix"
            ) from error
        yield


def _begin(folder: Path, digest: str, resume: bool) -> None:
    command = folder / COMMAND
    is_same = command.is_file() and command.read_bytes() == digest.encode()
    if resume and not is_same and has_finished_parts(folder):
        raise UserError(
            f"{folder}: has finished parts of another command or of inputs that have changed since; give --no-resume "
            "to start anew, or another --output-prefix"
        )
    if not (resume and is_same):
        _empty(folder)
        write_whole(command, digest)
    for state in _states(folder):
        if _written_extent(state) is None:
            say(f"{state}: damaged, so that its parts are made again", to_stderr=True)


def has_finished_parts(folder: Path) -> bool:
    """Whether there is something to go on from: of parts that were published, there is not."""
    # Of the narrowest tokens; which they are, only their tokenizer says.
    return any(PartialCorpus.finished_extent(state.with_suffix(""), np.uint16) != Extent() for state in _states(folder))


def _states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if path.name != COMMAND and path.is_file())


def _written_extent(state: Path) -> Extent | None:
    """What NAME.json says; nothing without one, and None if it is damaged."""
    if not state.is_file():
        return Extent()
    try:
        written = json.loads(state.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    names = {field.name for field in fields(Extent)}
    # By its type: True is a number as well.
    if not isinstance(written, dict) or written.keys() != names or any(type(n) is not int for n in written.values()):
        return None
    return Extent(**written) if min(written.values()) >= 0 else None


def kept_tokenizer(folder: Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer that the parts were made with, or else a new one, kept from now on."""
    kept = folder / "tokenizer"
    if (kept / DESCRIPTION).is_file():
        return load_tokenizer(kept)
    tokenizer, new = make(), folder / "tokenizer.new"
    shutil.rmtree(new, ignore_errors=True)
    tokenizer.save(new)
    new.rename(kept)
    return tokenizer


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or as it was, whatever ends the process or the machine."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _sizes(extent: Extent, dtype: type[np.integer]) -> tuple[int, int]:
    return extent.num_tokens * np.dtype(dtype).itemsize, extent.num_documents * np.dtype(np.int32).itemsize


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _empty_with_lock(folder: Path) -> None:
    with contextlib.suppress(OSError):
        _empty(folder)
        # While it is held: one of that name that another process makes after it is a lock of its own.
        (folder / LOCK).unlink()
