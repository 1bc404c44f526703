"""A model is trained on a source of known entropy: the bound falls towards the entropy and never below it.

For windows x drawn from the source p, whatever model q the training has led to,

    E[bound(x)] >= E[-log q(x)] = H(p) + KL(p || q) >= H(p),   H(p) = H(pi) + (S - 1) sum over i of pi_i H(P(. | i))

so that each stage of training can be held against a number that no part of this package has computed.
"""

import itertools
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sedd_megatron.data.corpus import corpus_path, write_corpus
from sedd_megatron.data.tokenizers import CharTokenizer
from sedd_megatron.evaluation.bounds import corpus_interval
from sedd_megatron.evaluation.intervals import Interval
from sedd_megatron.pretrained import load_pretrained
from tests.distributed.launch import launch
from tests.evaluation.markov import MarkovSource

LETTERS = "abcdef"
SEQ_LENGTH = 16
SOURCE = MarkovSource(len(LETTERS), peak=1.5, seed=2)
ENTROPY = SOURCE.window_entropy(SEQ_LENGTH)
ENTROPY_OF_INDEPENDENT_TOKENS = SEQ_LENGTH * SOURCE.token_entropy
FRESH = SOURCE.draw(1000, SEQ_LENGTH, seed=2)
STAGES = (0, 50, 100, 250)
BATCH_SIZE = 64
# Far from 0, so that each of the bound's three terms is many times its Monte Carlo error.
TIME_EPS = 0.05
NOISE_EPS = {"absorb": 0.05, "uniform": 0.2}


class Bounds(NamedTuple):
    """The bound on -log p of the fresh windows, in nats per window, at each stage of training."""

    windows: Tensor  # [stages, windows] float64, with the same draws at each stage
    intervals: list[Interval]  # 95 % for the source, by stage


def texts_of(windows: Tensor) -> list[str]:
    return ["".join(LETTERS[token] for token in window) for window in windows.tolist()]


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Of independent values [N], the standard error of the mean; what is Monte Carlo in a value is in the spread."""
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def train_arguments(graph: str, corpus: Path, save: Path, stage: int) -> list[str]:
    """The command line that brings a run to a stage, from the one before."""
    arguments = (
        "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --cond-dim 32 --hidden-dropout 0 "
        f"--make-vocab-size-divisible-by 8 --seq-length {SEQ_LENGTH} --graph {graph} --noise-eps {NOISE_EPS[graph]} "
        f"--time-eps {TIME_EPS} --global-batch-size {BATCH_SIZE} --micro-batch-size {BATCH_SIZE} --lr 4e-3 "
        "--lr-warmup-iters 10 --ema-decay 0.95 --eval-interval 0 --split 1,0,0 --device cpu "
        f"--data-path {corpus} --save {save} --train-iters {stage}"
    ).split()
    return arguments if stage == STAGES[0] else [*arguments, "--load", str(save)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """GRAPH/iter_* of each graph and stage; no run reads a window of its corpus twice."""
    folder = tmp_path_factory.mktemp("known_entropy")
    windows = SOURCE.draw(STAGES[-1] * BATCH_SIZE, SEQ_LENGTH, seed=1)
    write_corpus(["".join(texts_of(windows))], CharTokenizer(LETTERS), folder / "markov")
    corpus = corpus_path(folder / "markov")
    launch("run_pretrain.py", 1, [train_arguments(graph, corpus, folder / graph, stage)
                                  for graph, stage in itertools.product(NOISE_EPS, STAGES)])  # fmt: skip
    return folder


@pytest.fixture(scope="module", params=list(NOISE_EPS))
def bounds(request, trained: Path) -> Bounds:
    windows, intervals = [], []
    for stage in STAGES:
        model = load_pretrained(trained / request.param / f"iter_{stage:07d}", device="cpu")
        units = model.nll(texts_of(FRESH), mc_samples=8, seed=0, batch_size=512, time_eps=TIME_EPS)
        assert [unit.num_tokens for unit in units] == [SEQ_LENGTH] * len(FRESH)
        windows.append(torch.tensor([unit.bound for unit in units], dtype=torch.float64))
        intervals.append(corpus_interval(units).map(lambda nats_per_token: nats_per_token * SEQ_LENGTH))
    return Bounds(torch.stack(windows), intervals)


def test_the_closed_form_is_the_entropy_of_what_is_drawn():
    """H = -sum of p(x) log p(x) over all windows of 5 tokens, and the mean of -log p(x) over draws of 16."""
    every = torch.tensor(list(itertools.product(range(len(LETTERS)), repeat=5)))
    exact = SOURCE.negative_log_likelihood(every)
    probs = torch.exp(-exact)
    assert math.isclose(probs.sum(), 1, rel_tol=1e-12)
    assert math.isclose(probs @ exact, SOURCE.window_entropy(5), rel_tol=1e-12)
    for drawn in (FRESH, SOURCE.draw(100_000, SEQ_LENGTH, seed=3)):
        mean, error = mean_and_error(SOURCE.negative_log_likelihood(drawn))
        assert abs(mean - ENTROPY) < 2 * error


def test_the_untrained_bound_is_that_of_uniform_tokens(bounds):
    """At iteration 0 the scores are exactly those of independent uniform tokens, where the bound is S log V for every
    window: a term that is missing or has another weight cannot hide behind what the model has yet to learn.
    """
    mean, error = mean_and_error(bounds.windows[0])
    assert abs(mean - SEQ_LENGTH * math.log(len(LETTERS))) < 3 * error


def test_the_bound_decreases_with_training(bounds):
    """Paired over windows, by more than 5 standard errors of the difference and those of both bounds together."""
    for before, after in itertools.pairwise(bounds.windows):
        decrease, error = mean_and_error(before - after)
        assert decrease > 5 * error
        assert decrease > mean_and_error(before)[1] + mean_and_error(after)[1]


def test_the_bound_is_above_the_entropy(bounds):
    """bound(x) >= -log q(x), and E[-log q(x) + log p(x)] = KL(p || q) >= 0: window by window, and for the source."""
    exact = SOURCE.negative_log_likelihood(FRESH)
    for windows, interval in zip(*bounds, strict=True):
        excess, error = mean_and_error(windows - exact)
        assert excess > 2 * error
        assert interval.low > ENTROPY


def test_the_trained_bound_is_close_to_the_entropy(bounds):
    """Within 15 percent, which S H(pi), the least that a model of single tokens can reach, is far above."""
    interval = bounds.intervals[-1]
    assert interval.value < 1.15 * ENTROPY
    assert interval.high < (ENTROPY + ENTROPY_OF_INDEPENDENT_TOKENS) / 2
