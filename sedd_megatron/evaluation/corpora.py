"""The texts of the zero-shot tables, as the documents that the published figures were measured on.

Local files are named CORPUS-SPLIT, as wikitext2-train.parquet, or CORPUS-SPLIT-PART where there are several parts:

| corpus | split | a line of a .txt is | column of .parquet and .jsonl |
|---|---|---|---|
| lambada | test | a passage (use .jsonl: passages have line feeds) | text |
| wikitext2 | train | a line of wiki.train.raw, blank lines included | text |
| wikitext103 | test | a line of wiki.test.raw, blank lines included | text |
| ptb | test | a line of ptb.test.txt | sentence or text |
| lm1b | test | a line of the held-out news.en files | text |
| text8 | test | (the whole file is one document) the last 5,000,000 characters of text8 | text |
| ag_news | test | an article | text |
| pubmed, arxiv | validation | an article | article or text |

Splits are those of arXiv 2310.16834 (table 1) and, for the corpora that it does not have, of arXiv 2406.07524. There,
every document is detokenized alone and followed by an end-of-document token; so is a blank line of WikiText.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sedd_megatron.data.documents import json_lines, valid_text
from sedd_megatron.data.hub_datasets import datasets_library
from sedd_megatron.errors import UserError, one_line
from sedd_megatron.evaluation import detokenizers
from sedd_megatron.evaluation.detokenizers import Detokenizer
from sedd_megatron.wording import how_to_install

SUFFIXES = (".parquet", ".jsonl", ".txt")
# Where the hub keeps its own Parquet copy of a data set whose repository has only a script.
PARQUET_COPY = "hf://datasets/{name}@refs%2Fconvert%2Fparquet/{config}/{split}/*.parquet"


def _stripped(line: str) -> str:
    return line.strip()


def _with_line_end(line: str) -> str:
    """A row as the published data set has it: blank lines are empty, the others keep their line feed."""
    return line + "\n" if line.strip() else ""


@dataclass(frozen=True)
class Corpus:
    """One corpus, the split of its published figures and where it is to be had."""

    title: str
    split: str
    detokenize: Detokenizer
    hub_name: str
    hub_config: str | None = None
    hub_has_script: bool = False  # which is never run: the hub's Parquet copy is read
    column: str = "text"
    line_to_document: Callable[[str], str] = _stripped
    is_one_document: bool = False


CORPORA = {
    "lambada": Corpus("LAMBADA", "test", detokenizers.lambada, "EleutherAI/lambada_openai", "default"),
    "wikitext2": Corpus(
        "WikiText2", "train", detokenizers.wikitext, "Salesforce/wikitext", "wikitext-2-raw-v1",
        line_to_document=_with_line_end,
    ),
    "wikitext103": Corpus(
        "WikiText103", "test", detokenizers.wikitext, "Salesforce/wikitext", "wikitext-103-raw-v1",
        line_to_document=_with_line_end,
    ),
    "ptb": Corpus(
        "PTB", "test", detokenizers.penn_treebank, "ptb-text-only/ptb_text_only", "penn_treebank",
        hub_has_script=True, column="sentence",
    ),
    "lm1b": Corpus(
        "One Billion Words", "test", detokenizers.billion_words, "billion-word-benchmark/lm1b", "plain_text",
        hub_has_script=True,
    ),
    "text8": Corpus("text8", "test", detokenizers.unchanged, "afmck/text8", is_one_document=True),
    "ag_news": Corpus("AG News", "test", detokenizers.unchanged, "fancyzhx/ag_news"),
    "pubmed": Corpus(
        "PubMed", "validation", detokenizers.scientific_papers, "armanc/scientific_papers", "pubmed",
        hub_has_script=True, column="article",
    ),
    "arxiv": Corpus(
        "arXiv", "validation", detokenizers.scientific_papers, "armanc/scientific_papers", "arxiv",
        hub_has_script=True, column="article",
    ),
}  # fmt: skip


def documents_of(name: str, data_dir: Path | None) -> list[str]:
    """The documents of a corpus, detokenized, in the order of the data set.

    Args:
        name: a key of CORPORA.
        data_dir: folder with the file that this module's table names; None fetches the corpus from the hub.

    Raises:
        UserError: an unknown corpus, no file of it, a damaged one, no package `datasets`, or no network.
    """
    corpus = CORPORA.get(name)
    if corpus is None:
        raise UserError(f"corpus {name} does not exist; choose one of {', '.join(CORPORA)}")
    raw = _fetched(name, corpus) if data_dir is None else _read(name, corpus, data_dir)
    documents = [corpus.detokenize(text) for text in raw]
    if not any(documents):
        raise UserError(f"corpus {name}: no text there; {_way_out(name, corpus)}")
    return documents


def _read(name: str, corpus: Corpus, data_dir: Path) -> Iterator[str]:
    stem = f"{name}-{corpus.split}"
    for suffix in SUFFIXES:
        whole = data_dir / f"{stem}{suffix}"
        paths = [whole] if whole.is_file() else sorted(data_dir.glob(f"{stem}-*{suffix}"))
        if paths:
            _check_parts(name, paths)
            read = {".parquet": _parquet_rows, ".jsonl": _json_rows, ".txt": _text_rows}[suffix]
            return (text for path in paths for text in read(path, corpus))
    raise UserError(
        f"corpus {name}: {data_dir} has no {_file_names(name, corpus)}; put its {corpus.split} split there under "
        "one of these names, or name no folder where there is a network"
    )


def _check_parts(name: str, paths: Sequence[Path]) -> None:
    """Raise unless all parts are there that their names count, as -00000-of-00003."""
    found = [re.search(r"-(\d+)-of-(\d+)$", path.stem) for path in paths]
    counts = [match and match[2] for match in found]
    if not any(counts):
        return
    odd = next((path for path, count in zip(paths, counts, strict=True) if count != counts[0]), None)
    if odd is not None:
        raise UserError(f"corpus {name}: {odd} is of another set of parts than {paths[0].name}; keep one of them there")
    numbers, count = {int(match[1]) for match in found}, int(found[-1][2])
    if len(numbers) < count:
        first = 0 if 0 in numbers or count not in numbers else 1
        missing = next(number for number in range(first, first + count) if number not in numbers)
        raise UserError(
            f"corpus {name}: {paths[0].parent} has {len(numbers)} of the {count} parts of {paths[-1].name}, and not "
            f"number {missing:0{len(found[-1][1])}}; put all of them there"
        )


def _text_rows(path: Path, corpus: Corpus) -> Iterator[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({one_line(error)}); use another copy") from error
    if corpus.is_one_document:
        yield text.rstrip("\n")
        return
    # Not splitlines: articles have separators of other kinds in the middle of a line.
    for line in text.removesuffix("\n").split("\n"):
        yield corpus.line_to_document(line)


def _json_rows(path: Path, corpus: Corpus) -> Iterator[str]:
    for number, values in json_lines(f"corpus {corpus.title}:", path, "use another copy"):
        names = [column for column in (corpus.column, "text") if isinstance(values, dict) and column in values]
        text = values[names[0]] if names else None
        yield valid_text(text, corpus.column, f"{path}, line {number}", "write one JSON object a line with it")


def _parquet_rows(path: Path, corpus: Corpus) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(
            f"{path}: reading Parquet needs the package pyarrow; {how_to_install('data')}, or give the corpus as "
            ".jsonl or .txt"
        ) from error
    try:
        file = parquet.ParquetFile(path)
        names = [column for column in (corpus.column, "text") if column in file.schema_arrow.names]
        if not names:
            raise UserError(f"{path}: no column {corpus.column!r}; it has {', '.join(file.schema_arrow.names)}")
        texts = (text for batch in file.iter_batches(columns=names[:1]) for text in batch.column(0).to_pylist())
        for number, text in enumerate(texts, start=1):
            yield valid_text(text, names[0], f"{path}, row {number}", "use another copy")
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a Parquet file of text ({one_line(error)}); use another copy") from error


def _fetched(name: str, corpus: Corpus) -> Iterator[str]:
    way_out = _way_out(name, corpus)
    datasets = datasets_library(f"corpus {name}", way_out)
    try:
        if corpus.hub_has_script:
            files = PARQUET_COPY.format(name=corpus.hub_name, config=corpus.hub_config, split=corpus.split)
            rows = datasets.load_dataset("parquet", data_files={corpus.split: files}, split=corpus.split)
        else:
            rows = datasets.load_dataset(corpus.hub_name, corpus.hub_config, split=corpus.split)
        texts = list(rows[corpus.column])
    except Exception as error:  # the library and its HTTP client raise what they like
        raise UserError(f"corpus {name}: {corpus.hub_name} cannot be fetched ({one_line(error)}); {way_out}") from error
    for number, text in enumerate(texts, start=1):
        valid_text(text, corpus.column, f"corpus {name}, row {number} of {corpus.hub_name}", way_out)
    yield from ["".join(texts)] if corpus.is_one_document else texts


def _file_names(name: str, corpus: Corpus) -> str:
    return " or ".join(f"{name}-{corpus.split}{suffix}" for suffix in SUFFIXES)


def _way_out(name: str, corpus: Corpus) -> str:
    return f"put its {corpus.split} split into a folder as {_file_names(name, corpus)} and name that folder"
