"""R14: files that would run code, if anything in them were run; each would then leave a file behind."""

import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.campaign import runs
from tests.campaign.attempts import Attempt, Row, expect, expect_right
from tests.campaign.checks import expect_no_traceback, expect_refused, tail
from tests.campaign.processes import run
from tests.campaign.saves import copy_run
from tests.campaign.signatures import record, sign


class Payload:
    """Runs a shell command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def read_payload(attempt: Attempt) -> None:
    """One kind of payload, met by the command that would read it."""
    kinds = list(KINDS)
    kind = kinds[attempt.number % len(kinds)]
    canary = attempt.folder / "canary"
    command = KINDS[kind](attempt, attempt.random, f"touch {canary}")
    done = run(command, attempt.folder)
    expect_right(not canary.exists(), f"{kind}: it ran")
    expect_no_traceback(done)
    expect(done.code in (0, 2), f"{kind}: exit code {done.code}: {tail(done)}")
    if done.code:
        expect_refused(done)


def _pickled(dice: random.Random, shell: str) -> bytes:
    value = dice.choice((Payload(shell), {"model": Payload(shell)}, [Payload(shell)]))
    return pickle.dumps(value, protocol=dice.randint(0, 5))


def _published(attempt: Attempt, name: str, content: bytes) -> list[str]:
    """A folder in the published format with this file of weights."""
    folder = attempt.folder / "model"
    folder.mkdir()
    config = {"tokens": 256, "graph": {"type": "absorb"}, "noise": {"type": "loglinear"},
              "model": {"hidden_size": 16, "cond_dim": 8, "length": 16, "n_blocks": 2, "n_heads": 2,
                        "scale_by_sigma": True, "dropout": 0.1}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / name).write_bytes(content)
    if attempt.random.random() < 0.5:
        return runs.generate(folder, attempt.folder / "out.jsonl")
    return ["convert", "--from-published", str(folder), "--save", str(attempt.folder / "out")]


def _pytorch_model(attempt: Attempt, dice: random.Random, shell: str) -> list[str]:
    return _published(attempt, "pytorch_model.bin", _pickled(dice, shell))


def _torch_file(attempt: Attempt, dice: random.Random, shell: str) -> list[str]:
    import torch

    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2), "extra": Payload(shell)}, buffer)
    return _published(attempt, dice.choice(("pytorch_model.bin", "checkpoint.pth", "model.pth")), buffer.getvalue())


def _fake_safetensors(attempt: Attempt, dice: random.Random, shell: str) -> list[str]:
    return _published(attempt, "model.safetensors", _pickled(dice, shell))


def _single_file(attempt: Attempt, dice: random.Random, shell: str) -> list[str]:
    path = attempt.folder / "checkpoint.pth"
    path.write_bytes(_pickled(dice, shell))
    return runs.generate(path, attempt.folder / "out.jsonl")


def _yaml(attempt: Attempt, dice: random.Random, shell: str) -> list[str]:
    path = attempt.folder / "config.yaml"
    path.write_text(
        dice.choice(
            (
                f'seed: !!python/object/apply:os.system ["{shell}"]\n',
                f'!!python/object/apply:subprocess.Popen\n- [sh, -c, "{shell}"]\n',
                f'a: &a !!python/object/new:os.system ["{shell}"]\nseed: *a\n',
                "seed: !!python/name:os.system\n",
            )
        )
    )
    return runs.train(attempt.folder / "run", attempt.base.data, "one", "--config", str(path), steps=1)


def _tokenizer_code(attempt: Attempt, dice: random.Random, shell: str) -> list[str]:
    folder = attempt.folder / "tokenizer"
    folder.mkdir()
    code = f"import os\nos.system({shell!r})\nclass Tokenizer:\n    pass\n"
    for name in ("tokenizer.py", "tokenization_custom.py", "__init__.py", "setup.py"):
        (folder / name).write_text(code)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_custom.Tokenizer", None]}})
    )
    if dice.random() < 0.5:
        (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": shell, "vocab": {}}}))
    return _prepare(attempt, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder))


def _vocabulary(attempt: Attempt, dice: random.Random, shell: str) -> list[str]:
    for name in ("encoder.json", "vocab.bpe"):
        (attempt.folder / name).write_bytes(_pickled(dice, shell))
    vocabulary, merges = (str(attempt.folder / name) for name in ("encoder.json", "vocab.bpe"))
    return _prepare(attempt, "--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", vocabulary, "--merge-file", merges)


def _sentencepiece(attempt: Attempt, dice: random.Random, shell: str) -> list[str]:
    (attempt.folder / "m.model").write_bytes(_pickled(dice, shell))
    model = str(attempt.folder / "m.model")
    return _prepare(attempt, "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model)


def _dataset_code(attempt: Attempt, dice: random.Random, shell: str) -> list[str]:
    folder = attempt.folder / "corpus"
    folder.mkdir()
    (folder / "corpus.py").write_text(f"import os\nos.system({shell!r})\n")
    (folder / "data.pkl").write_bytes(_pickled(dice, shell))
    if dice.random() < 0.5:
        (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: data.pkl\n---\n")
    return ["prepare_data", "--dataset", str(folder), "--output-prefix", str(attempt.folder / "out" / "c"),
            "--tokenizer-type", "ByteTokenizer"]  # fmt: skip


def _prepare(attempt: Attempt, *flags: str) -> list[str]:
    (attempt.folder / "text.txt").write_text("some text")
    return ["prepare_data", "--input", str(attempt.folder / "text.txt"), "--output-prefix",
            str(attempt.folder / "out" / "c"), *flags]  # fmt: skip


def _description(attempt: Attempt, dice: random.Random, shell: str) -> list[str]:
    """The tokenizer beside the data is described as code, or as a file elsewhere."""
    data = attempt.folder / "corpus_text_document"
    for suffix in (".bin", ".idx"):
        shutil.copy2(f"{attempt.base.data}{suffix}", f"{data}{suffix}")
    folder = Path(f"{data}_tokenizer")
    folder.mkdir()
    kind = dice.choice(("os.system", f"__import__('os').system({shell!r})", "HuggingFaceTokenizer"))
    (folder / "description.json").write_text(json.dumps({"tokenizer_type": kind, "type": kind, "model": "../evil"}))
    (folder / "tokenizer.json").write_bytes(_pickled(dice, shell))
    return runs.train(attempt.folder / "run", data, steps=1)


def _pickled_shard(attempt: Attempt, dice: random.Random, shell: str) -> list[str]:
    """A shard that is a pickle, with a valid digest."""
    checkpoint = _copied(attempt)
    (shard,) = checkpoint.glob("shards-*")
    shard.write_bytes(_pickled(dice, shell))
    sign(checkpoint, lambda body: body["files"][shard.name].update(record(shard)))
    return _load(attempt, dice)


def _outside(attempt: Attempt, dice: random.Random, shell: str) -> list[str]:
    """A manifest that names files outside its folder, with valid digests."""
    checkpoint = _copied(attempt)
    outside = attempt.folder / "outside.safetensors"
    (shard,) = checkpoint.glob("shards-*")
    outside.write_bytes(_pickled(dice, shell) if dice.random() < 0.5 else shard.read_bytes())
    name = dice.choice(("../../outside.safetensors", str(outside)))

    def change(body: dict) -> None:
        body["files"][name] = record(outside)
        for entry in body["tensors"].values():
            for piece in entry["shards"]:
                piece["file"] = name

    sign(checkpoint, change)
    return _load(attempt, dice)


def _in_names(attempt: Attempt, dice: random.Random, shell: str) -> list[str]:
    """File names that a shell would run."""
    name = f"x; {shell.replace('/', chr(92) + 'x2f')} $({shell.split('/')[-1]}) `id`"
    return runs.train(attempt.folder / name.replace("/", "_")[:200], attempt.base.data, steps=1)


def _tracker(attempt: Attempt, dice: random.Random, shell: str) -> list[str]:
    _copied(attempt)
    path = attempt.folder / "run" / "latest_checkpointed_iteration.txt"
    path.write_bytes(dice.choice((f"$({shell})".encode(), b"../../outside", _pickled(dice, shell), b"\xff\xfe6", b"")))
    return _load(attempt, dice)


def _copied(attempt: Attempt) -> Path:
    copy_run(attempt.base.run, attempt.folder / "run", (3, 6))
    return attempt.folder / "run" / "iter_0000006"


def _load(attempt: Attempt, dice: random.Random) -> list[str]:
    if dice.random() < 0.5:
        return runs.train(attempt.folder / "run", attempt.base.data, steps=7)
    return runs.generate(attempt.folder / "run", attempt.folder / "out.jsonl")


KINDS: dict[str, Callable[[Attempt, random.Random, str], list[str]]] = {
    "pytorch_model.bin": _pytorch_model,
    "torch.save": _torch_file,
    "fake safetensors": _fake_safetensors,
    "single file": _single_file,
    "YAML tag": _yaml,
    "tokenizer folder with code": _tokenizer_code,
    "pickled vocabulary": _vocabulary,
    "pickled SentencePiece model": _sentencepiece,
    "dataset folder with code": _dataset_code,
    "tokenizer's description": _description,
    "pickled shard": _pickled_shard,
    "manifest that points outside": _outside,
    "file names": _in_names,
    "tracker": _tracker,
}

ROWS = [Row("R14", "payloads in every file that is read", read_payload, attempts=15 * len(KINDS), short=len(KINDS))]
