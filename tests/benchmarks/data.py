"""The loader against the training step it feeds, and prepare_data against tokenization alone: python -m
tests.benchmarks.data

The loader is one process: windows from a file, noise drawn, a batch made. A step takes a batch, so that the ratio is
how many times faster the loader is than training needs. prepare_data's rates are those that the command prints, from
the first text read to the last token on the disk, with the start of its processes; what it is compared with encodes the
same texts, which are in memory, and drops the tokens.
"""

import argparse
import itertools
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from sedd_megatron.data.corpus import open_tokens, write_corpus
from sedd_megatron.data.library_tokenizers import GPT2BPETokenizer
from sedd_megatron.data.loader import training_batches
from sedd_megatron.data.tokenizers import ByteTokenizer, CharTokenizer, SentencePieceTokenizer, Tokenizer
from sedd_megatron.data.windows import open_windows
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import parallel_groups
from sedd_megatron.training_config import WeightedCorpus
from tests.benchmarks.pairs import Lines, measure_pairs, seconds_of, write_table
from tests.benchmarks.train import Case, build_ours, describe, options_of

CASES = {
    "smallest": Case(1, 32, 2, 2, 32, 256),
    "tiny": Case(4, 128, 4, 16, 128, 256),  # examples/configs/tiny.yaml, the quick start's model
    "narrow": Case(4, 256, 4, 4, 256, 50257),
}
TINY_FLAGS = "--cond-dim 64 --make-vocab-size-divisible-by 8"
BATCHES_AT_ONCE = 50
# So that each takes seconds, beside which the start of processes does not count.
TIMES_MORE_TEXT = {"ByteTokenizer": 10, "CharTokenizer": 10, "SentencePieceTokenizer": 5}
LOADER_HEADER = (
    "| case | layers x width, V, B x S | batches/s | tokens/s | the training step's tokens/s | faster |\n"
    "|---|---|---|---|---|---|"
)
PREPARE_HEADER = (
    "\n| tokenizer | MB | encode, MB/s | prepare_data, MB/s | of encode | --workers {workers}, MB/s | of encode |\n"
    "|---|---|---|---|---|---|---|"
)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=["tiny", "narrow"], help="models that are fed")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--megabytes", type=float, default=12, help="of text to prepare")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=8192, help="of the SentencePiece model")
    parser.add_argument("--vocab-file", type=Path, help="GPT-2's encoder.json; without it GPT-2's BPE is left out")
    parser.add_argument("--merge-file", type=Path, help="GPT-2's vocab.bpe")
    parser.add_argument("--output", type=Path, help="a file of tests/benchmarks/results")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        cpu_backend.install()
    lines = Lines()

    with tempfile.TemporaryDirectory() as folder:
        lines.say(LOADER_HEADER)
        for name in arguments.cases:
            lines.say(
                f"| {name} | {describe(CASES[name])} | {loader_row(CASES[name], Path(folder), arguments.pairs)} |"
            )
        lines.say(PREPARE_HEADER.format(workers=arguments.workers))
        texts = standard_library_texts(arguments.megabytes * 1e6)
        for tokenizer in tokenizers(texts, arguments):
            own, times = Path(folder, tokenizer.tokenizer_type), TIMES_MORE_TEXT.get(tokenizer.tokenizer_type, 1)
            lines.say(f"| {prepare_row(tokenizer, texts * times, own, arguments)} |")
    write_table("Data", "tests.benchmarks.data", argv, arguments.output, lines)


def loader_row(case: Case, folder: Path, pairs: int) -> str:
    options = options_of(case, TINY_FLAGS if case == CASES["tiny"] else "")
    generator = np.random.Generator(np.random.Philox(0))
    write_corpus((bytes(generator.integers(0, 128, 10_000).tolist()).decode() for _ in range(1000)), ByteTokenizer(),
                 folder / "random")  # fmt: skip
    corpora = [WeightedCorpus(Fraction(1), str(folder / "random_text_document"))]
    windows = open_windows(corpora, seq_length=case.length, split="1,0,0", num_tokens=256, seed=0)
    with parallel_groups(options.parallel) as groups:
        from sedd_megatron.diffusion.draws import Stream
        from sedd_megatron.training.iterators import micro_batch_collator
        from sedd_megatron.training.step import train_step

        run, made = build_ours(case, options, groups)
        batches = training_batches(
            windows.train,
            micro_batch_collator(run, Stream.TRAIN_NOISE),
            consumed_samples=0,
            micro_batch_size=case.batch,
            data_parallel_rank=0,
            data_parallel_size=1,
        )
        steps = [itertools.cycle(made)]

        def load() -> None:
            for _ in range(BATCHES_AT_ONCE):
                next(batches)

        found = measure_pairs(load, lambda: train_step(run, steps), pairs)
    rate, tokens = BATCHES_AT_ONCE / found.seconds, case.batch * case.length
    step_rate = tokens / found.opponent_seconds
    return f"{rate:,.0f} | {rate * tokens:,.0f} | {step_rate:,.0f} | {found.speedup * BATCHES_AT_ONCE:.0f}x"


def standard_library_texts(size: float) -> list[str]:
    """Source files of Python's standard library, of about `size` bytes together."""
    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts and "test" not in path.parts:
            text = path.read_bytes().decode("utf-8", errors="ignore")
            texts += [text] if text else []
            size -= len(text)
        if size <= 0:
            break
    return texts


def tokenizers(texts: list[str], arguments: argparse.Namespace) -> Iterator[Tokenizer]:
    yield ByteTokenizer()
    yield CharTokenizer.from_texts(texts)
    yield SentencePieceTokenizer.train(texts, arguments.vocab_size)
    if arguments.vocab_file is not None:
        yield GPT2BPETokenizer(arguments.vocab_file, arguments.merge_file)


def prepare_row(tokenizer: Tokenizer, texts: list[str], folder: Path, arguments: argparse.Namespace) -> str:
    name = tokenizer.tokenizer_type
    (folder / "texts").mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number:05}.py").write_bytes(text.encode())
    tokenizer.save(folder / "tokenizer")
    megabytes = sum(len(text.encode()) for text in texts) / 1e6

    def encode() -> None:
        for text in texts:
            tokenizer.encode(text)

    def prepared(workers: int) -> float:
        command = [sys.executable, "-m", "sedd_megatron.prepare_data", "--input", str(folder / "texts"), "--workers",
                   str(workers), "--output-prefix", str(folder / "p"), "--tokenizer-type", name,
                   *(["--tokenizer-model", str(folder / "tokenizer")] if name != "ByteTokenizer" else [])]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(re.search(r"([\d.]+) MB/s", done.stdout)[1])

    rates = [
        (megabytes / seconds_of(encode), prepared(1), prepared(arguments.workers)) for _ in range(1 + arguments.pairs)
    ][1:]
    expected = [token for text in texts[:20] for token in tokenizer.encode(text)]
    assert open_tokens(str(folder / "p_text_document"))[: len(expected)].tolist() == expected
    alone, one, many = (statistics.median(column) for column in zip(*rates, strict=True))
    ratios = [statistics.median(row[way] / row[0] for row in rates) for way in (1, 2)]
    return f"{name} | {megabytes:.1f} | {alone:.1f} | {one:.1f} | {ratios[0]:.2f} | {many:.1f} | {ratios[1]:.2f}"


if __name__ == "__main__":
    main(sys.argv[1:])
