"""Datasets of the Hugging Face library `datasets`, from the hub or a local folder; no code of a dataset is ever run."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from sedd_megatron.data.documents import valid_text
from sedd_megatron.errors import UserError, one_line

ROWS_AT_ONCE = 1000
# What the library reads as data; cache is what it downloaded before and finds without a network. It has readers for
# other files too, and its versions before 4 run scripts.
FORMATS = ("parquet", "json", "arrow", "csv", "text", "cache")
FIRST_VERSION_WITHOUT_SCRIPTS = 4


@dataclass(frozen=True)
class DatasetPreset:
    """Where a known dataset is on the hub."""

    name: str
    config: str | None = None
    split: str = "train"
    key: str = "text"


PRESETS = {
    "openwebtext": DatasetPreset("Skylion007/openwebtext"),
    "lm1b": DatasetPreset("dvruette/lm1b"),
    "fineweb": DatasetPreset("HuggingFaceFW/fineweb", config="sample-10BT"),
    # The hub keeps it cut already; joined again it is the one text that it was.
    "text8": DatasetPreset("afmck/text8", split="train+validation+test"),
}


class DatasetSource:
    """Rows of a split, a document each."""

    unit = " documents"

    def __init__(self, name: str, rows: Any, identity: Any) -> None:
        self.name = f"--dataset {name}"
        self._rows = rows
        self._identity = identity
        self.total = rows.num_rows if hasattr(rows, "num_rows") else None
        self.position = self.num_nulls = 0

    def identity(self) -> Any:
        """The library's own fingerprint, or the files with their revision or time of change."""
        return self._identity

    def texts(self, key: str, skip: int = 0) -> Iterator[str]:
        """The text column `key`; an empty text for null.

        Raises:
            UserError: there is no such column, a row has no text in it, or reading fails.
        """
        columns = self._rows.column_names
        if columns is not None and key not in columns:
            raise UserError(
                f"{self.name}: no column {key!r} among {', '.join(columns)}; name the right one with --json-keys"
            )
        self.position, self.num_nulls = skip, 0
        if skip == self.total:
            return
        try:
            # skip() of the library would go through the rows of a table one by one.
            rest = self._rows.skip(skip) if self.total is None else self._rows.select(range(skip, self.total))
            for batch in rest.select_columns([key]).iter(batch_size=ROWS_AT_ONCE):
                for value in batch[key]:
                    self.position += 1
                    self.num_nulls += value is None
                    where = f"{self.name} row {self.position}"
                    yield "" if value is None else valid_text(value, key, where, "name the right one with --json-keys")
        except UserError:
            raise
        except Exception as error:  # whatever the library's readers and the network raise
            raise UserError(
                f"{self.name}: cannot be read after row {self.position} ({one_line(error)}); mend that, or try the "
                "same command again: it goes on from its last finished part"
            ) from error


def open_dataset(name: str, config: str | None, split: str, streaming: bool) -> DatasetSource:
    """A split of a dataset of the hub, of a folder with parquet, jsonl, csv or text files, or of save_to_disk.

    Raises:
        UserError: the library is missing or too old, there is no such dataset, config or split, or it has another
            format.
    """
    library = datasets_library("--dataset")
    folder = Path(name)
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            rows = _saved_rows(library, name, config, split)
            return DatasetSource(name, rows.with_format(None), ["saved", str(folder.resolve()), rows._fingerprint])
        builder = library.load_dataset_builder(name, config)
        format_name = type(builder).__module__.removeprefix("datasets.packaged_modules.").split(".")[0]
        if format_name not in FORMATS:
            raise UserError(f"--dataset {name}: is {format_name}, must be one of {', '.join(FORMATS)}; convert it")
        # With their revision on the hub or their time of change here.
        files = {
            str(part): [list(map(str, found)), [list(map(str, origin)) for origin in found.origin_metadata]]
            for part, found in (builder.config.data_files or {}).items()
        }
        if streaming:
            rows = builder.as_streaming_dataset(split)
        else:
            builder.download_and_prepare()
            rows = builder.as_dataset(split)
    except UserError:
        raise
    except Exception as error:  # its own, the hub client's, pyarrow's and the network's
        raise UserError(
            f"--dataset {name}: cannot be opened ({one_line(error)}); give a hub name, or a folder of parquet or "
            "jsonl files or of save_to_disk, with its --dataset-config and --dataset-split"
        ) from error
    return DatasetSource(name, rows, [name, config, split, builder.hash, files])


def datasets_library(where: str, instead: str = "") -> ModuleType:
    """The library, which no code of a dataset comes through; `instead` is another way out than to install it.

    Raises:
        UserError: opening with `where`: it is missing, or too old.
    """
    install = f"pip install 'datasets>={FIRST_VERSION_WITHOUT_SCRIPTS}'" + (f", or {instead}" if instead else "")
    try:
        # Imported here: it takes a second, and is an extra.
        import datasets
    except ImportError as error:
        raise UserError(f"{where}: needs the package datasets; {install}") from error
    if int(datasets.__version__.split(".")[0]) < FIRST_VERSION_WITHOUT_SCRIPTS:
        raise UserError(
            f"{where}: the package datasets is {datasets.__version__}, which can run scripts of datasets; {install}"
        )
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _saved_rows(library: ModuleType, name: str, config: str | None, split: str) -> Any:
    if config is not None:
        raise UserError(f"--dataset-config {config}: {name} is of save_to_disk, which has none; leave it out")
    saved = library.load_from_disk(name)
    if not isinstance(saved, library.DatasetDict):
        # A single split does not say its name in every version.
        if split not in ("train", str(saved.split)):
            raise UserError(f"--dataset-split {split}: {name} holds one split, {saved.split}; leave it out")
        return saved
    parts = split.split("+")
    if not set(parts) <= set(saved):
        raise UserError(f"--dataset-split {split}: {name} has {', '.join(map(str, saved))}; name one of them")
    return library.concatenate_datasets([saved[part] for part in parts])
