"""Tensors of a checkpoint on disk: safetensors shards and one JSON manifest with their digests.

Megatron's own torch_dist format keeps its metadata in pickles, which execute code when read, and has no digests. Here
the same description of shards (Megatron's ShardedTensor, and flat ranges of it for the distributed optimizer) goes to
formats that hold nothing but numbers and text:

    manifest.json                     {"digest": sha256 of the body, "body": {state, files, tensors}}
    shards-00000.safetensors, ...     one file per rank that holds a first replica of anything

Any layout reads any other: a rank copies what overlaps its own shards (checkpoint_reading.py).
"""

import errno
import hashlib
import json
import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sedd_megatron.data.digests import file_record
from sedd_megatron.errors import UserError, one_line
from sedd_megatron.parallel.groups import raise_on_every_rank
from sedd_megatron.training.checkpoint_checks import (
    DTYPES,
    DamagedCheckpointError,
    check_body,
    coverage_fault,
    stored_shapes,
)

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
# Axis by axis: where a box of a whole tensor starts, and its sizes.
Box = tuple[tuple[int, ...], tuple[int, ...]]
Value = TypeVar("Value")
# Of a disk that refuses to be read, as one over a network may for a while.
READINGS, SECONDS_BETWEEN_READINGS = 4, 1.0
# What tells that there is no such file, and not that it cannot be read.
NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


@dataclass(frozen=True)
class Shard:
    """A box of a whole tensor, or a flat range of that box, as this rank holds it in `data`."""

    key: str
    data: Tensor
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]  # of the box, 1 along each axis that `data` lacks (the layer number)
    is_first_replica: bool
    flat_range: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        sharded: ShardedTensor,
        key: str | None = None,
        data: Tensor | None = None,
        flat_range: tuple[int, int] | None = None,
    ) -> "Shard":
        """From Megatron's description, under another key or with other data of the same place if given."""
        return cls(
            key=sharded.key if key is None else key,
            data=sharded.data if data is None else data,
            global_shape=tuple(sharded.global_shape),
            offset=tuple(sharded.global_offset),
            shape=(1,) * sharded.prepend_axis_num + tuple(sharded.local_shape),
            is_first_replica=is_main_replica(sharded.replica_id),
            flat_range=flat_range,
        )

    @property
    def box(self) -> Box:
        """Where the box lies in the whole tensor."""
        return self.offset, self.shape

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index into the whole tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))

    @property
    def range(self) -> tuple[int, int]:
        """The flat range of the box that `data` holds, all of it included."""
        return self.flat_range or (0, math.prod(self.shape))


@dataclass(frozen=True)
class OwnShards:
    """What this rank writes: copies in host memory, by their names in the file, and the manifest's entries."""

    file: str
    data: dict[str, Tensor]
    entries: list[dict[str, Any]]


