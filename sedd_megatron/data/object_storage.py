"""Corpora in object storage, s3://BUCKET/PREFIX or msc://PROFILE/PREFIX, by Megatron-Core's own readers.

Everything but PREFIX.bin is copied once into --object-storage-cache-path, where it lies as beside any corpus:

    CACHE/s3/BUCKET/PREFIX.idx, PREFIX_stats.json, PREFIX_digests.json, PREFIX_tokenizer/
    CACHE/s3/BUCKET/PREFIX_remote.json    {"url": "s3://BUCKET/PREFIX.bin", "objects": {".bin": [bytes, version], ...}}

The tokens stay there: each window is one request for its range, of that version of the object (in S3).
"""

import contextlib
import fcntl
import functools
import json
import operator
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sedd_megatron.data.tokenizer_folder import TOKENIZER_FILES
from sedd_megatron.errors import UserError, one_line, printable, say
from sedd_megatron.training_config import is_in_object_storage
from sedd_megatron.wording import how_to_install

COPIED = (".idx", "_stats.json", "_digests.json", *(f"_tokenizer/{name}" for name in TOKENIZER_FILES))
# botocore's errors in the middle of an answer, and its codes for what another key or another name of the bucket mends.
BROKEN_OFF = ("ResponseStreamingError", "IncompleteReadError", "ReadTimeoutError")
REFUSED = ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")


# Of an answer that broke off: botocore repeats requests alone, and a long run reads millions of windows.
ATTEMPTS_TO_READ = 3


@dataclass(frozen=True)
class RemoteBin:
    """A .bin that is in object storage."""

    url: str
    size: int
    version: str


class RemoteTokens:
    """The tokens of a RemoteBin, as the array that a slice of a memory-mapped file would give."""

    def __init__(self, url: str, version: str, dtype: np.dtype, num_tokens: int) -> None:
        self.filename, self.version, self.dtype, self._num_tokens = url, version, dtype, num_tokens

    def __len__(self) -> int:
        return self._num_tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self._num_tokens)
        return _read(self.filename, self.version, self.dtype.type, stop - start, start * self.dtype.itemsize)


def remote_bin(prefix: str) -> RemoteBin | None:
    """Where the .bin of a corpus is of which the rest was copied here; None for one that is here.

    What lies beside a corpus cannot send a run elsewhere: the place says which object it is.

    Raises:
        UserError: what the copy left is damaged, or of another place.
    """
    path = Path(f"{prefix}_remote.json")
    if not os.path.isfile(path) or os.path.isfile(f"{prefix}.bin"):
        return None
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        size, version = written["objects"][".bin"]
        found = RemoteBin(written["url"], operator.index(size), version)
        if not is_in_object_storage(found.url) or not isinstance(version, str):
            raise ValueError("it names no object")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({one_line(error)}); delete it, and the corpus is copied again") from error
    if not f"/{prefix}.bin".endswith("/" + found.url.replace("://", "/", 1)):
        raise UserError(f"{path}: names {found.url}, which does not belong here; delete it")
    return found


def read_bytes(remote: RemoteBin, offset: int, count: int) -> bytes:
    """A range of it."""
    return _read(remote.url, remote.version, np.uint8, count, offset).tobytes()


def copy_beside(url: str, prefix: str) -> None:
    """Copy what belongs to the corpus `url` but its .bin, unless it is here as it is there; one process at a time.

    Raises:
        UserError: no such corpus there, no access, no network, or no room here.
    """
    place = Path(prefix)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{prefix}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _copy(url, prefix)
    except OSError as error:
        raise UserError(f"--object-storage-cache-path: {one_line(error)}; name a folder with room") from error


def _copy(url: str, prefix: str) -> None:
    with _errors(url):
        objects = _objects(url)
    for suffix in (".idx", ".bin"):
        if suffix not in objects:
            raise UserError(f"{url}: no object {url}{suffix}; give the prefix of a corpus that is there")
    written, new = Path(f"{prefix}_remote.json"), {"url": f"{url}.bin", "objects": objects}
    # The same place may have been another store's.
    if remote_bin(prefix) is not None and json.loads(written.read_text(encoding="utf-8")) == new:
        return
    written.unlink(missing_ok=True)
    for suffix in COPIED:
        place = Path(f"{prefix}{suffix}")
        place.unlink(missing_ok=True)
        if suffix not in objects:
            continue
        place.parent.mkdir(exist_ok=True)
        with _errors(f"{url}{suffix}"):
            _download(f"{url}{suffix}", f"{place}.part")
        os.replace(f"{place}.part", place)
    part = Path(f"{written}.part")
    part.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
    os.replace(part, written)


