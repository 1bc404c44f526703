"""Reading back what a run left: its metrics, and its checkpoint's tensors put together from their shards."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from sedd_megatron.training.checkpoint_format import read_manifest


def whole_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint; NaN where its shards leave a gap."""
    tensors = {}
    for key, entry in read_manifest(checkpoint)["tensors"].items():
        dtype = getattr(torch, entry["dtype"])
        boxes = {}
        for shard in entry["shards"]:
            place = tuple(slice(o, o + n) for o, n in zip(shard["offset"], shard["shape"], strict=True))
            box = boxes.setdefault(str(place), (place, torch.full(shard["shape"], torch.nan, dtype=dtype)))[1]
            with safe_open(checkpoint / shard["file"], framework="pt") as file:
                data = file.get_tensor(shard["name"]).view(-1)
            first, last = shard.get("flat_range", (0, box.numel()))
            box.view(-1)[first:last] = data
        whole = torch.full(entry["global_shape"], torch.nan, dtype=dtype)
        for place, box in boxes.values():
            whole[place] = box
        tensors[key] = whole
    return tensors


def metrics(folder: Path, name: str) -> torch.Tensor:
    """One column of metrics.jsonl, [number of lines that have it] float64."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line[name] for line in lines if name in line], dtype=torch.float64)


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm of `b`; 1 and more for a NaN."""
    difference = ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()
    return difference if difference == difference else 1.0
