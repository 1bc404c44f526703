"""What a run is known by."""

import resource
import tempfile

import pytest

from sedd_megatron.data.tokenizers import ByteTokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.parallel import cpu_backend

cpu_backend.install()

from sedd_megatron.training.same_run import tokenizer_records  # noqa: E402


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
