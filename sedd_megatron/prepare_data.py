"""python -m sedd_megatron.prepare_data: text, JSONL, folders or datasets -> Megatron's .bin/.idx, for --data-path."""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sedd_megatron.data.corpus import append_chunks, corpus_path, finish_corpus, open_tokens
from sedd_megatron.data.digests import digests_path, file_record, find_fault, has_digests
from sedd_megatron.data.documents import TEXT8_CHARACTERS, DocumentSource, FileSource, Text8Source
from sedd_megatron.data.encoding import encoded_chunks, token_dtype
from sedd_megatron.data.hub_datasets import PRESETS, open_dataset
from sedd_megatron.data.input_files import INPUT_FORMATS, input_files
from sedd_megatron.data.library_tokenizers import GPT2BPETokenizer, HuggingFaceTokenizer
from sedd_megatron.data.parts import Extent, PartialCorpus, kept_tokenizer, parts_folder
from sedd_megatron.data.preparation import Preparation
from sedd_megatron.data.progress import Progress
from sedd_megatron.data.publication import check_outputs, publish
from sedd_megatron.data.token_files import INPUT_DTYPES, TokenSource
from sedd_megatron.data.tokenizer_folder import DESCRIPTION, TOKENIZER_FILES
from sedd_megatron.data.tokenizers import (
    TOKENIZER_TYPES,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    build_tokenizer,
    load_tokenizer,
)
from sedd_megatron.errors import UserError, print_output, run_command
from sedd_megatron.options import option, parse_options
from sedd_megatron.training_config import is_in_object_storage
from sedd_megatron.wording import counted

MAX_WORKERS = 4096
DEFAULT_VOCAB_SIZE = 8192


@dataclass(frozen=True)
class PrepareOptions:
    """Preparation"""

    output_prefix: str | None = option(None, "writes PREFIX_text_document.bin and .idx; required")
    tokenizer_type: str | None = option(None, "how text becomes tokens; required", choices=TOKENIZER_TYPES)
    input: tuple[str, ...] | None = option(
        None,
        "text files, files with a JSON object in each line, or folders of them; gzip, bzip2, zstd; - is standard input",
    )
    input_format: str | None = option(
        None, "what the files are, each a text or lines of JSON; told by their content if not given", INPUT_FORMATS
    )
    input_dtype: str | None = option(None, "the files are bare tokens of this type, as nanoGPT's are", INPUT_DTYPES)
    dataset: str | None = option(None, "instead of --input: a dataset of the hub, a folder of one, or a preset's name")
    preset: str | None = option(None, "known data; text8 may come from --input", choices=tuple(PRESETS))
    dataset_config: str | None = option(None, "the dataset's configuration")
    dataset_split: str | None = option(None, "the dataset's split; train if not given")
    streaming: bool = option(False, "read the dataset while it is downloaded, and keep no copy")
    json_keys: tuple[str, ...] = option(
        ("text",), "keys of .jsonl lines, columns of a dataset; each becomes a corpus of its own"
    )
    tokenizer_model: str | None = option(
        None, "SentencePiece .model file, tokenizer folder or hub name, or the ..._tokenizer folder of a corpus"
    )
    vocab_file: str | None = option(None, "GPT-2's vocabulary (encoder.json)")
    merge_file: str | None = option(None, "GPT-2's merges (vocab.bpe)")
    train_tokenizer: bool = option(False, "train the SentencePiece model on the input")
    vocab_size: int | None = option(None, f"its number of tokens; {DEFAULT_VOCAB_SIZE} if not given")
    append_eod: bool = option(False, "end each document with the tokenizer's end-of-document token")
    allow_special_tokens: bool = option(
        False, "names of the tokenizer's special tokens in a text, as </s>, become these tokens; else they are text"
    )
    max_unknown_share: float = option(0.01, "share of the tokens that may be unknown to the tokenizer")
    workers: int = option(1, "processes that tokenize; the files are the same for any number")
    resume: bool = option(True, "go on from the last finished part of the same command if it was broken off")
    part_megabytes: int = option(64, "text of a part: what a broken preparation loses at most")
    check: str | None = option(
        None, "nothing but this: are PREFIX.bin and .idx, PREFIX as for --data-path, what was written"
    )


def main() -> None:
    """Parse the flags, make the tokenizer, write the corpora."""
    (options,) = parse_options(
        (PrepareOptions,), sys.argv[1:], "sedd_megatron.prepare_data", "Turn text into token files for training."
    )
    try:
        prepare(options)
    except BrokenPipeError:  # of standard output
        raise
    except OSError as error:
        where = error.filename or f"--output-prefix {options.output_prefix}"
        raise UserError(
            f"{where}: {error.strerror or error}; give another path, or room and permission there: the same command "
            "goes on from its last finished part"
        ) from error


