"""Texts become arrays with the ends of documents that the index can hold, and without lists that fill the memory."""

import random
import sys
import tracemalloc

import numpy as np
import pytest

from sedd_megatron.data import encoding
from sedd_megatron.data.encoding import cut_ends, encode_chunk, lengths_of
from sedd_megatron.data.library_tokenizers import GPT2BPETokenizer
from sedd_megatron.data.preparation import Preparation
from sedd_megatron.data.tokenizers import ByteTokenizer


def cut_lengths(lengths: list[int], longest: int) -> list[int]:
    """One token after the other."""
    cut = []
    for length in lengths:
        document = 0
        for _ in range(length):
            if document == longest:
                cut.append(document)
                document = 0
            document += 1
        cut.append(document)
    return cut


@pytest.mark.parametrize("longest", [1, 2, 7, 100])
def test_documents_are_cut_where_they_are_too_long(longest):
    generator = random.Random(longest)
    for _ in range(200):
        lengths = generator.choices(range(1, 30), k=generator.randrange(6))
        ends = cut_ends(np.cumsum(lengths, dtype=np.int64), longest)
        assert lengths_of(ends).tolist() == cut_lengths(lengths, longest)


def test_a_document_of_more_tokens_than_the_index_counts_is_cut():
    """The ends alone: such a text takes more memory than a test has."""
    limit = encoding.LONGEST_IN_INDEX
    assert limit == np.iinfo(np.int32).max
    lengths = [5, 2**31 - 1, 2**31, 2**33, 1]
    found = lengths_of(cut_ends(np.cumsum(lengths, dtype=np.int64), limit)).tolist()
    assert found == [5, limit, limit, 1, limit, limit, limit, limit, 4, 1]
    assert sum(found) == sum(lengths)


def test_texts_are_counted_whole_and_their_documents_in_parts(monkeypatch):
    monkeypatch.setattr(encoding, "LONGEST_IN_INDEX", 4)
    chunk = encode_chunk(["abcdefghij", "", "k"], ByteTokenizer(), Preparation())
    assert (chunk.num_texts, chunk.num_bytes, chunk.lengths.tolist()) == (3, 11, [4, 4, 2, 1])
    assert bytes(chunk.tokens.tolist()) == b"abcdefghijk"


@pytest.mark.parametrize("preparation", [Preparation(False), Preparation(False, allow_special_tokens=True)])
def test_a_long_document_takes_the_memory_of_its_tokens(gpt2_files, preparation):
    tokenizer = GPT2BPETokenizer(*gpt2_files)
    text = "lower <|endoftext|> low\n\n" * 200_000
    tracemalloc.start()
    tokens = encode_chunk([text], tokenizer, preparation).tokens
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expected = preparation.tokenizer_of_texts(tokenizer).encode(text)
    assert tokens.tolist() == expected
    assert (tokenizer.eod_id in expected) == preparation.allow_special_tokens
    # A list has 8 bytes for each token, and the numbers themselves.
    assert peak < sys.getsizeof(expected) + len(text), (peak, tokens.nbytes)
