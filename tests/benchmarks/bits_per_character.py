"""Bits per character of SEDD and of a causal GPT of the same size: python -m tests.benchmarks.bits_per_character
--baseline-gpt

Text is reduced to the 27 characters of text8 and cut into training, validation and test part, 90, 5 and 5 %. SEDD is
trained as by examples/pretrain_sedd.py, the GPT of tests/benchmarks/causal_gpt.py on the same windows in the same
order, with as many layers, heads and steps of the same widths, optimizer, schedule and moving average. Both are
evaluated on the same test windows, each without context outside of it. The GPT's figure is exact for them; SEDD's is
the upper bound of sedd_megatron/diffusion/likelihood.py, whose interval is Monte Carlo's, at 95 %. Of several learning
rates each model gets the best by the validation part after shorter runs. unigram and bigram are what counts in the
training part, plus one, give the test windows.
"""

import argparse
import json
import math
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.config import PretrainOptions
from sedd_megatron.data.corpus import corpus_path, write_corpus
from sedd_megatron.data.documents import TEXT8_CHARACTERS
from sedd_megatron.data.preparation import Preparation
from sedd_megatron.data.tokenizers import CharTokenizer
from sedd_megatron.data.windows import WindowDataset, Windows, open_windows
from sedd_megatron.evaluation.intervals import Interval
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import parallel_groups
from sedd_megatron.training_config import WeightedCorpus
from tests.benchmarks.pairs import write_table

DIGITS = dict(zip("0123456789", "zero one two three four five six seven eight nine".split(), strict=True))
TOKENIZER = CharTokenizer(TEXT8_CHARACTERS)
HEADER = (
    "| model | parameters | for the noise level | learning rate | training tokens | bits per character | seconds per "
    "step |\n|---|---|---|---|---|---|---|"
)


class Result(NamedTuple):
    """A row of the table, which has the parameters for the noise level among all of them."""

    bits: str
    parameters: int
    noise_parameters: int
    seconds: float


class Experiment(NamedTuple):
    """What all models of the table have in common."""

    arguments: argparse.Namespace
    windows: Windows
    folder: Path  # for the metrics of the runs

    def options(self, graph: str, rate: float, iterations: int) -> PretrainOptions:
        """The options of a run; the GPT takes all of them but the graph."""
        sizes = self.arguments
        return parse_pretrain_options(
            # Its windows are made here.
            "--mock-data --tokenizer-type NullTokenizer --vocab-size 2 "
            f"--graph {graph} --num-layers {sizes.num_layers} --hidden-size {sizes.hidden_size} "
            f"--num-attention-heads {sizes.num_attention_heads} --seq-length {sizes.seq_length} --cond-dim "
            f"{sizes.cond_dim} --micro-batch-size {sizes.batch_size} --global-batch-size {sizes.batch_size} "
            f"--make-vocab-size-divisible-by 1 --hidden-dropout {sizes.hidden_dropout} --train-iters {iterations} "
            f"--lr {rate} --lr-warmup-iters {iterations // 10} --lr-decay-style cosine --ema-decay {sizes.ema_decay} "
            f"--eval-interval 0 --eval-iters {max(len(self.windows.valid) // sizes.batch_size, 1)} --log-dir "
            f"{self.folder}/{graph}-{rate}-{iterations}".split()
        )


# (learning rate, steps, whether it is a run of the search) -> nats per token of the validation part, or the result
Trainer = Callable[[float, int, bool], float | Result]


