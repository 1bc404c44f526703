"""Fixtures that several test folders share."""

import signal
from pathlib import Path

import pytest

# A shell's & and nohup have them ignored, and what the tests start would ignore them as well, as it should.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def byte_corpus(tmp_path_factory) -> Path:
    """A small prepared corpus of bytes; its --data-path prefix."""
    from sedd_megatron.data.corpus import write_corpus
    from sedd_megatron.data.tokenizers import ByteTokenizer

    folder = tmp_path_factory.mktemp("corpus")
    documents = [Path(__file__).read_text(encoding="utf-8") * 4, "the quick brown fox jumps over the lazy dog. " * 200]
    write_corpus(iter(documents), ByteTokenizer(), folder / "bytes", append_eod=False)
    return folder / "bytes_text_document"


@pytest.fixture(scope="session")
def trained(tmp_path_factory, byte_corpus) -> Path:
    """The save folder of a short TP2 run with TensorBoard and a log folder of its own beside it."""
    from tests.commands import run, train_command

    folder = tmp_path_factory.mktemp("trained")
    done = run(train_command("--data-path", str(byte_corpus), "--train-iters", "6", "--save", str(folder / "save"),
                             "--tensor-model-parallel-size", "2", "--log-interval", "2", "--eval-interval", "3",
                             "--log-dir", str(folder / "log"), "--tensorboard-dir", str(folder / "board")))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "iteration 6/6 | loss" in done.stdout
    assert "tokens/s" in done.stdout
    assert "left" in done.stdout
    return folder / "save"
