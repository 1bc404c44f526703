"""Two ranks to whom the disk looks different, or of whom one alone has damage: both do what the first rank chooses."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.config import ParallelOptions, PrecisionOptions
from sedd_megatron.errors import UserError
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import parallel_groups
from tests.distributed.compare import metrics, whole_tensors
from tests.distributed.launch import REPOSITORY, own_jobs
from tests.distributed.run_checkpoint_faults import flip_a_bit

cpu_backend.install()

from sedd_megatron import evaluate, generate  # noqa: E402
from sedd_megatron.saved_model import find_saved_model  # noqa: E402
from sedd_megatron.training import checkpoint, run_folder  # noqa: E402
from sedd_megatron.training.pretrain import pretrain  # noqa: E402

RANK = int(os.environ["RANK"])


def train(arguments: list[str], folder: Path, train_iters: int) -> None:
    pretrain(parse_pretrain_options([*arguments, "--save", str(folder), "--train-iters", str(train_iters)]))


def copy(source: Path, name: str) -> Path:
    """A copy that the first rank makes; the second finds it when both are in a collective of the next command."""
    if RANK == 0:
        # The second may have made the folder already, as each rank does with --save.
        shutil.copytree(source, source.parent / name, dirs_exist_ok=True)
    return source.parent / name


def one_rank_chooses_for_training(arguments: list[str], unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy(unbroken, "chosen")
    if RANK == 1:
        # As if the run that saves there had not come so far yet.
        monkeypatch.setattr(run_folder, "checkpoint_folders", lambda root: [root / "iter_0000002"])
    train(arguments, folder, 5)
    monkeypatch.undo()
    if RANK == 0:
        # One more step after the four of the copy, from the fourth.
        assert metrics(folder, "iteration").tolist() == [1, 2, 3, 4, 5]


def damage_that_one_rank_finds_counts_for_all(arguments: list[str], unbroken: Path) -> None:
    folder = copy(unbroken, "damaged")
    if RANK == 0:
        flip_a_bit(folder / "iter_0000004" / "shards-00001.safetensors")
    train(arguments, folder, 5)
    if RANK == 0:
        assert metrics(folder, "iteration").tolist()[-3:] == [3, 4, 5]
        assert metrics(folder, "loss").tolist()[-3:-1] == metrics(unbroken, "loss").tolist()[2:4]


def a_number_that_is_not_finite_on_one_rank_ends_both(arguments: list[str], unbroken: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    folder, copy_own_shards = copy(unbroken, "not finite"), checkpoint.copy_own_shards

    def spoilt(shards):
        own = copy_own_shards(shards)
        if RANK == 1:
            own.data[next(name for name in own.data if name.startswith("ema."))].view(-1)[-1] = torch.nan
        return own

    monkeypatch.setattr(checkpoint, "copy_own_shards", spoilt)
    with pytest.raises(UserError, match=r"^the tensor ema\.embedding\.weight is not finite at iteration 5"):
        train(arguments, folder, 5)
    monkeypatch.undo()
    assert not (folder / "iter_0000005").exists()
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "4\n"


def loaded_average(folder: Path) -> torch.Tensor:
    """This rank's part of the embedding."""
    saved, parallel = find_saved_model(folder, "cpu"), ParallelOptions(tensor_model_parallel_size=2, device="cpu")
    with parallel_groups(parallel) as groups:
        return saved.load(parallel, PrecisionOptions(), lambda: groups).network.state_dict()["embedding.weight"].clone()


def one_rank_chooses_for_sampling(unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if RANK == 1:
        monkeypatch.setattr(run_folder, "checkpoint_folders", lambda root: [root / "iter_0000002"])
    own = loaded_average(unbroken)
    monkeypatch.undo()
    averages = [whole_tensors(unbroken / f"iter_000000{n}")["ema.embedding.weight"] for n in (2, 4)]
    place = slice(RANK * len(own), (RANK + 1) * len(own))
    assert torch.equal(own, averages[1][place])
    assert not torch.equal(own, averages[0][place])


def sampling_goes_around_damage(folder: Path) -> None:
    own = loaded_average(folder)
    average = whole_tensors(folder / "iter_0000002")["ema.embedding.weight"]
    assert torch.equal(own, average[RANK * len(own) : (RANK + 1) * len(own)])


def ranks_that_found_different_models_end(unbroken: Path, other: Path) -> None:
    with pytest.raises(UserError, match=r"unbroken/iter_0000004: is of another model than .*other/iter_0000001"):
        loaded_average(unbroken if RANK == 0 else other)


def what_one_machine_lacks_ends_both(unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each rank was on a machine of its own; at the default time-out the other would wait for minutes."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    layout = ["--tensor-model-parallel-size", "2", "--device", "cpu"]
    sampling, text = ["--length", "8", "--sampling-steps", "2"], str(REPOSITORY / "LICENSE")

    def start(command, load: Path, *flags: str) -> None:
        # A store that the first rank has left must not be met again.
        monkeypatch.setenv("MASTER_PORT", str(int(os.environ["MASTER_PORT"]) + 1))
        monkeypatch.setattr(sys, "argv", ["command", "--load", str(load), *layout, *flags])
        command()

    lacking = unbroken.parent / "lacking"
    for mistaken, command, load, flags, line in (
        (1, generate.main, lacking, sampling, f"--load {lacking}: no such folder"),
        (0, generate.main, unbroken, [*sampling, "--output", "/dev/null/x"], "--output /dev/null/x: cannot be written"),
        (1, evaluate.main, unbroken, ["--data", str(lacking)], f"--data {lacking}: "),
    ):
        sound = sampling if command is generate.main else ["--data", text, "--mc-samples", "2", "--max-documents", "1"]
        with pytest.raises(UserError, match=f"^{re.escape(line)}"):
            start(command, *((load, *flags) if mistaken == RANK else (unbroken, *sound)))
    start(generate.main, unbroken, *sampling)


def check(step: str, arguments: list[str], root: str) -> None:
    unbroken, other = Path(root) / "unbroken", Path(root) / "other"
    with pytest.MonkeyPatch.context() as monkeypatch:
        match step:
            case "unbroken":
                train([*arguments, "--save-interval", "2"], unbroken, 4)
                # For a later step, since ranks look for a model to sample from before they meet.
                folder = copy(unbroken, "damaged to sample")
                if RANK == 0:
                    flip_a_bit(folder / "iter_0000004" / "shards-00001.safetensors")
            case "other":
                train([*arguments, "--cond-dim", "4"], other, 1)
            case "training":
                one_rank_chooses_for_training(arguments, unbroken, monkeypatch)
            case "damage":
                damage_that_one_rank_finds_counts_for_all(arguments, unbroken)
            case "not finite":
                a_number_that_is_not_finite_on_one_rank_ends_both(arguments, unbroken, monkeypatch)
            case "sampling":
                one_rank_chooses_for_sampling(unbroken, monkeypatch)
            case "sampling around damage":
                sampling_goes_around_damage(Path(root) / "damaged to sample")
            case "one machine's mistake":
                what_one_machine_lacks_ends_both(unbroken, monkeypatch)
            case "different models":
                ranks_that_found_different_models_end(unbroken, other)


if __name__ == "__main__":
    # Each with a rendezvous of its own.
    for job in own_jobs():
        check(*job)
