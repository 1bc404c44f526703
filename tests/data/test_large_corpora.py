"""A corpus of a billion windows opens at once, in little memory, and what is wrong in it is found all the same."""

import itertools
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from sedd_megatron.data import corpus as corpus_module
from sedd_megatron.data.background_check import check_in_background
from sedd_megatron.data.corpus import INDEX_HEADER, INDEX_MAGIC, are_read_at_start, open_tokens, write_corpus
from sedd_megatron.data.digests import digests_path
from sedd_megatron.data.loader import training_batches
from sedd_megatron.data.tokenizers import ByteTokenizer
from sedd_megatron.data.windows import open_windows
from sedd_megatron.errors import UserError
from sedd_megatron.training_config import WeightedCorpus
from tests.distributed.launch import child_environment

LENGTH, WINDOWS = 16, 10**9
OPEN = """
import json, sys, time
import psutil
from fractions import Fraction
from sedd_megatron.data.corpus import are_read_at_start
from sedd_megatron.data.windows import has_keyed_order, open_windows
from sedd_megatron.training_config import WeightedCorpus

process, prefix = psutil.Process(), sys.argv[1]
# Of this process: a machine that does other things takes longer.
before, start = process.memory_info().rss, time.process_time()
assert not are_read_at_start([prefix])
windows = open_windows([WeightedCorpus(Fraction(1), prefix)], seq_length=16, split="98,1,1", num_tokens=256, seed=0)
found = [int(windows.train[n][1][0]) for n in range(100)]
seconds = time.process_time() - start
assert has_keyed_order(prefix, 16, "98,1,1")
print(json.dumps([len(windows.train), seconds, (process.memory_info().rss - before) / 2**20]))
"""


def sparse_corpus(prefix: Path, lengths: np.ndarray) -> str:
    """Of zeros that take no room on the disk."""
    sizes = lengths.astype(np.int64) * 2
    with open(f"{prefix}.idx", "wb") as file:
        file.write(INDEX_HEADER.pack(INDEX_MAGIC, 1, 8, len(lengths), len(lengths) + 1))
        for part in (lengths, np.cumsum(sizes) - sizes, np.arange(len(lengths) + 1, dtype=np.int64)):
            file.write(part.tobytes())
    with open(f"{prefix}.bin", "wb") as file:
        os.truncate(file.fileno(), int(sizes.sum()))
    return str(prefix)


def test_a_billion_windows_open_within_a_second_and_100_megabytes(tmp_path):
    # Of two million documents, whose index of 40 MB is not the most that is read.
    lengths = np.full(2 * 10**6, LENGTH * WINDOWS // (2 * 10**6), np.int32)
    prefix = sparse_corpus(tmp_path / "large", lengths)
    done = subprocess.run([sys.executable, "-c", OPEN, prefix], capture_output=True, text=True, timeout=300,
                          env=child_environment())  # fmt: skip
    assert done.returncode == 0, done.stderr
    num_windows, seconds, megabytes = json.loads(done.stdout)
    assert num_windows == round(0.98 * WINDOWS)
    assert seconds < 1
    assert megabytes < 100


@pytest.fixture
def prefix(tmp_path, monkeypatch) -> str:
    """A corpus without digests that is not read at the start, and whose index is not either."""
    write_corpus(["hello world, and more" * 20], ByteTokenizer(), tmp_path / "c")
    prefix = str(tmp_path / "c_text_document")
    digests_path(prefix).unlink()
    monkeypatch.setattr(corpus_module, "TOKENS_READ_AT_START", 0)
    monkeypatch.setattr(corpus_module, "INDEX_READ_AT_START", 0)
    return prefix


def opened(prefix: str):
    return open_windows([WeightedCorpus(Fraction(1), prefix)], seq_length=4, split="1,0,0", num_tokens=256, seed=0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_strange_tokens_are_found_in_the_background_and_where_they_are_read(prefix, num_workers):
    assert not are_read_at_start([prefix])
    assert check_in_background([prefix], 256).last_fault(10) is None
    tokens = np.fromfile(f"{prefix}.bin", np.uint16)
    tokens[-1] = 300
    tokens.tofile(f"{prefix}.bin")
    line = rf"^{prefix}.bin: has tokens \d+ to 300, the tokenizer's vocabulary has tokens 0 to 255; prepare the data"
    batches = training_batches(opened(prefix).train, list, consumed_samples=0, micro_batch_size=1,
                               data_parallel_rank=0, data_parallel_size=1, num_workers=num_workers)  # fmt: skip
    with pytest.raises(UserError, match=line) as error:
        list(itertools.islice(batches, len(tokens)))
    assert "\n" not in str(error.value)
    fault = check_in_background([prefix], 256).last_fault(10)
    assert fault.startswith(f"{prefix}.bin: has tokens ")


def test_a_damaged_index_is_found_in_the_background(prefix):
    path = Path(f"{prefix}.idx")
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    # One document's length, so that the last pointer and length no longer are the file's end.
    lengths = content[INDEX_HEADER.size : INDEX_HEADER.size + 4].view(np.int32)
    assert len(open_tokens(prefix, is_read_whole=False)) == lengths[0]
    content[INDEX_HEADER.size] ^= 1
    path.write_bytes(content.tobytes())
    with pytest.raises(UserError, match="its index says"):
        open_tokens(prefix, is_read_whole=False)
    # Two documents whose pointers are not those of their lengths, and whose ends are.
    whole = int(os.path.getsize(f"{prefix}.bin")) // 2
    lengths = np.array([5, 7, whole - 10], np.int32)
    with path.open("wb") as file:
        file.write(INDEX_HEADER.pack(INDEX_MAGIC, 1, 8, 3, 4))
        file.write(lengths.tobytes() + np.array([0, 10, 20]).tobytes() + np.arange(4).tobytes())
    assert len(open_tokens(prefix, is_read_whole=False)) == whole
    fault = check_in_background([prefix], 256).last_fault(10)
    assert fault == f"{path}: its pointers are not those of its lengths: it is damaged; prepare the data again"
