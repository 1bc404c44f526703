"""What --save and --load mean, command after command in this process."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch

from sedd_megatron import load_pretrained
from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.config import DiffusionOptions, ModelOptions
from sedd_megatron.data import background_check, digests
from sedd_megatron.data.corpus import write_corpus
from sedd_megatron.data.digests import digests_path, write_digests
from sedd_megatron.data.null_tokenizer import NullTokenizer
from sedd_megatron.data.tokenizers import ByteTokenizer, CharTokenizer, load_tokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.training import same_run
from sedd_megatron.training.checkpoint_format import read_manifest
from sedd_megatron.training.pretrain import pretrain
from sedd_megatron.training.processes import started_at
from sedd_megatron.training.run_lock import Owner
from sedd_megatron.training.same_run import save_tokenizer
from tests.distributed.compare import metrics, whole_tensors
from tests.distributed.launch import own_jobs
from tests.distributed.run_checkpoint_faults import flip_a_bit, interrupted_save
from tests.training.resigned import resign

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
FOX = "the quick brown fox jumps over the lazy dog. "
# The model of the fixtures, which is quick.
MODEL = (
    "--num-layers 1 --hidden-size 4 --num-attention-heads 2 --cond-dim 2 --seq-length 8 --hidden-dropout 0 "
    "--make-vocab-size-divisible-by 4 --global-batch-size 4 --micro-batch-size 2 --lr 1e-2 --lr-warmup-iters 1 "
    "--eval-interval 0 --device cpu"
).split()


class Commands:
    """Trains on a corpus in `root`, in folders of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.corpus = self.write("fox", FOX * 40)

    def write(self, name: str, text: str, tokenizer=None) -> str:
        characters = "".join(sorted(set(FOX)))
        write_corpus(iter([text]), tokenizer or CharTokenizer(characters), self.root / "data" / name)
        return str(self.root / "data" / f"{name}_text_document")

    def train(self, train_iters: int, *arguments: str, corpus: str | None = None) -> list[str]:
        """Run the command; what it printed but for progress and how it ended."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            command = [*MODEL, "--data-path", corpus or self.corpus, "--train-iters", str(train_iters), *arguments]
            pretrain(parse_pretrain_options([argument.replace("@", str(self.root)) for argument in command]))
        left_out = ("memory on", "iteration ", "finished at ", "nothing left to do: ")
        lines = said.getvalue().splitlines()
        return [line for line in lines if not line.startswith(left_out) and "parameters," not in line]

    def refusal(self, *arguments: str, train_iters: int = 4, corpus: str | None = None) -> str:
        with pytest.raises(UserError) as error:
            self.train(train_iters, *arguments, corpus=corpus)
        assert "\n" not in str(error.value)
        assert not torch.distributed.is_initialized(), "process groups were left behind"
        assert not list(self.root.glob("*/*training.lock*")), "the lock was left behind"
        return str(error.value)

    def losses(self, folder: str) -> list[float]:
        return metrics(self.root / folder, "loss").tolist()

    def tracker(self, folder: str) -> str:
        return (self.root / folder / "latest_checkpointed_iteration.txt").read_text().strip()


def one_command_line_starts_and_goes_on(run: Commands) -> None:
    run.train(6, "--save", "@/unbroken", "--save-interval", "1")
    same = ["--save", "@/x", "--load", "@/x"]
    assert run.train(2, *same) == [f"saved {run.root}/x/iter_0000002"]
    lines = run.train(4, *same)
    assert lines[0] == f"resumes from {run.root}/x/iter_0000002 with --train-iters 2 -> 4"
    assert run.train(4, "--save", "@/x") == [f"resumes from {run.root}/x/iter_0000004"]
    run.train(6, "--save", "@/x")
    assert run.losses("x") == run.losses("unbroken")
    # From elsewhere first, then from its own.
    from_elsewhere = ["--load", "@/unbroken/iter_0000003", "--save", "@/y"]
    assert run.train(4, *from_elsewhere)[0].startswith(f"resumes from {run.root}/unbroken/iter_0000003")
    assert run.train(5, *from_elsewhere)[0] == (
        f"--save {run.root}/y holds this run already, so that --load {run.root}/unbroken/iter_0000003 is not read"
    )
    assert run.losses("y") == run.losses("unbroken")[3:5]
    assert run.refusal("--save", "@/x", "--no-resume") == (
        f"--save {run.root}/x: holds iter_0000006, and --no-resume does not go on from it; leave it out, or save to "
        "another folder"
    )
    run.train(1, "--save", "@/z", "--no-resume")


def another_run_is_refused_by_its_first_difference(run: Commands) -> None:
    prefix = f"--save {run.root}/x: holds another run's checkpoints; iter_0000006 "
    for name, flags, before, now in (
        ("seed", ["--seed", "5"], "1234", "5"),
        ("split", ["--split", "80,20,0"], "969,30,1", "80,20,0"),
        ("seq_length", ["--seq-length", "16"], "8", "16"),
        ("global_batch_size", ["--global-batch-size", "8"], "4", "8"),
        ("time_sampling", ["--time-sampling", "independent"], "low-discrepancy", "independent"),
    ):
        flag = "--" + name.replace("_", "-")
        assert run.refusal("--save", "@/x", *flags) == (
            f"{prefix}was trained with {flag} {before}, this run has {now}; give the same, --allow-changed {name} "
            "to go on with the change, or save elsewhere"
        )
        shutil.copytree(run.root / "x", run.root / name)
        lines = run.train(7, "--save", f"@/{name}", *flags, "--allow-changed", name)
        assert f"--train-iters 6 -> 7, {flag} {before} -> {now}" in lines[0]
        assert run.tracker(name) == "7"
    assert "was trained with --num-layers 1, this run has 2; give the same, or save elsewhere" in run.refusal(
        "--save", "@/x", "--num-layers", "2"
    )
    # The layout, and how things are computed, saved and logged, are free; a size by default is that size.
    lines = run.train(6, "--save", "@/x", "--micro-batch-size", "4", "--log-interval", "1", "--ffn-hidden-size", "16",
                      "--keep-last", "9", "--loss-chunk-rows", "0", "--save-interval", "2")  # fmt: skip
    assert lines == [f"resumes from {run.root}/x/iter_0000006"]
    changed = run.train(6, "--save", "@/x", "--lr", "5e-3", "--adam-beta2", "0.99", "--hidden-dropout", "0.1")[0]
    assert changed.endswith("with --hidden-dropout 0.0 -> 0.1, --lr 0.01 -> 0.005, --adam-beta2 0.999 -> 0.99")


def runs_may_share_a_folder_of_metrics(run: Commands) -> None:
    for name in ("a", "b"):
        run.train(3, "--save", f"@/logs {name}", "--log-dir", "@/logs", "--save-interval", "2")
    records = (run.root / "logs" / "metrics.jsonl").read_text()
    run.train(3, "--save", "@/logs a", "--log-dir", "@/logs", "--load", "@/logs a/iter_0000002")
    assert (run.root / "logs" / "metrics.jsonl").read_text().startswith(records)
    assert len(run.losses("logs")) == 7
    for load in ([], ["--load", "@/one log's/iter_0000002"]):
        run.train(3, "--save", "@/one log's", "--log-dir", "@/log", "--save-interval", "2", *load)
    assert len(run.losses("log")) == 3


def data_is_known_by_what_is_in_it(run: Commands) -> None:
    shutil.copytree(run.root / "data", run.root / "moved")
    moved = run.corpus.replace("/data/", "/moved/")
    assert run.train(6, "--save", "@/x", corpus=moved) == [
        f"resumes from {run.root}/x/iter_0000006 with --data-path {run.corpus} -> {moved}"
    ]
    other = run.write("other", FOX[::-1] * 40)
    assert (
        f"was trained on other data than --data-path {other}; give the same, --allow-changed data_path"
        in run.refusal("--save", "@/x", corpus=other)
    )
    run.train(7, "--save", "@/x", "--allow-changed", "data_path", corpus=other)
    # A digest beside the data knows what a sample of its bytes does not show.
    whole, changed = run.write("whole", FOX * 40), run.write("changed", FOX * 40)
    change_a_token(changed)
    write_digests(changed)
    with mock.patch.multiple(same_run, BLOCKS=2, BLOCK_BYTES=16):
        run.train(1, "--save", "@/whole", corpus=whole)
        assert f"was trained on other data than --data-path {changed}" in run.refusal(
            "--save", "@/whole", corpus=changed
        )
        digests_path(changed).unlink()
        assert run.train(1, "--save", "@/whole", corpus=changed)[0].startswith("resumes from")
    for weight in ("1", "0.5"):
        lines = run.train(1, "--save", "@/blend", "--data-path", weight, run.corpus, weight, whole)
    assert lines[0].startswith(f"resumes from {run.root}/blend/iter_0000001 with --data-path 1 ")
    # A tokenizer of the same size.
    characters = "".join(sorted(set(FOX.upper())))
    upper = run.write("upper", FOX.upper() * 40, CharTokenizer(characters))
    refused = run.refusal("--save", "@/x", "--allow-changed", "data_path", corpus=upper)
    assert "has another tokenizer than the data (description.json differs)" in refused
    assert "--allow-changed tokenizer" in refused
    kept = load_tokenizer(run.root / "x" / "iter_0000007" / "tokenizer")
    assert kept.characters == "".join(sorted(set(FOX)))
    more = run.write("bytes", FOX * 40, ByteTokenizer())
    assert "has a vocabulary of 28 tokens, the data one of 256" in run.refusal("--save", "@/x", corpus=more)


def a_short_run_on_damaged_data_is_not_saved(run: Commands) -> None:
    corpus = run.write("short", FOX * 40)
    change_a_token(corpus)
    describe = digests.file_record

    def slowly(path: Path) -> dict:
        time.sleep(1)
        return describe(path)

    with mock.patch.object(background_check, "SECONDS_TO_WAIT", 0.0), mock.patch.object(digests, "file_record", slowly):
        refused = run.refusal("--save", "@/short", train_iters=1, corpus=corpus)
    assert f"{corpus}.bin: is not what was written" in refused
    assert refused.endswith("; nothing is saved from here on")
    assert not list((run.root / "short").glob("iter_*"))


def change_a_token(corpus: str) -> None:
    """To another of the vocabulary, in the middle."""
    path = Path(f"{corpus}.bin")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 & ~1] ^= 1
    path.write_bytes(content)


def a_run_goes_back_and_around_damage(run: Commands) -> None:
    shutil.copytree(run.root / "unbroken", run.root / "back")
    (run.root / "disk").mkdir()
    third = run.root / "back" / "iter_0000003"
    third.symlink_to(third.rename(run.root / "disk" / "iter_0000003"))
    # Given again by a launcher, after a start that was killed before it had gone back.
    with mock.patch.dict(os.environ, TORCHELASTIC_RUN_ID="none"):
        lines = run.train(5, "--load", "@/back/iter_0000003", "--save", "@/back")
    aside = sorted(path.name for path in (run.root / "back").glob("*.set-aside"))
    assert aside == [f"iter_000000{n}.set-aside" for n in (4, 5, 6)]
    assert sum("set aside" in line for line in lines) == 3
    assert run.tracker("back") == "5"
    assert run.losses("back")[-2:] == run.losses("unbroken")[3:5]
    expected = whole_tensors(run.root / "unbroken" / "iter_0000005")
    assert all(torch.equal(tensor, expected[key])
               for key, tensor in whole_tensors(run.root / "back" / "iter_0000005").items())  # fmt: skip

    # And after one that had, which does not mean to go back again.
    with mock.patch.dict(os.environ, TORCHELASTIC_RUN_ID="none"):
        lines = run.train(6, "--load", "@/back/iter_0000003", "--save", "@/back")
    assert lines[1].startswith(f"resumes from {run.root}/back/iter_0000005")
    assert run.losses("back")[-1] == run.losses("unbroken")[5]

    # To one that was set aside, of another lineage than what has its name now.
    lines = run.train(6, "--load", "@/back/iter_0000005.set-aside", "--save", "@/back")
    assert f"{run.root}/back/iter_0000005.set-aside is iter_0000005 from here on" in lines
    aside = sorted(path.name for path in (run.root / "back").glob("*.set-aside*"))
    assert aside == [f"iter_000000{name}" for name in ("4.set-aside", "5.set-aside-2", "6.set-aside", "6.set-aside-2")]
    assert run.train(5, "--save", "@/back")[0].startswith(f"resumes from {run.root}/back/iter_0000006")

    shutil.copytree(run.root / "unbroken", run.root / "damaged")
    flip_a_bit(run.root / "damaged" / "iter_0000006" / "shards-00000.safetensors")
    exact = run.refusal("--save", "@/damaged", "--exact-load", train_iters=7)
    assert exact.startswith(f"{run.root}/damaged/iter_0000006/shards-00000.safetensors: damaged")
    before = json.dumps(read_manifest(run.root / "damaged" / "iter_0000005"))
    lines = run.train(7, "--save", "@/damaged")
    damage = f"{run.root}/damaged/iter_0000006/shards-00000.safetensors: damaged (its digest does not match)"
    assert lines[1] == f"{damage}; falls back to iter_0000005"
    assert run.losses("damaged")[-2:][0] == run.losses("unbroken")[5]
    assert json.dumps(read_manifest(run.root / "damaged" / "iter_0000005")) == before
    assert lines[2] == f"resumes from {run.root}/damaged/iter_0000005"
    assert (run.root / "damaged" / "iter_0000006.damaged").is_dir()


def leftovers_retention_and_numbers_that_are_not_finite(run: Commands) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted_save([*MODEL, "--data-path", run.corpus, "--train-iters", "2", "--save", f"{run.root}/left"])
    (left,) = (run.root / "left").glob(".iter_0000002.partial.*")
    lines = run.train(6, "--save", "@/left", "--save-interval", "1", "--keep-last", "2", "--keep-every", "3")
    assert lines[0] == f"removed {left}: a run that died left it unfinished"
    kept = sorted(path.name for path in (run.root / "left").glob("*iter*"))
    assert kept == ["iter_0000003", "iter_0000005", "iter_0000006", "latest_checkpointed_iteration.txt"]
    # A tracker file that cannot be written is no reason to keep what was to be deleted.
    (run.root / "no tracker" / "latest_checkpointed_iteration.txt").mkdir(parents=True)
    run.train(5, "--save", "@/no tracker", "--save-interval", "1", "--keep-last", "1")
    assert [path.name for path in (run.root / "no tracker").glob("iter_*")] == ["iter_0000005"]
    assert "--keep-every 3 keeps more than --keep-last does" in run.refusal("--save", "@/left", "--keep-every", "3")

    assert run.refusal("--save", "@/left", "--lr", "3e38", "--lr-warmup-iters", "0", train_iters=7) == (
        "the tensor sigma_embedding.input.weight is not finite at iteration 7, which is not saved; resume from the "
        "last checkpoint with a lower --lr or --clip-grad, and look at the data"
    )
    assert sorted(path.name for path in (run.root / "left").glob("*iter*")) == kept
    assert run.tracker("left") == "6"


def checkpoints_of_every_release_go_on(run: Commands) -> None:
    releases = sorted(FIXTURES.glob("checkpoint_*"))
    assert len(releases) >= 6
    for release in releases:
        name = f"from {release.name}"
        lines = run.train(3, "--load", str(release), "--save", f"@/{name}")
        assert lines[0].startswith(f"resumes from {release}/iter_0000002 with --train-iters 2 -> 3")
        # What each release's own third step had: tests/fixtures/README.md.
        assert run.losses(name) == pytest.approx([2.7172035], rel=1e-6)
        assert "was trained with --seed 1234" in run.refusal("--load", str(release), "--seed", "1")


def check(folder: str) -> None:
    run = Commands(Path(folder))
    one_command_line_starts_and_goes_on(run)
    another_run_is_refused_by_its_first_difference(run)
    runs_may_share_a_folder_of_metrics(run)
    data_is_known_by_what_is_in_it(run)
    a_short_run_on_damaged_data_is_not_saved(run)
    a_run_goes_back_and_around_damage(run)
    leftovers_retention_and_numbers_that_are_not_finite(run)
    checkpoints_of_every_release_go_on(run)
    a_lock_tells_of_a_live_run_and_not_of_a_dead_one(run)
    a_run_whose_lock_is_gone_saves_no_more(run)
    a_converted_model_is_of_no_run(run)
    sizes_are_checked_before_a_model_is_made(run)
    releases_give_their_averages()


def a_converted_model_is_of_no_run(run: Commands) -> None:
    """It has no seed or data to be kept, and may come without a tokenizer."""
    root = run.root / "converted"
    shutil.copytree(FIXTURES / "checkpoint_0.6.0", root)
    shutil.rmtree(root / "iter_0000002" / "tokenizer")
    records = save_tokenizer(NullTokenizer(28), root / "iter_0000002" / "tokenizer")
    names = {field.name for cls in (ModelOptions, DiffusionOptions) for field in dataclasses.fields(cls)}

    def change(body: dict) -> None:
        options = {name: value for name, value in body["state"]["options"].items() if name in names}
        body["state"] |= {"options": options, "tokenizer_files": records}

    resign(root / "iter_0000002", change)
    lines = run.train(3, "--load", str(root), "--save", "@/from converted", "--seed", "9", "--seq-length", "4")
    assert lines[0] == f"resumes from {root}/iter_0000002"
    assert load_tokenizer(run.root / "from converted" / "iter_0000003" / "tokenizer").num_tokens == 28
    assert "was trained with --cond-dim 2, this run has 4" in run.refusal("--load", str(root), "--cond-dim", "4")


def sizes_are_checked_before_a_model_is_made(run: Commands) -> None:
    release = FIXTURES / "checkpoint_0.6.0"
    for name, value in (("num_layers", 10**9), ("hidden_size", 10**9), ("ffn_hidden_size", 10**9), ("cond_dim", 10**9)):
        folder = run.root / f"large {name}"
        shutil.copytree(release, folder)
        resign(
            folder / "iter_0000002", lambda body, name=name, value=value: body["state"]["options"].update({name: value})
        )
        with pytest.raises(UserError, match="which is not that of a model of its options"):
            load_pretrained(folder, device="cpu")


def a_lock_tells_of_a_live_run_and_not_of_a_dead_one(run: Commands) -> None:
    # This test's own parent, which lives, and a process that has ended.
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    owner = Owner.of_this_process()
    live = replace(owner, process=os.getppid(), started=started_at(psutil.Process(os.getppid())))
    path = run.root / "x" / "training.lock"
    path.write_text(json.dumps(asdict(live)))
    before = sorted(run.root.glob("x/*"))
    with pytest.raises(UserError, match=f"another run saves there, process {os.getppid()} on "):
        run.train(8, "--save", "@/x", "--allow-changed", "data_path")
    assert sorted(run.root.glob("x/*")) == before
    dead = replace(owner, process=ended.pid, started=owner.started)
    path.write_text(json.dumps(asdict(dead)))
    lines = run.train(8, "--save", "@/x", "--allow-changed", "data_path")
    assert lines[0] == f"took over {path}, whose run is dead: {dead}"
    assert run.tracker("x") == "8"
    assert not path.exists()


def a_run_whose_lock_is_gone_saves_no_more(run: Commands) -> None:
    from sedd_megatron.training import loop

    step, path = loop.train_step, run.root / "stolen" / "training.lock"
    thief = replace(Owner.of_this_process(), host="node7", token="0")

    def stolen_step(*arguments, **keywords):
        done = step(*arguments, **keywords)
        if (run.root / "stolen" / "iter_0000002").exists():
            path.write_text(json.dumps(asdict(thief)))
        return done

    loop.train_step = stolen_step
    try:
        with pytest.raises(UserError, match=r"was taken from this run and is held by process \d+ on node7"):
            run.train(5, "--save", "@/stolen", "--save-interval", "1")
    finally:
        loop.train_step = step
    assert sorted(path.name for path in (run.root / "stolen").glob("*iter_*")) == ["iter_0000001", "iter_0000002"]
    assert json.loads(path.read_text()) == asdict(thief)
    path.unlink()


def releases_give_their_averages() -> None:
    """The last, since its process groups stay."""
    scores = []
    for release in sorted(FIXTURES.glob("checkpoint_*")):
        model = load_pretrained(release, device="cpu")
        scores.append(model.log_score(torch.arange(8)[None], torch.tensor([0.5])))
        average = whole_tensors(release / "iter_0000002")["ema.embedding.weight"]
        assert torch.equal(model.network.state_dict()["embedding.weight"], average)
    assert scores[0].std() > 0.01
    for score in scores[1:]:
        torch.testing.assert_close(score, scores[0], rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    for job in own_jobs():
        check(*job)
