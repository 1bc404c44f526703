"""Models, datasets and corpora by their names on a hub are what they are from local files; what fails is one line."""

import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.commands import ENVIRONMENT, Done, run, torchrun
from tests.hub import Hub
from tests.training.test_convert import published_folder

pyarrow = pytest.importorskip("pyarrow")

from pyarrow import parquet  # noqa: E402

from sedd_megatron import convert, prepare_data  # noqa: E402

TEXTS = [f"document {number} ä" if number % 5 != 2 else "" for number in range(40)]
TOKEN_IDS = ["3 1 4 1 5", "9 2 6 5 3 5 8 9 7 9 3 2 3 8 4 6 2 6 4 3"]
WIKITEXT = ["", " 1 N 2 \n", "", " 3 4 5 6 \n"]
PENN_TREEBANK = ["7 N 8", "9 10"]
WIKITEXT_CARD = b"""---
configs:
- config_name: wikitext-103-raw-v1
  data_files:
  - split: test
    path: wikitext-103-raw-v1/test-*
- config_name: wikitext-2-raw-v1
  data_files:
  - split: test
    path: wikitext-2-raw-v1/test-*
  - split: train
    path: wikitext-2-raw-v1/train-*
---
# WikiText
"""
LETTERS = "abcdefghijklmnopqrstuvwxyzABCD"
PREPARE = ["-m", "sedd_megatron.prepare_data", "--tokenizer-type", "ByteTokenizer"]
EVALUATION = ["--mc-samples", "2", "--device", "cpu"]
CORPORA = [*EVALUATION, "--corpora", "wikitext2", "ptb"]
# Runs evaluate several times, so that its libraries are imported once.
EVALUATE = """
import json, sys
from sedd_megatron import evaluate
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["evaluate", *arguments]
    evaluate.main()
    print("end of evaluation")
"""
LOG_SCORES = """
import sys
import torch
from sedd_megatron import load_pretrained
output, *names = sys.argv[1:]
states, sigma = torch.arange(32).reshape(2, 16) % 31, torch.tensor([0.3, 2.0])
torch.save([load_pretrained(name, device="cpu").log_score(states, sigma) for name in names], output)
"""


def parquet_file(texts: Sequence[str], column: str = "text") -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({column: list(texts), "number": list(range(len(texts)))}), file)
    return file.getvalue()