def host_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy in host memory, out of FP8; a copy even on the CPU, where training changes tensors in place."""
    tensor = tensor.detach()
    if is_float8tensor(tensor):
        tensor = dequantize_fp8_tensor(tensor)
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def copy_own_shards(shards: Iterable[Shard]) -> OwnShards:
    """Copy the first replicas among `shards` to host memory, so that training may go on while they are written."""
    file = f"shards-{torch.distributed.get_rank():05d}.safetensors"
    entries, data = [], {}
    for shard in shards:
        if not shard.is_first_replica:
            continue
        flat = shard.flat_range
        name = f"{shard.key}@{'.'.join(map(str, shard.offset))}" + (f"+{flat[0]}" if flat else "")
        data[name] = host_copy(shard.data)
        record = {"file": file, "name": name, "offset": list(shard.offset), "shape": list(shard.shape)}
        entries.append(
            {
                "key": shard.key,
                "dtype": str(data[name].dtype).removeprefix("torch."),
                "global_shape": list(shard.global_shape),
                "shard": record | ({"flat_range": list(flat)} if flat else {}),
            }
        )
    return OwnShards(file, data, entries)


def first_not_finite(own: OwnShards) -> str | None:
    """The key of the first of these tensors that has a NaN or an infinity; a tenth of the time of their digest."""
    keys = (entry["key"] for entry in own.entries)
    return next((key for key, tensor in zip(keys, own.data.values(), strict=True) if not _is_finite(tensor)), None)


def write_own_shards(directory: Path, own: OwnShards) -> dict[str, Any]:
    """Write this rank's file and bring it to the disk; returns its record by name. Calls no collective.

    Raises:
        OSError: the disk is full, or the folder is gone.
    """
    if not own.data:
        return {}
    path = directory / own.file
    try:
        save_file(own.data, path)
    except SafetensorError as error:
        number = re.search(r"\(os error ([0-9]+)\)", str(error))
        if number is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    sync_file(path)
    return {own.file: file_record(path)}


def write_manifest(
    directory: Path, entries: list[dict[str, Any]], files: dict[str, Any], state: dict[str, Any]
) -> None:
    """Write the manifest over all ranks' entries and files, after checking that they make whole tensors."""
    tensors = _by_key(entries)
    for key, entry in tensors.items():
        fault = coverage_fault(entry)
        assert fault is None, f"{key}: {fault}"
    body = {"format_version": FORMAT_VERSION, "state": state, "files": files, "tensors": tensors}
    write_synced(directory / MANIFEST, json.dumps({"digest": _digest_of_json(body), "body": body}))


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest's body: state, files, tensors.

    Raises:
        DamagedCheckpointError: there is none, it does not match its digest, or it is not what a manifest must be.
        UserError: it is of a later format, or the disk does not give it.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(read_patiently(path, lambda: _text_of_file(path)))
        body = manifest["body"]
        version = body["format_version"]
        if manifest["digest"] != _digest_of_json(body):
            raise ValueError("its digest does not match")
        if type(version) is int and version > FORMAT_VERSION:
            raise UserError(
                f"{path}: has format {version}, and this version reads {FORMAT_VERSION}; load it with the version of "
                "sedd_megatron that wrote it, or a later one"
            )
        check_body(body)
        return body
    except NO_FILE as error:
        raise DamagedCheckpointError(
            f"{directory}: no {MANIFEST}, so not a checkpoint of sedd_megatron; give the folder after --save"
        ) from error
    except (KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        fault = "it has another form"
    except ValueError as error:
        fault = one_line(error)
    raise DamagedCheckpointError(f"{path}: damaged ({fault}); use an earlier checkpoint or another copy")


def verify_files(directory: Path, body: dict[str, Any]) -> None:
    """Check every file and every tensor in it before any is used: digests, shapes, and that all numbers are finite.

    The ranks share the work. Collective over all ranks.

    Raises:
        DamagedCheckpointError: on every rank, naming the first missing or damaged file, or the first tensor that is not
            finite.
        UserError: on every rank, naming a file that the disk does not give.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own_files = {name: body["files"][name] for name in sorted(body["files"])[rank::world_size]}
    pieces: dict[str, list[tuple[str, str, dict[str, Any]]]] = {name: [] for name in own_files}
    for key, entry in body["tensors"].items():
        for piece in entry["shards"]:
            if piece["file"] in pieces:
                pieces[piece["file"]].append((key, entry["dtype"], piece))
    with ThreadPoolExecutor(4) as pool:
        errors = pool.map(lambda name: _error(directory / name, own_files[name], pieces[name]), own_files)
        raise_on_every_rank(next((error for error in errors if error is not None), None))


def verify_records(directory: Path, records: dict[str, Any]) -> None:
    """Compare files with their records, on this rank alone.

    Raises:
        DamagedCheckpointError: naming the first missing or damaged file.
        UserError: naming a file that the disk does not give.
    """
    for name, record in records.items():
        error = _error(directory / name, record)
        if error is not None:
            raise error


def read_patiently(path: Path, read: Callable[[], Value]) -> Value:
    """What `read` gives of a file, which is asked again while the disk refuses.

    Raises:
        OSError: there is no such file.
        UserError: the disk does not give it. That is no damage: what comes after must not be put away for it.
    """
    reading = 1
    while True:
        try:
            return read()
        except NO_FILE:
            raise
        except OSError as error:
            if reading == READINGS:
                raise UserError(
                    f"{path}: cannot be read ({one_line(error)}); start again when the disk gives it, or rename its "
                    "checkpoint's folder to do without it"
                ) from error
        time.sleep(SECONDS_BETWEEN_READINGS)
        reading += 1


def write_synced(path: Path, text: str) -> None:
    """Write a text file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_synced(path: Path, text: str) -> None:
    """Have a text file hold this in one step, whatever was there, and wait until it is on the disk."""
    hidden = path.with_name(f".{path.name}")
    write_synced(hidden, text)
    hidden.replace(path)
    sync_file(path.parent)


def sync_file(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Of folders some file systems say so that there is nothing to wait for.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _by_key(entries: list[dict[str, Any]]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for entry in entries:
        record = {"dtype": entry["dtype"], "global_shape": entry["global_shape"], "shards": []}
        tensors.setdefault(entry["key"], record)["shards"].append(entry["shard"])
    return tensors


def _text_of_file(path: Path) -> str:
    # Not of a pipe, which would be waited for.
    if not stat.S_ISREG(path.stat().st_mode):
        raise FileNotFoundError(path)
    return path.read_text(encoding="utf-8")


def _error(
    path: Path, record: dict[str, Any], pieces: Iterable[tuple[str, str, dict[str, Any]]] = ()
) -> UserError | None:
    """What is wrong with a file, or with the first of its pieces, (key, dtype, piece)."""
    try:
        fault = read_patiently(path, lambda: _fault(path, record) or _tensor_fault(path, pieces))
    except NO_FILE:
        fault = f"{path}: missing from the checkpoint"
    except UserError as error:
        return error
    return None if fault is None else DamagedCheckpointError(f"{fault}; use an earlier checkpoint or another copy")


def _fault(path: Path, record: dict[str, Any]) -> str | None:
    if path.stat().st_size != record["bytes"] or file_record(path)["sha256"] != record["sha256"]:
        return f"{path}: damaged (its digest does not match)"
    return None


def _tensor_fault(path: Path, pieces: Iterable[tuple[str, str, dict[str, Any]]]) -> str | None:
    """The first piece that is not what the manifest says, or not finite."""
    if not pieces:
        return None
    try:
        with safe_open(path, framework="pt") as file:
            for key, dtype, piece in pieces:
                # The header alone: nothing is read of a tensor that has another size.
                saved = file.get_slice(piece["name"])
                found = saved.get_dtype(), saved.get_shape()
                if found[0] != DTYPES[dtype][0] or list(found[1]) not in stored_shapes(piece):
                    return f"{path}: damaged ({piece['name']} is {found[0]} {found[1]}, the manifest has another)"
                if not _is_finite(file.get_tensor(piece["name"])):
                    return f"{path}: the tensor {key} is not finite"
    except SafetensorError as error:
        return f"{path}: damaged ({one_line(error)})"
    return None


def _is_finite(tensor: Tensor) -> bool:
    # One pass without a mask of the tensor's size: a NaN is the smallest and the largest value wherever there is one.
    return tensor.numel() == 0 or all(math.isfinite(bound) for bound in torch.aminmax(tensor))


def _digest_of_json(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
