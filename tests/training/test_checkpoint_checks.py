"""Manifests that their digest confirms and that are wrong all the same."""

import copy
import random
from itertools import pairwise

import numpy as np
import pytest

from sedd_megatron.training.checkpoint_checks import check_body, coverage_fault, stored_shapes

SHARDS = "shards-00000.safetensors"


def piece(offset, shape, flat_range=None, name="a"):
    found = {"file": SHARDS, "name": name, "offset": list(offset), "shape": list(shape)}
    return found | ({"flat_range": list(flat_range)} if flat_range else {})


def is_covered_once(entry) -> bool:
    """By counting: how often each element of the whole is written."""
    shape = entry["global_shape"]
    counts = np.zeros([size + 4 for size in shape], dtype=int)
    for one in entry["shards"]:
        box = np.zeros(one["shape"], dtype=int)
        first, last = one.get("flat_range", (0, box.size))
        box.reshape(-1)[first:last] += 1
        if last > box.size or first > last:
            return False
        place = tuple(slice(start, start + size) for start, size in zip(one["offset"], one["shape"], strict=True))
        counts[place] += box
    inside = tuple(slice(0, size) for size in shape)
    return bool((counts[inside] == 1).all()) and counts.sum() == counts[inside].sum()


def random_entry(rng: random.Random) -> tuple[dict, bool]:
    """Boxes of a grid and flat ranges of them, and whether nothing was changed about them."""
    shape = [rng.randint(1, 5) for _ in range(rng.randint(1, 3))]
    cuts = [sorted({0, size, *(rng.randint(0, size) for _ in range(rng.randint(0, 2)))}) for size in shape]
    pieces = [([], [])]
    for axis in cuts:
        pieces = [(o + [a], n + [b - a]) for o, n in pieces for a, b in pairwise(axis)]
    shards = []
    for offset, sizes in pieces:
        total = int(np.prod(sizes))
        inner = sorted(rng.randint(0, total) for _ in range(rng.randint(0, 2)))
        if inner:
            bounds = [0, *inner, total]
            shards += [piece(offset, sizes, pair) for pair in pairwise(bounds)]
        else:
            shards.append(piece(offset, sizes))
    wrong = rng.choice(["nothing", "nothing", "leave out", "twice", "move", "size", "range", "another box"])
    one = rng.choice(shards)
    if wrong == "leave out":
        shards.remove(one)
    elif wrong == "twice":
        shards.append(copy.deepcopy(one))
    elif wrong == "move":
        one["offset"][rng.randrange(len(shape))] += 1
    elif wrong == "size":
        one["shape"][rng.randrange(len(shape))] += 1
    elif wrong == "range" and "flat_range" in one:
        one["flat_range"][rng.randrange(2)] += 1
    elif wrong == "another box":
        one["offset"] = [
            rng.randint(0, size - n) if size >= n else 0 for size, n in zip(shape, one["shape"], strict=True)
        ]
    rng.shuffle(shards)
    return {"dtype": "float32", "global_shape": shape, "shards": shards}, wrong == "nothing"


def test_pieces_pass_only_where_counting_finds_every_element_once():
    rng, refused = random.Random(7), 0
    for _ in range(4000):
        entry, is_right = random_entry(rng)
        fault = coverage_fault(entry)
        assert fault is not None or is_covered_once(entry), entry
        assert fault is None or not is_right, (entry, fault)
        refused += fault is not None
    assert refused > 1000, refused


def test_many_pieces_take_no_time():
    shards = [piece((layer, column), (1, 1)) for layer in range(200) for column in range(100)]
    assert coverage_fault({"dtype": "float32", "global_shape": [200, 100], "shards": shards}) is None
    shards[7]["offset"] = [0, 8]
    assert coverage_fault({"dtype": "float32", "global_shape": [200, 100], "shards": shards}) is not None


def test_stored_shapes_are_the_box_without_leading_ones_or_the_length_of_the_range():
    assert stored_shapes(piece((0, 0, 0), (1, 3, 2))) == [[1, 3, 2], [3, 2]]
    assert stored_shapes(piece((0, 0), (3, 2), (1, 5))) == [[4]]
    assert stored_shapes(piece((0,), (1,))) == [[1], []]


def body() -> dict:
    return {
        "state": {"options": {}, "num_tokens": 3, "iteration": 1, "consumed_samples": 4, "scheduler_samples": 4,
                  "tokenizer_files": {"description.json": {"bytes": 3, "sha256": "0"}}},
        "files": {SHARDS: {"bytes": 100, "sha256": "0"}},
        "tensors": {"w": {"dtype": "float32", "global_shape": [2, 3], "shards": [piece((0, 0), (2, 3))]}},
    }  # fmt: skip


def edit(*path_and_value):
    def change(whole):
        *path, last, value = path_and_value
        for key in path:
            whole = whole[key]
        whole[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (edit("state", "iteration", -1), "iteration is -1"),
        (edit("state", "num_tokens", "3"), "num_tokens is '3'"),
        (edit("state", "consumed_samples", True), "consumed_samples is True"),
        (edit("files", "../shards-00000.safetensors", {"bytes": 1, "sha256": "0"}), "is no plain file name"),
        (edit("files", "model.bin", {"bytes": 1, "sha256": "0"}), "'model.bin' is no name of a file of shards"),
        (edit("state", "tokenizer_files", "/etc/passwd", {"bytes": 1, "sha256": "0"}), "is no plain file name"),
        (edit("state", "tokenizer_files", "..", {"bytes": 1, "sha256": "0"}), "'..' is no plain file name"),
        (edit("files", SHARDS, {"bytes": "many", "sha256": "0"}), "the record of shards-00000.safetensors is "),
        (edit("files", SHARDS, {"bytes": 20, "sha256": "0"}), "its tensors have 24 bytes and its files 20"),
        (edit("tensors", "w", "dtype", "save"), "w has the dtype 'save'"),
        (edit("tensors", "w", "global_shape", [2, -3]), "w: its shape is"),
        (edit("tensors", "w", "global_shape", [10**12, 3]), "w: its pieces have 6 elements of 3000000000000"),
        (edit("tensors", "w", "shards", []), "w: its pieces have 0 elements of 6"),
        (edit("tensors", "w", "shards", 0, "offset", [1, 0]), "w: a piece at (1, 0) of shape (2, 3) reaches beyond"),
        (edit("tensors", "w", "shards", 0, "flat_range", [0, 5]), "w: its pieces at (0, 0) end at element 5 of 6"),
        (edit("tensors", "w", "shards", 0, "file", "shards-00001.safetensors"), "which is none of its files"),
        (edit("tensors", "v", {"dtype": "float32", "global_shape": [2, 3], "shards": [piece((0, 0), (2, 3))]}),
         "'a' is used twice"),
    ],
)  # fmt: skip
def test_a_body_that_is_not_what_it_must_be_is_refused_in_words(change, text):
    whole = body()
    check_body(whole)
    change(whole)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check_body(whole)
    assert text in str(error.value)
