"""A model's later texts become tokens as those of its data did: what prepare_data was told goes with the data, the
checkpoints and both conversions.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tokenizers as hf

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.data.corpus import write_corpus
from sedd_megatron.data.digests import digests_path
from sedd_megatron.data.document_ends import check_ends_of_documents
from sedd_megatron.data.library_tokenizers import HuggingFaceTokenizer
from sedd_megatron.data.null_tokenizer import NullTokenizer
from sedd_megatron.data.preparation import Preparation, preparation_of, stats_path
from sedd_megatron.data.special_tokens import SpecialNamesTokenizer
from sedd_megatron.data.tokenizers import ByteTokenizer, CharTokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.generation.requests import TextRequest, frames_of
from sedd_megatron.options import parse_options
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.prepare_data import PrepareOptions, prepare

cpu_backend.install()

from sedd_megatron import convert  # noqa: E402
from sedd_megatron.pretrained import load_pretrained  # noqa: E402
from sedd_megatron.training.pretrain import data_tokenizer  # noqa: E402
from tests.commands import EXAMPLE, run  # noqa: E402
from tests.distributed.layouts import MODEL  # noqa: E402


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """The folder of a tokenizer with two words and an end of document that is among its words."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = hf.Tokenizer(hf.models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


def prepared(folder: Path, words: Path, *flags: str) -> str:
    """The prefix of a corpus that was made with these flags."""
    (folder / "in.jsonl").write_text('{"text": "a b </s> b"}\n{"text": "b</s>a"}\n' * 40)
    (options,) = parse_options(
        (PrepareOptions,),
        ["--input", str(folder / "in.jsonl"), "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model",
         str(words), "--output-prefix", str(folder / "c"), "--max-unknown-share", "1", *flags], "", "",
    )  # fmt: skip
    prepare(options)
    return str(folder / "c_text_document")


@pytest.mark.parametrize("allowed", [False, True])
def test_a_model_reads_texts_as_its_data_was_read(tmp_path, words, allowed):
    flags = ["--append-eod", "--allow-special-tokens"] if allowed else []
    prefix = prepared(tmp_path, words, *flags)
    done = run([sys.executable, str(EXAMPLE), *MODEL, "--data-path", prefix, "--train-iters", "1", "--eval-interval",
                "0", "--save", str(tmp_path / "run")])  # fmt: skip
    assert done.returncode == 0, done.stderr
    convert.to_published(str(tmp_path / "run"), tmp_path / "published")
    convert.from_published(str(tmp_path / "published"), tmp_path / "back")
    assert ("preparation" in json.loads((tmp_path / "published" / "config.json").read_text())) is True
    for folder in ("run", "published", "back"):
        model = load_pretrained(tmp_path / folder, device="cpu")
        assert model.preparation == Preparation(allowed, allowed)
        # One token for the name, or text that is no word.
        expected = [1, 3, 2] if allowed else model.tokenizer.encode("a</s>b")
        assert model.tokenizer.encode("a</s>b") == expected
        assert (3 in expected) == allowed
        if allowed:
            (sample,) = model.generate(prompts="a</s>", suffix="</s>b", length=6, steps=2, stop_at_eod=False)
            assert (sample.tokens[:2], sample.tokens[-2:]) == ([1, 3], [3, 2])
        bounds = model.nll(["a b", "b"], windowing="concatenate", mc_samples=2)
        assert sum(bound.num_tokens for bound in bounds) == (5 if allowed else 3)
    if allowed:
        _goes_on_without_what_was_written_down(tmp_path, prefix)


def _goes_on_without_what_was_written_down(folder: Path, prefix: str) -> None:
    """As a copy of the data that was made without it; the model has seen what it has seen."""
    stats_path(prefix).unlink()
    digests_path(prefix).unlink()
    done = run([sys.executable, str(EXAMPLE), *MODEL, "--data-path", prefix, "--train-iters", "2", "--eval-interval",
                "0", "--save", str(folder / "run")])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"saved {folder}/run/iter_0000002\n" in done.stdout
    assert load_pretrained(folder / "run", device="cpu").preparation == Preparation(True, True)


def test_a_blend_has_seen_what_any_of_its_corpora_had(tmp_path):
    def corpus(name: str, **written) -> str:
        write_corpus(["some text"], ByteTokenizer(), tmp_path / name)
        prefix = str(tmp_path / f"{name}_text_document")
        stats_path(prefix).write_text(json.dumps(written))
        return prefix

    plain, ended = corpus("plain", append_eod=False), corpus("ended", append_eod=True)
    special, older = corpus("special", append_eod=False, allow_special_tokens=True), corpus("older")
    foreign = corpus("foreign")
    stats_path(foreign).unlink()
    assert preparation_of([plain]) == Preparation(False, False)
    assert preparation_of([plain, ended, older]) == Preparation(True, False)
    assert preparation_of([plain, special]) == Preparation(False, True)
    assert preparation_of([older]) == preparation_of([foreign, plain]) == Preparation(None, False)


def test_nobody_knows_of_data_with_a_long_name(tmp_path):
    assert preparation_of([str(tmp_path / ("x" * 250))]) == Preparation()


