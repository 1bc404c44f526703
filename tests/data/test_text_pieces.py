"""Text inside a text has the tokens that it has there, and names of special tokens are text."""

import io
import random
from functools import cache

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from sedd_megatron.data.encoding import encode_chunk
from sedd_megatron.data.library_tokenizers import HuggingFaceTokenizer
from sedd_megatron.data.preparation import Preparation
from sedd_megatron.data.special_tokens import SpecialNamesTokenizer
from sedd_megatron.data.tokenizers import ByteTokenizer, CharTokenizer, SentencePieceTokenizer, Tokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.generation.requests import TextRequest, frames_of

TEXTS = ["foo bar foo bar baz", "the fo bar.  two  blanks and foobar", "Answer: yes, (foo) a bar"]
NAMED = "foo</s>bar <s>"


def sentencepiece_tokenizer(**settings) -> SentencePieceTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, "< / s >"] * 20), model_writer=model, vocab_size=60, hard_vocab_limit=False,
        minloglevel=2, **settings,
    )  # fmt: skip
    return SentencePieceTokenizer(model.getvalue())


def trained(model: models.Model, **parts) -> HuggingFaceTokenizer:
    """As the published tokenizer.json of its kind is made: names of special tokens first in the vocabulary."""
    tokenizer = hf.Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    shared = {"vocab_size": 300, "show_progress": False, "special_tokens": ["<unk>", "<s>", "</s>"]}
    kinds = {
        models.BPE: lambda: trainers.BpeTrainer(**shared, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
        models.Unigram: lambda: trainers.UnigramTrainer(**shared, unk_token="<unk>"),
        models.WordPiece: lambda: trainers.WordPieceTrainer(**shared),
    }
    tokenizer.train_from_iterator([*TEXTS, "< / s >"] * 10, kinds[type(model)]())
    return HuggingFaceTokenizer(tokenizer, "</s>")


def metaspace(model: models.Model, scheme: str) -> HuggingFaceTokenizer:
    return trained(
        model,
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme),
        decoder=decoders.Metaspace(prepend_scheme=scheme),
    )


MAKERS = {
    "bytes": ByteTokenizer,
    "characters": lambda: CharTokenizer.from_texts([*TEXTS, NAMED]),
    "sentencepiece": sentencepiece_tokenizer,
    "sentencepiece that keeps blanks": lambda: sentencepiece_tokenizer(remove_extra_whitespaces=False),
    "sentencepiece without a prefix": lambda: sentencepiece_tokenizer(add_dummy_prefix=False),
    "sentencepiece with neither": lambda: sentencepiece_tokenizer(
        add_dummy_prefix=False, remove_extra_whitespaces=False
    ),
    "metaspace first": lambda: metaspace(models.BPE(unk_token="<unk>"), "first"),
    "metaspace always": lambda: metaspace(models.BPE(unk_token="<unk>"), "always"),
    "metaspace never": lambda: metaspace(models.BPE(unk_token="<unk>"), "never"),
    "unigram": lambda: metaspace(models.Unigram(), "always"),
    "prepended": lambda: trained(
        models.BPE(unk_token="<unk>"),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    ),
    "stripped": lambda: trained(
        models.Unigram(),
        normalizer=normalizers.Sequence([normalizers.Strip(), normalizers.Replace(hf.Regex(" {2,}"), " ")]),
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="always")]),
        decoder=decoders.Metaspace(prepend_scheme="always"),
    ),
    "words by metaspace": lambda: trained(
        models.Unigram(),
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
        ),
        decoder=decoders.Metaspace(prepend_scheme="always"),
    ),
    "stripped words": lambda: trained(
        models.Unigram(),
        normalizer=normalizers.Sequence([normalizers.Strip(), normalizers.NFKC()]),
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
        ),
        decoder=decoders.Metaspace(prepend_scheme="always"),
    ),
    "words by byte level": lambda: trained(
        models.BPE(),
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
        ),
        decoder=decoders.ByteLevel(),
    ),
    "byte level": lambda: trained(
        models.BPE(), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True), decoder=decoders.ByteLevel()
    ),
    "word pieces": lambda: trained(
        models.WordPiece(unk_token="<unk>"),
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(cleanup=False),
    ),
}


@cache
def tokenizer_named(name: str) -> Tokenizer:
    return MAKERS[name]()


@pytest.fixture(params=MAKERS)
def tokenizer(request) -> Tokenizer:
    return tokenizer_named(request.param)


def test_a_text_in_two_pieces_is_the_text(tokenizer):
    """What a tokenizer does not keep of the whole (word pieces their blanks), it need not keep of the pieces."""
    keeps_last_blank = tokenizer.decode(tokenizer.encode("foo ")).endswith(" ")
    for text in TEXTS:
        whole = tokenizer.decode(tokenizer.encode(text))
        assert whole.replace(" ", "").lower() == text.replace(" ", "").lower()
        for cut in range(1, len(text)):
            if text[cut - 1] != " " or keeps_last_blank:
                pieces = tokenizer.encode(text[:cut]) + tokenizer.encode_inside(text[cut:])
                assert tokenizer.decode(pieces) == whole, (text[:cut], text[cut:])
    assert tokenizer.encode_inside("") == []


