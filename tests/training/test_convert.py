"""Published folders: read, written, converted and back, bit for bit; what does not fit is refused by name."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sedd_megatron.errors import UserError
from sedd_megatron.parallel import cpu_backend

cpu_backend.install()

from sedd_megatron import convert, evaluate  # noqa: E402
from sedd_megatron.pretrained import load_pretrained  # noqa: E402
from sedd_megatron.saved_model import find_saved_model  # noqa: E402
from sedd_megatron.training.published_format import read_weights  # noqa: E402
from tests.distributed.compare import whole_tensors  # noqa: E402

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


def test_that_documents_were_apart_goes_there_and_back(tmp_path):
    source = published_folder(tmp_path / "published", "absorb")
    config = json.loads((source / "config.json").read_text())
    config["parted_documents"] = ["reset_position_ids"]
    (source / "config.json").write_text(json.dumps(config))
    convert.from_published(str(source), tmp_path / "checkpoint")
    convert.to_published(str(tmp_path / "checkpoint"), tmp_path / "back")
    for folder in (source, tmp_path / "checkpoint", tmp_path / "back"):
        assert find_saved_model(folder, "cpu").parted_documents == ("reset_position_ids",)
        with pytest.raises(UserError, match=r"its documents were cut off from each other .* give --windowing strided"):
            evaluate.check(["--load", str(folder), "--data", __file__, "--device", "cpu"])
    for damaged in ("reset_position_ids", ["seed"], [["reset_position_ids"]], {}):
        (source / "config.json").write_text(json.dumps(config | {"parted_documents": damaged}))
        with pytest.raises(UserError, match=r"parted_documents is .*, must be of reset_attention_mask, reset"):
            find_saved_model(source, "cpu")


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


def test_blocks_are_counted_before_they_are_listed(tmp_path):
    folder = published_folder(tmp_path / "model", "absorb", n_blocks=10**9)
    with pytest.raises(UserError, match=r"has 2 blocks, the configuration needs 1000000000; these are not the weights"):
        load_pretrained(folder, device="cpu")


def test_a_configuration_in_ten_thousand_brackets_is_one_line(tmp_path):
    folder = published_folder(tmp_path / "model", "absorb")
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config.json: not the configuration of a published SEDD model \(RecursionErr"):
        find_saved_model(folder)


def test_a_small_file_that_asks_for_much_memory_is_refused(tmp_path):
    """By its shape where that is wrong, and by what the file holds where the configuration asks for as much."""
    folder = published_folder(tmp_path / "model", "absorb")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = "output_layer.linear.weight"
    for shape, text in (
        ((10**11,), rf"{name} has shape \(100000000000,\), the configuration needs \(31, 32\)"),
        ((31, 32), rf"{name} asks for 3,968 bytes and the file has fewer for it"),
    ):
        torch.save(weights | {name: torch.zeros(1).expand(shape)}, folder / "pytorch_model.bin")
        assert (folder / "pytorch_model.bin").stat().st_size < 2**20
        with pytest.raises(UserError, match=text):
            load_pretrained(folder, device="cpu")


def test_names_as_ddp_has_them_are_read(tmp_path):
    folder = published_folder(tmp_path / "model", "absorb")
    weights = load_file(folder / "model.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    model, expected = load_pretrained(folder, device="cpu"), golden("absorb")
    error = (model.log_score(expected["x"], expected["sigma"]) - expected["log_score"]).abs().max()
    assert error < 2e-5 * expected["log_score"].abs().max()


class AsPublished(torch.nn.Module):
    """The published module's parameters in its order (model/transformer.py, SEDD), to save them as its code does."""

    def __init__(self, width: int, cond_dim: int, num_states: int, num_blocks: int) -> None:
        super().__init__()
        linear = torch.nn.Linear
        self.vocab_embed = torch.nn.Module()
        self.vocab_embed.embedding = torch.nn.Parameter(torch.empty(num_states, width))
        self.sigma_map = torch.nn.Module()
        self.sigma_map.mlp = torch.nn.Sequential(linear(256, cond_dim), torch.nn.SiLU(), linear(cond_dim, cond_dim))
        self.rotary_emb = torch.nn.Module()
        self.rotary_emb.register_buffer("inv_freq", torch.empty(4))
        self.blocks = torch.nn.ModuleList()
        for _ in range(num_blocks):
            block = torch.nn.Module()
            block.norm1 = torch.nn.Module()
            block.norm1.weight = torch.nn.Parameter(torch.empty(width))
            block.attn_qkv, block.attn_out = linear(width, 3 * width, bias=False), linear(width, width, bias=False)
            block.norm2 = torch.nn.Module()
            block.norm2.weight = torch.nn.Parameter(torch.empty(width))
            block.mlp = torch.nn.Sequential(linear(width, 4 * width), torch.nn.GELU(), linear(4 * width, width))
            block.adaLN_modulation = linear(cond_dim, 6 * width)
            self.blocks.append(block)
        self.output_layer = torch.nn.Module()
        self.output_layer.norm_final = torch.nn.Module()
        self.output_layer.norm_final.weight = torch.nn.Parameter(torch.empty(width))
        self.output_layer.linear = linear(width, num_states)
        self.output_layer.adaLN_modulation = linear(cond_dim, 2 * width)