def main(argv: Sequence[str]) -> None:
    arguments = parse_arguments(argv)
    if not torch.cuda.is_available():
        cpu_backend.install()
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(arguments, text8_windows(arguments, Path(folder)), Path(folder))
        rows = [row_of(f"SEDD, {graph}", sedd_trainer(experiment, graph), arguments) for graph in arguments.graph]
        if arguments.baseline_gpt:
            rows.append(row_of("causal GPT", gpt_trainer(experiment), arguments))
        unigram, bigram = bits_of_counts(experiment.windows, TOKENIZER.num_tokens)
    train, valid, test = (len(part) for part in experiment.windows)
    lines = [
        HEADER,
        *rows,
        f"| unigram | | | | | {unigram:.3f} | |",
        f"| bigram | | | | | {bigram:.3f} | |",
        f"\n{arguments.num_layers} layers x {arguments.hidden_size}, {arguments.num_attention_heads} heads, "
        f"{arguments.train_iters:,} steps of {arguments.batch_size} x {arguments.seq_length}; windows: {train:,} "
        f"training, {valid:,} validation, {test:,} test. Learning rates: {rates_in_words(arguments)}; then warm-up and "
        f"cosine to 0. SEDD's intervals: Monte Carlo error alone, {arguments.num_times} times t per window.",
    ]
    print("\n".join(lines), flush=True)
    write_table("Bits per character", "tests.benchmarks.bits_per_character", argv, arguments.output, lines)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", help="text files; if not given, Python's standard library")
    parser.add_argument("--graph", nargs="+", choices=("absorb", "uniform"), default=["absorb"])
    parser.add_argument("--baseline-gpt", action="store_true", help="train the GPT as well")
    parser.add_argument("--train-iters", type=int, default=4000)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--num-attention-heads", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--cond-dim", type=int, default=64, help="SEDD's width of the noise conditioning")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--hidden-dropout", type=float, default=0.0)
    parser.add_argument("--ema-decay", type=float, default=0.995)
    parser.add_argument("--lr", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3], help="of several, the best is taken")
    parser.add_argument("--search-iters", type=int, default=400, help="steps of each run that a rate is chosen by")
    parser.add_argument("--num-times", type=int, default=32, help="times t per test window, for the bound; even")
    parser.add_argument("--output", type=Path, help="a file of tests/benchmarks/results")
    return parser.parse_args(argv)


def rates_in_words(arguments: argparse.Namespace) -> str:
    if len(arguments.lr) == 1:
        return "given"
    rates = ", ".join(f"{rate:g}" for rate in arguments.lr)
    return f"for each model the best of {rates} on the validation part after {arguments.search_iters:,} steps"


def text8_of(text: str) -> str:
    """`text` in the manner of text8: lower case, digits spelled out, one blank for everything between letters."""
    spelled = re.sub("[0-9]", lambda digit: f" {DIGITS[digit[0]]} ", text.lower())
    return re.sub("[^a-z]+", " ", spelled)


def text8_windows(arguments: argparse.Namespace, folder: Path) -> Windows:
    # Here, because it imports Megatron, which main has to prepare the CPU for.
    from tests.benchmarks.data import standard_library_texts

    texts = [path.read_text(encoding="utf-8") for path in arguments.input or ()] or standard_library_texts(4e6)
    write_corpus([text8_of("\n".join(texts))], TOKENIZER, folder / "corpus")
    corpora = [WeightedCorpus(Fraction(1), str(corpus_path(folder / "corpus")))]
    return open_windows(
        corpora, seq_length=arguments.seq_length, split="90,5,5", num_tokens=TOKENIZER.num_tokens, seed=1234
    )


def row_of(name: str, train: Trainer, arguments: argparse.Namespace) -> str:
    """Trains with the best of the learning rates."""
    rate = arguments.lr[0]
    if len(arguments.lr) > 1:
        losses = {rate: train(rate, arguments.search_iters, True) for rate in arguments.lr}
        rate = min(losses, key=losses.get)
        found = ", ".join(f"{loss / math.log(2):.3f} at {rate:g}" for rate, loss in losses.items())
        print(f"{name}: validation after {arguments.search_iters} steps, bits per character: {found}", flush=True)
    result = train(rate, arguments.train_iters, False)
    tokens = arguments.train_iters * arguments.batch_size * arguments.seq_length
    row = (
        f"| {name} | {result.parameters:,} | {result.noise_parameters:,} | {rate:g} | {tokens:,} | {result.bits} | "
        f"{result.seconds:.3f} |"
    )
    # The table comes when all models are trained.
    print(row, flush=True)
    return row


