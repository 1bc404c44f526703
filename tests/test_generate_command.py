"""The command that makes texts as a person runs it, with a model of length 16 that tensor-parallel ranks trained."""

import json
import re
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from sedd_megatron.errors import KEPT_CONTROLS, UserError, printable, run_command
from sedd_megatron.generate import main
from tests.commands import Done, generate, read_records, run, train_command

REQUESTS = [
    {"prompt": "def", "suffix": "end", "length": 12, "num_samples": 3},
    {"infill": "a[MASK*5]b[MASK]"},
    {"prompt": "import", "length": 40, "seed": 5},
    {"tokens": [0, None, 200, None, None, 10]},
]
SAMPLING = ["--seed", "4", "--first-sample", "2", "--batch-size", "2", "--sampling-steps", "6"]


def result_of(record: dict[str, Any]) -> str:
    """How a sample is printed."""
    return f"--- sample {record['sample']} ---\n{printable(record['text'], kept=KEPT_CONTROLS)}\n"


class Run:
    """What a start of the command with REQUESTS left."""

    def __init__(self, load: Path, folder: Path, *arguments: str, num_ranks: int = 1) -> None:
        requests, output, self.page = folder / "requests", folder / "new" / "out.jsonl", folder / "pages" / "trace.html"
        requests.write_text("\n".join(map(json.dumps, REQUESTS)), encoding="utf-8")
        files = ["--requests", str(requests), "--output", str(output), "--trace", str(self.page)]
        self.done = generate(load, *files, *SAMPLING, *arguments, num_ranks=num_ranks)
        assert self.done.returncode == 0, self.done.stderr
        self.records = sorted(read_records(output), key=lambda record: record["sample"])

    @property
    def drawn(self) -> list[dict[str, Any]]:
        """The records but for their times, which no two runs share."""
        return [{key: value for key, value in record.items() if key != "seconds"} for record in self.records]

    @property
    def replayed(self) -> dict[str, list[int]]:
        """What each sample of the page is at its last step, by its title."""
        data = re.search(r'<script type="application/json" id="data">(.*?)</script>', self.page.read_text(), re.DOTALL)
        ends = {}
        for sample in json.loads(data[1])["samples"]:
            ends[sample["title"]] = sample["initial"]
            for _, position, state in sample["changes"]:
                sample["initial"][position] = state
        return ends


@pytest.fixture(scope="module")
def one_process(trained, tmp_path_factory) -> Run:
    return Run(trained, tmp_path_factory.mktemp("one"), "--stream")


@pytest.fixture(scope="module")
def model(trained):
    from sedd_megatron import load_pretrained

    return load_pretrained(trained, device="cpu")


def test_each_line_of_a_file_gets_its_samples_around_what_it_gives(one_process):
    records = one_process.records
    assert [record["sample"] for record in records] == [2, 3, 4, 5, 6, 7]
    assert [record["line"] for record in records] == [1, 1, 1, 2, 3, 4]
    assert [record["seed"] for record in records] == [4, 4, 4, 4, 5, 4]
    tokens = [record["tokens"] for record in records]
    assert [len(ids) for ids in tokens] == [12, 12, 12, 8, 40, 6]
    assert all((bytes(ids[:3]), bytes(ids[-3:])) == (b"def", b"end") for ids in tokens[:3])
    assert bytes(tokens[3])[::6] == b"ab"
    assert bytes(tokens[4][:6]) == b"import"
    assert (tokens[5][0], tokens[5][2], tokens[5][5]) == (0, 200, 10)
    assert len(set(map(tuple, tokens))) == 6
    for record in records:
        assert record["text"] == bytes(record["tokens"]).decode("utf-8", errors="replace")
        assert not record["ended"]
        assert record["seconds"] > 0
    # At most one call for each step and the denoising; four blocks of 16 that overlap by half cover 40.
    assert all(1 <= record["network_calls"] <= 7 for record in records if record["sample"] != 6)
    assert 7 < records[4]["network_calls"] <= 4 * 7


def test_a_stream_shows_the_texts_on_their_way_and_then_the_results(one_process):
    shown, said = one_process.done.stdout, one_process.done.stderr
    results = [result_of(record) for record in one_process.records]
    for record, result in zip(one_process.records, results, strict=True):
        batch_of_one = record["sample"] in (4, 5, 6, 7)
        text = printable(record["text"], kept=KEPT_CONTROLS)
        line = text if batch_of_one else f"sample {record['sample']}: {text}"
        before, after = shown.split(result)
        assert f"\n{line}\n" in before
        assert result not in after
    assert "--- step 0/7 ---\nsample 2: def██████end\nsample 3: def██████end\n" in shown
    assert "--- step 0/7 ---\na█████b█\n" in shown
    assert "--- step 0/7 of block 1/4 ---\nimport██████████\n" in shown
    assert not [character for character in shown if unicodedata.category(character) == "Cc" and character not in "\n\t"]
    assert any("\x00" <= character < "\t" for record in one_process.records for character in record["text"])
    assert said == f"wrote {one_process.page}\n"


