"""R4: bits are flipped in every kind of file, and files are cut, emptied, lengthened and taken away."""

import json
import random
import shutil
from pathlib import Path

from tests.campaign import runs
from tests.campaign.attempts import Attempt, Row, SilentlyWrongError, expect, expect_right
from tests.campaign.checks import (
    expect_done,
    expect_no_traceback,
    expect_refused,
    expect_same_run,
    expect_same_tensors,
    tail,
)
from tests.campaign.processes import run
from tests.campaign.saves import copy_run
from tests.campaign.signatures import sign

NEWEST, THERE = 9, (3, 6, 9)
DAMAGES = ("flip", "flip", "flip", "cut", "empty", "lengthen", "remove")


def damage_a_file(attempt: Attempt) -> None:
    """One file of one kind, damaged in one way, met by one command."""
    dice = attempt.random
    kind = dice.choice(("newest", "newest", "older", "tracker", "metrics", "pieces", "data", "data"))
    save, base = attempt.folder / "run", attempt.base
    copy_run(base.run, save, THERE)
    if kind == "data":
        _damage_data(attempt, dice, save)
        return
    if kind == "pieces":
        _damage_pieces(attempt, dice, save)
        return
    iteration = {"newest": NEWEST, "older": dice.choice(THERE[:-1])}.get(kind)
    if iteration:
        folder = save / f"iter_{iteration:07d}"
        path = dice.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    else:
        path = save / {"tracker": "latest_checkpointed_iteration.txt", "metrics": "metrics.jsonl"}[kind]
    how = damage(path, dice)
    what = f"{how} {path.relative_to(save)}"
    if dice.random() < 0.5:
        _resume(attempt, dice, save, path, kind, what)
    else:
        _sample(attempt, save, path, kind, what)


def _resume(attempt: Attempt, dice: random.Random, save: Path, path: Path, kind: str, what: str) -> None:
    base, exact = attempt.base, kind == "newest" and dice.random() < 0.25
    done = run(runs.train(save, base.data, "one", *["--exact-load"] * exact), attempt.folder)
    if exact:
        expect_refused(done, path.name)
        return
    expect(done.code == 0, f"{what}: exit code {done.code}: {tail(done)}")
    expect_done(done)
    if kind == "metrics":
        expect_same_tensors(base.references["one"], save)
    else:
        expect_same_run(base.references["one"], save)
    expect(kind != "newest" or path.name in done.said, f"{what}: not a word of {path.name}: {tail(done)}")


def _sample(attempt: Attempt, save: Path, path: Path, kind: str, what: str) -> None:
    output = attempt.folder / "samples.jsonl"
    done = run(runs.generate(save, output), attempt.folder)
    if done.code:
        expect(kind == "newest", f"{what}: refused, and the newest checkpoint is whole: {tail(done)}")
        expect_refused(done, path.name)
        return
    expect_done(done)
    found = runs.records(output)
    if kind == "newest" and found in [attempt.base.samples[i] for i in THERE[:-1]]:
        expect(path.name in done.said, f"{what}: an older checkpoint's samples, and not a word of it: {tail(done)}")
    else:
        expect_right(found == attempt.base.samples[NEWEST], f"{what}: other samples")


def _damage_pieces(attempt: Attempt, dice: random.Random, save: Path) -> None:
    """A manifest whose digests are valid, and whose pieces are not what they were."""
    how = dice.choice(("missing", "twice", "moved", "smaller", "tensor missing", "other file"))

    def change(body: dict) -> None:
        entry = body["tensors"][key]
        piece = entry["shards"][0]
        if how == "missing":
            entry["shards"] = []
        elif how == "twice":
            entry["shards"].append(dict(piece))
        elif how == "moved":
            piece["offset"][-1] += 1
        elif how == "smaller":
            piece["shape"][-1] -= 1
        elif how == "tensor missing":
            del body["tensors"][key]
        else:
            piece["file"] = "tokenizer/description.json"

    folder = save / f"iter_{NEWEST:07d}"
    keys = sorted(json.loads((folder / "manifest.json").read_text())["body"]["tensors"])
    key = dice.choice(keys)
    sign(folder, change)
    output = attempt.folder / "samples.jsonl"
    if dice.random() < 0.5:
        done = run(runs.train(save, attempt.base.data), attempt.folder)
    else:
        done = run(runs.generate(save, output), attempt.folder)
    if done.code:
        expect_refused(done)
    elif output.exists():
        # Of one checkpoint or the other: sampling does not read every tensor.
        expect_right(runs.records(output) in attempt.base.samples.values(), f"{key} {how}: other samples")
    else:
        expect_done(done)
        expect_same_run(attempt.base.references["one"], save)


def _damage_data(attempt: Attempt, dice: random.Random, save: Path) -> None:
    base, data = attempt.base, attempt.folder / "data" / attempt.base.data.name
    data.parent.mkdir()
    for path in base.folder.glob(f"{base.data.name}*"):
        target = data.parent / path.name
        shutil.copytree(path, target) if path.is_dir() else shutil.copy2(path, target)
    path = dice.choice(sorted(p for p in data.parent.rglob("*") if p.is_file()))
    # Most of the bytes are in one file; the others have their say as well.
    if dice.random() < 0.4:
        path = data.with_name(f"{data.name}.bin")
    how = damage(path, dice)
    what = f"{how} {path.relative_to(data.parent)}"
    action = dice.choice(("check", "train", "resume"))
    if action == "check":
        done = run(["prepare_data", "--check", str(data)], attempt.folder)
        if path.suffix in (".bin", ".idx") or done.code:
            expect_refused(done, path.name)
        return
    if action == "train":
        shutil.rmtree(save)
    done = run(runs.train(save, data), attempt.folder)
    expect_no_traceback(done)
    if path.name in done.said or path.parent.name in done.said:
        # Refused, or trained on and said so.
        expect(done.code in (0, 2), f"{what}: exit code {done.code}: {tail(done)}")
        return
    expect(done.code == 0, f"{what}: exit code {done.code} and no name: {tail(done)}")
    try:
        expect_same_run(base.references["one"], save)
    except SilentlyWrongError as error:
        raise SilentlyWrongError(f"{what}, {action}: {error}") from error


def damage(path: Path, dice: random.Random) -> str:
    """Damage a file; returns how."""
    data, how = bytearray(path.read_bytes()), dice.choice(DAMAGES)
    if how == "flip" and data:
        bit = dice.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        return f"bit {bit} flipped in"
    if how == "cut" and len(data) > 1:
        path.write_bytes(data[: dice.randrange(1, len(data))])
    elif how == "lengthen":
        path.write_bytes(data + dice.randbytes(dice.randint(1, 100)))
    elif how == "remove":
        path.unlink()
    else:
        path.write_bytes(b"")
        how = "empty"
    return how


ROWS = [Row("R4", "bit flips and truncations of every file", damage_a_file, attempts=600, short=24)]
