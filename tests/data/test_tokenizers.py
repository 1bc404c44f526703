"""Tokenizers: text comes back as it was, a saved tokenizer gives the same ids, a damaged one is named."""

import io
import json
import random
import resource
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers as hf

from sedd_megatron.data import library_tokenizers as module
from sedd_megatron.data.library_tokenizers import GPT2BPETokenizer, HuggingFaceTokenizer
from sedd_megatron.data.null_tokenizer import NullTokenizer
from sedd_megatron.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    build_tokenizer,
    load_tokenizer,
)
from sedd_megatron.errors import UserError

SOURCES = [path.read_text(encoding="utf-8") for path in sorted(Path(module.__file__).parent.glob("*.py"))]
LAYOUT = "def f(x):\n\tif x:\n        return  {'a':   1}\n\n\n  # trailing blanks   \r\n\tété 😀\x00\u2028end "


def random_text(seed: int, length: int = 400) -> str:
    generator = random.Random(seed)
    blocks = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    return "".join(chr(generator.randrange(*generator.choice(blocks))) for _ in range(length))


@pytest.fixture(scope="module")
def sentencepiece_tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train(SOURCES, 700)


@pytest.fixture(params=["byte", "char", "sentencepiece", "gpt2", "hugging_face"])
def tokenizer(request, gpt2_files, sentencepiece_tokenizer, hugging_face_folder):
    return {
        "byte": ByteTokenizer,
        "char": lambda: CharTokenizer.from_texts([*SOURCES, LAYOUT]),
        "sentencepiece": lambda: sentencepiece_tokenizer,
        "gpt2": lambda: GPT2BPETokenizer(*gpt2_files),
        "hugging_face": lambda: HuggingFaceTokenizer.from_name(str(hugging_face_folder)),
    }[request.param]()


def test_saved_tokenizer_gives_the_same_ids(tokenizer, tmp_path):
    folder = tmp_path / "saved"
    tokenizer.save(folder)
    again = load_tokenizer(folder)
    assert (again.tokenizer_type, again.num_tokens, again.eod_id) == (
        tokenizer.tokenizer_type,
        tokenizer.num_tokens,
        tokenizer.eod_id,
    )
    for text in [*SOURCES, LAYOUT]:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        assert again.decode(ids) == tokenizer.decode(ids)
        assert 0 <= min(ids) <= max(ids) < tokenizer.num_tokens
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_text_with_its_layout_comes_back(tokenizer):
    if tokenizer.tokenizer_type == "HuggingFaceTokenizer":
        pytest.skip("a vocabulary of four words keeps no layout")
    for text in [*SOURCES, LAYOUT, " ", "\n", "\t\t", "  leading", "trailing  \n\n"]:
        if tokenizer.tokenizer_type != "CharTokenizer" or set(text) <= set(tokenizer.characters):
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("seed", range(20))
def test_any_unicode_comes_back_from_bytes(seed, gpt2_files, sentencepiece_tokenizer):
    text = random_text(seed)
    for tokenizer in (ByteTokenizer(), GPT2BPETokenizer(*gpt2_files), CharTokenizer.from_texts([text])):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # SentencePiece's own sign for a blank is the one character that it cannot give back.
    text = text.replace("\u2581", "")
    assert sentencepiece_tokenizer.decode(sentencepiece_tokenizer.encode(text)) == text


def test_bytes_that_are_no_text_become_the_replacement_character():
    assert ByteTokenizer().encode("é") == [0xC3, 0xA9]
    assert ByteTokenizer().decode([0x61, 0xC3, 0x62]) == "a\ufffdb"


def test_char_tokenizer_takes_characters_in_code_point_order_and_names_an_unknown_one():
    tokenizer = CharTokenizer.from_texts(iter(["ba\n", "cab"]))
    assert (tokenizer.characters, tokenizer.num_tokens, tokenizer.eod_id) == ("\nabc", 4, None)
    assert tokenizer.encode("abc\n") == [1, 2, 3, 0]
    with pytest.raises(UserError, match=r"character 'é' is not among the 4"):
        tokenizer.encode("abé")


