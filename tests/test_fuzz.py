"""Whatever a person types ends with what was asked for or with one line, never with a traceback: every option of every
command, up to where work would begin, with values of all kinds; and the files of options and requests.
"""

import dataclasses
import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sedd_megatron.errors import UserError
from sedd_megatron.parallel import cpu_backend

cpu_backend.install()

from lm_eval.utils import simple_parse_args_string  # noqa: E402

from sedd_megatron import (  # noqa: E402
    convert,
    evaluate,
    generate,
    harness_model,
    plan,
    prepare_data,
    report,
    sample_quality,
)
from sedd_megatron.arguments import corpora_by_flag, parse_pretrain_options, weighted_corpora  # noqa: E402
from sedd_megatron.config import GROUPS, ConfigFile, LayoutOptions, ParallelOptions  # noqa: E402
from sedd_megatron.data.splits import open_parts  # noqa: E402
from sedd_megatron.data.tokenizers import ByteTokenizer, CharTokenizer  # noqa: E402
from sedd_megatron.generation.requests import TextRequest, read_requests  # noqa: E402
from sedd_megatron.generation.settings import SamplingOptions  # noqa: E402
from sedd_megatron.options import flag_of, load_yaml_options, parse_options  # noqa: E402
from sedd_megatron.training_config import DataOptions, ProfilingOptions  # noqa: E402
from tests.training.test_convert import published_folder  # noqa: E402

# What stands in the folder that the commands are started in.
MODEL, CORPUS, TEXT = "model", "corpus_text_document", "text.txt"
NUMBERS = ["0", "1", "2", "3", "4", "7", "16", "-1", "-0", str(2**31 - 1), str(2**31), str(2**63 - 1),
           str(2**63), str(-(2**63)), str(10**30), "9" * 5000, "0x10", "1_0", "٣", "2.0", "1e3", "", " ", "x", "None",
           "--"]  # fmt: skip
REALS = ["0", "0.5", "1", "1.0", "-0.0", "-1", "1e-320", "1e-9", "0.999", "2", "30", "1e30", "1e308", "1e400",
         "-1e400", "nan", "inf", "", "x", "1/2", "9" * 5000]  # fmt: skip
# None is of the form owner/name, which is looked for on a hub where there is no such folder.
NAMES = ["", " ", "nowhere", "no/where/below", MODEL, TEXT, f"{TEXT}/be/low", "empty", CORPUS, ".", "x" * 256,
         "x" * 5000, "d/" * 2500, "new\nline", "\x1b[31mred", "\udcff", "é" * 200, "1e99999999", "0.5", "1,1", "1,1,1",
         "a", "b c", "[MASK]", "[MASK*0]", f"[MASK*{'9' * 5000}]", "[MASK*" + "9" * 12 + "]", "--seed", "-",
         "~"]  # fmt: skip
SLOW_OR_AWAY = {"max_samples"}  # raising the limit is asking for the memory


def values_of(field: dataclasses.Field) -> st.SearchStrategy[list[str]]:
    """What stands behind an option's flag: every other time something that it might take."""
    annotation = str(field.type)
    if field.metadata["choices"]:
        good, bad = st.sampled_from(field.metadata["choices"]), st.sampled_from(["", "none", "x" * 5000])
    elif "int" in annotation:
        good, bad = st.integers(0, 64).map(str), st.sampled_from(NUMBERS) | st.integers(-(10**20), 10**20).map(str)
    elif "float" in annotation:
        good, bad = st.floats(0, 1).map(str), st.sampled_from(REALS) | st.floats().map(str)
    else:
        good = st.sampled_from(["nowhere", MODEL, TEXT, CORPUS, "0.5", "1,1,1", "a"])
        bad = st.sampled_from(NAMES) | st.text(st.characters(exclude_characters="/"), max_size=20)
    one = good | bad
    return st.lists(one, min_size=1, max_size=4) if "tuple" in annotation else one.map(lambda value: [value])


def flags_of(field: dataclasses.Field) -> st.SearchStrategy[list[str]]:
    flag = flag_of(field.name)
    if field.type is bool:
        good = st.sampled_from([[flag], [flag.replace("--", "--no-", 1)]])
        return good | good | st.sampled_from([[f"{flag}=true"], [flag, "true"]])
    joined = values_of(field).map(lambda values: [f"{flag}={values[0]}", *values[1:]])
    return values_of(field).map(lambda values: [flag, *values]) | joined