def test_a_page_replays_to_the_samples(one_process):
    expected = {f"sample {record['sample']}": record["tokens"] for record in one_process.records}
    assert one_process.replayed == expected


@pytest.mark.parametrize("layout", [["--tensor-model-parallel-size", "2"], []], ids=["TP2", "DP2"])
def test_two_ranks_write_what_one_process_writes(trained, tmp_path, one_process, layout):
    two = Run(trained, tmp_path, *layout, num_ranks=2)
    assert two.drawn == one_process.drawn
    assert two.replayed == one_process.replayed
    results = sorted(map(result_of, two.records))
    assert sorted(re.findall(r"--- sample \d+ ---\n.*?\n(?=--- sample|\Z)", two.done.stdout, re.DOTALL)) == results


def test_a_python_call_draws_what_the_command_draws(model, one_process):
    asked = {"sampler": "analytic", "steps": 6}
    texts = model.generate(3, "def", suffix="end", length=12, seed=4, first_sample=2, batch_size=3, **asked)
    texts += model.generate(infill="a[MASK*5]b[MASK]", seed=4, first_sample=5, **asked)
    texts += model.generate(prompts=["import"], length=40, seed=5, first_sample=6, **asked)
    drawn = [{key: value for key, value in text.record().items() if key != "seconds"} for text in texts]
    expected = [{key: value for key, value in record.items() if key != "line"} for record in one_process.drawn[:5]]
    assert drawn == expected


def test_prompts_of_a_python_call_are_numbered_on(model):
    def tokens(*arguments, **others) -> list[tuple[int, list[int]]]:
        texts = model.generate(*arguments, length=9, steps=3, seed=1, sampler="event-driven", **others)
        return [(text.sample, text.tokens) for text in texts]

    together = tokens(2, ["ab", "", "cd"], first_sample=5, batch_size=4)
    apart = [tokens(1, prompt, first_sample=5 + k) for k, prompt in enumerate(["ab", "ab", "", "", "cd", "cd"])]
    assert together == [sample for (sample,) in apart]
    assert len({tuple(ids) for _, ids in together}) == 6
    assert tokens(2, [], first_sample=5) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"steps": 0}, "steps 0 must be at least 1"),
        ({"top_p": 0.0}, "top_p 0.0 must be above 0 and at most 1 (1 keeps all tokens)"),
        ({"temperature": float("inf")}, "temperature inf must be at least 0 and finite"),
        ({"seed": -1}, "seed -1 must be at least 0"),
        (
            {"prompts": ["a", "b" * 17]},
            "prompt of 17 tokens: longer than a sample of 16; shorten the text or raise length",
        ),
        ({"infill": "ab"}, "infill has nothing to fill in; write [MASK] or [MASK*12] where tokens are wanted"),
        ({"time_grid": "sine"}, "time_grid sine does not exist; choose one of uniform, cosine"),
    ],
)
def test_mistakes_of_a_python_call_name_the_argument(model, arguments, text):
    with pytest.raises(UserError) as error:
        model.generate(**arguments)
    assert str(error.value) == text


def test_samples_do_not_depend_on_the_batch_and_flags_say_the_same_as_a_line(trained, tmp_path, one_process):
    output = tmp_path / "out.jsonl"
    done = generate(trained, "--prompt", "def", "--suffix", "end", "--length", "12", "--num-samples", "3", *SAMPLING,
                    "--batch-size", "3", "--output", str(output))  # fmt: skip
    assert done.returncode == 0, done.stderr
    same = [
        {key: record[key] for key in record if key not in ("seconds", "line")} for record in one_process.records[:3]
    ]
    assert [{key: record[key] for key in record if key != "seconds"} for record in read_records(output)] == same
    assert done.stdout == "".join(map(result_of, same))
    assert done.stderr == ""


def test_infill_keeps_the_text_around(trained, tmp_path):
    output = tmp_path / "out.jsonl"
    done = generate(trained, "--infill", "é[MASK*2] = [MASK*30](x)", "--sampling-steps", "3", "--output", str(output))
    assert done.returncode == 0, done.stderr
    (record,) = read_records(output)
    around = re.fullmatch(r"é(..) = (.{30})\(x\)".encode(), bytes(record["tokens"]), re.DOTALL)
    assert around, record["tokens"]


