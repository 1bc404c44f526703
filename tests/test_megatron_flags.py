"""Megatron-LM's flags: each is ours or has an answer, the answers name flags that there are, and all come at once."""

import dataclasses
import re
from pathlib import Path

import pytest

from sedd_megatron import convert, evaluate, generate
from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.config import GROUPS, ConfigFile
from sedd_megatron.errors import UserError
from sedd_megatron.generation.requests import TextRequest
from sedd_megatron.megatron_flags import ANSWERS, answer_of
from sedd_megatron.options import flag_of
from sedd_megatron.parallel import cpu_backend
from tests.commands import EXAMPLE, run

cpu_backend.install()

from megatron.core.transformer import TransformerConfig  # noqa: E402

FLAGS = (Path(__file__).parent / "fixtures" / "megatron_flags.txt").read_text(encoding="utf-8").split()


def flags_of(option_classes) -> set[str]:
    fields = [field for cls in option_classes for field in dataclasses.fields(cls)]
    names = [(name, field) for field in fields for name in (field.name, *field.metadata["also"])]
    negated = [flag_of(f"no_{name}") for name, field in names if field.type is bool]
    return {*(flag_of(name) for name, _ in names), *negated}


CONFIG = [flag_of(field.name) for field in dataclasses.fields(TransformerConfig)]
# Fields of it whose flags are called otherwise.
RENAMED = {"--perform-initialization", "--microbatch-group-size-per-vp-stage", "---cpu-offloading-context",
           "--barrier-with-L1-time", "--layernorm-zero-centered-gamma", "--use-mamba-mem-eff-path"}  # fmt: skip
OURS = flags_of((ConfigFile, *GROUPS))


def test_every_flag_of_megatron_is_ours_or_has_an_answer():
    assert len(FLAGS) > 900
    assert [flag for flag in FLAGS if flag not in OURS and answer_of(flag) is None] == []


def test_every_field_of_the_installed_transformer_config_is_ours_or_has_an_answer():
    """As which they stand in YAML files; another version may bring others."""
    assert [flag for flag in CONFIG if flag not in OURS | RENAMED and answer_of(flag) is None] == []


def test_the_table_names_what_megatron_has_and_we_do_not():
    names = [name for names in ANSWERS for name in names.split()]
    assert len(names) == len(set(names))
    for name in names:
        flag = f"--{name.removesuffix('*')}"
        if name.endswith("*"):
            assert any(one.startswith(flag) for one in FLAGS), name
        else:
            assert flag in {*FLAGS, *CONFIG}, name
            assert flag not in OURS, name


def test_answers_name_flags_that_there_are():
    others = {"--max-restarts", *flags_of((generate.GenerateOptions, TextRequest, evaluate.EvaluateOptions))}
    there = OURS | others | flags_of((convert.ConvertOptions,))
    for answer in ANSWERS.values():
        assert 15 < len(answer) < 200
        for flag in re.findall(r"(?<!\S)--[\w-]+(?!\*)\b", answer):
            assert flag in there or any(one.startswith(flag) for one in there if f"{flag}*" in answer), answer


def refusal_of(*argv: str) -> list[str]:
    with pytest.raises(UserError) as refused:
        parse_pretrain_options(["--data-path", "d", *argv])
    return str(refused.value).split("\nerror: ")


def test_all_unknown_flags_are_answered_at_once_without_their_values():
    lines = refusal_of("--swiglu", "--num-query-groups", "8", "--seed", "3", "--tokenizer-special-tokens", "a", "b",
                       "--moe-router-topk=2", "--weight-deca", "0.1", "--swiglu", "--use-mcore-models")  # fmt: skip
    assert [line.split(":")[0] for line in lines] == [
        "--swiglu", "--num-query-groups", "--tokenizer-special-tokens", "--moe-router-topk=2",
        "unknown flag --weight-deca", "--use-mcore-models",
    ]  # fmt: skip
    assert lines[0] == "--swiglu: the MLP is the published one, with a tanh-GELU; leave it out"
    assert lines[4] == "unknown flag --weight-deca: did you mean --weight-decay? --help lists every flag"
    assert lines[5] == "--use-mcore-models: always so: leave it out"
    # Before what else is wrong, of which there may be much.
    assert refusal_of("--seed", "x", "--fp16") == [f"--fp16: {answer_of('--fp16')}"]
    assert len(refusal_of(*(f"--x{i}" for i in range(60)))) == 51
    # What stands behind a flag of ours is no value of another.
    assert refusal_of("--bf16", "true") == ["unknown flag true: --help lists every flag"]


def test_help_is_given_whatever_stands_beside_it(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_pretrain_options(["--swiglu", "--help"])
    assert ended.value.code == 0
    assert "--tensor-model-parallel-size" in capsys.readouterr().out


def test_a_yaml_file_is_answered_as_a_command_line_is(tmp_path):
    path = tmp_path / "llama.yaml"
    path.write_text("swiglu: true\nlr: 0.1\nnum_query_groups: 8\nsede: 3\n")
    assert refusal_of("--config", str(path)) == [
        f"--config {path}: swiglu: the MLP is the published one, with a tanh-GELU; leave it out",
        f"--config {path}: num_query_groups: every head has its own keys and values; leave it out",
        f"--config {path}: unknown option sede: did you mean seed? --help lists every flag",
    ]


def test_a_terminal_shows_a_line_for_each_and_no_control_character_of_theirs(tmp_path):
    import sys

    done = run([sys.executable, str(EXAMPLE), "--swiglu", "--x\x1b[31m\nfake", "--fp16"])
    assert done.returncode == 2
    assert done.stdout == ""
    swiglu, unknown, fp16 = done.stderr.splitlines()
    assert swiglu.startswith("error: --swiglu: ")
    assert unknown == "error: unknown flag --x\\x1b[31m\\nfake: --help lists every flag"
    assert fp16.startswith("error: --fp16: ")