def test_gpt2_bpe_follows_its_merges(gpt2_files):
    tokenizer = GPT2BPETokenizer(*gpt2_files)
    vocabulary = json.loads(gpt2_files[0].read_text())
    pieces = ["low", "er", "Ġlow", "er", "ĊĊ", "Ġ", "Ġlow"]
    assert tokenizer.encode("lower lower\n\n  low") == [vocabulary[piece] for piece in pieces]
    assert (tokenizer.num_tokens, tokenizer.eod_id) == (262, 261)
    # In a document the name of the end token is text; only --append-eod writes the token.
    assert tokenizer.eod_id not in tokenizer.encode("<|endoftext|>")


@pytest.mark.parametrize("length", [1, 7, 50])
def test_gpt2_bpe_in_pieces_is_gpt2_bpe_of_the_whole(gpt2_files, monkeypatch, length):
    tokenizer = GPT2BPETokenizer(*gpt2_files)
    texts = [*SOURCES, LAYOUT, "low  low\n\n \n low's\u2028 12 \x1c\x1c !!\n", random_text(3).replace("a", " \n ")]
    whole = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(module, "PIECE_CHARACTERS", length)
    assert [tokenizer.encode(text) for text in texts] == whole


def test_sentencepiece_has_bytes_line_feeds_and_runs_of_blanks(sentencepiece_tokenizer):
    assert sentencepiece_tokenizer.num_tokens == 700
    assert sentencepiece_tokenizer.eod_id == 1
    assert len(sentencepiece_tokenizer.encode("\n\t\n")) == 3
    assert len(sentencepiece_tokenizer.encode("        ")) <= 2
    # The names of control and byte pieces are text when a text has them.
    for text in ("</s>", "<unk>", "<0x0A>"):
        assert sentencepiece_tokenizer.decode(sentencepiece_tokenizer.encode(text)) == text
        assert len(sentencepiece_tokenizer.encode(text)) > 1


def test_sentencepiece_learns_from_a_text_without_line_feeds():
    one_line = " ".join(SOURCES).replace("\n", " ") * 3
    assert len(one_line) > 1 << 16
    tokenizer = SentencePieceTokenizer.train([one_line], 500)
    assert tokenizer.decode(tokenizer.encode(one_line)) == one_line


def test_hugging_face_tokenizer_keeps_whole_documents(hugging_face_folder):
    tokenizer = HuggingFaceTokenizer.from_name(str(hugging_face_folder))
    # The file asks for 4 tokens at most and padding to 16; its vocabulary of 4 leaves ids out.
    assert tokenizer.encode("the fox " * 10) == [1, 2] * 10
    assert (tokenizer.num_tokens, tokenizer.eod_id) == (8, 7)


def sentencepiece_without_bytes(unknown_id: int) -> SentencePieceTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc cab abc", "bca abc cab"] * 20), model_writer=model, vocab_size=20, minloglevel=2,
        hard_vocab_limit=False, byte_fallback=False, unk_id=unknown_id, bos_id=-1, eos_id=1 - unknown_id,
    )  # fmt: skip
    return SentencePieceTokenizer(model.getvalue())


def test_a_saved_tokenizer_json_has_the_library_s_bytes(hugging_face_folder, tmp_path):
    HuggingFaceTokenizer.from_name(str(hugging_face_folder)).save(tmp_path / "ours")
    saved = tmp_path / "ours" / "tokenizer.json"
    hf.Tokenizer.from_file(str(saved)).save(str(tmp_path / "theirs.json"))
    assert saved.read_bytes() == (tmp_path / "theirs.json").read_bytes()