def typed(option_classes: Sequence[type]) -> st.SearchStrategy[list[str]]:
    """Up to four flags of a command, in any order and number."""
    fields = [field for cls in option_classes for field in dataclasses.fields(cls) if field.name not in SLOW_OR_AWAY]
    some = st.lists(st.sampled_from(fields).flatmap(flags_of), min_size=1, max_size=4)
    return some.map(lambda lists: [word for words in lists for word in words])


def ends_well(call: Callable[[], object]) -> None:
    """With nothing, or with a UserError of one line that a terminal only shows; several for what is unknown."""
    lines = []
    try:
        call()
    except UserError as error:
        lines = str(error).split("\nerror: ")
    assert len(lines) <= 51
    for line in lines:
        assert 10 < len(line) < 12_000
        assert not [character for character in line if unicodedata.category(character) in ("Cc", "Cs")], line


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    from sedd_megatron.data.corpus import write_corpus

    path = tmp_path_factory.mktemp("fuzz")
    published_folder(path / MODEL, "absorb")
    write_corpus(iter(["some text. " * 40]), ByteTokenizer(), path / "corpus", append_eod=False)
    (path / TEXT).write_text("some text\n")
    (path / "empty").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


def pretrain_check(argv: Sequence[str]) -> None:
    options = parse_pretrain_options(argv)
    if {corpus.prefix for corpus in weighted_corpora(options.data)} == {CORPUS}:
        open_parts(corpora_by_flag(options.data), seq_length=options.model.seq_length, split=options.data.split,
                   num_tokens=256, seed=options.training.seed)  # fmt: skip


def prepare_check(argv: Sequence[str]) -> None:
    (options,) = parse_options((prepare_data.PrepareOptions,), argv, "prepare_data", "")
    prepare_data.check_and_open(options)


def harness_check(argv: Sequence[str]) -> None:
    """As name=value,name=value and not as flags, which the harness itself reads."""
    pairs = [word.removeprefix("--").replace("-", "_", word.count("-")) for word in argv]
    added = {"device": harness_model.HARNESS_DEVICE, "batch_size": 1}
    harness_model.check_arguments(simple_parse_args_string(",".join(pairs)), added)


OF_TEXTS = (TextRequest, SamplingOptions)
COMMANDS = {
    "pretrain": (pretrain_check, (ConfigFile, *GROUPS),
                 ["--data-path", CORPUS, "--seq-length", "16", "--global-batch-size", "8", "--split", "1,1,1"], 800),
    "pretrain by part": (pretrain_check, (ConfigFile, DataOptions, ProfilingOptions, ParallelOptions),
                         ["--train-data-path", CORPUS, "--seq-length", "16", "--global-batch-size", "8"], 300),
    "generate": (generate.check, (generate.GenerateOptions, *OF_TEXTS, LayoutOptions), ["--load", MODEL], 600),
    "evaluate": (evaluate.check, (evaluate.EvaluateOptions, LayoutOptions), ["--load", MODEL], 500),
    "prepare_data": (prepare_check, (prepare_data.PrepareOptions,),
                     ["--output-prefix", "out", "--input", TEXT, "--tokenizer-type", "ByteTokenizer"], 400),
    "convert": (convert.check, (convert.ConvertOptions,), [], 150),
    "plan": (plan.check, (plan.PlanOptions, ConfigFile, *GROUPS), ["--bf16"], 300),
    "harness": (harness_check, harness_model.MODEL_ARGUMENTS, [f"--load={MODEL}"], 400),
    "report": (report.check, (report.ReportOptions,), ["--runs", TEXT, "--output", "page.html"], 100),
    "sample_quality": (sample_quality.check, (sample_quality.QualityOptions, *OF_TEXTS), ["--samples", TEXT], 300),
}  # fmt: skip


