"""Datasets of the library `datasets` give the corpus that their texts as .jsonl give, and never run code."""

import json
from pathlib import Path

import numpy as np
import pytest

from sedd_megatron.data.corpus import open_tokens
from sedd_megatron.data.hub_datasets import PRESETS, open_dataset
from sedd_megatron.errors import UserError
from tests.data.test_corpus import run_command
from tests.distributed.launch import child_environment

datasets = pytest.importorskip("datasets")

TEXTS = [f"document {number} ä {'x' * (number % 7)}" if number % 5 else "" for number in range(2500)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """The same texts as folders of parquet and jsonl, and of save_to_disk with and without splits."""
    root = tmp_path_factory.mktemp("datasets")
    rows = datasets.Dataset.from_dict({"text": TEXTS, "number": list(range(len(TEXTS)))})
    for name in ("parquet", "jsonl"):
        (root / name).mkdir()
    for part in range(2):
        rows.shard(2, part, contiguous=True).to_parquet(root / "parquet" / f"train-{part}.parquet")
    rows.to_json(root / "jsonl" / "rows.jsonl")
    rows.save_to_disk(root / "saved")
    datasets.DatasetDict({"train": rows, "test": rows.select(range(10))}).save_to_disk(root / "splits")
    return root


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    # The library keeps what it converts; here in a folder that goes away.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["parquet", "jsonl", "saved", "splits"])
def test_texts_come_in_order_and_from_any_place_on(folders, name, streaming):
    source = open_dataset(str(folders / name), None, "train", streaming)
    assert list(source.texts("text")) == TEXTS
    for skip in (1, 1001, 2499, 2500):
        assert list(source.texts("text", skip)) == TEXTS[skip:]
        assert source.position == 2500
    assert json.dumps(source.identity()) == json.dumps(
        open_dataset(str(folders / name), None, "train", streaming).identity()
    )


def test_the_command_writes_the_corpus_of_the_same_texts(folders, tmp_path):
    lines = tmp_path / "in.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    flags = ("--tokenizer-type", "CharTokenizer", "--output-prefix")
    assert run_command("--input", str(lines), *flags, str(tmp_path / "lines")).returncode == 0
    done = run_command("--dataset", str(folders / "parquet"), "--streaming", "--workers", "2", *flags,
                       str(tmp_path / "rows"), variables={"HF_DATASETS_CACHE": str(tmp_path / "cache")})  # fmt: skip
    assert done.returncode == 0, done.stderr
    for suffix in (".bin", ".idx", "_stats.json", "_tokenizer/description.json"):
        names = [tmp_path / f"{name}_text_document{suffix}" for name in ("lines", "rows")]
        assert names[0].read_bytes() == names[1].read_bytes()


def test_text8_is_joined_from_its_splits_and_cut_again(tmp_path):
    parts = {"train": "ab " * 60, "validation": "c" * 10, "test": "d" * 10}
    rows = {split: datasets.Dataset.from_dict({"text": [text]}) for split, text in parts.items()}
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "text8")
    done = run_command(
        "--dataset", str(tmp_path / "text8"), "--preset", "text8", "--output-prefix", str(tmp_path / "p")
    )
    assert done.returncode == 0, done.stderr
    tokens = open_tokens(str(tmp_path / "p_text_document"))
    assert tokens[180:].tolist() == [3] * 10 + [4] * 10
    assert np.fromfile(tmp_path / "p_text_document.idx", np.int32, 3, offset=34).tolist() == [180, 10, 10]


def test_scripts_are_refused_and_do_not_run(tmp_path):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match=r"evil: cannot be opened \(Dataset scripts are no longer supported"):
        open_dataset(str(tmp_path / "evil"), None, "train", False)
    assert not (tmp_path / "ran").exists()


def test_other_formats_are_refused_by_name(tmp_path):
    (tmp_path / "xml").mkdir()
    (tmp_path / "xml" / "a.xml").write_text("<a/>")
    with pytest.raises(UserError, match=r"xml: is xml, must be one of parquet, json"):
        open_dataset(str(tmp_path / "xml"), None, "train", False)


@pytest.mark.parametrize(
    ("name", "config", "split", "text"),
    [
        ("nowhere/nothing", None, "train", "--dataset nowhere/nothing: cannot be opened"),
        ("parquet", None, "valid", "cannot be opened .*valid"),
        ("parquet", "english", "train", "cannot be opened .*english"),
        ("splits", None, "valid", "--dataset-split valid: .* has train, test; name one of them"),
        ("saved", None, "test", "--dataset-split test: .* holds one split"),
        ("saved", "english", "train", "--dataset-config english: .* has none"),
    ],
)
def test_what_is_not_there_is_named(folders, name, config, split, text):
    path = folders / name
    with pytest.raises(UserError, match=text) as error:
        open_dataset(str(path) if path.exists() else name, config, split, False)
    assert "\n" not in str(error.value)


def test_columns_and_rows_without_text_are_named(folders, tmp_path):
    source = open_dataset(str(folders / "parquet"), None, "train", True)
    with pytest.raises(UserError, match="no column 'body' among text, number; name the right one with --json-keys"):
        next(source.texts("body"))
    with pytest.raises(UserError, match="row 8: no text at key 'number'"):
        next(source.texts("number", 7))
    datasets.Dataset.from_dict({"text": ["a", None]}).save_to_disk(tmp_path / "holes")
    source = open_dataset(str(tmp_path / "holes"), None, "train", False)
    assert (list(source.texts("text")), source.num_nulls) == (["a", ""], 1)


@pytest.mark.parametrize(
    ("library", "text"),
    [
        ("raise ImportError", "needs the package datasets; pip install"),
        ("__version__ = '3.6.0'", "is 3.6.0, which can"),
    ],
)
def test_a_library_that_is_missing_or_too_old_is_one_line(tmp_path, library, text):
    (tmp_path / "datasets.py").write_text(library)
    done = run_command("--preset", "lm1b", "--output-prefix", str(tmp_path / "p"), "--tokenizer-type", "ByteTokenizer",
                       variables={"PYTHONPATH": f"{tmp_path}:{child_environment()['PYTHONPATH']}"})  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: --dataset")
    assert text in done.stderr
    assert done.stderr.count("\n") == 1


def test_presets_name_hub_datasets():
    assert set(PRESETS) == {"openwebtext", "lm1b", "fineweb", "text8"}
    assert all("/" in preset.name for preset in PRESETS.values())
