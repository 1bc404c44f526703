"""Whether a manifest is what it must be: plain file names, sizes that the files can hold, every element exactly once.

A manifest that its digest confirms may still have been written by other code, or signed again by somebody.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from sedd_megatron.config import ModelOptions
from sedd_megatron.errors import UserError

# Of a tensor on disk: the name of its dtype in safetensors, and bytes of an element.
DTYPES = {"float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}
SHARD_FILE = re.compile(r"shards-[0-9]{5,}\.safetensors")
COUNTS = ("num_tokens", "iteration", "consumed_samples", "scheduler_samples")


class DamagedCheckpointError(UserError):
    """A checkpoint that cannot be used as it is; the one before it may be."""


def check_body(body: dict[str, Any]) -> None:
    """Check a manifest's body before anything is read or allocated by it.

    Raises:
        ValueError: what is wrong, in words.
        KeyError, TypeError, AttributeError: it does not have the form of a body.
    """
    state, files = body["state"], body["files"]
    for name in COUNTS:
        _require(_is_size(state[name]), f"{name} is {state[name]!r}")
    _require(isinstance(state["options"], dict), "its options are not a table")
    last_update = state.get("ema_last_update", 0)
    _require(_is_size(last_update) and last_update <= state["iteration"], f"ema_last_update is {last_update!r}")
    skipped = state.get("skipped_steps", 0)
    _require(_is_size(skipped) and skipped <= state["iteration"], f"skipped_steps is {skipped!r}")
    for name, values in state.get("recent_steps", {}).items():
        is_known = isinstance(values, str) if name == "layout" else all(isinstance(value, float) for value in values)
        _require(is_known, f"{name} of the recent steps is malformed")
    for name, record in [*files.items(), *state["tokenizer_files"].items()]:
        _require(Path(name).name == name and name != ".." and "\0" not in name, f"{name!r} is no plain file name")
        _require(_is_size(record["bytes"]) and isinstance(record["sha256"], str), f"the record of {name} is malformed")
    for name in files:
        _require(SHARD_FILE.fullmatch(name) is not None, f"{name!r} is no name of a file of shards")
    taken, num_bytes = set(), 0
    for key, entry in body["tensors"].items():
        _require(entry["dtype"] in DTYPES, f"{key} has the dtype {entry['dtype']!r}")
        fault = coverage_fault(entry)
        _require(fault is None, f"{key}: {fault}")
        for piece in entry["shards"]:
            place = (piece["file"], piece["name"])
            _require(piece["file"] in files, f"{key} lies in {piece['file']!r}, which is none of its files")
            _require(place not in taken, f"{piece['name']!r} is used twice")
            taken.add(place)
        num_bytes += math.prod(entry["global_shape"]) * DTYPES[entry["dtype"]][1]
    held = sum(record["bytes"] for record in files.values())
    _require(num_bytes <= held, f"its tensors have {num_bytes:,} bytes and its files {held:,}")


def check_sizes(body: dict[str, Any], model: ModelOptions, where: Path) -> None:
    """Check the sizes in a checkpoint's options against its tensors, before a model of these sizes is made.

    Raises:
        DamagedCheckpointError: naming the first tensor that has others.
    """
    num_tokens = body["state"]["num_tokens"]
    rows = range(num_tokens, num_tokens + 1 + model.make_vocab_size_divisible_by)
    for key, sizes in {
        "embedding.weight": (rows, model.hidden_size),
        "decoder.layers.mlp.linear_fc1.weight": (model.num_layers, model.mlp_hidden_size, model.hidden_size),
        "sigma_embedding.input.weight": (model.cond_dim, range(1, 1 << 20)),
    }.items():
        shape = body["tensors"].get(f"ema.{key}", {"global_shape": []})["global_shape"]
        if len(shape) != len(sizes) or not all(
            size in rule if isinstance(rule, range) else size == rule for size, rule in zip(shape, sizes, strict=True)
        ):
            raise DamagedCheckpointError(
                f"{where}: its tensor ema.{key} has shape {tuple(shape)}, which is not that of a model of its options; "
                "use another copy"
            )


def coverage_fault(entry: dict[str, Any]) -> str | None:
    """What keeps a tensor's pieces from covering every element of it exactly once; None if they do."""
    shape = entry["global_shape"]
    if not all(map(_is_size, shape)):
        return f"its shape is {shape}"
    ranges: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[int, int]]] = {}
    for piece in entry["shards"]:
        offset, sizes = tuple(piece["offset"]), tuple(piece["shape"])
        if not len(offset) == len(sizes) == len(shape) or not all(map(_is_size, offset + sizes)):
            return f"a piece at {offset} of shape {sizes} is not within shape {shape}"
        if any(start + size > whole for start, size, whole in zip(offset, sizes, shape, strict=True)):
            return f"a piece at {offset} of shape {sizes} reaches beyond shape {shape}"
        ranges.setdefault((offset, sizes), []).append(flat_range(piece))
    for (offset, sizes), pieces in ranges.items():
        position = 0
        for first, last in sorted(pieces):
            if not (_is_size(first) and _is_size(last)) or first != position or last < first:
                return f"its pieces at {offset} leave a gap or overlap at element {position}"
            position = last
        if position != math.prod(sizes):
            return f"its pieces at {offset} end at element {position} of {math.prod(sizes)}"
    boxes = [box for box in ranges if math.prod(box[1]) > 0]
    covered = sum(math.prod(sizes) for _, sizes in boxes)
    if covered != math.prod(shape):
        return f"its pieces have {covered} elements of {math.prod(shape)}"
    return _overlap_fault(boxes)


def flat_range(piece: dict[str, Any]) -> tuple[int, int]:
    """The flat range of its box that a piece holds, all of it included."""
    return tuple(piece.get("flat_range", (0, math.prod(piece["shape"]))))


def stored_shapes(piece: dict[str, Any]) -> list[list[int]]:
    """The shapes that a piece may have in its file: 1-D if it is a flat range, else with or without the axes of size 1
    in front (the layer number).
    """
    if "flat_range" in piece:
        first, last = flat_range(piece)
        return [[last - first]]
    shape = list(piece["shape"])
    ones = next((axis for axis, size in enumerate(shape) if size != 1), len(shape))
    return [shape[axis:] for axis in range(ones + 1)]


def _overlap_fault(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> str | None:
    """Boxes that lie within their tensor and have its number of elements cover it if no two meet."""
    if len(boxes) < 2:
        return None
    starts = np.array([offset for offset, _ in boxes], dtype=np.int64)
    stops = starts + np.array([sizes for _, sizes in boxes], dtype=np.int64)
    order = np.argsort(starts[:, 0], kind="stable")
    starts, stops = starts[order], stops[order]
    # Along the first axis sorted: a box can only meet those after it that start before it stops.
    ends = np.searchsorted(starts[:, 0], stops[:, 0], side="left")
    for i, end in enumerate(ends):
        others = slice(i + 1, end)
        if ((starts[others] < stops[i]) & (stops[others] > starts[i])).all(axis=1).any():
            return f"two of its pieces overlap at {starts[i].tolist()}"
    return None


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise ValueError(fault)