def test_a_full_disk_is_an_error_of_the_disk(hugging_face_folder, tmp_path):
    tokenizer = HuggingFaceTokenizer.from_name(str(hugging_face_folder))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for the description, and for the beginning of what the library makes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            tokenizer.save(tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def hugging_face_with(model) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(hf.Tokenizer(model), None)


def test_unknown_text_becomes_the_unknown_id_where_there_is_one(tokenizer, tmp_path):
    for text in [*SOURCES, LAYOUT]:
        if tokenizer.tokenizer_type == "HuggingFaceTokenizer":
            assert tokenizer.unknown_id in tokenizer.encode(text)
        else:
            assert tokenizer.unknown_id not in tokenizer.encode(text)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").unknown_id == tokenizer.unknown_id
    kinds = {"SentencePieceTokenizer": 0, "HuggingFaceTokenizer": 0}
    assert tokenizer.unknown_id == kinds.get(tokenizer.tokenizer_type)


@pytest.mark.parametrize(
    ("make", "unknown_id"),
    [
        (lambda: sentencepiece_without_bytes(0), 0),
        (lambda: sentencepiece_without_bytes(1), 1),
        (lambda: hugging_face_with(hf.models.WordLevel({"<unk>": 3, "abc": 0}, unk_token="<unk>")), 3),
        (lambda: hugging_face_with(hf.models.WordPiece({"abc": 0, "?": 5}, unk_token="?")), 5),
        (lambda: hugging_face_with(hf.models.BPE({"a": 0, "b": 1, "c": 2, "U": 4}, [], unk_token="U")), 4),
        (lambda: hugging_face_with(hf.models.Unigram([("abc", -1.0), ("unknown", 0.0)], unk_id=1)), 1),
    ],
    ids=["sentencepiece 0", "sentencepiece 1", "word level", "word piece", "bpe", "unigram"],
)
def test_the_unknown_id_is_what_stands_for_a_character_of_no_token(make, unknown_id):
    tokenizer = make()
    assert tokenizer.unknown_id == unknown_id
    assert unknown_id in tokenizer.encode("é")
    assert unknown_id not in tokenizer.encode("abc")


def test_a_hugging_face_model_without_an_unknown_token_has_no_unknown_id():
    assert hugging_face_with(hf.models.BPE({"a": 0}, [])).unknown_id is None
    assert hugging_face_with(hf.models.Unigram([("a", -1.0)])).unknown_id is None


def bpe(**settings) -> hf.Tokenizer:
    return hf.Tokenizer(hf.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], **settings))


