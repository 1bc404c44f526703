"""python -m sedd_megatron.prepare_data: text, JSONL or a folder -> Megatron's .bin/.idx pair, ready for --data-path."""

import sys
import time
from dataclasses import MISSING, dataclass
from pathlib import Path

from sedd_megatron.data.corpus import ProgressLine, corpus_path, documents, input_files, write_corpus
from sedd_megatron.data.tokenizers import (
    TOKENIZER_TYPES,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    build_tokenizer,
)
from sedd_megatron.errors import UserError, run_command
from sedd_megatron.options import option, parse_options


@dataclass(frozen=True)
class PrepareOptions:
    """Preparation"""

    input: tuple[str, ...] = option(MISSING, "text files, .jsonl files, or folders of them")
    output_prefix: str = option(MISSING, "writes PREFIX_text_document.bin and .idx")
    tokenizer_type: str = option(MISSING, "how text becomes tokens", choices=TOKENIZER_TYPES)
    tokenizer_model: str | None = option(None, "SentencePiece .model file, tokenizer folder or hub name")
    vocab_file: str | None = option(None, "GPT-2's vocabulary (encoder.json)")
    merge_file: str | None = option(None, "GPT-2's merges (vocab.bpe)")
    train_tokenizer: bool = option(False, "train the SentencePiece model on the input")
    vocab_size: int = option(8192, "its number of tokens")
    json_keys: tuple[str, ...] = option(("text",), "keys of the .jsonl lines; each becomes a corpus of its own")
    append_eod: bool = option(False, "end each document with the tokenizer's end-of-document token")


def main() -> None:
    """Parse the flags, make the tokenizer, write the corpora."""
    (options,) = parse_options(
        (PrepareOptions,), sys.argv[1:], "sedd_megatron.prepare_data", "Turn text into token files for training."
    )
    try:
        prepare(options)
    except OSError as error:
        where = error.filename or f"--output-prefix {options.output_prefix}"
        raise UserError(f"{where}: {error.strerror}; give another path, or room and permission there") from error


def prepare(options: PrepareOptions) -> None:
    """Write one corpus per JSON key and print what it holds.

    Raises:
        UserError: input that is missing, damaged or does not fit the flags.
        OSError: a file or folder that cannot be read or written.
    """
    files = input_files(options.input)
    plain = [path for path in files if path.suffix != ".jsonl"]
    keys = " ".join(options.json_keys)
    if plain and keys != "text":
        raise UserError(f"--json-keys {keys}: {plain[0]} has no keys; leave the flag out, or give .jsonl files alone")
    tokenizer = make_tokenizer(options, files)
    if options.append_eod and tokenizer.eod_id is None:
        raise UserError(f"--append-eod: {options.tokenizer_type} has no end-of-document token; leave the flag out")
    prefix = Path(options.output_prefix)
    for key in options.json_keys:
        start = time.monotonic()
        stats = write_corpus(
            documents(files, key),
            tokenizer,
            prefix,
            append_eod=options.append_eod,
            key=key,
            on_progress=ProgressLine(),
        )
        seconds = time.monotonic() - start
        megabytes = sum(path.stat().st_size for path in files) / 1e6
        print(
            f"{stats.num_documents:,} documents, {stats.num_tokens:,} tokens of {tokenizer.num_tokens:,}, "
            f"unigram entropy {stats.unigram_entropy_nats:.3f} nats per token, {megabytes / seconds:.1f} MB/s\n"
            f"--data-path {corpus_path(prefix, key)}"
        )


def make_tokenizer(options: PrepareOptions, files: list[Path]) -> Tokenizer:
    """The tokenizer that the flags ask for, learnt from the files where it has to be."""
    if options.train_tokenizer and options.tokenizer_type != SentencePieceTokenizer.tokenizer_type:
        raise UserError(
            f"--train-tokenizer: {options.tokenizer_type} is not trained; use it with SentencePieceTokenizer, "
            "or leave it out"
        )
    texts = (text for key in options.json_keys for text in documents(files, key))
    if options.train_tokenizer:
        return SentencePieceTokenizer.train(texts, options.vocab_size)
    if options.tokenizer_type == CharTokenizer.tokenizer_type:
        return CharTokenizer.from_texts(texts)
    return build_tokenizer(options.tokenizer_type, options.tokenizer_model, options.vocab_file, options.merge_file)


if __name__ == "__main__":
    run_command(main)
