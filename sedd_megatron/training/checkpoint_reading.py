"""From the pieces of a checkpoint to the shards of this run, whatever the layouts of the two."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sedd_megatron.errors import UserError, one_line
from sedd_megatron.parallel.groups import raise_on_every_rank
from sedd_megatron.training.checkpoint_checks import DamagedCheckpointError, flat_range
from sedd_megatron.training.checkpoint_format import NO_FILE, Box, Shard, read_patiently


def read_shards(directory: Path, body: dict[str, Any], shards: Iterable[Shard]) -> None:
    """Fill the data of each shard, converting to its dtype, from whatever saved shards overlap it.

    The files have been verified (`verify_files`). Collective over all ranks.

    Raises:
        UserError: on every rank, if one needs a tensor that is not in the checkpoint or has another shape there.
        DamagedCheckpointError: a file has changed since it was verified.
    """
    fault = None
    try:
        _read_own_shards(directory, body, shards)
    except UserError as error:
        fault = error
    raise_on_every_rank(fault)


def _read_own_shards(directory: Path, body: dict[str, Any], shards: Iterable[Shard]) -> None:
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
        first, last = flat_range(piece)
        start, stop = max(first, wanted[0]), min(last, wanted[1])
        if start >= stop:
            continue
        path = directory / piece["file"]
        try:
            if piece["file"] not in open_files:
                opened = read_patiently(path, lambda path=path: safe_open(path, framework="pt"))
                open_files[piece["file"]] = opened
            # Of a flat range only what is wanted is read; a box is read whole, to be cut in memory.
            saved = open_files[piece["file"]].get_slice(piece["name"])
            part = slice(start - first, stop - first)
            found = saved[part] if "flat_range" in piece else saved[:].view(-1)[part]
        except (SafetensorError, *NO_FILE) as error:
            raise DamagedCheckpointError(f"{path}: {piece['name']} cannot be read ({one_line(error)})") from error
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