def test_pieces_do_not_begin_with_a_blank_of_the_tokenizers_own():
    for name in MAKERS:
        tokenizer = tokenizer_named(name)
        alone, inside = (tokenizer.decode(tokenizer.encode("fo") + encode("bar"))
                         for encode in (tokenizer.encode, tokenizer.encode_inside))  # fmt: skip
        assert inside.strip() == "fobar", name
        prefixes = name not in ("bytes", "characters", "sentencepiece without a prefix", "sentencepiece with neither",
                                "metaspace never")  # fmt: skip
        assert (alone.strip() == "fo bar") == prefixes, name


@pytest.mark.parametrize("name", ["sentencepiece", "prepended", "metaspace first"])
def test_requests_get_their_pieces_as_they_stand(name):
    tokenizer = tokenizer_named(name)

    def given_texts(request: TextRequest) -> list[str]:
        """The given runs of tokens, after one that ends in no blank."""
        (frame,) = frames_of(request, tokenizer, 24)
        runs, last = [], False
        for token, is_given in zip(frame.tokens, frame.given, strict=True):
            if is_given and not last:
                runs.append([])
            if is_given:
                runs[-1].append(token)
            last = is_given
        start = tokenizer.encode("a")
        return [tokenizer.decode(start + run)[1:] for run in runs]

    assert given_texts(TextRequest(infill="fo[MASK*2]bar[MASK] a bar[MASK].")) == [" fo", "bar", " a bar", "."]
    assert given_texts(TextRequest(infill="[MASK]foo")) == ["foo"]
    assert given_texts(TextRequest(prompt="fo", suffix=".")) == [" fo", "."]
    assert given_texts(TextRequest(suffix=" foo")) == [" foo"]


def test_no_text_becomes_the_end_of_a_document(tokenizer):
    for text in (NAMED, "</s>", "</s></s>", "a </s> b"):
        for ids in (tokenizer.encode(text), tokenizer.encode_inside(text)):
            assert tokenizer.eod_id is None or tokenizer.eod_id not in ids
            assert set(tokenizer.special_tokens.values()) - {tokenizer.unknown_id} <= set(range(tokenizer.num_tokens))
            assert (set(tokenizer.special_tokens.values()) - {tokenizer.unknown_id}).isdisjoint(ids)
        if tokenizer.unknown_id is None or tokenizer.unknown_id not in ids:
            shown = tokenizer.decode(tokenizer.encode(text)).replace(" ", "")
            assert shown == text.replace(" ", "")
    library = tokenizer.tokenizer_type in ("SentencePieceTokenizer", "HuggingFaceTokenizer")
    assert tokenizer.special_tokens.get("</s>") == (tokenizer.eod_id if library else None)
    assert tokenizer.eod_id is not None or not library


@pytest.mark.parametrize("name", ["words by metaspace", "stripped words", "words by byte level", "metaspace always"])
def test_blanks_after_a_name_stay(name):
    tokenizer, text = tokenizer_named(name), "foo </s> bar foo"
    assert tokenizer.decode(tokenizer.encode(text)).strip() == text
    assert tokenizer.decode(tokenizer.encode("a") + tokenizer.encode_inside(text)).strip() == f"a{text}"


def test_the_name_of_an_added_token_has_the_tokens_of_any_text():
    """Those that it has before it is added."""
    plain = trained(models.BPE(), pre_tokenizer=pre_tokenizers.ByteLevel(), decoder=decoders.ByteLevel())
    text = "foo<|end|>bar <|other|>"
    expected = plain.encode(text), plain.encode_inside(text)
    with_added = hf.Tokenizer.from_str(plain._tokenizer.to_str())
    with_added.add_special_tokens(["<|end|>", "<|other|>"])
    tokenizer = HuggingFaceTokenizer(with_added, "<|end|>")
    assert (tokenizer.encode(text), tokenizer.encode_inside(text)) == expected
    assert tokenizer.special_tokens["<|end|>"] == tokenizer.eod_id == plain.num_tokens
    not_special = hf.Tokenizer.from_str(plain._tokenizer.to_str())
    not_special.add_tokens(["<|end|>"])
    tokenizer = HuggingFaceTokenizer(not_special, "<|end|>")
    for ids in (tokenizer.encode(text), tokenizer.encode_inside(text)):
        assert tokenizer.eod_id not in ids
        assert tokenizer.decode(ids).strip() == text