def json_lines(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return published_folder(tmp_path_factory.mktemp("published") / "model", "absorb")


@pytest.fixture(scope="module")
def marker(tmp_path_factory) -> Path:
    """What every file of code on the hub would make if it ran."""
    return tmp_path_factory.mktemp("code") / "ran"


@pytest.fixture(scope="module")
def hub(folder, marker) -> Iterator[Hub]:
    code = f"open({str(marker)!r}, 'w')\n".encode()
    model = {path.name: path.read_bytes() for path in folder.iterdir()}
    # A model of another kind, which its description gives away.
    foreign = {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": bytes(3_000_000)}
    others = {"README.md": b"# A model\n", "model.py": code, "original.bin": bytes(3_000_000), "old/config.json": b"{}"}
    lines, copy = json_lines(TEXTS), "ptb-text-only/ptb_text_only@refs/convert/parquet"
    datasets = {
        "me/texts": {
            "README.md": b"# Texts\n",
            "data/train-00000-of-00002.parquet": parquet_file(TEXTS[:23]),
            "data/train-00001-of-00002.parquet": parquet_file(TEXTS[23:]),
        },
        "me/tools": {"train.jsonl": lines, "tokenize.py": code},
        "me/script": {"script.py": code},
        "me/both": {"train.jsonl": lines, "both.py": code},
        "Salesforce/wikitext": {
            "README.md": WIKITEXT_CARD,
            "wikitext-103-raw-v1/test-00000-of-00001.parquet": parquet_file(["11"]),
            "wikitext-2-raw-v1/test-00000-of-00001.parquet": parquet_file(["12"]),
            "wikitext-2-raw-v1/train-00000-of-00001.parquet": parquet_file(WIKITEXT),
        },
        "ptb-text-only/ptb_text_only": {"ptb_text_only.py": code},
        copy: {
            "penn_treebank/test/0000.parquet": parquet_file(PENN_TREEBANK, "sentence"),
            "penn_treebank/train/0000.parquet": parquet_file(["13"], "sentence"),
        },
    }
    # As convert --to-published writes it.
    description = json.dumps({"tokenizer_type": "CharTokenizer", "characters": LETTERS}).encode()
    letters = model | {"tokenizer/description.json": description, "tokenizer/tokenizer.py": code}
    models = {
        "me/model": model | others,
        "me/letters": letters,
        "me/notes": {"README.md": b"# Notes\n"},
        "me/gpt": foreign,
    }
    with Hub(models, datasets) as hub:
        yield hub


@pytest.fixture(autouse=True)
def no_code_runs(marker) -> Iterator[None]:
    yield
    assert not marker.exists()


@pytest.fixture(scope="module")
def stopped(hub) -> Hub:
    """One that does not answer; it began after the other, so that the port is not the other's."""
    with Hub({}, {}) as hub:
        return hub


def started(hub: Hub, cache: Path, *arguments: str | Path, num_ranks: int = 1) -> Done:
    """Python in a process that asks this hub."""
    start = [sys.executable] if num_ranks == 1 else torchrun(num_ranks)
    return run([*start, *map(str, arguments)], hub.environment(ENVIRONMENT, cache))


def error_of(done: Done) -> str:
    """The last line of a command that ended with a mistake."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.rstrip("\n").split("\n")[-1]


@pytest.fixture(scope="module")
def evaluations(folder, tmp_path_factory) -> tuple[list[str], str, str]:
    """Arguments for texts of token ids, and what the command prints of them and of the corpora from local files."""
    texts = tmp_path_factory.mktemp("texts")
    (texts / "ids.jsonl").write_bytes(json_lines(TOKEN_IDS))
    (texts / "wikitext2-train.txt").write_text("".join(text or " \n" for text in WIKITEXT))
    (texts / "ptb-test.txt").write_text("".join(text + "\n" for text in PENN_TREEBANK))
    arguments, local = [*EVALUATION, "--data", str(texts / "ids.jsonl")], [*CORPORA, "--data-dir", str(texts)]
    commands = [["--load", str(folder), *chosen] for chosen in (arguments, local)]
    done = run([sys.executable, "-c", EVALUATE, json.dumps(commands)])
    assert done.returncode == 0, done.stderr
    of_texts, of_corpora, _ = done.stdout.split("end of evaluation\n")
    return arguments, of_texts, of_corpora


def test_a_model_by_its_name_is_the_model_of_the_folder_and_stays_without_a_network(hub, stopped, folder, tmp_path):
    hub.fetched.clear()
    for number, (asked, names) in enumerate([(hub, ["me/model", folder]), (stopped, ["me/model"])]):
        done = started(asked, tmp_path / "cache", "-c", LOG_SCORES, tmp_path / f"{number}.pt", *names)
        assert done.returncode == 0, done.stderr
    assert hub.fetched == {"me/model/config.json", "me/model/model.safetensors"}
    by_name, of_folder, from_cache = [scores for number in range(2) for scores in torch.load(tmp_path / f"{number}.pt")]
    assert torch.equal(by_name, of_folder)
    assert torch.equal(from_cache, of_folder)


def test_a_model_comes_with_its_own_tokenizer(hub, tmp_path):
    hub.fetched.clear()
    encode = (
        "from sedd_megatron import load_pretrained; print(load_pretrained('me/letters', 'cpu').tokenizer.encode('cab'))"
    )
    done = started(hub, tmp_path / "cache", "-c", encode)
    assert done.stdout == "[2, 0, 1]\n", done.stderr
    of_tokenizer = {name for name in hub.fetched if "tokenizer" in name}
    assert of_tokenizer == {"me/letters/tokenizer/description.json"}


def test_a_converted_checkpoint_is_that_of_the_folder(hub, folder, tmp_path):
    command = ["-m", "sedd_megatron.convert", "--from-published", "me/model", "--save", tmp_path / "by-name"]
    done = started(hub, tmp_path / "cache", *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"saved {tmp_path / 'by-name' / 'iter_0000000'}\n"
    convert.from_published(str(folder), tmp_path / "of-folder")
    by_name, of_folder = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "by-name", tmp_path / "of-folder")
    )
    assert by_name == of_folder


def test_two_ranks_that_fetch_at_once_print_what_is_printed_of_the_folder(hub, evaluations, tmp_path):
    arguments, of_texts, _ = evaluations
    command = ["-m", "sedd_megatron.evaluate", "--load", "me/model", *arguments]
    done = started(hub, tmp_path, *command, num_ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == of_texts
    assert "2 documents, 48 characters, 25 tokens" in of_texts


def test_an_unknown_model_is_one_line(hub, tmp_path):
    error = error_of(started(hub, tmp_path, "-m", "sedd_megatron.generate", "--load", "me/nothing"))
    assert error.startswith("error: me/nothing: no such folder, and it cannot be fetched from a hub (")
    assert "Not Found" in error
    assert error.endswith("); download it and name its folder")


def test_a_repository_without_a_model_is_one_line(hub, tmp_path):
    command = ["-m", "sedd_megatron.evaluate", "--load", "me/notes", "--data", tmp_path / "none.txt"]
    assert error_of(started(hub, tmp_path, *command)) == (
        "error: me/notes: no such folder, and the hub's repository of this name has no config.json; name a "
        "model in the published format, or a folder"
    )


def test_a_model_of_another_kind_is_refused_by_its_description_alone(hub, tmp_path):
    hub.fetched.clear()
    command = ["-m", "sedd_megatron.convert", "--from-published", "me/gpt", "--save", tmp_path / "new"]
    assert "config.json" in error_of(started(hub, tmp_path / "cache", *command))
    assert hub.fetched == {"me/gpt/config.json"}


def test_no_hub_is_one_line(stopped, tmp_path):
    command = ["-m", "sedd_megatron.convert", "--from-published", "me/model", "--save", tmp_path / "new"]
    error = error_of(started(stopped, tmp_path / "cache", *command))
    assert error.startswith("error: me/model: no such folder, and it cannot be fetched from a hub (")
    assert error.endswith("); download it and name its folder")
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> dict[str, bytes]:
    """The token files of the texts from a .jsonl file."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "texts.jsonl").write_bytes(json_lines(TEXTS))
    lines = (str(root / "texts.jsonl"),)
    prepare_data.prepare(
        prepare_data.PrepareOptions(output_prefix=str(root / "p"), tokenizer_type="ByteTokenizer", input=lines)
    )
    return token_files(root)


def token_files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.glob("p_text_document.*")}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_gives_the_tokens_of_its_texts(hub, corpus, tmp_path, streaming):
    hub.fetched.clear()
    command = [*PREPARE, "--dataset", "me/texts", "--output-prefix", tmp_path / "p", *["--streaming"] * streaming]
    done = started(hub, tmp_path / "cache", *command)
    assert done.returncode == 0, done.stderr
    assert corpus.keys() == {"p_text_document.bin", "p_text_document.idx"}
    assert token_files(tmp_path) == corpus
    parts = {f"me/texts/data/train-0000{part}-of-00002.parquet" for part in range(2)}
    assert hub.fetched == {"me/texts/README.md"} | parts
    assert any((tmp_path / "cache" / "datasets").rglob("*.arrow")) == (not streaming)


def test_code_beside_a_dataset_is_not_fetched(hub, corpus, tmp_path):
    hub.fetched.clear()
    done = started(hub, tmp_path / "cache", *PREPARE, "--dataset", "me/tools", "--output-prefix", tmp_path / "p")
    assert done.returncode == 0, done.stderr
    assert token_files(tmp_path) == corpus
    assert hub.fetched == {"me/tools/train.jsonl"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("me/script", "script.py"),
        ("me/both", "both.py"),
        ("me/nothing", "me/nothing"),
    ],
)
def test_a_dataset_with_a_script_or_of_no_repository_is_one_line(hub, tmp_path, name, reason):
    done = started(hub, tmp_path / "cache", *PREPARE, "--dataset", name, "--output-prefix", tmp_path / "p")
    error = error_of(done)
    before, after = error.split("(", 1)
    assert before == f"error: --dataset {name}: cannot be opened "
    assert reason in after
    assert after.endswith(
        "); give a hub name, or a folder of parquet or jsonl files or of save_to_disk, with its --dataset-config and "
        "--dataset-split"
    )
    assert not token_files(tmp_path)


def test_corpora_are_evaluated_as_from_local_files(hub, folder, evaluations, tmp_path):
    hub.fetched.clear()
    done = started(hub, tmp_path, "-m", "sedd_megatron.evaluate", "--load", folder, *CORPORA)
    assert done.returncode == 0, done.stderr
    _, _, of_corpora = evaluations
    assert done.stdout == of_corpora
    assert "wikitext2: 4 documents" in of_corpora
    assert "ptb: 2 documents" in of_corpora
    assert hub.fetched == {
        "Salesforce/wikitext/README.md",
        "Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet",
        "Salesforce/wikitext/wikitext-2-raw-v1/train-00000-of-00001.parquet",
        "ptb-text-only/ptb_text_only/penn_treebank/test/0000.parquet",
    }
