"""python -m sedd_megatron.plan as it is used: what it prints, and that its command lines are those of a run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sedd_megatron import plan
from sedd_megatron.arguments import check_options
from sedd_megatron.config import GROUPS, ConfigFile, PretrainOptions
from sedd_megatron.errors import UserError
from sedd_megatron.options import parse_options
from sedd_megatron.planning.layouts import Plan
from tests.commands import ENVIRONMENT
from tests.distributed.launch import REPOSITORY

CONFIGS = REPOSITORY / "examples" / "configs"


def printed(capsys, monkeypatch, *argv: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["plan", *argv])
    monkeypatch.chdir(REPOSITORY)
    plan.main()
    return capsys.readouterr().out.splitlines()


def planned_layouts() -> list[tuple[Path, str, str]]:
    found = []
    for path in sorted(CONFIGS.glob("*b.yaml")):
        found += [(path, *line) for line in re.findall(r"^#   (\d+) GPUs: (.*)$", path.read_text(), re.MULTILINE)]
    return found


def test_the_presets_name_layouts_for_three_clusters():
    assert [(path.name, gpus) for path, gpus, _ in planned_layouts()] == [
        (name, gpus) for name in ("sedd-1.7b.yaml", "sedd-7b.yaml") for gpus in ("64", "512", "4096")
    ]


@pytest.mark.parametrize(("path", "gpus", "flags"), planned_layouts(), ids=lambda value: Path(str(value)).name[:16])
def test_the_presets_layouts_are_still_the_fastest(path, gpus, flags, capsys, monkeypatch):
    config = str(path.relative_to(REPOSITORY))
    lines = printed(capsys, monkeypatch, "--config", config, "--gpus", gpus, "--top", "1")
    torchrun, sbatch = lines[-2:]
    assert torchrun.endswith(f" --save runs/mine {flags}")
    assert sbatch.startswith(f"sbatch --nodes={int(gpus) // 8} --ntasks-per-node=8 --gpus-per-node=8 ")
    assert sbatch.split(".sbatch ")[1] == torchrun.split(".py ")[1]
    # What is to be copied is a run's command line.
    argv = shlex.split(torchrun.split("pretrain_sedd.py ")[1])
    _, *groups = parse_options((ConfigFile, *GROUPS), argv, "pretrain_sedd.py", "")
    check_options(PretrainOptions(*groups), int(gpus), on_this_machine=False)
    billions = {"sedd-1.7b.yaml": 1.7, "sedd-7b.yaml": 7.0}[path.name]
    assert int(lines[0].split()[0].replace(",", "")) == pytest.approx(billions * 1e9, rel=0.03)


@pytest.mark.parametrize("gpus", ["4", "1024"])
def test_tables_fit_a_terminal_and_add_up(gpus, capsys, monkeypatch):
    argv = ("--config", "examples/configs/sedd-7b.yaml", "--gpus", gpus, "--top", "5", "--layout", "3")
    lines = printed(capsys, monkeypatch, *argv)
    end = lines.index("to train in layout 3, on each node, or once under Slurm:")
    assert max(map(len, lines[:end])) <= 120
    starts = [lines.index(title) + 1 for title in lines if title.endswith(":") and title != lines[end]]
    tables = [[line.split() for line in lines[start : start + 6]] for start in starts]
    assert [len(table) for table in tables] == [6, 6, 6]
    for row in tables[1][1:]:
        *parts, total, size = map(float, row[1:])
        assert sum(parts) == pytest.approx(total, abs=0.5)
        assert total <= size == 80
    for row in tables[2][1:]:
        # The rest is what nobody counts.
        assert sum(map(float, row[1:8])) == pytest.approx(100 / 1.03, abs=0.5)
    # Sequences x number are three words.
    seconds = [float(row[10]) for row in tables[0][1:]]
    assert seconds == sorted(seconds)
    assert "--layout" not in lines[-2]


def test_the_command_line_keeps_what_was_given(capsys, monkeypatch):
    flags = ("--num-layers", "4", "--hidden-size", "256", "--num-attention-heads", "4", "--bf16", "--save", "runs/a b",
             "--data-path", "0.5", "a", "0.5", "b", "--tensor-model-parallel-size=2")  # fmt: skip
    lines = printed(capsys, monkeypatch, "--gpus", "4", "--num-tokens=100", *flags)
    assert f"examples/pretrain_sedd.py {shlex.join(flags)} " in lines[-2]
    assert lines[-2].startswith("torchrun --nproc-per-node 4 ")
    assert lines[0].split(" | ")[0].endswith("parameters, 100 tokens")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpus", "0"], "--gpus 0 must be at least 1"),
        (["--bf16", "--tensor-model-parallel-size", "0"], "--tensor-model-parallel-size 0 must be at least 1"),
        (["--bf16", "--tensor-model-parallel-size", "3"], "no layout keeps to a run's rules; the sizes given"),
        (["--bf16", "--noise-eps", "0"], "--noise-eps 0.0 must lie between 0 and 1"),
        (["--num-tokens", "0", "--bf16"], "--num-tokens 0 must be at least 2 and at most 2,147,483,648"),
        (["--bf16", "--gpus", "7"], "--gpus 7: no layout keeps to a run's rules; of the simplest: --global-batch-size"),
        (["--gpu", "v100"], "argument --gpu: invalid choice: 'v100'"),
        (["--bf16", "--top", "2", "--layout", "3"], "--layout 3 must be at least 1 and at most --top 2"),
        (["--bf16", "--num-layers", "300", "--hidden-size", "16384", "--num-attention-heads", "128"],
         "nothing fits into the 80 GB of --gpu h100: tensor 2 x pipeline 4 x context 1 on 8 GPUs needs least, "),
    ],
)  # fmt: skip
def test_mistakes_have_their_line(flags, words, capsys, monkeypatch):
    with pytest.raises(UserError) as error:
        printed(capsys, monkeypatch, *flags)
    assert words in str(error.value)


SMALL = "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 2048 --global-batch-size 64 --bf16"
NULL = "--tokenizer-type NullTokenizer --vocab-size 100"


@pytest.mark.parametrize(
    ("flags", "added"),
    [
        ("--train-samples 6400 --lr-warmup-fraction 0.1", "--data-path data/mine_text_document --save runs/mine"),
        (f"--mock-data {NULL} --config tiny", "--save runs/mine"),
        ("--train-data-path a --valid-data-path 0.5 b 0.5 c", "--save runs/mine"),
        ("--profile --timing-log-level 1", "--data-path data/mine_text_document --save runs/mine"),
        ("--fp8-format hybrid --fp8-recipe blockwise", "--data-path data/mine_text_document --save runs/mine"),
        ("--tp-comm-overlap --grad-reduce-in-bf16", "--data-path data/mine_text_document --save runs/mine"),
        ("--recompute-granularity full --recompute-method block --recompute-num-layers 2 --save a",
         "--data-path data/mine_text_document"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_every_layouts_command_line_is_that_of_a_run(flags, added, gpus):
    words = [*flags.split(), *SMALL.split()]
    _, run, kept, found = plan.check(["--gpus", str(gpus), *words])
    assert shlex.join(found) == added
    cluster = plan.Cluster(gpus, 8, plan.DEVICES["h100"])
    if "tp-comm" in flags and gpus == 1:
        with pytest.raises(UserError, match="--tp-comm-overlap runs beside bfloat16 products over a shared sequence"):
            plan.all_plans(run, cluster, 100, kept)
        return
    plans = plan.all_plans(run, cluster, 100, kept)
    assert len(plans) >= 3 or kept
    for one in plans:
        _, *groups = parse_options(
            (ConfigFile, *GROUPS), [*words, *found, *plan.layout_flags(one.options, run)], "pretrain_sedd.py", ""
        )
        assert PretrainOptions(*groups) == one.options
        check_options(PretrainOptions(*groups), gpus, on_this_machine=False)


def test_what_is_exchanged_in_less_time_is_planned_so(capsys, monkeypatch):
    """Each new option by its effect alone: the same layout with and without it."""
    layout = "--gpus 8 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1 --micro-batch-size 1"

    def only(flags: str = "") -> Plan:
        argv = [*layout.split(), *SMALL.split(), *flags.split()]
        _, run, kept, _ = plan.check([*argv, "--recompute-granularity", "selective"])
        (found,) = plan.all_plans(run, plan.Cluster(8, 8, plan.DEVICES["h100"]), 100, {*kept, "context_parallel_size"})
        return found

    plain, overlapped, half = only(), only("--tp-comm-overlap"), only("--grad-reduce-in-bf16")
    assert overlapped.memory == plain.memory
    assert plain.time.compute == overlapped.time.compute == half.time.compute
    assert 0 < overlapped.time.tensor < plain.time.tensor == half.time.tensor
    assert half.memory.gradients == plain.memory.gradients / 2
    assert half.time.links.nvlink < plain.time.links.nvlink == overlapped.time.links.nvlink


def test_a_vocabulary_that_is_given_is_planned_with(capsys, monkeypatch):
    flags = (*SMALL.split(), "--mock-data", *NULL.split())
    assert "parameters, 100 tokens | " in printed(capsys, monkeypatch, *flags)[0]
    assert "parameters, 50,257 tokens | " in printed(capsys, monkeypatch, *SMALL.split())[0]
    # However large: what this machine holds does not count.
    large = (*flags[:-1], str(2 * 10**9), "--gpus", "64")
    with pytest.raises(UserError, match="nothing fits into the 80 GB of --gpu h100"):
        printed(capsys, monkeypatch, *large)


def test_without_a_checkout_the_command_lines_name_the_package(capsys, monkeypatch):
    monkeypatch.setattr("sedd_megatron.planning.table.is_checkout", lambda: False)
    torchrun, srun = printed(capsys, monkeypatch, *SMALL.split(), "--gpus", "16")[-2:]
    run = torchrun.split(" -m sedd_megatron.pretrain ")[1]
    assert torchrun.startswith("torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 --nproc-per")
    assert srun == f"srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 python -m sedd_megatron.pretrain {run}"


def test_a_plan_needs_neither_megatron_nor_a_gpu():
    # Importing Megatron takes longer than planning.
    code = "import sys; sys.argv[1:] = ['--bf16']\nfrom sedd_megatron import plan; plan.main()\n"
    code += "assert not any(name.split('.')[0] == 'megatron' for name in sys.modules)"
    environment = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "", "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
