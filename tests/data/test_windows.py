"""Windows: each once per epoch, in an order that (seed, n) decides; ranks share them without gap or overlap."""

import itertools
import pickle
import shutil
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from sedd_megatron.data import token_range
from sedd_megatron.data.collator import NoisingCollator
from sedd_megatron.data.corpus import write_corpus
from sedd_megatron.data.loader import training_batches, validation_batches
from sedd_megatron.data.micro_batch import MicroBatchCollator
from sedd_megatron.data.splits import check_tokens_of_parts
from sedd_megatron.data.tokenizers import ByteTokenizer
from sedd_megatron.data.windows import CorpusWindows, open_windows, split_ranges
from sedd_megatron.diffusion import AbsorbingGraph, LogLinearSchedule, UniformGraph
from sedd_megatron.diffusion.draws import Stream, philox_generator
from sedd_megatron.errors import UserError
from sedd_megatron.training_config import WeightedCorpus

LENGTH = 8


@pytest.fixture(scope="module")
def data_path(tmp_path_factory) -> str:
    """100 windows and a rest, each window different."""
    folder = tmp_path_factory.mktemp("windows")
    text = bytes(np.random.Generator(np.random.Philox(0)).integers(0, 128, 100 * LENGTH + 3).tolist()).decode()
    write_corpus(iter([text[:300], text[300:]]), ByteTokenizer(), folder / "w")
    return str(folder / "w_text_document")


def windows(data_path: str, **change):
    corpora = [WeightedCorpus(Fraction(1), data_path)]
    opened = open_windows(corpora, **{"seq_length": LENGTH, "split": "80,15,5", "num_tokens": 256, "seed": 3, **change})
    check_tokens_of_parts(opened, change.get("num_tokens", 256))
    return opened


def rows(dataset, indices) -> list[tuple]:
    return [tuple(dataset[n][1].tolist()) for n in indices]


def test_each_epoch_has_every_window_once_in_an_order_of_its_own(data_path):
    train = windows(data_path).train
    assert len(train) == 80
    stream = np.fromfile(data_path + ".bin", dtype=np.uint16)[: 80 * LENGTH].reshape(80, LENGTH)
    expected = sorted(map(tuple, stream.tolist()))
    epochs = [rows(train, range(e * 80, (e + 1) * 80)) for e in range(3)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[1] != epochs[2]
    assert rows(windows(data_path, seed=4).train, range(80)) != epochs[0]


@pytest.mark.parametrize("num_windows", [1, 2, 3, 255, 1000, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 1_000_003])
def test_an_epoch_is_numpys_permutation_in_half_the_memory(num_windows):
    dataset = CorpusWindows(np.zeros(1), 1, 0, num_windows, seed=3, shuffle=True, number=5)
    for epoch in (0, 7):
        order = dataset._order.of_epoch(epoch)
        assert order.dtype == np.uint32
        expected = philox_generator(3, Stream.SAMPLE_ORDER, epoch, 5).permutation(num_windows)
        assert np.array_equal(order, expected)


def test_splits_share_no_window(data_path):
    parts = windows(data_path)
    found = [set(rows(part, range(len(part)))) for part in parts]
    assert [len(part) for part in parts] == [80, 15, 5]
    assert all(not a & b for a, b in itertools.combinations(found, 2))
    assert rows(parts.valid, range(15)) == rows(parts.valid, range(15, 30)), "validation is in the same order each time"


@pytest.mark.parametrize("num_windows", [1, 2, 7, 1000])
def test_split_ranges_cover_everything(num_windows):
    ranges = split_ranges("969,30,1", num_windows)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == num_windows
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))


def test_loader_processes_get_the_map_and_not_a_copy(data_path):
    train = windows(data_path).train
    sent = pickle.dumps(train)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert isinstance(again.tokens, np.memmap)
    assert rows(again, range(100)) == rows(train, range(100))


def test_noise_does_not_depend_on_the_batch_it_is_drawn_in(data_path):
    samples = [windows(data_path).train[n] for n in (0, 5, 81, 82, 10**6, 10**6 + 1)]
    whole = collator()(samples)
    parts = [collator()(samples[:1]), collator()(samples[1:4]), collator()(samples[4:])]
    for together, field in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(together, torch.cat(field))
    assert whole.x_0.dtype == torch.int64
    assert not torch.equal(whole.x_t, collator(Stream.VALIDATION_NOISE)(samples).x_t)


@pytest.mark.parametrize("num_samples", [12, 13])
def test_every_rank_validates_as_many_batches(data_path, num_samples):
    counts = {
        len(list(validation_batches(windows(data_path).valid, collator(), num_samples=num_samples, micro_batch_size=3,
                                    data_parallel_rank=rank, data_parallel_size=2)))
        for rank in range(2)
    }  # fmt: skip
    assert len(counts) == 1


def collator(stream=Stream.TRAIN_NOISE) -> NoisingCollator:
    return NoisingCollator(AbsorbingGraph(256), LogLinearSchedule(), seed=5, stream=stream)


def take(data_path: str, count: int, **change) -> list:
    options = {"consumed_samples": 0, "micro_batch_size": 4, "data_parallel_rank": 0, "data_parallel_size": 1, **change}
    return list(itertools.islice(training_batches(windows(data_path).train, collator(), **options), count))