def test_an_end_of_document_that_is_the_unknown_token_is_an_end():
    tokenizer = HuggingFaceTokenizer(hf.Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>")), "</s>")
    assert tokenizer.unknown_id == tokenizer.eod_id == 0
    assert encode_chunk(["a", "a"], tokenizer, Preparation(True)).num_unknown == 0


def test_allowed_names_are_their_tokens_inside_a_text(tokenizer):
    """Of the library's tokenizers as the library itself encodes them, of others without a blank after them."""
    if tokenizer.eod_id is None:
        assert not tokenizer.special_tokens
        return
    for text in ("foo</s>bar", "</s>bar</s></s> foo", "foo </s> bar", "".join(f"{text}</s>" for text in TEXTS)):
        first, *others = text.split("</s>")
        if isinstance(tokenizer, HuggingFaceTokenizer):
            library = hf.Tokenizer.from_str(tokenizer._tokenizer.to_str())
            expected = library.encode(text, add_special_tokens=False).ids
        else:
            parts = [tokenizer.encode(first), *map(tokenizer.encode_inside, others)]
            expected = [id for part in parts for id in (*part, tokenizer.eod_id)][:-1]
        written = encode_chunk([text], tokenizer, Preparation(False, True))
        assert written.tokens.tolist() == expected, text
        assert expected.count(tokenizer.eod_id) == len(others)
        assert written.num_unknown == expected.count(tokenizer.unknown_id)
        # Behind a text, it begins as a piece does and goes on as here.
        inside = SpecialNamesTokenizer(tokenizer).encode_inside(text)
        behind_name = expected[expected.index(tokenizer.eod_id) :]
        assert inside == [*tokenizer.encode_inside(first), *behind_name], text


def test_names_that_are_tokens_are_shown(tokenizer):
    """A library that decodes them to nothing would show a text that was never there."""
    if tokenizer.eod_id is None:
        return
    with_names = SpecialNamesTokenizer(tokenizer)
    for text in ("foo</s>bar", "</s>foo bar</s></s> foo", "foo"):
        ids = with_names.encode(text)
        shown = with_names.decode(ids)
        assert shown.replace(" ", "") == text.replace(" ", "")
        without = shown
        if tokenizer.decode([tokenizer.eod_id]) == "":
            without = shown.replace("</s>", "")
        assert without == tokenizer.decode(ids)


@pytest.mark.parametrize("place", ["beginning", "inside"])
def test_a_name_that_takes_the_blanks_before_it_does_so_everywhere(place):
    plain = trained(models.BPE(), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
                    decoder=decoders.ByteLevel())  # fmt: skip
    library = hf.Tokenizer.from_str(plain._tokenizer.to_str())
    library.add_special_tokens([hf.AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer = SpecialNamesTokenizer(HuggingFaceTokenizer(library, "</s>"))
    mask = tokenizer.special_tokens["<mask>"]
    encode = tokenizer.encode if place == "beginning" else tokenizer.encode_inside
    assert encode("foo  <mask> bar") == [*plain.encode("foo"), mask, *plain.encode(" bar")]
    assert encode("foo </s> bar") == [*plain.encode("foo "), plain.eod_id, *plain.encode(" bar")]


@pytest.mark.parametrize("name", ["sentencepiece", "sentencepiece that keeps blanks", "metaspace first"])
def test_no_blank_follows_an_allowed_name(name):
    tokenizer = tokenizer_named(name)
    ids = encode_chunk(["foo</s>bar</s> a"], tokenizer, Preparation(False, True)).tokens
    parts = [part[part != tokenizer.eod_id].tolist() for part in np.split(ids, np.flatnonzero(ids == tokenizer.eod_id))]
    texts = [tokenizer.decode(tokenizer.encode("(") + part) for part in parts]
    assert [text.removeprefix("(") for text in texts] == [" foo", "bar", " a"]


def test_an_end_of_document_that_was_not_added_is_allowed_too():
    library = hf.Tokenizer(models.BPE({"a": 0, "b": 1, "<": 2, "/": 3, "s": 4, ">": 5, "</s>": 6}, []))
    tokenizer = HuggingFaceTokenizer(library, "</s>")
    written = encode_chunk(["a</s>b"], tokenizer, Preparation(False, True))
    assert written.tokens.tolist() == [0, 6, 1]
    with pytest.raises(UserError, match=r"^character 'c' has no token in this tokenizer"):
        encode_chunk(["a</s>c"], tokenizer, Preparation(False, True))


@pytest.mark.parametrize("seed", range(3))
def test_texts_of_all_kinds_of_blanks_in_pieces(seed):
    generator = random.Random(seed)
    for name in ("sentencepiece that keeps blanks", "metaspace first", "metaspace always", "prepended"):
        tokenizer = tokenizer_named(name)
        for _ in range(50):
            text = "f" + "".join(generator.choices(["foo", " ", "  ", "bar", ".", "("], k=6)) + "r"
            cuts = sorted(generator.sample(range(1, len(text)), k=2))
            pieces = [text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]]
            ids = tokenizer.encode(pieces[0]) + [id for piece in pieces[1:] for id in tokenizer.encode_inside(piece)]
            assert tokenizer.decode(ids) == text, (name, pieces)