def test_text_that_a_tokenizer_would_drop_is_refused():
    tokenizer = bpe()
    assert tokenizer.encode("aéb").ids == tokenizer.encode("ab").ids, "the library has learned to refuse it"
    tokenizer.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    tokenizer.normalizer = hf.normalizers.Lowercase()
    tokenizer.add_tokens(["<|end|>"])
    tokenizer.add_special_tokens(["|"])
    ours = HuggingFaceTokenizer(tokenizer, None)
    # Blanks are between its words, and capitals and the added token have their ids.
    assert ours.encode("AB a<|end|>b") == [2, 0, 3, 1]
    with pytest.raises(UserError, match=r"^character 'é' has no token in this tokenizer; leave it out, or use a "):
        ours.encode("ab aéb")
    for text, missing in (("a <b", "<"), ("a <|END|> b", "<"), ("a|b", r"\|")):
        with pytest.raises(UserError, match=rf"^character '{missing}' has no token"):
            ours.encode(text)
    suffixed = hf.Tokenizer(hf.models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>"))
    assert HuggingFaceTokenizer(suffixed, None).encode("ab") == [0, 1]
    for model in (hf.models.Unigram([("a", -1.0)]), hf.models.WordLevel({"a": 0}), hf.models.WordPiece({"a": 0})):
        with pytest.raises(UserError, match=r"^the text has a character that this tokenizer has no token for \(\w+ "):
            hugging_face_with(model).encode("é")


def test_bytes_stand_for_every_character(tmp_path):
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    by_level = hf.Tokenizer(hf.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    by_level.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fallback = {f"<0x{byte:02X}>": byte for byte in range(256)}
    by_fallback = hf.Tokenizer(hf.models.BPE(fallback, [], byte_fallback=True))
    for tokenizer in (by_level, by_fallback):
        assert len(HuggingFaceTokenizer(tokenizer, None).encode("é\n")) == 3


def test_an_iterator_that_fails_is_not_blamed_on_the_vocabulary():
    def texts(error: Exception):
        yield from SOURCES
        raise error

    for error in (UserError("in.jsonl line 3: not JSON"), OSError(5, "Input/output error"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised:
            SentencePieceTokenizer.train(texts(error), 700)
        assert raised.value is error


def test_dropout_of_a_bpe_is_off(tmp_path):
    bpe(dropout=0.5).save(str(tmp_path / "tokenizer.json"))
    library = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert len({tuple(library.encode("abab").ids) for _ in range(200)}) > 1
    tokenizer = HuggingFaceTokenizer.from_name(str(tmp_path))
    tokenizer.save(tmp_path / "saved")
    for one in (tokenizer, load_tokenizer(tmp_path / "saved")):
        assert {tuple(one.encode("abab")) for _ in range(200)} == {(2, 2)}


def test_numbers_for_a_model_without_a_tokenizer():
    tokenizer = NullTokenizer(1000)
    assert tokenizer.encode(f"0 007 999 {'0' * 5000}12") == [0, 7, 999, 12]
    for word, shown in (("1000", "1000"), ("x", "x"), ("²", "²"), ("1" * 5000, f"{'1' * 40}...")):
        with pytest.raises(UserError) as error:
            tokenizer.encode(f"1 {word}")
        assert str(error.value).startswith(f"{shown!r} is not a token id from 0 to 999, which is all that this model")


def test_hugging_face_eod_is_the_configured_one_or_none(hugging_face_folder):
    config = hugging_face_folder / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "fox"}))
    assert HuggingFaceTokenizer.from_name(str(hugging_face_folder)).eod_id == 2
    config.unlink()
    assert HuggingFaceTokenizer.from_name(str(hugging_face_folder)).eod_id is None


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"eos_token": {}}', '{"eos_token": 5}', '{"eos_token": {"content": [1]}}']
)
def test_damaged_hugging_face_config_is_named(hugging_face_folder, content):
    (hugging_face_folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer_config.json: damaged"):
        HuggingFaceTokenizer.from_name(str(hugging_face_folder))


def test_mistakes_in_the_flags_are_named(tmp_path, gpt2_files):
    vocabulary, merges = map(str, gpt2_files)
    foreign = tmp_path / "foreign.json"
    foreign.write_text("not a tokenizer")
    few = tmp_path / "few.json"
    few.write_text(json.dumps({"a": 0, "b": 1}))
    no_merges = tmp_path / "none.bpe"
    no_merges.write_text("#version: 0.2\n")
    for arguments, message in [
        (("WordTokenizer", None, None, None), r"WordTokenizer does not exist; choose one of ByteTokenizer, "),
        (("CharTokenizer", None, None, None), "made by prepare_data"),
        (("SentencePieceTokenizer", None, None, None), "needs --tokenizer-model"),
        (("SentencePieceTokenizer", "/no/such.model", None, None), "/no/such.model: no such file"),
        (("SentencePieceTokenizer", str(foreign), None, None), "foreign.json: not a SentencePiece model"),
        (("GPT2BPETokenizer", None, None, merges), "needs --vocab-file"),
        (("GPT2BPETokenizer", None, vocabulary, None), "needs --merge-file"),
        (("GPT2BPETokenizer", None, str(foreign), merges), "foreign.json.*: not a BPE vocabulary"),
        (("GPT2BPETokenizer", None, vocabulary, vocabulary), "not a BPE vocabulary"),
        (("GPT2BPETokenizer", None, str(few), str(no_merges)), "few.json: no token for 254 of the 256 bytes"),
        (("HuggingFaceTokenizer", None, None, None), "needs --tokenizer-model"),
        (("HuggingFaceTokenizer", str(tmp_path), None, None), "neither a folder with a tokenizer.json"),
        (("HuggingFaceTokenizer", "/no/such/folder", None, None), "/no/such/folder: neither a folder"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            build_tokenizer(*arguments)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("vocab_size", [-1, 20, 100_000, 10**30])
def test_vocabulary_size_that_does_not_suit_the_text_is_named(vocab_size):
    with pytest.raises(UserError, match=rf"^--vocab-size {vocab_size}: (does not suit|is more|is less)") as error:
        SentencePieceTokenizer.train(SOURCES, vocab_size)
    assert "\n" not in str(error.value)


def test_damaged_descriptions_are_named(tokenizer, tmp_path):
    folder = tmp_path / "saved"
    with pytest.raises(UserError, match=r"description.json: no tokenizer there"):
        load_tokenizer(folder)
    tokenizer.save(folder)
    description = (folder / "description.json").read_text(encoding="utf-8")
    for damaged in (b"", description.encode()[:-3], b"[]", b"{}", b'{"tokenizer_type": []}', b"\x00\xff"):
        (folder / "description.json").write_bytes(damaged)
        with pytest.raises(UserError, match=r"description.json: damaged|does not exist"):
            load_tokenizer(folder)
    (folder / "description.json").write_text(description, encoding="utf-8")
    for path in folder.iterdir():
        if path.name != "description.json":
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            with pytest.raises(UserError, match=path.name.split(".")[0] if path.suffix != ".json" else str(folder)):
                load_tokenizer(folder)
            path.unlink()
            with pytest.raises(UserError, match=r"no such file|neither a folder with"):
                load_tokenizer(folder)
            path.write_bytes(whole)
    shutil.rmtree(folder)