def joined(batches: list) -> list[torch.Tensor]:
    """The fields of many batches, in the order of the samples."""
    fields = [torch.cat(field) for field in zip(*batches, strict=True)]
    order = fields[-1].argsort()
    return [field[order] for field in fields]


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 2), (2, 4), (4, 2), (3, 4)])
def test_ranks_share_the_samples_of_one(data_path, ranks, micro_batch_size):
    one = joined(take(data_path, 60 // 4 * 2))
    steps = 120 // (ranks * micro_batch_size)
    many = joined([
        batch
        for rank in range(ranks)
        for batch in take(data_path, steps, data_parallel_rank=rank, data_parallel_size=ranks,
                          micro_batch_size=micro_batch_size)
    ])  # fmt: skip
    for a, b in zip(one, many, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_gives_the_rest(data_path, num_workers):
    unbroken = take(data_path, 30)
    resumed = take(data_path, 10, consumed_samples=80, num_workers=num_workers)
    for a, b in zip(unbroken[20:], resumed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_validation_is_the_same_every_time_and_bounded(data_path):
    def once():
        return list(validation_batches(windows(data_path).valid, collator(Stream.VALIDATION_NOISE), num_samples=12,
                                       micro_batch_size=3, data_parallel_rank=0, data_parallel_size=2))  # fmt: skip

    first, second = once(), once()
    assert [batch.sample_index.tolist() for batch in first] == [[0, 1, 2], [6, 7, 8]]
    assert all(torch.equal(x, y) for a, b in zip(first, second, strict=True) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seq_length": 10_000}, "fewer than one window"),
        ({"num_tokens": 100}, r"has tokens 0 to 127, the tokenizer's vocabulary has tokens 0 to 99"),
        ({"split": "1,2"}, "must be three weights"),
        ({"split": "a,b,c"}, "must be three weights"),
        ({"split": "0,0,0"}, "must be three weights"),
        ({"split": "-1,1,1"}, "must be three weights"),
        ({"split": "nan,1,1"}, "must be three weights"),
        ({"split": "inf,1,1"}, "must be three weights"),
        ({"split": "1e308,1e308,1"}, "must be three weights"),
        ({"split": "0,1,1"}, "leaves no training window"),
    ],
)
def test_errors_name_the_value_and_the_way_out(data_path, change, text):
    with pytest.raises(UserError, match=text):
        windows(data_path, **change)


def finds_strange_tokens(blended, path: str, rank: int) -> bool:
    try:
        check_tokens_of_parts(blended, 256, rank, 3)
    except UserError as error:
        return str(error).startswith(f"{path}.bin: has tokens ")
    return False


def test_each_block_of_tokens_is_read_by_one_of_the_ranks(data_path, tmp_path, monkeypatch):
    monkeypatch.setattr(token_range, "TOKENS_AT_ONCE", 16 * LENGTH)
    copies = [str(tmp_path / name) for name in ("a", "b")]
    for copy, suffix in itertools.product(copies, (".bin", ".idx")):
        shutil.copy(data_path + suffix, copy + suffix)
    corpora = [WeightedCorpus(Fraction(1, 2), copy) for copy in copies]
    blended = open_windows(corpora, seq_length=LENGTH, split="80,15,5", num_tokens=256, seed=3)
    readers = []
    for copy in copies:
        tokens = np.memmap(copy + ".bin", dtype=np.uint16, mode="r+")
        for place in range(0, len(tokens), 16 * LENGTH):
            sound, tokens[place] = tokens[place], 300
            readers.append([rank for rank in range(3) if finds_strange_tokens(blended, copy, rank)])
            tokens[place] = sound
    assert readers == [[block % 3] for block in range(14)]


@pytest.mark.parametrize("graph", [AbsorbingGraph(256), UniformGraph(256)], ids=["absorb", "uniform"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_micro_batches_are_parts_of_the_sequences_with_the_positions_that_count(data_path, graph, num_workers):
    noising = NoisingCollator(graph, LogLinearSchedule(), seed=5, stream=Stream.TRAIN_NOISE)
    dataset, samples = windows(data_path).train, range(8, 12)
    whole = noising([dataset[n] for n in samples])
    parts = []
    for context_rank in range(2):
        collator = MicroBatchCollator(noising, context_rank, context_size=2, row_multiple=8)
        parts.append(next(training_batches(dataset, collator, consumed_samples=8, micro_batch_size=4,
                                           data_parallel_rank=0, data_parallel_size=1,
                                           num_workers=num_workers)))  # fmt: skip
    for name in ("x_0", "x_t"):
        fields = [getattr(part.noisy, name) for part in parts]
        assert all(field.is_contiguous() for field in fields), "a GPU would make the host wait for the copy"
        assert torch.equal(torch.cat(fields, dim=1), getattr(whole, name))
    for noisy, position, num_rows, keys, *_ in parts:
        assert torch.equal(keys, parts[0].dropout_keys), "those of the samples, on every rank of the context"
        # Rows in the order of [S, B], as Megatron's hidden states have them.
        counts = [s * 4 + b for s in range(LENGTH // 2) for b in range(4)
                  if graph.mask_token_id is None or noisy.x_t[b, s] == graph.mask_token_id]  # fmt: skip
        assert num_rows == len(counts) > 0
        assert position.tolist() == counts + [0] * (-num_rows % 8)


def test_a_process_that_ends_while_its_loader_runs_ends(data_path):
    # What an exception leaves behind: the iterator lives on in its traceback. Workers heed none of these signals.
    code = f"""
import os, signal
from sedd_megatron.errors import STOP_SIGNALS
from tests.data.test_windows import collator, training_batches, windows

batches = training_batches(windows({data_path!r}).train, collator(), consumed_samples=0, micro_batch_size=4,
                           data_parallel_rank=0, data_parallel_size=1, num_workers=2)
next(batches)
for number in STOP_SIGNALS:
    signal.signal(number, signal.SIG_IGN)
    os.killpg(0, number)
for _ in range(20):
    next(batches)
print("went on", flush=True)
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          start_new_session=True)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (3, "went on\n", "")
