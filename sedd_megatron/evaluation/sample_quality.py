"""How good samples are: diversity, generative perplexity under another model, MAUVE; 95 % intervals over the samples.

Generative perplexity alone misleads, for text that repeats itself is easy to predict: entropy belongs beside it.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sedd_megatron.errors import UserError, one_line
from sedd_megatron.evaluation.intervals import Interval
from sedd_megatron.wording import how_to_install

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RESAMPLES = 2000
DRAWS_AT_ONCE = 1 << 20  # of the bootstrap: bounds its memory
NORMAL_95 = 1.96
NGRAMS = (1, 2, 3)
# Of the MAUVE package, as are the 25 points of its curve.
MAUVE_SCALING = 5
MAUVE_POINTS = 25


@dataclass(frozen=True)
class Measure:
    """A row of the table."""

    name: str
    result: Interval
    digits: int
    note: str = ""


def unigram_entropy(tokens: Sequence[Hashable]) -> float:
    """Entropy of a sample's token distribution, in nats: -sum_w f_w ln f_w over its tokens' frequencies; at most ln S.

    The quantity of arXiv 2406.03736 and 2409.02908; the former gives it in bits.
    """
    counts = np.array(list(Counter(tokens).values()), dtype=np.float64)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def distinct_share(samples: Sequence[Sequence[Hashable]], n: int) -> float:
    """distinct-n (arXiv 1510.03055): the number of different n-grams over that of all n-grams of the samples; NaN where
    every sample is shorter than n.
    """
    grams = [gram for tokens in samples for gram in zip(*(tokens[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else math.nan


def bootstrap_ratio(
    numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray | None = None, seed: int = 0
) -> Interval:
    """sum(numerators) / sum(denominators), a mean if there are none, with the percentile bootstrap over the samples.

    Of a single sample the interval is without bounds.
    """
    above = np.asarray(numerators, dtype=np.float64)
    below = np.ones_like(above) if denominators is None else np.asarray(denominators, dtype=np.float64)
    value = float(above.sum() / below.sum())
    if len(above) < 2:
        return _without_bounds(value)
    generator = np.random.default_rng(seed)
    at_once = max(DRAWS_AT_ONCE // len(above), 1)
    ratios = []
    for start in range(0, RESAMPLES, at_once):
        rows = generator.integers(len(above), size=(min(at_once, RESAMPLES - start), len(above)))
        ratios.append(above[rows].sum(axis=1) / below[rows].sum(axis=1))
    low, high = np.quantile(np.concatenate(ratios), (0.025, 0.975))
    return Interval(value, float(low), float(high))


def _without_bounds(value: float) -> Interval:
    return Interval(value, -math.inf, math.inf)


def diversity(samples: Sequence[Sequence[Hashable]], unit: str) -> list[Measure]:
    """Length, entropy and distinct-n of token sequences.

    Args:
        unit: what the tokens are, for the table.

    Raises:
        UserError: no sample has a token.
    """
    filled = [tokens for tokens in samples if tokens]
    if not filled:
        raise UserError("every sample is empty; draw samples of at least one token")
    entropy = bootstrap_ratio([unigram_entropy(tokens) for tokens in filled])
    measures = [
        Measure("tokens per sample", bootstrap_ratio([len(tokens) for tokens in filled]), 1, unit),
        Measure("unigram entropy, nats", entropy, 3, "within a sample, averaged"),
        Measure("unigram entropy, bits", entropy.map(lambda nats: nats / math.log(2)), 3, "the same"),
    ]
    for n in NGRAMS:
        long_enough = [tokens for tokens in filled if len(tokens) >= n]
        if long_enough:
            within = bootstrap_ratio([distinct_share([tokens], n) for tokens in long_enough])
            measures.append(Measure(f"distinct-{n} within a sample", within, 3, "averaged"))
    for n in NGRAMS:
        # No interval: drawing samples again repeats some, and repetition is what this measures.
        over_all = _without_bounds(distinct_share(filled, n))
        if not math.isnan(over_all.value):
            measures.append(Measure(f"distinct-{n} over all samples", over_all, 3, f"{len(filled)} samples"))
    return measures


@dataclass(frozen=True)
class Judge:
    """A causal language model that says how probable text is."""

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    context: int  # the most tokens that it can see
    batch_size: int = 8

    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> list[list[int]]:
        """The judge's tokens of each text, no special ones added; the first `max_tokens`, or all."""
        encodings = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return [ids[:max_tokens] for ids in encodings["input_ids"]]

    @torch.no_grad()
    def negative_log_likelihoods(self, samples: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Of each sample the sum, in nats, and the number of tokens judged: all but the first, which nothing predicts.

        A sample longer than the judge's context is read in windows that begin with the last token of the one before, so
        that every token counts once. Published figures judge the first 1024 tokens, which is one window of GPT-2.
        """
        sums, counts = np.zeros(len(samples)), np.zeros(len(samples), dtype=np.int64)
        windows = [
            (row, tokens[start : start + self.context])
            for row, tokens in enumerate(samples)
            for start in range(0, len(tokens) - 1, self.context - 1)
        ]
        for batch in self._batches(windows):
            inputs = self._padded(batch)
            logits = self.model(**inputs).logits[:, :-1].float()
            targets = inputs["input_ids"][:, 1:]
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            for (row, tokens), loss in zip(batch, losses, strict=True):
                sums[row] += loss[: len(tokens) - 1].sum(dtype=torch.float64).item()
                counts[row] += len(tokens) - 1
        return sums, counts

    @torch.no_grad()
    def features(self, samples: Sequence[Sequence[int]]) -> np.ndarray:
        """[N, H]: the last hidden state at the last token, of at most one context, as MAUVE takes it; none is empty."""
        rows = [(row, tokens[: self.context]) for row, tokens in enumerate(samples)]
        features, order = [], []
        for batch in self._batches(rows):
            states = self.model(**self._padded(batch), output_hidden_states=True).hidden_states[-1].float()
            features += [state[len(tokens) - 1].cpu().numpy() for (_, tokens), state in zip(batch, states, strict=True)]
            order += [row for row, _ in batch]
        return np.stack([features[i] for i in np.argsort(order)])

    def _batches(self, windows: list[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
        # Windows of about one length together: little of the work is padding.
        ordered = sorted(windows, key=lambda window: len(window[1]), reverse=True)
        return (ordered[i : i + self.batch_size] for i in range(0, len(ordered), self.batch_size))

    def _padded(self, batch: Sequence[tuple[int, Sequence[int]]]) -> dict[str, Tensor]:
        ids = [torch.tensor(tokens) for _, tokens in batch]
        inputs = {"input_ids": ids, "attention_mask": [torch.ones_like(row) for row in ids]}
        pad = torch.nn.utils.rnn.pad_sequence
        return {name: pad(rows, batch_first=True).to(self.model.device) for name, rows in inputs.items()}


def load_judge(name: str, device: str = "auto", batch_size: int = 8) -> Judge:
    """A causal language model and its tokenizer from a folder, or from the hub where there is a network.

    Weights are read from safetensors only, and code that comes with a model is never run.

    Raises:
        UserError: no package `transformers`, no such model, one without safetensors or of another kind, no GPU.
    """
    if batch_size < 1:
        raise UserError(f"--judge-batch-size {batch_size} must be at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU; use --device cpu, or leave it out")
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"--judge {name}: needs the package transformers; {how_to_install('quality')}, or leave it out"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    except Exception as error:  # of every kind: the hub's, safetensors', the configuration's
        raise UserError(
            f"--judge {name}: no causal language model with safetensors weights that can be loaded "
            f"({one_line(error)}); name a folder with its config.json, model.safetensors and tokenizer.json"
        ) from error
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    context = getattr(model.config, "max_position_embeddings", None) or 1024
    return Judge(name, model.to(place).eval(), tokenizer, context, batch_size)


def perplexity_measures(judge: Judge, texts: Sequence[str], max_tokens: int | None) -> list[Measure]:
    """Generative perplexity under the judge, of the first `max_tokens` of its tokens of each text, or of all.

    Raises:
        UserError: no text has two of the judge's tokens.
    """
    sums, counts = judge.negative_log_likelihoods(judge.encode(texts, max_tokens))
    judged = counts > 0
    if not judged.any():
        raise UserError(f"--judge {judge.name}: no sample has two of its tokens; draw longer samples")
    extent = "whole samples" if max_tokens is None else f"first {max_tokens} tokens"
    over_tokens = bootstrap_ratio(sums[judged], counts[judged]).map(math.exp)
    # The published training code averages this one; a few bad samples dominate it.
    over_samples = bootstrap_ratio(np.exp(sums[judged] / counts[judged]))
    return [
        Measure("generative perplexity", over_tokens, 2, f"{judge.name}, {extent}, mean over tokens"),
        Measure("generative perplexity, mean of samples", over_samples, 2, "each sample's own, averaged"),
    ]


def mauve_measure(judge: Judge, texts: Sequence[str], references: Sequence[str], max_tokens: int | None) -> Measure:
    """MAUVE (arXiv 2102.01454) of the texts and the references, on the judge's features.

    Raises:
        UserError: no package `mauve-text`, or fewer than two texts on a side.
    """
    sides = [[tokens for tokens in judge.encode(side, max_tokens) if tokens] for side in (texts, references)]
    if min(map(len, sides)) < 2:
        raise UserError(
            f"--reference: MAUVE compares two sets, here of {len(sides[0])} and {len(sides[1])} texts with any token; "
            "give at least two of each, better thousands"
        )
    own, other = map(judge.features, sides)
    result = mauve_score(own, other)
    return Measure("MAUVE", result, 3, f"{len(own)} against {len(other)} texts, features of {judge.name}")


def mauve_function() -> Callable[..., Any]:
    """compute_mauve of the package that its authors publish.

    Raises:
        UserError: no package `mauve-text`.
    """
    try:
        from mauve import compute_mauve
    except ImportError as error:
        raise UserError(
            f"--reference: MAUVE needs the package mauve-text; {how_to_install('quality')}, or leave it out"
        ) from error
    return compute_mauve


def mauve_score(own: np.ndarray, other: np.ndarray, seed: int = 25) -> Interval:
    """MAUVE of two sets of features, [N, H] and [M, H].

    The interval is the estimate +- 1.96 bootstrap standard errors over the samples, in the clusters of the estimate:
    with these fixed, drawing samples again is drawing the two histograms' counts again. Meaningful from 1000 texts on.

    Raises:
        UserError: no package `mauve-text`.
    """
    found = mauve_function()(p_features=own, q_features=other, mauve_scaling_factor=MAUVE_SCALING, seed=seed)
    generator = np.random.default_rng(seed)
    counts = (generator.multinomial(len(side), histogram, RESAMPLES) / len(side)
              for side, histogram in ((own, found.p_hist), (other, found.q_hist)))  # fmt: skip
    error = np.std([mauve_of_histograms(p, q) for p, q in zip(*counts, strict=True)])
    value = float(found.mauve)
    return Interval(value, max(value - NORMAL_95 * error, 0.0), min(value + NORMAL_95 * error, 1.0))


def mauve_of_histograms(p: np.ndarray, q: np.ndarray) -> float:
    """Area under the divergence curve of two distributions over the same clusters, as arXiv 2102.01454 has it."""
    weights = np.linspace(1e-6, 1 - 1e-6, MAUVE_POINTS)[:, None]
    mixtures = weights * p + (1 - weights) * q
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = (np.exp(-MAUVE_SCALING * np.where(side > 0, side * np.log(side / mixtures), 0).sum(axis=1))
                for side in (q, p))  # fmt: skip
    # The curve's ends lie on the axes, and the area is the mean of the two ways to take it.
    x, y = np.concatenate(([1.0], x, [0.0])), np.concatenate(([0.0], y, [1.0]))
    return (_area(x, y) + _area(y, x)) / 2


def _area(x: np.ndarray, y: np.ndarray) -> float:
    order = np.argsort(x)
    x, y = x[order], y[order]
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


def quality_table(measures: Sequence[Measure]) -> str:
    """The measures as a Markdown table."""
    rows = ["| measure | value | 95 % interval | |", "| --- | ---: | --- | --- |"]
    for measure in measures:
        result, digits = measure.result, measure.digits
        between = "" if math.isinf(result.high) else f"{result.low:.{digits}f} to {result.high:.{digits}f}"
        rows.append(f"| {measure.name} | {result.value:.{digits}f} | {between} | {measure.note} |")
    return "\n".join(rows)
