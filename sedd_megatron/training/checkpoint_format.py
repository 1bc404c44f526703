"""Tensors of a checkpoint on disk: safetensors shards and one JSON manifest with their digests.

Megatron's own torch_dist format keeps its metadata in pickles, which execute code when read, and has no digests. Here
the same description of shards (Megatron's ShardedTensor, and flat ranges of it for the distributed optimizer) goes to
formats that hold nothing but numbers and text:

    manifest.json                     {"digest": sha256 of the body, "body": {state, files, tensors}}
    shards-00000.safetensors, ...     one file per rank that holds a first replica of anything

Any layout reads any other: a rank copies what overlaps its own shards.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sedd_megatron.errors import UserError

MANIFEST = "manifest.json"
# Axis by axis: where a box of a whole tensor starts, and its sizes.
Box = tuple[tuple[int, ...], tuple[int, ...]]


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
        raise OSError(f"{path}: {error}") from error
    sync_file(path)
    return {own.file: file_record(path)}


def write_manifest(
    directory: Path, entries: list[dict[str, Any]], files: dict[str, Any], state: dict[str, Any]
) -> None:
    """Write the manifest over all ranks' entries and files, after checking that they make whole tensors."""
    tensors = _by_key(entries)
    for key, entry in tensors.items():
        _check_coverage(key, entry)
    body = {"format_version": 1, "state": state, "files": files, "tensors": tensors}
    write_synced(directory / MANIFEST, json.dumps({"digest": _digest_of_json(body), "body": body}))


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest's body: state, files, tensors.

    Raises:
        UserError: there is none, or it does not match its digest.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{directory}: no {MANIFEST}, so not a checkpoint of sedd_megatron; give the folder after --save"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        intact = manifest["digest"] == _digest_of_json(manifest["body"])
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise UserError(f"{path}: damaged (its digest does not match); use an earlier checkpoint or another copy")
    return manifest["body"]


