"""Blends: every run of samples is in proportion, and whose sample n is depends on nothing but the weights."""

import cProfile
import itertools
import json
import pickle
import pstats
import random
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from sedd_megatron.arguments import parse_pretrain_options, weighted_corpora
from sedd_megatron.data.blend import Assignment, common_tokenizer
from sedd_megatron.data.collator import NoisingCollator
from sedd_megatron.data.corpus import write_corpus
from sedd_megatron.data.loader import training_batches
from sedd_megatron.data.tokenizers import ByteTokenizer, CharTokenizer, SentencePieceTokenizer
from sedd_megatron.data.windows import open_windows
from sedd_megatron.diffusion import AbsorbingGraph, LogLinearSchedule
from sedd_megatron.diffusion.draws import Stream
from sedd_megatron.errors import UserError
from sedd_megatron.options import check_values
from sedd_megatron.training_config import DataOptions, WeightedCorpus
from tests.commands import ENVIRONMENT
from tests.data.test_tokenizers import SOURCES
from tests.distributed.launch import REPOSITORY
from tests.distributed.layouts import MODEL

LENGTH = 8
WINDOWS = (40, 100, 7)


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory) -> list[str]:
    """Corpora of 40, 100 and 7 windows; each window begins with the corpus' number and its own."""
    folder = tmp_path_factory.mktemp("blend")
    for number, count in enumerate(WINDOWS):
        rows = [bytes([number, window] + [0] * (LENGTH - 2)) for window in range(count)]
        write_corpus([b"".join(rows).decode()], ByteTokenizer(), folder / str(number))
    return [str(folder / f"{number}_text_document") for number in range(len(WINDOWS))]


def blend(prefixes, *weights: str, split: str = "1,0,0", seed: int = 3):
    corpora = [WeightedCorpus(Fraction(weight), prefix) for weight, prefix in zip(weights, prefixes, strict=False)]
    return open_windows(corpora, seq_length=LENGTH, split=split, num_tokens=256, seed=seed)


def rows(dataset, indices) -> list[tuple[int, int]]:
    return [tuple(dataset[n][1][:2].tolist()) for n in indices]


@pytest.mark.parametrize(
    "weights",
    [["0.7", "0.3"], ["1", "1", "1"], ["0.9", "0.05", "0.03", "0.02"], ["18012", "7341", "991"],
     ["1", "2", "3", "4", "5", "6", "7"], ["1", "1/3", "1e-1"]],
)  # fmt: skip
def test_any_run_of_samples_is_in_proportion(weights):
    weights = [Fraction(weight) for weight in weights]
    assignment = Assignment.of(weights)
    # Whole periods are exactly in proportion, so runs within three of them show every run.
    length = min(3 * len(assignment.corpora), 30_000)
    corpora = np.array([assignment.locate(n)[0] for n in range(length)])
    for corpus, weight in enumerate(weights):
        share = float(weight / sum(weights))
        lag = np.cumsum(corpora == corpus) - share * np.arange(1, length + 1)
        assert np.abs(lag).max() < 1 + 1e-9
        assert lag.max() - lag.min() < 2
        assert Fraction(assignment.counts[corpus], len(assignment.corpora)) == weight / sum(weights)