def published_run(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A run of the published code after a step (its utils.py, save_checkpoint): its weights, and their average."""
    average = load_file(published_folder(folder, "absorb") / "model.safetensors")
    shape = json.loads((folder / "config.json").read_text())
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    module = AsPublished(shape["model"]["hidden_size"], shape["model"]["cond_dim"], shape["tokens"] + 1, 2)
    module.load_state_dict(average)
    shadow = [parameter.clone().detach() for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = {
        "optimizer": optimizer.state_dict(),
        "model": module.state_dict(),
        "ema": {"decay": 0.9999, "num_updates": 1, "shadow_params": shadow},
        "step": 1,
    }
    (folder / ".hydra").mkdir()
    # OmegaConf writes 1e-4 without a point, which YAML reads as a text.
    noise = "noise:\n  type: loglinear\n  sigma_min: 1e-4\n  sigma_max: 20\n"
    config = {"ngpus": 8, "tokens": shape["tokens"], "graph": {"type": "absorb"}, "model": shape["model"]}
    (folder / ".hydra" / "config.yaml").write_text(noise + yaml.safe_dump(config))
    for path in ("checkpoints-meta/checkpoint.pth", "checkpoints/checkpoint_1.pth"):
        (folder / path).parent.mkdir()
        torch.save(state, folder / path)
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}, average


@pytest.mark.parametrize("named", ["", "checkpoints/checkpoint_1.pth"])
def test_a_run_of_the_published_code_is_read_with_its_average(tmp_path, named):
    trained, average = published_run(tmp_path / "run")
    source = str(tmp_path / "run" / named)
    expected = golden("absorb")
    error = (load_pretrained(source, "cpu").log_score(expected["x"], expected["sigma"]) - expected["log_score"]).abs()
    assert error.max() < 2e-5 * expected["log_score"].abs().max()
    checkpoint = convert.from_published(source, tmp_path / "checkpoint")
    saved = whole_tensors(checkpoint)
    for prefix, weights in (("", trained), ("ema.", average)):
        found = saved[f"{prefix}decoder.layers.mlp.linear_fc1.weight"]
        assert torch.equal(found, torch.stack([weights[f"blocks.{n}.mlp.0.weight"] for n in range(2)]))
        assert torch.equal(saved[f"{prefix}head.linear.bias"][:31], weights["output_layer.linear.bias"])
        assert torch.equal(saved[f"{prefix}embedding.weight"][:31], weights["vocab_embed.embedding"])
    assert not torch.equal(trained["output_layer.linear.bias"], average["output_layer.linear.bias"])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state["ema"]["shadow_params"].pop(), "its average has 29 tensors, the model has 30; these"),
        (lambda state: state["ema"]["shadow_params"].reverse(),
         "of its average, vocab_embed.embedding has shape (64,), the configuration needs (31, 32) (and "),
        (lambda state: state["ema"]["shadow_params"][8].fill_(torch.nan),
         "of its average, blocks.0.norm2.weight has values that are not finite; these"),
        (lambda state: state.pop("ema"), "has no moving average (ema, shadow_params); use another copy"),
        (lambda state: state.update(model=3), "holds something else than named tensors; use another copy"),
    ],
)  # fmt: skip
def test_a_run_that_is_damaged_is_refused_by_name(tmp_path, change, text):
    published_run(tmp_path / "run")
    path = tmp_path / "run" / "checkpoints-meta" / "checkpoint.pth"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    with pytest.raises(UserError) as error:
        load_pretrained(tmp_path / "run", device="cpu")
    assert text in str(error.value)


def test_a_checkpoint_that_is_not_finite_is_not_published(tmp_path, monkeypatch):
    source = published_folder(tmp_path / "published", "absorb")
    convert.from_published(str(source), tmp_path / "checkpoint")
    whole_network = convert._whole_network

    def diverged(saved):
        network = whole_network(saved)
        network.head.linear.bias.data[3] = torch.inf
        return network

    monkeypatch.setattr(convert, "_whole_network", diverged)
    with pytest.raises(UserError, match=r"output_layer.linear.bias has values that are not finite; load another$"):
        convert.to_published(str(tmp_path / "checkpoint"), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda w: w.pop("blocks.1.norm2.weight"), "blocks.1.norm2.weight is missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "extra is not of this model"),
        (lambda w: w.update({"blocks.9.extra": torch.zeros(1)}), "has 3 blocks, the configuration needs 2"),
        (lambda w: w.update({"output_layer.linear.bias": torch.zeros(30)}),
         "output_layer.linear.bias has shape (30,), the configuration needs (31,)"),
        (lambda w: w["blocks.0.attn_qkv.weight"].fill_(torch.nan),
         "blocks.0.attn_qkv.weight has values that are not finite"),
        (lambda w: w["blocks.1.mlp.2.bias"][5:].fill_(-torch.inf),
         "blocks.1.mlp.2.bias has values that are not finite"),
        (lambda w: w.update({"blocks.1.mlp.2.bias": torch.zeros(32, dtype=torch.int32)}),
         "blocks.1.mlp.2.bias is not a dense tensor of floating-point numbers (torch.int32, torch.strided)"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, change, text):
    folder = published_folder(tmp_path / "model", "absorb")
    change_weights(folder, change)
    with pytest.raises(UserError) as error:
        load_pretrained(folder, device="cpu")
    assert str(error.value) == f"{folder}: {text}; these are not the weights of its configuration"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"scale_by_sigma": False}, "model.scale_by_sigma is False with graph absorb; ours scales under the absorbing"),
        ({"n_heads": "four"}, "published SEDD model (ValueError: n_heads is 'four', must be a whole number from 1 to "),
        (
            {"n_heads": 0},
            "published SEDD model (ValueError: n_heads is 0, must be a whole number from 1 to 2147483647)",
        ),
        ({"n_heads": True}, "(ValueError: n_heads is True, must be a whole number"),
        ({"n_blocks": -1}, "(ValueError: n_blocks is -1, must be a whole number"),
        ({"n_blocks": 2.0}, "(ValueError: n_blocks is 2.0, must be a whole number"),
        ({"length": 0}, "(ValueError: length is 0, must be a whole number from 1 to 1048576); use another copy"),
        ({"length": 10**400}, "(ValueError: length is a number of 1329 bits, must be a whole number"),
        ({"dropout": 1.0}, "(ValueError: dropout is 1.0, must be at least 0 and below 1)"),
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
        ("--from-published", str(tmp_path / "none"), "--save", str(tmp_path / "new")): "no such folder",
    }
    for arguments, text in cases.items():
        monkeypatch.setattr(sys, "argv", ["convert", *arguments])
        with pytest.raises(UserError, match=text):
            convert.main()
    assert not (tmp_path / "new").exists()


def test_a_name_that_can_be_none_is_refused_in_python_as_well(tmp_path, monkeypatch):
    # The current folder is a model, and an empty name does not mean it.
    monkeypatch.chdir(published_folder(tmp_path / "model", "absorb"))
    assert load_pretrained(".", device="cpu").seq_length > 0
    for name, text in (
        ("", "a model's folder '' must not be empty: leave it out, or give what it names"),
        ("x" * 5000, "must be at most 4095 bytes long, and 255 between slashes"),
        ("a\0b", "must not have a NUL character in it"),
    ):
        with pytest.raises(UserError) as error:
            load_pretrained(name, device="cpu")
        assert str(error.value).endswith(text)


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    from sedd_megatron.data.tokenizers import ByteTokenizer

    folder = published_folder(tmp_path / "model", "absorb")
    ByteTokenizer().save(folder / "tokenizer")
    with pytest.raises(UserError, match=r"its tokenizer has 256 tokens and its model 30"):
        find_saved_model(folder)
