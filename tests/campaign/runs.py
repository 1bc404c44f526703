"""The run that is attacked, what it comes to when nobody attacks it, and how two results are compared."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.campaign.processes import TRAIN, Done, run

STEPS, SAVE_INTERVAL, GLOBAL_BATCH = 12, 3, 4
# Adam's epsilon: tests/distributed/layouts.py says why.
MODEL = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --cond-dim 8 --seq-length 16 "
    f"--make-vocab-size-divisible-by 8 --micro-batch-size 2 --global-batch-size {GLOBAL_BATCH} --lr 1e-3 "
    "--lr-warmup-iters 4 --adam-eps 1e-4 --ema-decay 0.9 --split 80,20,0 --device cpu "
    "--distributed-timeout-minutes 1.5 "
    f"--save-interval {SAVE_INTERVAL} --eval-interval 4 --eval-iters 1 --log-interval 1"
).split()
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "dp2": (2, ["--use-distributed-optimizer"]),
}
SAMPLING = "--sampler event-driven --length 16 --num-samples 2 --seed 3 --device cpu".split()
# Of metrics.jsonl, and of --output: what two equal runs do not share.
MEASURED = ("tokens_per_second", "seconds", "started", "memory_bytes", "data_wait_seconds")


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    records: dict[tuple[str, int], dict[str, Any]]  # of metrics.jsonl, by kind and iteration
    tensors: dict[str, np.ndarray]  # of the last checkpoint, whole

    def first_difference(self, other: "Result", tolerance: float = 0.0) -> str | None:
        """None if they are equal, by default to the bit."""
        for name, ours, theirs in (
            ("metrics.jsonl", self.records, other.records),
            ("the checkpoint", self.tensors, other.tensors),
        ):
            if ours.keys() != theirs.keys():
                return f"{name} has other entries: {sorted(ours.keys() ^ theirs.keys(), key=str)[:6]}"
        for key, record in self.records.items():
            for name, value in record.items():
                if not math.isclose(value, other.records[key][name], rel_tol=tolerance):
                    return f"{name} of {key} is {value}, must be {other.records[key][name]}"
        for key, tensor in self.tensors.items():
            expected = other.tensors[key]
            if tensor.dtype != expected.dtype or tensor.shape != expected.shape:
                return f"tensor {key} is {tensor.dtype} {tensor.shape}, must be {expected.dtype} {expected.shape}"
            is_same = tensor.tobytes() == expected.tobytes()
            # Moments are far smaller than weights: a tolerance is one of the whole tensor.
            if not is_same and np.abs(tensor - expected).max() > tolerance * np.abs(expected).max():
                return f"tensor {key} differs by {np.abs(tensor - expected).max()}"
        return None


@dataclass(frozen=True)
class Base:
    """What all attempts share and none changes: data, unbroken runs by layout, and samples of their checkpoints."""

    folder: Path
    data: Path  # --data-path
    references: dict[str, Result]
    seconds: dict[str, float]  # that such a run takes
    samples: dict[int, list[dict[str, Any]]]  # by the iteration of the checkpoint, of the run in one process

    @property
    def run(self) -> Path:
        """The save folder of the unbroken run in one process."""
        return self.folder / "one"


def train(save: Path, data: Path, layout: str = "one", *flags: str, steps: int = STEPS) -> list[str]:
    """The training command, the same at the first start and at every restart."""
    return [TRAIN, *MODEL, "--train-iters", str(steps), "--data-path", str(data), "--save", str(save),
            *LAYOUTS[layout][1], *flags]  # fmt: skip


def generate(load: Path, output: Path, *flags: str) -> list[str]:
    """The command that samples."""
    return ["generate", "--load", str(load), "--output", str(output), *SAMPLING, *flags]


def make_base(folder: Path) -> Base:
    """Prepare the data and train the unbroken runs."""
    text = folder / "corpus.txt"
    text.write_text("".join(f"{n}: the quick brown fox jumps over {n * n} lazy dogs.\n" for n in range(60)))
    prepare = ["prepare_data", "--input", str(text), "--output-prefix", str(folder / "corpus"), "--tokenizer-type",
               "ByteTokenizer"]  # fmt: skip
    require(run(prepare, folder))
    data, references, seconds = folder / "corpus_text_document", {}, {}
    for layout, (ranks, _) in LAYOUTS.items():
        begin = time.monotonic()
        require(run(train(folder / layout, data, layout), folder, ranks=ranks))
        seconds[layout] = time.monotonic() - begin
        references[layout] = result(folder / layout)
    samples = {}
    for iteration in range(SAVE_INTERVAL, STEPS + 1, SAVE_INTERVAL):
        output = folder / f"samples-{iteration}.jsonl"
        require(run(generate(folder / "one" / f"iter_{iteration:07d}", output), folder))
        samples[iteration] = records(output)
    return Base(folder, data, references, seconds, samples)


def require(done: Done) -> None:
    """For what is not attacked."""
    if done.code:
        raise RuntimeError(f"exit code {done.codes} without an attack:\n{done.said[-3000:]}")


def result(save: Path, iteration: int = STEPS, log_dir: Path | None = None) -> Result:
    """Read what a run came to.

    Raises:
        ValueError: metrics.jsonl has a line that is not JSON, or an iteration twice.
    """
    return Result(metrics(log_dir or save), tensors(save / f"iter_{iteration:07d}"))


def metrics(log_dir: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """metrics.jsonl, by kind and iteration.

    Raises:
        ValueError: a line that is not JSON, or an iteration twice.
    """
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in (log_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line, parse_constant=_no_json)
        kinds = [kind for kind in ("validation", "test") if f"{kind}_loss" in record] or ["training"]
        key = (kinds[0], record["iteration"])
        if key in found:
            raise ValueError(f"metrics.jsonl has {key} twice")
        found[key] = {name: value for name, value in record.items() if name not in MEASURED}
    return found


def _no_json(constant: str) -> None:
    raise ValueError(f"metrics.jsonl has {constant}, which is not JSON")


def tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint, put together from its shards."""
    body = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["body"]
    files = {name: load_file(checkpoint / name) for name in body["files"]}
    whole = {}
    for key, entry in body["tensors"].items():
        array = np.full(entry["global_shape"], np.nan, dtype=entry["dtype"])
        for shard in entry["shards"]:
            box = array[tuple(slice(o, o + n) for o, n in zip(shard["offset"], shard["shape"], strict=True))]
            first, last = shard.get("flat_range", (0, box.size))
            flat = box.reshape(-1)
            flat[first:last] = files[shard["file"]][shard["name"]].reshape(-1)
            box[...] = flat.reshape(box.shape)
        whole[key] = array
    return whole


def records(path: Path) -> list[dict[str, Any]]:
    """What generate --output wrote, without times."""
    lines = path.read_text(encoding="utf-8").split("\n")
    found = [json.loads(line) for line in lines if line]
    return [{name: value for name, value in record.items() if name not in MEASURED} for record in found]


def saved_iterations(save: Path) -> list[int]:
    """Iterations of the checkpoints in a folder, in order."""
    return sorted(int(path.name[5:]) for path in save.glob("iter_*") if path.name[5:].isdigit())


def last_iteration(save: Path) -> int:
    """The last training step in metrics.jsonl while a run writes it; 0 without any."""
    path = save / "metrics.jsonl"
    lines: Sequence[str] = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["iteration"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0
