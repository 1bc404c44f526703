"""README.md's command lines are those of the commands: every flag and value of them is one that is taken."""

import itertools
import re
import shlex

import pytest

from sedd_megatron import convert, evaluate, generate, harness_model, plan, prepare_data, report, sample_quality
from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.config import LayoutOptions
from sedd_megatron.errors import UserError
from sedd_megatron.generation.requests import TextRequest
from sedd_megatron.generation.settings import SamplingOptions
from sedd_megatron.options import check_values, parse_options
from tests.distributed.launch import REPOSITORY

OF_TEXTS = (TextRequest, SamplingOptions)
OPTION_CLASSES = {
    "prepare_data": (prepare_data.PrepareOptions,),
    "generate": (generate.GenerateOptions, *OF_TEXTS, LayoutOptions),
    "evaluate": (evaluate.EvaluateOptions, LayoutOptions),
    "convert": (convert.ConvertOptions,),
    "sample_quality": (sample_quality.QualityOptions, *OF_TEXTS),
}


def commands() -> list[list[str]]:
    """Words of each command line that leaves nothing out, from the program on."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if re.match(r"(python|torchrun|sbatch|sedd-pretrain) ", line) and " ..." not in line:
                found.append(shlex.split(line, comments=True))
    return found


def parse(words: list[str], monkeypatch) -> str:
    """What the words after the program's name are parsed as; its name."""
    start = next(n for n, word in enumerate(words) if word.startswith("sedd_megatron.") or word.endswith(".py"))
    name, argv = words[start].removeprefix("sedd_megatron."), words[start + 1 :]
    if name == "examples/pretrain_sedd.py":
        ranks = dict(itertools.pairwise(words)).get("--nproc-per-node", "1")
        monkeypatch.setenv("WORLD_SIZE", ranks)
        parse_pretrain_options(argv)
    elif name == "harness":
        pairs = argv[argv.index("--model_args") + 1].split(",")
        check_values(dict(pair.split("=") for pair in pairs), harness_model.MODEL_ARGUMENTS, "--model_args")
    elif name in ("plan", "report"):
        {"plan": plan, "report": report}[name].check(argv)
    else:
        parse_options(OPTION_CLASSES[name], argv, name, "")
    return name


def test_every_command_line_is_one_that_is_taken(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    names = [parse(words, monkeypatch) for words in commands() if not any("tests." in word for word in words)]
    assert len(names) >= 14
    assert {*names} == {*OPTION_CLASSES, "examples/pretrain_sedd.py", "harness", "plan", "report"}


@pytest.mark.parametrize("wrong", ["--sampler analytical", "--samplr analytic", "--num-samples many"])
def test_a_wrong_one_is_found(wrong, monkeypatch):
    with pytest.raises(UserError, match=r"invalid|unknown"):
        parse(f"python -m sedd_megatron.generate --load x {wrong}".split(), monkeypatch)
