"""The last step of a preparation: finished files take the place of the corpus that was there, or nothing changes.

.NAME.new/      what is to come, brought beside its place: this may fail, for want of room or another disk
.NAME.old/      what was there, while the new takes its place; it comes back if that fails
"""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from sedd_megatron.data.digests import written_digests
from sedd_megatron.data.tokenizer_folder import DESCRIPTION, TOKENIZER_FILES
from sedd_megatron.errors import UserError

INDEX_MAGIC = b"MMIDIDX\x00\x00"
TOKENIZER = "_tokenizer"
# In the order in which they come; a corpus is there when its index is, and ours as long as its tokenizer is.
PUBLISHED = (TOKENIZER, "_stats.json", "_digests.json", ".bin", ".idx")
FILES = PUBLISHED[1:]


def publish(corpora: Sequence[tuple[Path, Path]]) -> None:
    """Put the finished files of each PARTIAL in the place of its FINAL.

    Raises:
        OSError: they cannot be brought there; what was there is there still.
    """
    staged = []
    try:
        for partial, final in corpora:
            staging = _emptied(final, "new")
            for suffix in PUBLISHED:
                source, new = Path(f"{partial}{suffix}"), staging / f"{final.name}{suffix}"
                staged.append((source, new))
                _bring(source, new)
        for _, final in corpora:
            _exchange(final)
    except BaseException:
        for source, new in staged:
            if new.exists() and not source.exists():
                os.rename(new, source)
        for _, final in corpora:
            shutil.rmtree(_beside(final, "new"), ignore_errors=True)
        raise
    for partial, final in corpora:
        # Where they were copied the parts are there still.
        Path(f"{partial}.json").unlink(missing_ok=True)
        for which in ("new", "old"):
            shutil.rmtree(_beside(final, which), ignore_errors=True)


def check_outputs(finals: Sequence[Path], inputs: Iterable[str | Path]) -> None:
    """Raise unless whatever a publication would replace is a corpus, whole or what a publication that broke off left.

    Raises:
        UserError: something else has a name of its, or one of the inputs has.
    """
    inputs = [Path(path) for path in inputs if os.path.isfile(path)]
    for final in finals:
        for path in (Path(f"{final}{suffix}") for suffix in FILES):
            if not os.path.lexists(path):
                continue
            for read in inputs:
                if os.path.exists(path) and os.path.samefile(path, read):
                    raise UserError(f"{read}: is read and would be replaced; give another --output-prefix")
            if not path.is_file() or not _is_ours(final):
                raise UserError(
                    f"{path}: is there already and belongs to no corpus of prepare_data, which would replace it; move "
                    "it, or give another --output-prefix"
                )
        _check_tokenizer(Path(f"{final}{TOKENIZER}"), inputs)


def _check_tokenizer(folder: Path, inputs: Sequence[Path]) -> None:
    if os.path.islink(folder) or not os.path.lexists(folder):  # a link is replaced, and not what it leads to
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is there already and is no folder; move it, or give another --output-prefix")
    for read in inputs:
        if read.resolve().is_relative_to(folder.resolve()) and read.name not in TOKENIZER_FILES:
            raise UserError(f"{read}: is read and would be replaced; give another --output-prefix")
    names = sorted(os.listdir(folder))
    foreign = [name for name in names if name not in TOKENIZER_FILES or DESCRIPTION not in names]
    if foreign:
        raise UserError(
            f"{folder / foreign[0]}: was not written by prepare_data, which would replace that folder; move it, or "
            "give another --output-prefix"
        )


def _is_ours(final: Path) -> bool:
    if os.path.isfile(Path(f"{final}{TOKENIZER}", DESCRIPTION)) or written_digests(str(final)) is not None:
        return True
    try:
        with open(f"{final}.idx", "rb") as file:
            if file.read(len(INDEX_MAGIC)) == INDEX_MAGIC:
                return True
    except OSError:
        pass
    try:
        with open(f"{final}_stats.json", encoding="utf-8") as file:
            stats = json.load(file)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(stats, dict) and "unigram_entropy_nats" in stats


def _beside(final: Path, which: str) -> Path:
    return final.parent / f".{final.name}.{which}"


def _emptied(final: Path, which: str) -> Path:
    folder = _beside(final, which)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    return folder


def _bring(source: Path, new: Path) -> None:
    """Rename, or copy from another disk."""
    try:
        os.rename(source, new)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        if source.is_dir():
            shutil.copytree(source, new)
        else:
            shutil.copyfile(source, new)
            with new.open("rb") as file:
                os.fsync(file.fileno())


def _exchange(final: Path) -> None:
    """The new for the old; the index goes first and comes last, so that there never is half a corpus."""
    new, old = _beside(final, "new"), _emptied(final, "old")
    done = []
    try:
        for suffix in reversed(PUBLISHED):
            place = f"{final}{suffix}"
            if os.path.lexists(place):
                done.append((place, old / f"{final.name}{suffix}"))
                os.rename(*done[-1])
        for suffix in PUBLISHED:
            done.append((new / f"{final.name}{suffix}", f"{final}{suffix}"))
            os.rename(*done[-1])
    except BaseException:
        for source, target in reversed(done):
            if os.path.lexists(target) and not os.path.lexists(source):
                os.rename(target, source)
        raise