def verify_files(directory: Path, body: dict[str, Any]) -> None:
    """Compare every file with its digest before any is read; the ranks share the work. Collective over all ranks.

    Raises:
        UserError: on every rank, naming the first missing or damaged file.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    gathered: list[Any] = [None] * world_size
    own_records = {name: body["files"][name] for name in sorted(body["files"])[rank::world_size]}
    torch.distributed.all_gather_object(gathered, _faults(directory, own_records))
    _refuse([fault for own in gathered for fault in own])


def verify_records(directory: Path, records: dict[str, Any]) -> None:
    """Compare files with their records, on this rank alone.

    Raises:
        UserError: naming the first missing or damaged file.
    """
    _refuse(_faults(directory, records))


def read_shards(directory: Path, body: dict[str, Any], shards: Iterable[Shard]) -> None:
    """Fill the data of each shard, converting to its dtype, from whatever saved shards overlap it.

    Raises:
        UserError: a tensor is not in the checkpoint or has another shape there.
    """
    open_files: dict[str, Any] = {}
    with torch.no_grad():
        for shard in shards:
            entry = body["tensors"].get(shard.key)
            if entry is None:
                raise UserError(f"{directory}: has no tensor {shard.key}; it was saved by another kind of run or model")
            if tuple(entry["global_shape"]) != shard.global_shape:
                raise UserError(
                    f"{directory}: {shard.key} has shape {tuple(entry['global_shape'])}, this model needs "
                    f"{shard.global_shape}; load with the options it was trained with"
                )
            _read_shard(directory, entry, shard, open_files)


def write_synced(path: Path, text: str) -> None:
    """Write a text file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_record(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _by_key(entries: list[dict[str, Any]]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for entry in entries:
        record = {"dtype": entry["dtype"], "global_shape": entry["global_shape"], "shards": []}
        tensors.setdefault(entry["key"], record)["shards"].append(entry["shard"])
    return tensors


def _check_coverage(key: str, entry: dict[str, Any]) -> None:
    """Every element is written, and by one rank alone: sizes add up to the whole, and no two places are the same."""
    size, places = 0, set()
    for shard in entry["shards"]:
        first, last = _flat_range(shard)
        size += last - first
        places.add((*shard["offset"], first))
    assert len(places) == len(entry["shards"]), f"{key}: two ranks wrote the same place"
    assert size == math.prod(entry["global_shape"]), f"{key}: {size} elements of {entry['global_shape']} were written"


def _flat_range(shard: dict[str, Any]) -> tuple[int, int]:
    return tuple(shard.get("flat_range", (0, math.prod(shard["shape"]))))


def _read_shard(directory: Path, entry: dict[str, Any], target: Shard, open_files: dict[str, Any]) -> None:
    """By boxes: of the target's own box only its range is read, other boxes are put together and cut."""
    pieces_of_box: dict[Box, list[dict[str, Any]]] = {}
    for piece in entry["shards"]:
        pieces_of_box.setdefault((tuple(piece["offset"]), tuple(piece["shape"])), []).append(piece)
    dtype = getattr(torch, entry["dtype"])
    if target.box in pieces_of_box:
        values = _read_range(directory, pieces_of_box[target.box], target.range, dtype, open_files)
    else:
        whole = torch.empty(target.shape, dtype=dtype)
        for box, pieces in pieces_of_box.items():
            overlap = _overlap(box, target.box)
            if overlap is not None:
                in_source, in_target = overlap
                source = _read_range(directory, pieces, (0, math.prod(box[1])), dtype, open_files)
                whole[in_target] = source.view(box[1])[in_source]
        values = whole.view(-1)[slice(*target.range)]
    # To the device first: FP8 tensors are quantised where they are.
    target.data.copy_(values.view(target.data.shape).to(target.data.device))


def _read_range(
    directory: Path,
    pieces: list[dict[str, Any]],
    wanted: tuple[int, int],
    dtype: torch.dtype,
    open_files: dict[str, Any],
) -> Tensor:
    """The flat range `wanted` of a box, from its pieces: 1-D."""
    values = torch.empty(wanted[1] - wanted[0], dtype=dtype)
    for piece in pieces:
        first, last = _flat_range(piece)
        start, stop = max(first, wanted[0]), min(last, wanted[1])
        if start >= stop:
            continue
        path = directory / piece["file"]
        try:
            if piece["file"] not in open_files:
                open_files[piece["file"]] = safe_open(path, framework="pt")
            # Of a flat range only what is wanted is read; a box is read whole, to be cut in memory.
            saved = open_files[piece["file"]].get_slice(piece["name"])
            part = slice(start - first, stop - first)
            found = saved[part] if "flat_range" in piece else saved[:].view(-1)[part]
        except SafetensorError as error:
            raise UserError(f"{path}: {piece['name']} cannot be read ({error})") from error
        values[start - wanted[0] : stop - wanted[0]].copy_(found)
    return values


def _overlap(source: Box, target: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where two boxes meet, as slices of each; None if they do not."""
    in_source, in_target = [], []
    for a, n, b, m in zip(*source, *target, strict=True):
        start, stop = max(a, b), min(a + n, b + m)
        if start >= stop:
            return None
        in_source.append(slice(start - a, stop - a))
        in_target.append(slice(start - b, stop - b))
    return tuple(in_source), tuple(in_target)


def _faults(directory: Path, records: dict[str, Any]) -> list[str]:
    with ThreadPoolExecutor(4) as pool:
        faults = pool.map(lambda name: _fault(directory / name, records[name]), records)
        return [fault for fault in faults if fault]


def _refuse(faults: list[str]) -> None:
    if faults:
        raise UserError(f"{faults[0]}; use an earlier checkpoint or another copy")


def _fault(path: Path, record: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path}: missing from the checkpoint"
    if path.stat().st_size != record["bytes"] or file_record(path)["sha256"] != record["sha256"]:
        return f"{path}: damaged (its digest does not match)"
    return None


def _digest_of_json(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
