"""Tensors of a checkpoint on disk: safetensors shards and one JSON manifest with their digests.

Megatron's own torch_dist format keeps its metadata in pickles, which execute code when read, and has no digests. Here
the same description of shards (Megatron's ShardedTensor) goes to formats that hold nothing but numbers and text:

    manifest.json                     {"digest": sha256 of the body, "body": {state, files, tensors}}
    shards-00000.safetensors, ...     one file per rank that holds a first replica of anything

Any layout reads any other: a rank copies what overlaps its own shards.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sedd_megatron.errors import UserError

MANIFEST = "manifest.json"


def write_shards(directory: Path, tensors: Iterable[ShardedTensor], state: dict[str, Any]) -> None:
    """Write the first replicas of `tensors` and, from rank 0, the manifest with `state`. Collective over all ranks."""
    tensors = list(tensors)
    # Megatron's own check that every element is written by exactly one rank.
    _, global_metadata = determine_global_metadata({str(i): tensor for i, tensor in enumerate(tensors)})
    validate_sharding_integrity(global_metadata)
    rank = torch.distributed.get_rank()
    entries, file = _write_own_file(directory, f"shards-{rank:05d}.safetensors", tensors)
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, (entries, file))
    if rank == 0:
        files = {name: record for _, own in gathered for name, record in own.items()}
        all_entries = [entry for own, _ in gathered for entry in own]
        body = {"format_version": 1, "state": state, "files": files, "tensors": _by_key(all_entries)}
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


def read_shards(directory: Path, body: dict[str, Any], tensors: Iterable[ShardedTensor]) -> None:
    """Fill the data of each ShardedTensor, converting to its dtype, from whatever shards overlap it.

    Raises:
        UserError: a tensor is not in the checkpoint or has another shape there.
    """
    open_files: dict[str, Any] = {}
    with torch.no_grad():
        for tensor in tensors:
            entry = body["tensors"].get(tensor.key)
            if entry is None:
                raise UserError(
                    f"{directory}: has no tensor {tensor.key}; it was saved by another kind of run or model"
                )
            if tuple(entry["global_shape"]) != tuple(tensor.global_shape):
                raise UserError(
                    f"{directory}: {tensor.key} has shape {tuple(entry['global_shape'])}, this model needs "
                    f"{tuple(tensor.global_shape)}; load with the options it was trained with"
                )
            for shard in entry["shards"]:
                _copy_overlap(directory, shard, tensor, open_files)


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


def _write_own_file(
    directory: Path, name: str, tensors: Iterable[ShardedTensor]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    entries, data = [], {}
    for tensor in tensors:
        if not is_main_replica(tensor.replica_id):
            continue
        stored_name = f"{tensor.key}@{'.'.join(map(str, tensor.global_offset))}"
        data[stored_name] = tensor.data.detach().cpu().contiguous()
        entries.append(
            {
                "key": tensor.key,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "global_shape": list(tensor.global_shape),
                "shard": {"file": name, "name": stored_name, "offset": list(tensor.global_offset),
                          "shape": _global_extent(tensor)},
            }
        )  # fmt: skip
    if not data:
        return [], {}
    save_file(data, directory / name)
    sync_file(directory / name)
    return entries, {name: file_record(directory / name)}


def _by_key(entries: list[dict[str, Any]]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for entry in entries:
        record = {"dtype": entry["dtype"], "global_shape": entry["global_shape"], "shards": []}
        tensors.setdefault(entry["key"], record)["shards"].append(entry["shard"])
    return tensors


def _global_extent(tensor: ShardedTensor) -> list[int]:
    """The shard's size along every global axis: 1 along the prepended ones (the layer number)."""
    return [1] * tensor.prepend_axis_num + list(tensor.local_shape)


def _copy_overlap(directory: Path, shard: dict[str, Any], tensor: ShardedTensor, open_files: dict[str, Any]) -> None:
    starts = [max(a, b) for a, b in zip(shard["offset"], tensor.global_offset, strict=True)]
    own_extent = _global_extent(tensor)
    stops = [
        min(a + n, b + m)
        for a, n, b, m in zip(shard["offset"], shard["shape"], tensor.global_offset, own_extent, strict=True)
    ]
    if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
        return
    axes = range(tensor.prepend_axis_num, len(starts))
    source = tuple(slice(starts[i] - shard["offset"][i], stops[i] - shard["offset"][i]) for i in axes)
    target = tuple(slice(starts[i] - tensor.global_offset[i], stops[i] - tensor.global_offset[i]) for i in axes)
    name = shard["file"]
    try:
        if name not in open_files:
            open_files[name] = safe_open(directory / name, framework="pt")
        tensor.data[target].copy_(open_files[name].get_slice(shard["name"])[source])
    except SafetensorError as error:
        raise UserError(f"{directory / name}: {shard['name']} cannot be read ({error})") from error


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
