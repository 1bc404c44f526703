"""No flag of prepare_data is ignored without a word."""

import pytest

from sedd_megatron.data.corpus import open_tokens, write_corpus
from sedd_megatron.data.tokenizers import ByteTokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.options import parse_options
from sedd_megatron.prepare_data import PrepareOptions, check_and_open, digest_of, prepare


def options_of(folder, *flags: str) -> PrepareOptions:
    if not (folder / "in.txt").exists():
        (folder / "in.txt").write_text("some text")
    flags = ("--input", str(folder / "in.txt"), "--output-prefix", str(folder / "p"), *flags)
    return parse_options((PrepareOptions,), flags, "", "")[0]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("SentencePieceTokenizer --train-tokenizer --tokenizer-model x",
         "--tokenizer-model x: --train-tokenizer makes a model; leave one of them out"),
        ("ByteTokenizer --tokenizer-model x", "--tokenizer-model x: ByteTokenizer takes the ..._tokenizer folder of a "
         "corpus alone; give one, or leave it out"),
        ("CharTokenizer --tokenizer-model x", "--tokenizer-model x: CharTokenizer takes"),
        ("GPT2BPETokenizer --vocab-file a --merge-file b --tokenizer-model x",
         "--tokenizer-model x: GPT2BPETokenizer takes"),
        ("CharTokenizer --preset text8 --tokenizer-model x", "--tokenizer-model x: text8 has 27 characters; leave"),
        ("ByteTokenizer --vocab-file x", "--vocab-file and --merge-file belong to GPT2BPETokenizer without a"),
        ("HuggingFaceTokenizer --tokenizer-model x --merge-file x", "--vocab-file and --merge-file belong to"),
        ("ByteTokenizer --vocab-size 100", "--vocab-size 100: belongs to --train-tokenizer; give that, or leave it"),
        ("SentencePieceTokenizer --tokenizer-model x --vocab-size 8192", "--vocab-size 8192: belongs to"),
    ],
)  # fmt: skip
def test_a_flag_without_a_meaning_is_refused(tmp_path, flags, why):
    with pytest.raises(UserError) as error:
        prepare(options_of(tmp_path, "--tokenizer-type", *flags.split()))
    assert str(error.value).startswith(why)
    assert not list(tmp_path.glob("p*"))


def test_the_tokenizer_of_a_corpus_is_taken_for_every_type(tmp_path):
    write_corpus(["text"], ByteTokenizer(), tmp_path / "first")
    folder = str(tmp_path / "first_text_document_tokenizer")
    prepare(options_of(tmp_path, "--tokenizer-type", "ByteTokenizer", "--tokenizer-model", folder))
    assert len(open_tokens(str(tmp_path / "p_text_document"))) == 9
    with pytest.raises(UserError, match="--vocab-file and --merge-file belong to"):
        prepare(
            options_of(
                tmp_path, "--tokenizer-type", "GPT2BPETokenizer", "--tokenizer-model", folder, "--vocab-file", "x"
            )
        )


def test_the_size_of_a_vocabulary_that_is_not_given_is_the_one_that_is_said(tmp_path):
    """So that parts go on where the number is given in one of the commands alone."""
    flags = ("--tokenizer-type", "SentencePieceTokenizer", "--train-tokenizer")
    digests = [
        digest_of(*check_and_open(options_of(tmp_path, *flags, *more))) for more in ((), ("--vocab-size", "8192"))
    ]
    assert digests[0] == digests[1]
