"""Damages a checkpoint in each way that a person may meet, and tries to use it in this process."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from sedd_megatron import load_pretrained
from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.errors import UserError
from sedd_megatron.training.pretrain import pretrain
from tests.distributed.launch import own_jobs


def refusal(arguments: list[str]) -> str:
    with pytest.raises(UserError) as error:
        pretrain(parse_pretrain_options(arguments))
    assert "\n" not in str(error.value)
    assert not torch.distributed.is_initialized(), "process groups were left behind"
    return str(error.value)


def check(arguments: list[str], folder: str) -> None:
    source, root = Path(folder), Path(folder).parent / "damaged"
    checkpoint = source / "iter_0000003"
    pretrain(parse_pretrain_options([*arguments, "--save", folder, "--train-iters", "3"]))
    assert (source / "latest_checkpointed_iteration.txt").read_text().strip() == "3"
    assert not list(source.glob(".*")), "something unfinished was left behind"

    resume = [*arguments, "--train-iters", "4", "--load"]
    shards = sorted(path.name for path in checkpoint.glob("shards-*"))
    for name in [*shards, "manifest.json", "tokenizer/description.json"]:
        for damage in (flip_a_bit, cut_short, Path.unlink):
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(source, root)
            damage(root / checkpoint.name / name)
            if name.startswith("tokenizer"):
                with pytest.raises(UserError, match=r"description\.json: (damaged|missing)"):
                    load_pretrained(root)
                continue
            text = refusal([*resume, str(root)])
            assert name in text, text
            assert any(word in text for word in ("damaged", "missing", "no manifest.json")), text

    # Nothing in a checkpoint is a pickle, so that nothing in it can run.
    for path in checkpoint.rglob("*"):
        if path.is_file():
            with pytest.raises(Exception):  # noqa: B017, PT011
                pickle.loads(path.read_bytes())

    assert "no such folder" in refusal([*resume, str(root.parent / "nothing")])
    other_model = [*resume, folder, "--num-layers", "2"]
    assert "trained with --num-layers 4, this run has 2" in refusal(other_model)
    assert "trained with --num-layers 4, this run has 2" in refusal([*arguments, "--save", folder, "--num-layers", "2"])
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    with pytest.raises(KeyboardInterrupt):
        interrupted_save([*resume, folder, "--save", folder, "--save-interval", "1"])
    after = {path: path.stat().st_mtime_ns for path in source.rglob("*") if ".partial" not in str(path)}
    changed = {path for path in before if before[path] != after.get(path) and path.is_file()}
    assert not changed - {source / "metrics.jsonl"}, changed
    assert (source / "latest_checkpointed_iteration.txt").read_text().strip() == "3"
    pretrain(parse_pretrain_options([*resume, folder, "--save", folder]))
    assert (source / "latest_checkpointed_iteration.txt").read_text().strip() == "4"
    assert not list(source.glob(".*"))


def interrupted_save(arguments: list[str]) -> None:
    """A save that dies between its shards and its manifest."""
    from sedd_megatron.training import checkpoint_format

    kept = checkpoint_format._by_key

    def dies(entries):
        raise KeyboardInterrupt

    checkpoint_format._by_key = dies
    try:
        pretrain(parse_pretrain_options(arguments))
    finally:
        checkpoint_format._by_key = kept


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(bytes(data))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


if __name__ == "__main__":
    for job in own_jobs():
        check(*job)