def prepare(options: PrepareOptions) -> None:
    """Write one corpus per key and print what it holds.

    Raises:
        UserError: input that is missing, damaged or does not fit the flags.
        OSError: a file or folder that cannot be read or written.
    """
    for flag, value in (("--output-prefix", options.output_prefix), ("--check", options.check)):
        if value is not None and is_in_object_storage(value):
            raise UserError(f"{flag} {value}: prepare_data works on disks; name a prefix there, and copy its files")
    if options.check is not None:
        check(options)
        return
    options, source = check_and_open(options)
    prefix = Path(options.output_prefix)
    with parts_folder(prefix.parent / f".{prefix.name}.parts", digest_of(options, source), options.resume) as folder:
        tokenizer = kept_tokenizer(folder, lambda: make_tokenizer(options, source))
        if options.append_eod and tokenizer.eod_id is None:
            raise UserError(f"--append-eod: {options.tokenizer_type} has no end-of-document token; leave the flag out")
        if options.allow_special_tokens and not tokenizer.special_tokens:
            raise UserError(f"--allow-special-tokens: {options.tokenizer_type} has none; leave the flag out")
        written = [write_parts(options, source, tokenizer, folder, key) for key in options.json_keys]
        for key, (extent, _) in zip(options.json_keys, written, strict=True):
            _check_tokens(options, tokenizer, extent, key)
        # All that can fail of all corpora, before the first of them is published.
        finals = [corpus_path(prefix, key) for key in options.json_keys]
        partials = [folder / final.name for final in finals]
        counted_corpora = [finish_corpus(partial, tokenizer, _preparation(options)) for partial in partials]
        for final in finals:
            _tell_of_replacement(final)
        publish(list(zip(partials, finals, strict=True)))
        lines = []
        for final, stats, (extent, rate) in zip(finals, counted_corpora, written, strict=True):
            unknown = ""
            if tokenizer.unknown_id is not None:
                unknown = f"{extent.num_unknown:,} of them unknown ({extent.num_unknown / stats.num_tokens:.2%}), "
            lines.append(
                f"{counted(stats.num_documents, 'document')}, {counted(stats.num_tokens, 'token')} of "
                f"{tokenizer.num_tokens:,}, {unknown}unigram entropy {stats.unigram_entropy_nats:.3f} nats per token, "
                f"{rate}\n--data-path {final}" + (" --split 90,5,5" if options.preset == "text8" else "")
            )
    # Once all of them are there: output that cannot be written costs none.
    print_output("\n".join(lines))


def check(options: PrepareOptions) -> None:
    """Say that the corpus --check is what was written.

    Raises:
        UserError: it is not, nobody wrote down what it was, or there are other flags.
    """
    if replace(options, check=None) != PrepareOptions():
        raise UserError(f"--check {options.check}: reads a corpus and nothing else; leave all other flags out")
    if not has_digests(options.check):
        open_tokens(options.check, flag="--check")
        raise UserError(
            f"--check {options.check}: has no {digests_path(options.check).name} beside it, as corpora of older "
            "releases and of other programs have none; prepare the data again to have one"
        )
    fault = find_fault(options.check)
    if fault is not None:
        raise UserError(fault)
    num_tokens = len(open_tokens(options.check, flag="--check"))
    print_output(f"{options.check}: its {counted(num_tokens, 'token')}, index and tokenizer are what was written")


def _preparation(options: PrepareOptions) -> Preparation:
    # Nobody knows of bare tokens how they were made.
    return Preparation(None if options.input_dtype else options.append_eod, options.allow_special_tokens)


def _tell_of_replacement(final: Path) -> None:
    tokens = Path(f"{final}.bin")
    if Path(f"{final}.idx").is_file() and tokens.is_file():
        print_output(f"replaces the {tokens.stat().st_size:,} bytes of {tokens}")


def _check_tokens(options: PrepareOptions, tokenizer: Tokenizer, extent: Extent, key: str) -> None:
    if extent.num_documents == 0 and len(options.json_keys) > 1:
        raise UserError(
            f"--json-keys: the input has no text at key {key!r}; mend it, or leave that key out and give --no-resume"
        )
    share = extent.num_unknown / max(extent.num_tokens, 1)
    if share > options.max_unknown_share:
        raise UserError(
            f"--max-unknown-share {options.max_unknown_share}: of the {counted(extent.num_tokens, 'token')} at key "
            f"{key!r} {share:.2%} are unknown to this {tokenizer.tokenizer_type}; give one that fits the text and "
            "--no-resume, or raise the share"
        )