def sedd_trainer(experiment: Experiment, graph: str) -> Trainer:
    def train_sedd(rate: float, iterations: int, is_search: bool) -> float | Result:
        options = experiment.options(graph, rate, iterations)
        with parallel_groups(options.parallel) as groups:
            from sedd_megatron.training.loop import train
            from sedd_megatron.training.validation import validate

            run = train(options, experiment.windows, TOKENIZER, None, groups, Preparation())
            if run.iteration < iterations:
                # The loop takes SIGTERM for a wish to save and leave.
                raise SystemExit(f"stopped at step {run.iteration} of {iterations}: no table")
            if is_search:
                return validate(run, experiment.windows.valid)
            (model,) = run.model_chunks
            sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
            for_noise = sum(size for name, size in sizes.items() if "modulation." in name or "sigma_embed" in name)
            bits = bound_on_bits(run, experiment.windows.test, experiment.arguments.num_times)
            text = f"<= {bits.value:.3f} [{bits.low:.3f}, {bits.high:.3f}]"
            return Result(text, sum(sizes.values()), for_noise, seconds_per_step(options))

    return train_sedd


def bound_on_bits(run, windows: WindowDataset, num_times: int) -> Interval:
    """Prior, diffusion and reconstruction of the moving average of the weights, per token of these windows."""
    from sedd_megatron.evaluation.bounds import sample_interval
    from sedd_megatron.pretrained import PretrainedModel

    (network,) = run.model_chunks
    network.eval()
    options = run.options
    model = PretrainedModel(network, run.graph, run.schedule, run.tokenizer, options.model.seq_length, run.groups)
    text = "".join(run.tokenizer.decode(windows[n][1].tolist()) for n in range(len(windows)))
    with run.ema.swapped_in():
        # The text's windows without overlap are the ones that it was put together from.
        units = model.nll(
            [text],
            mc_samples=num_times,
            windowing="concatenate",
            batch_size=options.training.micro_batch_size,
            time_eps=options.diffusion.time_eps,
        )
    assert len(units) == len(windows)
    return sample_interval(units).map(lambda nats: nats / math.log(2))


def seconds_per_step(options: PretrainOptions) -> float:
    """The median, from what the training loop writes."""
    lines = Path(options.logging.log_dir, "metrics.jsonl").read_text().splitlines()
    tokens = options.training.global_batch_size * options.model.seq_length
    return statistics.median(tokens / json.loads(line)["tokens_per_second"] for line in lines)


def gpt_trainer(experiment: Experiment) -> Trainer:
    def train_causal(rate: float, iterations: int, is_search: bool) -> float | Result:
        # Where a graph is named for SEDD; nothing of the GPT depends on it.
        options = experiment.options("absorb", rate, iterations)
        with parallel_groups(options.parallel) as groups:
            from tests.benchmarks.causal_gpt import build_causal_run, nats_of_windows, train_gpt

            run = build_causal_run(options, TOKENIZER.num_tokens, groups)
            seconds = train_gpt(run, experiment.windows.train)
            part = experiment.windows.valid if is_search else experiment.windows.test
            nats = nats_of_windows(run, part) / (len(part) * options.model.seq_length)
            if is_search:
                return nats
            size = sum(parameter.numel() for parameter in run.model.parameters())
            return Result(f"{nats / math.log(2):.3f}", size, 0, statistics.median(seconds))

    return train_causal


def bits_of_counts(windows: Windows, num_tokens: int) -> tuple[float, float]:
    """Bits per character of the test windows by the training windows' frequencies: of characters, and of characters
    after a character (of a window's first one by itself).
    """
    train, test = (np.stack([part[n][1].numpy() for n in range(len(part))]) for part in (windows.train, windows.test))
    single = np.bincount(train.ravel(), minlength=num_tokens) + 1.0
    pairs = np.ones((num_tokens, num_tokens))
    np.add.at(pairs, (train[:, :-1], train[:, 1:]), 1.0)
    alone = -np.log2(single / single.sum())[test]
    after = -np.log2(pairs / pairs.sum(1, keepdims=True))[test[:, :-1], test[:, 1:]]
    return alone.mean(), (alone[:, 0].sum() + after.sum()) / test.size


if __name__ == "__main__":
    main(sys.argv[1:])