def cases(count: int):
    """The same ones every time, however long one takes."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_any_flags_end_well(command):
    check, option_classes, base, count = COMMANDS[command]

    @cases(count)
    @given(typed(option_classes))
    def of_flags(words):
        ends_well(lambda: check([*base, *words]))

    of_flags()


def test_any_flags_of_megatron_end_well(folder):
    """With whatever values, among ours; and as keys of a YAML file."""
    names = (Path(__file__).parent / "fixtures" / "megatron_flags.txt").read_text(encoding="utf-8").split()
    values = st.sampled_from(NUMBERS + REALS + NAMES) | st.text(max_size=9)
    foreign = st.tuples(st.sampled_from(names), st.lists(values, max_size=3)).map(lambda pair: [pair[0], *pair[1]])
    words = st.lists(foreign, max_size=8).map(lambda lists: [word for words in lists for word in words])

    @cases(300)
    @given(words, typed((ConfigFile, *GROUPS)))
    def of_flags(theirs, ours):
        ends_well(lambda: pretrain_check(["--data-path", CORPUS, *theirs, *ours]))
        keys = {word.strip("-").replace("-", "_"): 1 for word in theirs}
        read_yaml(folder, yaml.safe_dump(keys, allow_unicode=True).encode("utf-8", "surrogatepass"))

    of_flags()


WHOLE = "seed: 7\nlr: 3e-4\nbf16: true\ndata_path: [0.5, a, 0.5, b]\n"
YAML_FILES = [
    b"\xe9", b"\x80", b"\xff\xfe", b"%", b"- a", b"---\n---", b"1: 2", b"null: 2", b"a: " * 3, b"[" * 100_000,
    b"seed: 1\0", b'save: "a\\0b"', b"save: ''", b"data_path: ['']", b"bf16: 1", b"seed: true", b"graph: [absorb]",
    b"seed: " + b"9" * 400, b"seed: " + b"9" * 5000, b"seed: 0x" + b"f" * 6000, b"data_path: 0x" + b"f" * 6000,
    b"lr: " + b"9" * 400, b"lr: 1e400", b"lr: .nan", b"lr: .inf", b"seed: 2024-99-99", b"seed: !!int ''",
    b"seed: !!timestamp x", b"seed: !!binary =", b"seed: !!python/object:os.system {}", b"!!set {seed}",
    b"? [a]\n: b", b"? {a: b}\n: c", b"a: &a [*a]", b"a: &a [x, x]\nb: &b [*a, *a]\nseed: [*b, *b]",
]  # fmt: skip


def read_yaml(folder: Path, content: bytes) -> None:
    (folder / "options.yaml").write_bytes(content)
    ends_well(lambda: load_yaml_options(Path("options.yaml"), GROUPS))


@pytest.mark.parametrize("content", YAML_FILES, ids=lambda content: ascii(content[:20]))
def test_a_yaml_file_of_a_kind_that_was_once_a_traceback(folder, content):
    read_yaml(folder, content)


def test_a_yaml_file_of_any_content_ends_well(folder):
    plain = st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.dates(), st.binary()),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=8,
    )  # fmt: skip
    names = st.sampled_from([field.name for cls in GROUPS for field in dataclasses.fields(cls)])
    written = st.dictionaries(names, plain, max_size=4).map(lambda values: yaml.safe_dump(values, allow_unicode=True))
    cut = st.tuples(st.integers(0, len(WHOLE)), st.binary(max_size=6)).map(
        lambda cut: WHOLE[: cut[0]].encode() + cut[1] + WHOLE[cut[0] :].encode()
    )

    @cases(200)
    @given(written.map(lambda text: text.encode("utf-8", "surrogatepass")) | cut | st.binary(max_size=40))
    def of_content(content):
        read_yaml(folder, content)

    of_content()


JSON_LINES = [
    b"\xe9", b"NaN", b'{"": 1}', b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"seed": ' + b"9" * 5000 + b"}", b'{"seed": 1e400}', b'{"num_samples": 1000000000000}',
    b'{"num_samples": 600}\n' * 2,
    b'{"length": 1000000000000}', b'{"prompt": "\\ud800"}', b'{"infill": "[MASK*999999999999]"}',
    b'{"tokens": [null, 1e9]}', b'{"tokens": [null, ' + b"9" * 400 + b"]}",
]  # fmt: skip


def read_lines(folder: Path, content: bytes) -> None:
    (folder / "requests.jsonl").write_bytes(content)
    path, tokenizer = Path("requests.jsonl"), CharTokenizer("abc")
    ends_well(lambda: read_requests(path, tokenizer, 8, TextRequest(), max_samples=1000))


@pytest.mark.parametrize("content", JSON_LINES, ids=lambda content: ascii(content[:20]))
def test_requests_of_a_kind_that_was_once_a_traceback(folder, content):
    read_lines(folder, content)


def test_requests_of_any_content_end_well(folder):

    plain = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=9)
        | st.lists(st.none() | st.integers())
    )
    names = st.sampled_from([*(field.name for field in dataclasses.fields(TextRequest)), "tokens", "x"])
    lines = st.lists(st.dictionaries(names, plain, max_size=3).map(json.dumps), min_size=1, max_size=3)

    @cases(200)
    @given(lines.map(lambda lines: "\n".join(lines).encode()) | st.binary(max_size=40))
    def of_content(content):
        read_lines(folder, content)

    of_content()