def earliest_deadlines_first(counts: list[int]) -> list[int]:
    """Whose each sample of a period is, with a look at every corpus for every sample."""
    period, done, corpora = sum(counts), [0] * len(counts), []
    for n in range(period):
        released = (i for i, count in enumerate(counts) if done[i] * period // count <= n and done[i] < count)
        corpora.append(min(released, key=lambda i: (-(-(done[i] + 1) * period // counts[i]), i)))
        done[corpora[-1]] += 1
    return corpora


@pytest.mark.parametrize("seed", range(60))
def test_the_order_is_that_of_the_earliest_deadlines(seed):
    generator = random.Random(seed)
    counts = [generator.randint(1, generator.choice([1, 3, 50, 400])) for _ in range(generator.randint(1, 12))]
    assignment = Assignment.of([Fraction(count) for count in counts])
    assert assignment.corpora.tolist() == earliest_deadlines_first(list(assignment.counts))
    seen = Counter()
    for corpus, rank in zip(assignment.corpora.tolist(), assignment.ranks.tolist(), strict=True):
        assert rank == seen[corpus]
        seen[corpus] += 1


def test_many_corpora_take_no_longer_than_a_few():
    generator = random.Random(0)
    calls = []
    for number in (20, 400):
        weights = [Fraction(generator.random()) for _ in range(number)]
        profile = cProfile.Profile()
        assignment = profile.runcall(Assignment.of, weights)
        assert len(assignment.corpora) == 1 << 16
        calls.append(pstats.Stats(profile).total_calls)
    assert calls[1] < 1.5 * calls[0]


def test_weights_that_no_short_period_has_are_taken_to_1_in_65536():
    weights = [Fraction(weight) for weight in ("0.123456789", "0.5", "1e-9")]
    assignment = Assignment.of(weights)
    assert sum(assignment.counts) == len(assignment.corpora) == 1 << 16
    for count, weight in zip(assignment.counts, weights, strict=True):
        assert count >= 1
        assert abs(Fraction(count, 1 << 16) - weight / sum(weights)) <= Fraction(1, 1 << 16)


@pytest.mark.parametrize("weights", [("0.7", "0.3"), ("2", "5", "1"), ("0.333", "0.6667", "0.01")])
def test_each_corpus_is_read_in_order_without_gaps(weights):
    assignment = Assignment.of([Fraction(weight) for weight in weights])
    seen = Counter()
    for n in range(5000):
        corpus, own_n = assignment.locate(n)
        assert own_n == seen[corpus]
        seen[corpus] += 1
    far = 10**12
    positions = [assignment.locate(n) for n in range(far, far + 200)]
    for corpus in seen:
        own = [own_n for c, own_n in positions if c == corpus]
        assert own == list(range(own[0], own[0] + len(own)))
        assert abs(own[0] - far * assignment.counts[corpus] / len(assignment.corpora)) < 2


def test_each_corpus_has_its_own_epochs(prefixes):
    train = blend(prefixes, "0.5", "0.4", "0.1").train
    assert len(train) == sum(WINDOWS)
    found = rows(train, range(2000))
    assert Counter(corpus for corpus, _ in found) == {0: 1000, 1: 800, 2: 200}
    for number, count in enumerate(WINDOWS):
        own = [window for corpus, window in found if corpus == number]
        epochs = [own[start : start + count] for start in range(0, len(own) - count + 1, count)]
        assert len(epochs) >= 8
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_the_order_is_a_function_of_seed_and_n(prefixes):
    train = blend(prefixes, "0.7", "0.3").train
    order = rows(train, range(500))
    shuffled = np.random.Generator(np.random.Philox(0)).permutation(500)
    assert rows(blend(prefixes, "0.7", "0.3").train, shuffled) == [order[n] for n in shuffled]
    assert rows(pickle.loads(pickle.dumps(train)), range(500)) == order
    assert len(pickle.dumps(train)) < 2000
    assert rows(blend(prefixes, "7", "3").train, range(500)) == order, "weights count in proportion"
    assert rows(blend(prefixes, "0.7", "0.3", seed=4).train, range(500)) != order
    assert [n for n, _ in (train[n] for n in range(5))] == list(range(5))


def test_one_corpus_is_read_as_it_always_was(prefixes):
    alone = rows(blend(prefixes, "1").train, range(100))
    assert rows(blend(prefixes, "0.25").train, range(100)) == alone
    blended = rows(blend(prefixes, "1", "1").train, range(200))
    assert [row for row in blended if row[0] == 0] == alone, "its own order does not depend on the others"


def test_splits_apply_to_each_corpus(prefixes):
    parts = blend(prefixes, "1", "1", "1", split="80,15,5")
    found = [set(rows(part, range(3 * sum(WINDOWS)))) for part in parts]
    assert [len(part) for part in parts] == [32 + 80 + 6, 6 + 15 + 1, 2 + 5]
    assert [len(rows_of_part) for rows_of_part in found] == [len(part) for part in parts]
    assert all(not a & b for a, b in itertools.combinations(found, 2))
    # The smallest corpus has no window for the test part, which the others share.
    assert {corpus for corpus, _ in found[2]} == {0, 1}


def options(*data_path: str):
    return parse_pretrain_options(["--data-path", *data_path])


def test_data_path_is_a_prefix_or_weights_and_prefixes(tmp_path):
    assert weighted_corpora(options("data/a").data) == [(1, "data/a")]
    assert weighted_corpora(options("0.7", "a", "1e-1", "b").data) == [(Fraction(7, 10), "a"), (Fraction(1, 10), "b")]
    preset = tmp_path / "c.yaml"
    for text, values in (
        ("data_path: data/a", ("data/a",)),
        ("data_path: ['0.7', a, '0.3', b]", ("0.7", "a", "0.3", "b")),
        ("data_path: [0.70, a, 3, b]", ("0.7", "a", "3", "b")),
    ):
        preset.write_text(text)
        assert parse_pretrain_options(["--config", str(preset)]).data.data_path == values
    assert json.loads(json.dumps(options("data/a").to_dict()))["data_path"] == ["data/a"]
    for saved in ("data/a", ["data/a"]):
        assert check_values({"data_path": saved}, (DataOptions,), "a checkpoint") == {"data_path": ("data/a",)}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            ["1", "a", "b"],
            "--data-path 1 a b: is 3 values, must be one or an even number; a blend is weights and prefixes",
        ),
        (["a", "b"], "--data-path a b: the weight a must be a number above 0; a blend is"),
        (["1", "a", "-1", "b"], "--data-path -1 b: the weight -1 must be a number above 0"),
        (["1", "a", "0", "b"], "--data-path 0 b: the weight 0 must be a number above 0"),
        (["nan", "a", "1", "b"], "--data-path nan a: the weight nan must be a number above 0"),
        (["1e99999999", "a", "1", "b"], "--data-path 1e99999999 a: the weight 1e99999999 must be a number above 0"),
        (["1e-99999999", "a", "1", "b"], "--data-path 1e-99999999 a: the weight 1e-99999999 must be a number above 0"),
        (["inf", "a", "1", "b"], "--data-path inf a: the weight inf must be a number above 0"),
        (["1/0", "a", "1", "b"], "--data-path 1/0 a: the weight 1/0 must be a number above 0"),
        (["inf", "a", "1", "b"], "the weight inf must be a number above 0"),
    ],
)
def test_mistakes_in_data_path_are_named(values, text):
    with pytest.raises(UserError) as error:
        options(*values)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_a_corpus_that_is_missing_or_too_small_is_named(prefixes):
    with pytest.raises(UserError, match=r"--data-path nowhere: no file nowhere.idx"):
        blend([prefixes[0], "nowhere"], "1", "1")
    with pytest.raises(UserError, match=rf"--split 0.05,1,1: leaves no training window of the 7 of {prefixes[2]}"):
        blend(prefixes, "1", "1", "1", split="0.05,1,1")


def test_tokenizers_must_be_the_same(tmp_path):
    def prefix(name: str, tokenizer) -> str:
        write_corpus(["ab"], tokenizer, tmp_path / name)
        return str(tmp_path / f"{name}_text_document")

    chars = prefix("chars", CharTokenizer("ab"))
    assert common_tokenizer([chars, prefix("again", CharTokenizer("ab"))]).num_tokens == 2
    for other, difference in (
        (prefix("more", CharTokenizer("abc")), "characters is 'abc', not 'ab'"),
        (prefix("bytes", ByteTokenizer()), "characters is None, not 'ab'"),
    ):
        with pytest.raises(
            UserError, match=rf"{other}: its tokenizer is not that of {chars}: {difference}; prepare it"
        ):
            common_tokenizer([chars, other])
    pieces = [prefix(f"sp{size}", SentencePieceTokenizer.train(SOURCES, size)) for size in (500, 600)]
    with pytest.raises(UserError, match=r"tokenizer.model differs"):
        common_tokenizer(pieces)
    with pytest.raises(UserError, match=r"nowhere_tokenizer/description.json: no tokenizer there"):
        common_tokenizer([chars, "nowhere"])


def test_one_of_many_tokenizers_that_are_the_same_is_loaded(tmp_path):
    prefixes = []
    for name in "abcde":
        write_corpus(["ab"], CharTokenizer("ab"), tmp_path / name)
        prefixes.append(str(tmp_path / f"{name}_text_document"))
    # The same, but not byte by byte.
    description = tmp_path / "e_text_document_tokenizer" / "description.json"
    description.write_text(json.dumps(json.loads(description.read_text())))
    profile = cProfile.Profile()
    assert profile.runcall(common_tokenizer, prefixes).encode("ba") == [1, 0]
    loads = [calls for (_, _, name), (calls, *_) in pstats.Stats(profile).stats.items() if name == "load_tokenizer"]
    assert loads == [2]
    description.write_text("{")
    with pytest.raises(UserError, match=r"e_text_document_tokenizer/description.json: damaged"):
        common_tokenizer(prefixes)


def test_resuming_a_blend_gives_the_rest(prefixes):
    def batches(first: int, count: int) -> list:
        collator = NoisingCollator(AbsorbingGraph(256), LogLinearSchedule(), seed=5, stream=Stream.TRAIN_NOISE)
        every = training_batches(blend(prefixes, "0.7", "0.3").train, collator, consumed_samples=first,
                                 micro_batch_size=4, data_parallel_rank=0, data_parallel_size=1)  # fmt: skip
        return list(itertools.islice(every, count))

    for one, other in zip(batches(0, 30)[20:], batches(80, 10), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_the_example_trains_on_a_blend(prefixes, tmp_path):
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "examples" / "pretrain_sedd.py"), *MODEL, "--device", "cpu", "--data-path",
         "0.7", prefixes[0], "0.3", prefixes[1], "--seq-length", str(LENGTH), "--train-iters", "2", "--save",
         str(tmp_path), "--split", "1,1,0", "--eval-interval", "2", "--eval-iters", "1"],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "70 training and 70 validation windows of 8 tokens" in done.stdout
    (manifest,) = tmp_path.glob("iter_*/manifest.json")
    saved = json.loads(manifest.read_text())["body"]
    assert saved["state"]["options"]["data_path"] == ["0.7", prefixes[0], "0.3", prefixes[1]]