def write_parts(
    options: PrepareOptions, source: DocumentSource | TokenSource, tokenizer: Tokenizer, folder: Path, key: str
) -> tuple[Extent, str]:
    """Tokenize what the finished parts of a key do not have yet; returns what there is now, and the rates."""
    partial = folder / corpus_path(Path(options.output_prefix), key).name
    dtype = token_dtype(tokenizer.num_tokens)
    begin = PartialCorpus.finished_extent(partial, dtype)
    if begin.num_texts:
        print_output(
            f"going on after {counted(begin.num_documents, 'document')} of an earlier run (--no-resume starts anew)"
        )
    if isinstance(source, TokenSource):
        chunks = source.chunks(tokenizer, begin.num_tokens)
    else:
        texts = source.texts(key, begin.num_texts)
        chunks = encoded_chunks(texts, tokenizer, _preparation(options), options.workers, folder / "tokenizer")
    progress = Progress(source, begin)
    try:
        end = append_chunks(chunks, dtype, partial, part_bytes=options.part_megabytes * 1_000_000, on_progress=progress)
    finally:
        progress.close()
    if source.num_nulls:
        print_output(f"left out {counted(source.num_nulls, 'document')} with null at key {key!r}")
    return end, progress.rates(end)


def check_and_open(options: PrepareOptions) -> tuple[PrepareOptions, DocumentSource | TokenSource]:
    """The options with what a preset means filled in, and where their texts come from.

    Raises:
        UserError: flags that do not belong together, or a source that is not there.
    """
    if options.dataset in PRESETS and not os.path.exists(options.dataset):
        options = replace(options, preset=options.preset or options.dataset, dataset=None)
    is_text8 = options.preset == "text8"
    if is_text8 and options.tokenizer_type is None:
        options = replace(options, tokenizer_type=CharTokenizer.tokenizer_type)
    _check_flags(options, is_text8)
    _check_outputs(options)
    if options.input is not None:
        source = _open_input(options)
        _check_outputs(options, [file.path for file in source.files if file.spool is None])
    else:
        preset = PRESETS.get(options.preset or "")
        name = options.dataset or preset.name
        config = options.dataset_config or (preset.config if preset and not options.dataset else None)
        split = options.dataset_split or (preset.split if preset else "train")
        source = open_dataset(name, config, split, options.streaming)
    return options, Text8Source(source) if is_text8 else source


def _check_outputs(options: PrepareOptions, inputs: Sequence[Path] = ()) -> None:
    finals = [corpus_path(Path(options.output_prefix), key) for key in options.json_keys]
    check_outputs(finals, [*inputs, *filter(None, (options.tokenizer_model, options.vocab_file, options.merge_file))])


def _open_input(options: PrepareOptions) -> FileSource | TokenSource:
    folder = Path(options.output_prefix).parent
    if options.input_dtype is not None:
        return TokenSource(input_files(options.input, spool_folder=folder, are_texts=False), options.input_dtype)
    files = input_files(options.input, input_format=options.input_format, spool_folder=folder)
    plain = [file.path for file in files if not file.is_json_lines]
    keys = " ".join(options.json_keys)
    if plain and keys != "text":
        raise UserError(
            f"--json-keys {keys}: {plain[0]} has no keys; leave the flag out, or give files of JSON lines alone"
        )
    return FileSource(files)


def _check_flags(options: PrepareOptions, is_text8: bool) -> None:
    given = [flag for flag, value in (("--input", options.input), ("--dataset", options.dataset)) if value is not None]
    rules = [
        (len(given) < 2, "--input and --dataset: give one of them"),
        (options.output_prefix is not None, "missing --output-prefix: required; --help explains"),
        (given or options.preset, "missing --input, --dataset or --preset: one is required; --help explains"),
        (not given or options.preset in (None, "text8"),
         f"--preset {options.preset}: comes from the hub; leave {' '.join(given)} out"),
        (options.input is None or not (options.dataset_config or options.dataset_split or options.streaming),
         "--dataset-config, --dataset-split and --streaming belong to --dataset; leave them or --input out"),
        (options.tokenizer_type is not None, "missing --tokenizer-type: required; --help explains"),
        (not is_text8 or options.tokenizer_type == CharTokenizer.tokenizer_type,
         f"--tokenizer-type {options.tokenizer_type}: text8 is a corpus of 27 characters; leave the flag out"),
        (not is_text8 or options.json_keys == ("text",), "--json-keys: text8 has one text; leave the flag out"),
        (len(set(options.json_keys)) == len(options.json_keys),
         f"--json-keys {' '.join(options.json_keys)}: names a key twice; name each once"),
        (options.input is not None or (options.input_format is None and options.input_dtype is None),
         "--input-format and --input-dtype belong to --input; leave them out"),
        (0 <= options.max_unknown_share <= 1,
         f"--max-unknown-share {options.max_unknown_share} must be from 0 to 1"),
        (options.input_dtype is None or not (options.append_eod or options.allow_special_tokens or options.input_format
                                             or options.json_keys != ("text",)),
         "--input-dtype: bare tokens are taken as they are; leave --append-eod, --allow-special-tokens, --input-format "
         "and --json-keys out"),
        (1 <= options.workers <= MAX_WORKERS, f"--workers {options.workers} must be from 1 to {MAX_WORKERS}"),
        (options.part_megabytes >= 1, f"--part-megabytes {options.part_megabytes} must be at least 1"),
        (not options.train_tokenizer or options.tokenizer_type == SentencePieceTokenizer.tokenizer_type,
         f"--train-tokenizer: {options.tokenizer_type} is not trained; use it with SentencePieceTokenizer, or leave "
         "it out"),
        *_tokenizer_rules(options, is_text8),
    ]  # fmt: skip
    for holds, message in rules:
        if not holds:
            raise UserError(message)


