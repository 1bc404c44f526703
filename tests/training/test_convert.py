"""Published folders: read, written, converted and back, bit for bit; what does not fit is refused by name."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sedd_megatron.errors import UserError
from sedd_megatron.parallel import cpu_backend

cpu_backend.install()

from sedd_megatron import convert  # noqa: E402
from sedd_megatron.pretrained import load_pretrained  # noqa: E402
from sedd_megatron.saved_model import find_saved_model  # noqa: E402
from sedd_megatron.training.published_format import read_weights  # noqa: E402

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


def golden(graph: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / f"model_{graph}.safetensors")


def published_folder(folder: Path, graph: str, **config_changes) -> Path:
    """The golden model as its authors would have put it on a hub."""
    folder.mkdir()
    path = FIXTURES / f"model_{graph}.safetensors"
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    for name, value in config_changes.items():
        config["model"][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name.removeprefix("param."): t for name, t in golden(graph).items() if name.startswith("param.")}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_a_published_folder_gives_the_published_log_scores(tmp_path, graph):
    model, expected = load_pretrained(published_folder(tmp_path / "model", graph), device="cpu"), golden(graph)
    error = (model.log_score(expected["x"], expected["sigma"]) - expected["log_score"]).abs().max()
    assert error < 2e-5 * expected["log_score"].abs().max()
    (text,) = model.generate(prompts="3 4 5", length=8, steps=4)
    assert text.tokens[:3] == [3, 4, 5]
    assert [int(word) for word in text.text.split()] == text.tokens


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_there_and_back_changes_no_bit(tmp_path, graph):
    source = published_folder(tmp_path / "published", graph)
    checkpoint = convert.from_published(str(source), tmp_path / "checkpoint")
    assert checkpoint == tmp_path / "checkpoint" / "iter_0000000"
    convert.to_published(str(tmp_path / "checkpoint"), tmp_path / "back")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "back")]
    for config in configs:
        del config["model"]["name"]
    assert configs[0] == configs[1]
    assert find_saved_model(tmp_path / "back").tokenizer.num_tokens == 30


def test_the_older_file_of_weights_is_read_and_nothing_in_it_is_run(tmp_path):
    folder = published_folder(tmp_path / "model", "absorb")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in read_weights(folder).items())

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"vocab_embed.embedding": Trap()}))
    with pytest.raises(UserError, match=r"its weights cannot be read \(.*\); use another copy$"):
        read_weights(folder)
    torch.save({"vocab_embed.embedding": "text"}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds something else than named tensors"):
        read_weights(folder)
    assert not (tmp_path / "ran").exists()


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda w: w.pop("blocks.1.norm2.weight"), "blocks.1.norm2.weight is missing; the weights do not fit"),
        (lambda w: w.update(extra=torch.zeros(1)), "extra is not of this model; the weights do not fit"),
        (lambda w: w.update({"output_layer.linear.bias": torch.zeros(30)}),
         "output_layer.linear.bias has shape (30,), the configuration needs (31,); the weights do not fit"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, change, text):
    folder = published_folder(tmp_path / "model", "absorb")
    change_weights(folder, change)
    with pytest.raises(UserError) as error:
        load_pretrained(folder, device="cpu")
    assert str(error.value) == f"{folder}: {text} config.json"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"scale_by_sigma": False}, "model.scale_by_sigma is False with graph absorb; ours scales under the absorbing"),
        ({"n_heads": "four"}, "not the configuration of a published SEDD model (ValueError: "),
        ({"n_heads": 5}, "--hidden-size 32 is not a multiple of --num-attention-heads 5"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(tmp_path, change, text):
    folder = published_folder(tmp_path / "model", "absorb", **change)
    with pytest.raises(UserError) as error:
        find_saved_model(folder)
    assert text in str(error.value)


def test_mistakes_of_the_command(tmp_path, monkeypatch):
    source = published_folder(tmp_path / "published", "absorb")
    convert.from_published(str(source), tmp_path / "checkpoint")
    cases = {
        (): "give --from-published with --save, or --load with --to-published, and nothing else",
        ("--from-published", str(source)): "give --from-published with --save",
        ("--from-published", str(source), "--save", str(tmp_path / "checkpoint")): "has checkpoints already",
        ("--load", str(tmp_path / "checkpoint"), "--to-published", str(source)): "is there already; name a new folder",
        ("--from-published", str(tmp_path / "none"), "--save", str(tmp_path / "new")): "no checkpoint there",
    }
    for arguments, text in cases.items():
        monkeypatch.setattr(sys, "argv", ["convert", *arguments])
        with pytest.raises(UserError, match=text):
            convert.main()
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    from sedd_megatron.data.tokenizers import ByteTokenizer

    folder = published_folder(tmp_path / "model", "absorb")
    ByteTokenizer().save(folder / "tokenizer")
    with pytest.raises(UserError, match=r"its tokenizer has 256 tokens and its model 30"):
        find_saved_model(folder)