@pytest.mark.parametrize("flags", [["--reset-attention-mask"], ["--reset-attention-mask", "--reset-position-ids"]])
def test_documents_are_apart_where_each_corpus_has_ends(tmp_path, words, flags):
    tokenizer = HuggingFaceTokenizer.from_name(str(words))
    data = parse_pretrain_options(["--data-path", "x", *flags]).data
    ended, plain, foreign = (str(tmp_path / name) for name in ("ended", "plain", "foreign"))
    for prefix, has_ends in ((ended, True), (plain, False)):
        stats_path(prefix).write_text(json.dumps({"append_eod": has_ends}))
    check_ends_of_documents(data, tokenizer, [ended, foreign])
    check_ends_of_documents(parse_pretrain_options(["--data-path", "x"]).data, NullTokenizer(9), [plain])
    rule = f"{' '.join(flags)}: documents end at end-of-document tokens, and "
    way_out = f"; prepare it so, or leave {'it' if len(flags) == 1 else 'them'} out"
    for one, prefixes, what in (
        (tokenizer, [ended, plain], f"{plain} was prepared without --append-eod"),
        (NullTokenizer(9), [foreign], "the tokenizer (NullTokenizer) has no end-of-document token"),
    ):
        with pytest.raises(UserError) as refused:
            check_ends_of_documents(data, one, prefixes)
        assert str(refused.value) == rule + what + way_out


@pytest.mark.parametrize("damaged", ["{", "[]", '{"append_eod": 1}', '{"allow_special_tokens": null}', "[" * 100_000])
def test_what_is_damaged_is_named(tmp_path, damaged):
    write_corpus(["some text"], ByteTokenizer(), tmp_path / "c")
    path = stats_path(str(tmp_path / "c_text_document"))
    path.write_text(damaged)
    with pytest.raises(UserError) as error:
        preparation_of([str(tmp_path / "c_text_document")])
    assert str(error.value) == (
        f"{path}: damaged; copy it again, or delete it, and nothing is known of how the data was prepared"
    )


def test_a_corpus_that_is_replaced_is_told(tmp_path, words, capsys):
    prepared(tmp_path, words)
    assert "replaces" not in capsys.readouterr().out
    num_bytes = (tmp_path / "c_text_document.bin").stat().st_size
    prepared(tmp_path, words, "--append-eod")
    assert f"replaces the {num_bytes:,} bytes of {tmp_path}/c_text_document.bin\n" in capsys.readouterr().out


def test_a_name_that_stands_for_unknown_text_too_may_be_asked_for():
    """As GPT-2's: its tokens are of bytes, and nothing is unknown."""
    library = hf.Tokenizer(hf.models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    tokenizer = SpecialNamesTokenizer(HuggingFaceTokenizer(library, "</s>"))
    (frame,) = frames_of(TextRequest(prompt="a</s>"), tokenizer, 4)
    assert frame.tokens[:2] == (1, 0)


def test_flags_do_not_give_data_another_tokenizer_than_its_own(tmp_path):
    write_corpus(["some text"], CharTokenizer("emostx "), tmp_path / "c")
    prefix = str(tmp_path / "c_text_document")
    options = parse_pretrain_options([*MODEL, "--data-path", prefix, "--tokenizer-type", "ByteTokenizer"])
    with pytest.raises(UserError) as error:
        data_tokenizer(options)
    assert str(error.value) == (
        f"--tokenizer-type ByteTokenizer: {prefix} has its own tokenizer beside it, which counts; leave the flag out"
    )
    shutil.rmtree(f"{prefix}_tokenizer")
    assert data_tokenizer(options).tokenizer_type == "ByteTokenizer"


def test_a_corpus_that_lost_its_tokens_is_made_again(tmp_path, words, capsys):
    prefix = prepared(tmp_path, words)
    tokens = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").unlink()
    prepared(tmp_path, words)
    assert Path(f"{prefix}.bin").read_bytes() == tokens
    assert "replaces" not in capsys.readouterr().out


def output_to(target: str, folder: Path):
    """What comes of a preparation of two keys whose output a shell sends somewhere."""
    command = [sys.executable, "-m", "sedd_megatron.prepare_data", "--input", str(folder / "in.jsonl"), "--json-keys",
               "text", "title", "--output-prefix", str(folder / "p"), "--tokenizer-type", "ByteTokenizer"]  # fmt: skip
    return run(["bash", "-c", f'exec "$@" {target}', "bash", *command])


def test_output_that_cannot_be_written_is_not_blamed_on_the_prefix(tmp_path):
    """And everything is done by then."""
    (tmp_path / "in.jsonl").write_text('{"text": "some text", "title": "a title"}\n')
    full = "error: standard output: cannot be written (No space left on device); send it elsewhere\n"
    for target, code, said in ((">/dev/full", 2, full), ("| true", 0, ""), (">&-", 0, ""), ("2>/dev/full", 0, "")):
        done = output_to(target, tmp_path)
        assert (done.returncode, done.stderr) == (code, said), target
        assert (tmp_path / "p_text_document.idx").is_file()
        assert (tmp_path / "p_title_document.idx").is_file(), target
        for path in tmp_path.glob("p_*.idx"):
            path.unlink()
    done = output_to("", tmp_path)
    assert done.stdout.count("--data-path") == 2
    done = output_to(">/dev/full", tmp_path)
    assert (done.returncode, done.stderr) == (2, full), "nothing is replaced without a line"


def test_warnings_that_cannot_be_written_end_nothing(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.pdf", ".c.txt"):
        (tmp_path / "texts" / name).write_text("some text")
    command = [sys.executable, "-m", "sedd_megatron.prepare_data", "--input", str(tmp_path / "texts"),
               "--output-prefix", str(tmp_path / "p"), "--tokenizer-type", "ByteTokenizer"]  # fmt: skip
    done = run(["bash", "-c", 'exec "$@" 2>/dev/full', "bash", *command])
    assert "--data-path" in done.stdout
    assert (tmp_path / "p_text_document.idx").is_file()


def test_bytes_have_no_names_and_stay_as_they_are():
    tokenizer = SpecialNamesTokenizer(ByteTokenizer())
    assert tokenizer.encode("a</s>") == tokenizer.encode_inside("a</s>") == list(b"a</s>")
    assert tokenizer.decode(list(b"a</s>")) == "a</s>"