def _tokenizer_rules(options: PrepareOptions, is_text8: bool) -> list[tuple[bool, str]]:
    """No flag is given that another one, or the type, leaves without a meaning."""
    kind, model = options.tokenizer_type, options.tokenizer_model
    is_of_corpus = model is not None and os.path.isfile(Path(model) / DESCRIPTION)
    takes_model = kind in (SentencePieceTokenizer.tokenizer_type, HuggingFaceTokenizer.tokenizer_type)
    takes_files = kind == GPT2BPETokenizer.tokenizer_type and not is_of_corpus
    return [
        (model is None or not options.train_tokenizer,
         f"--tokenizer-model {model}: --train-tokenizer makes a model; leave one of them out"),
        (model is None or not is_text8, f"--tokenizer-model {model}: text8 has 27 characters; leave the flag out"),
        (model is None or takes_model or is_of_corpus,
         f"--tokenizer-model {model}: {kind} takes the ..._tokenizer folder of a corpus alone; give one, or leave it "
         "out"),
        (takes_files or (options.vocab_file is None and options.merge_file is None),
         "--vocab-file and --merge-file belong to GPT2BPETokenizer without a --tokenizer-model; leave them out"),
        (options.vocab_size is None or options.train_tokenizer,
         f"--vocab-size {options.vocab_size}: belongs to --train-tokenizer; give that, or leave it out"),
    ]  # fmt: skip


def make_tokenizer(options: PrepareOptions, source: DocumentSource | TokenSource) -> Tokenizer:
    """The tokenizer that the flags ask for, learnt from the texts where it has to be."""
    model = options.tokenizer_model
    if options.preset == "text8":
        return CharTokenizer(TEXT8_CHARACTERS)
    if model is not None and os.path.isfile(Path(model) / DESCRIPTION):
        tokenizer = load_tokenizer(Path(model))
        if tokenizer.tokenizer_type != options.tokenizer_type:
            raise UserError(
                f"--tokenizer-type {options.tokenizer_type}: {model} holds a {tokenizer.tokenizer_type}; name that one"
            )
        return tokenizer
    if isinstance(source, TokenSource):
        if options.train_tokenizer or options.tokenizer_type == CharTokenizer.tokenizer_type:
            raise UserError(
                f"--input-dtype {options.input_dtype}: there is no text to learn a tokenizer from; give "
                "--tokenizer-model FOLDER_tokenizer of the corpus that the tokens are of"
            )
        return build_tokenizer(options.tokenizer_type, model, options.vocab_file, options.merge_file)
    texts = (text for key in options.json_keys for text in source.texts(key))
    if options.train_tokenizer:
        return SentencePieceTokenizer.train(texts, _vocab_size(options))
    if options.tokenizer_type == CharTokenizer.tokenizer_type:
        return CharTokenizer.from_texts(texts)
    return build_tokenizer(options.tokenizer_type, model, options.vocab_file, options.merge_file)


def digest_of(options: PrepareOptions, source: DocumentSource | TokenSource) -> str:
    """Of all that decides the bytes: parts of one digest may be joined, and no others."""
    files = {}
    for name in filter(None, (options.tokenizer_model, options.vocab_file, options.merge_file)):
        paths = [Path(name, file) for file in TOKENIZER_FILES] if os.path.isdir(name) else [Path(name)]
        files[name] = [file_record(path) if os.path.isfile(path) else None for path in paths]
    decisive = {
        "source": source.identity(),
        "options": [options.json_keys, options.tokenizer_type, options.preset, options.train_tokenizer,
                    _vocab_size(options), options.append_eod, options.allow_special_tokens],
        "tokenizer files": files,
        "versions": [_version(package) for package in ("sedd_megatron", "sentencepiece", "tokenizers")],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def _vocab_size(options: PrepareOptions) -> int:
    return DEFAULT_VOCAB_SIZE if options.vocab_size is None else options.vocab_size


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # our own, used from its folder
        return None


if __name__ == "__main__":
    run_command(main)