def _objects(url: str) -> dict[str, list[Any]]:
    """Size and version of what there is of a corpus, by what stands behind the prefix."""
    if url.startswith("s3://"):
        bucket, _, key = url.removeprefix("s3://").partition("/")
        pages = _boto3().client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
        found = ((one["Key"], one["Size"], one["ETag"]) for page in pages for one in page.get("Contents", ()))
    else:
        client, key = _msc().resolve_storage_client(url)
        listed = client.list(path=os.path.dirname(key))
        found = ((one.key, one.content_length, one.etag or str(one.last_modified)) for one in listed)
    beside = {name[len(key) :]: [size, version] for name, size, version in found if name.startswith(key)}
    return {suffix: beside[suffix] for suffix in (*COPIED, ".bin") if suffix in beside}


def _download(url: str, place: str) -> None:
    if url.startswith("s3://"):
        bucket, _, key = url.removeprefix("s3://").partition("/")
        _boto3().client("s3").download_file(bucket, key, place)
    else:
        _msc().download_file(url, place)


def _read(url: str, version: str, dtype: type[np.number], count: int, offset: int) -> np.ndarray:
    """Numbers of an object, from the byte `offset` on; an answer that breaks off is asked for again, and that is told.

    Raises:
        UserError: it cannot be read, or is not of this version any more.
    """
    with _errors(url):
        for attempt in range(1, ATTEMPTS_TO_READ):
            try:
                return _reader(url, version, os.getpid()).read(dtype, count, offset)
            except Exception as error:  # as in _errors
                if type(error).__name__ not in BROKEN_OFF:
                    raise
                say(f"{url}: attempt {attempt} broke off ({one_line(error)})", to_stderr=True)
        return _reader(url, version, os.getpid()).read(dtype, count, offset)


@functools.cache
def _reader(url: str, version: str, process: int) -> Any:
    """Megatron's reader of a .bin. One for each process: a forked one must not share the connections of another."""
    from megatron.core.datasets.indexed_dataset import OBJECT_STORAGE_BIN_READERS
    from megatron.core.datasets.object_storage_utils import ObjectStorageConfig

    is_s3 = url.startswith("s3://")
    _boto3() if is_s3 else _msc()
    # A range as it is asked for. Megatron's blocks of 256 MiB are for reading in order, and windows are shuffled.
    reader = OBJECT_STORAGE_BIN_READERS["s3" if is_s3 else "msc"](url, ObjectStorageConfig("", bin_chunk_nbytes=1))
    if is_s3:
        # An object that is replaced while a run reads it would give windows of two corpora. Megatron's reader knows no
        # versions, but its client asks here for more to say.
        def of_this_version(params: dict[str, Any], **_: Any) -> dict[str, Any]:
            return {**params, "IfMatch": version}

        reader._client.meta.events.register("provide-client-params.s3.GetObject", of_this_version)
    return reader


@functools.cache
def _boto3() -> Any:
    """boto3, whose attempts that fail are told: it repeats requests by itself (AWS_MAX_ATTEMPTS)."""
    try:
        import boto3
        import botocore.session
    except ImportError as error:
        raise UserError(f"s3:// needs boto3; {how_to_install('s3')}") from error

    def tell(attempts: int, operation: Any, response: Any = None, caught_exception: Any = None, **_: Any) -> None:
        status = response[0].status_code if response is not None else 0
        if caught_exception is not None or status >= 500 or status == 429:
            why = one_line(caught_exception) if caught_exception is not None else f"status {status}"
            say(printable(f"{operation.name} of S3: attempt {attempts} failed ({why})"), to_stderr=True)

    session = botocore.session.get_session()
    session.register("needs-retry.s3", tell)
    boto3.setup_default_session(botocore_session=session)
    return boto3


def _msc() -> Any:
    try:
        import multistorageclient
    except ImportError as error:
        raise UserError("msc:// needs the multi-storage client; pip install multi-storage-client") from error
    return multistorageclient


@contextlib.contextmanager
def _errors(url: str) -> Iterator[None]:
    """Around what asks object storage.

    Raises:
        UserError: in place of the clients' errors.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each client raises its own, and they have no common base
        response = getattr(error, "response", None) or {}
        code = response.get("Error", {}).get("Code", "")
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
            way_out = "give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        elif code == "NoSuchBucket":
            way_out = "name a bucket that is there, or its store by AWS_ENDPOINT_URL"
        elif code == "PreconditionFailed":
            way_out = "it has changed since this run opened it: put back what was there, or start again with what is"
        elif code in REFUSED:
            way_out = "give the credentials of an account that may list and read there"
        else:
            way_out = "mend that and start again: a run goes on from its newest checkpoint"
        raise UserError(f"{url}: cannot be read ({one_line(error)}); {way_out}") from error
