"""What a run is known by."""

import copy
import json
import resource
import tempfile

import pytest

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.data import sample_order
from sedd_megatron.data.tokenizers import ByteTokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.parallel import cpu_backend

cpu_backend.install()

from sedd_megatron.training.same_run import changes, describe_run, first_difference, tokenizer_records  # noqa: E402


def described(*flags: str) -> dict:
    """As a checkpoint has it."""
    return json.loads(json.dumps(describe_run(parse_pretrain_options(["--seq-length", "16", *flags]), 256)))


def test_an_order_that_older_releases_gave_is_not_gone_on_from(byte_corpus, monkeypatch):
    few = described("--data-path", str(byte_corpus))
    monkeypatch.setattr(sample_order, "MOST_IN_A_TABLE", 8)
    now = described("--data-path", str(byte_corpus))
    older = copy.deepcopy(now)
    for corpus in older["data"]:
        assert corpus.pop("keyed_order")
    line = ("data_path", "read its windows in the order that releases before 0.8 gave so many")
    assert first_difference(older, now, ()) == line
    assert first_difference(older, now, ("data_path",)) is None
    assert changes(older, now) == ["another order of the windows"]
    # The model alone has read no windows.
    assert first_difference(older, now, (), is_same_run=False) is None
    assert first_difference(now, now, ()) is None
    assert first_difference(older, few, ()) is None


@pytest.mark.parametrize("flag", ["--reset-attention-mask", "--reset-position-ids"])
def test_documents_are_apart_in_all_of_a_run_or_by_permission(byte_corpus, flag):
    name = flag.removeprefix("--").replace("-", "_")
    together, apart = described("--data-path", str(byte_corpus)), described("--data-path", str(byte_corpus), flag)
    line = (name, f"was trained with {flag} False, this run has True")
    assert first_difference(together, apart, ()) == line
    # As do checkpoints of releases that knew no such flag.
    del together["options"][name]
    assert first_difference(together, apart, ()) == line
    apart["options"]["allow_changed"] = [name]
    assert first_difference(together, apart, (name,)) is None
    assert changes(together, apart) == [f"{flag} False -> True"]
    assert first_difference(together, apart, (), is_same_run=False) is None


def test_made_up_data_and_real_data_are_two_runs(byte_corpus):
    real, mock = (described(*flags) for flags in (
        ["--data-path", str(byte_corpus)], ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "256"]
    ))  # fmt: skip
    assert first_difference(mock, mock, ()) is None
    assert first_difference(mock, real, ()) == (
        "data_path", f"was trained on other data than --data-path {byte_corpus}"
    )  # fmt: skip
    assert first_difference(real, mock, ()) == ("data_path", "was trained on other data than --mock-data")
    assert first_difference(mock, real, ("data_path",)) is None
    assert changes(mock, real) == [f"--mock-data -> {byte_corpus}"]
    assert changes(real, mock) == [f"--data-path {byte_corpus} -> --mock-data"]


def test_a_full_temporary_folder_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert list(tokenizer_records(ByteTokenizer())) == ["description.json"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"cannot write the tokenizer to a temporary folder: .*File too large; make"
        ):
            tokenizer_records(ByteTokenizer())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match="cannot write the tokenizer to a temporary folder"):
        tokenizer_records(ByteTokenizer())
