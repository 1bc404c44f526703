"""Digests of a corpus' files, kept beside them: whether they still are what was written.

    PREFIX_digests.json     {".bin": {"bytes": 4096, "sha256": "..."}, ".idx": ..., "_tokenizer/description.json": ...}

A flipped bit in a .bin is another token, which nothing else can tell from the right one.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import IO

from sedd_megatron.data.object_storage import remote_bin
from sedd_megatron.errors import say

DIGESTED = (".bin", ".idx")
STATISTICS = "_stats.json"


def sha256_of(file: IO[bytes]) -> str:
    """Of all that is still to be read, in pieces that fit anywhere."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def file_record(path: Path) -> dict[str, int | str]:
    """Size in bytes and sha256 of a file."""
    with path.open("rb") as file:
        digest = sha256_of(file)
    return {"bytes": path.stat().st_size, "sha256": digest}


def digests_path(prefix: str) -> Path:
    """Where the digests of the corpus PREFIX are, if there are any."""
    return Path(f"{prefix}_digests.json")


def has_digests(prefix: str) -> bool:
    """Whether somebody wrote them."""
    return os.path.isfile(digests_path(prefix))


def write_digests(prefix: str) -> None:
    """Write down what PREFIX.bin, PREFIX.idx, PREFIX_stats.json and the files of PREFIX_tokenizer are now."""
    tokenizer = (f"_tokenizer/{path.name}" for path in sorted(Path(f"{prefix}_tokenizer").iterdir()))
    digests = {suffix: file_record(Path(f"{prefix}{suffix}")) for suffix in (*DIGESTED, STATISTICS, *tokenizer)}
    digests_path(prefix).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


def written_digests(prefix: str) -> dict[str, str] | None:
    """The sha256 that were written down, by what stands behind the prefix, .bin and .idx first; None without any that
    can be read.
    """
    try:
        digests = json.loads(digests_path(prefix).read_text(encoding="utf-8"))
        return {name: digests[name]["sha256"] for name in (*DIGESTED, *digests)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def find_fault(prefix: str) -> str | None:
    """What is wrong with the first file that is not as its digest says, in one line with the way out; None if all are.

    Reads all of them whole, but a .bin in object storage: that would be all of it over the network.
    """
    digests = written_digests(prefix)
    if digests is None:
        return f"{digests_path(prefix)}: damaged; copy it again, or prepare the data again"
    is_remote = remote_bin(prefix) is not None
    for name, digest in digests.items():
        path = Path(f"{prefix}{name}")
        if name == ".bin" and is_remote:
            continue
        try:
            found = file_record(path)["sha256"]
        except OSError as error:
            if name == STATISTICS and isinstance(error, FileNotFoundError):
                # As preparation.py says to do where it is damaged; tokens and tokenizer are what they were.
                say(f"{path}: is not there, and nothing is known of how the data was prepared", to_stderr=True)
                continue
            return f"{path}: cannot be read ({error.strerror}); mend that, or prepare the data again"
        if found != digest:
            return (
                f"{path}: is not what was written: its sha256 is {found}, must be {digest} by "
                f"{digests_path(prefix).name}; copy both again, or prepare the data again"
            )
    return None