@pytest.fixture(scope="module")
def trained_uniform(tmp_path_factory, byte_corpus) -> Path:
    """As `trained`, with the uniform graph."""
    folder = tmp_path_factory.mktemp("uniform") / "save"
    done = run(train_command("--data-path", str(byte_corpus), "--train-iters", "1", "--save", str(folder), "--graph",
                             "uniform", "--noise", "geometric", "--tensor-model-parallel-size", "2"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


LONG = "of 17 tokens: longer than a sample of 16; shorten the text or raise --length"
FOR_UNIFORM = "is not for the UniformGraph; choose one of euler, analytic, predictor-corrector"
# {folder} has an empty file of that name and nothing else.
MISTAKES = {
    "prompt": (["--prompt", "x" * 17], f"--prompt {LONG}"),
    "length": (["--length", "0"], "--length 0 must be at least 1"),
    "infill": (["--infill", "abc"],
               "--infill has nothing to fill in; write [MASK] or [MASK*12] where tokens are wanted"),
    "bytes": (["--prompt", "a\udcff"], "--prompt: '\\udcff' is not a character; write the text in UTF-8"),
    "steps": (["--sampling-steps", "0"], "--sampling-steps 0 must be at least 1"),
    "no such sampler": (["--sampler", "heun"], "argument --sampler: invalid choice: 'heun' (choose from "),
    "uniform": (["--sampler", "ancestral"], f"--sampler 'ancestral' {FOR_UNIFORM}"),
    "output": (["--output", "{folder}/file/out.jsonl"], "--output {folder}/file/out.jsonl: cannot be written ("),
    "output is a folder": (["--output", "{folder}"],
                           "--output {folder}: cannot be written (Is a directory); name another file"),
    "trace": (["--trace", "{folder}/file/trace.html"], "--trace {folder}/file/trace.html: cannot be written ("),
    "trace is a folder": (["--trace", "{folder}"],
                          "--trace {folder}: cannot be written (Is a directory); name another file"),
    "no name": (["--output", ""], "argument --output: '' must not be empty: leave it out, or give what it names"),
    "tensor size": (["--tensor-model-parallel-size", "0"], "--tensor-model-parallel-size 0 must be at least 1 and "),
    "seed": (["--seed", str(2**64)], "argument --seed: 18446744073709551616 must fit into 64 bits"),
    "samples": (["--num-samples", str(10**12)], "--num-samples 1000000000000 is more than the 1000000 that "
                                                "--max-samples leaves; raise that, or ask for fewer at a time"),
    "max-samples": (["--num-samples", "3", "--max-samples", "2"], "--num-samples 3 is more than the 2 that --max-"),
    "long": (["--length", str(10**12)], "--length 1000000000000 must be at most 1048576"),
    "masks": (["--infill", "a[MASK*999999999999]"], "--infill: is more than 1048576 tokens long; ask for fewer"),
    "grid": (["--sampling-steps", str(10**12)], "--sampling-steps 1000000000000 must be at most 1000000"),
    "CUDA graph": (["--cuda-graph"], "--cuda-graph captures a GPU's kernels, and --device is cpu; leave it out"),
    "CUDA graph of stages": (["--cuda-graph", "--pipeline-model-parallel-size", "2"],
                             "--cuda-graph captures the layers of one stage, and --pipeline-model-parallel-size is 2; "
                             "leave out one of the two"),
    "requests": (["--requests", "{folder}/file"],
                 "--requests {folder}/file: no line there; write one JSON object a line"),
    "no model": (["--load", "{folder}"],
                 "--load {folder}: no checkpoint there (no folder iter_*); give a folder that "),
    "layout": (["--tensor-model-parallel-size", "3"],
               "--num-attention-heads 4 is not a multiple of --tensor-model-parallel-size 3; change one of them"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_and_code_2(trained, request, tmp_path, monkeypatch, capsys, name):
    (tmp_path / "file").touch()
    arguments, text = MISTAKES[name]
    load = request.getfixturevalue("trained_uniform") if name == "uniform" else trained
    written = [argument.replace("{folder}", str(tmp_path)) for argument in arguments]
    # A start of its own for each would take most of a minute.
    monkeypatch.setattr("sys.argv", ["generate", "--load", str(load), "--device", "cpu", *written])
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        run_command(main)
    said = capsys.readouterr()
    assert (end.value.code, said.out, said.err.count("\n")) == (2, "", 1), said.err
    assert said.err.startswith(f"error: {text.replace('{folder}', str(tmp_path))}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_start_that_fails_leaves_an_older_output_as_it_was(trained, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    output.write_text("older")
    # Known once the ranks are counted, after all other mistakes.
    flags = ["--load", str(trained), "--device", "cpu", "--output", str(output), "--pipeline-model-parallel-size", "2"]
    monkeypatch.setattr("sys.argv", ["generate", *flags])
    with pytest.raises(UserError, match=r"must divide the 1 rank started"):
        main()
    assert output.read_text() == "older"


def test_a_mistake_ends_the_process_as_it_ends_the_function(trained):
    done = generate(trained, *MISTAKES["prompt"][0])
    assert done == Done(2, "", f"error: {MISTAKES['prompt'][1]}\n")
