"""lm-evaluation-harness gets the same answers in every layout, on every rank, and from the command."""

import json
import math
import re
from pathlib import Path

import pytest

from sedd_megatron.parallel import cpu_backend
from tests.commands import run, torchrun
from tests.distributed.launch import launch

cpu_backend.install()

from tests.training.test_convert import published_folder  # noqa: E402

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


GRAPHS = ("absorb", "uniform")


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> Path:
    """A folder for each graph with a file for each rank of each layout."""
    folder = tmp_path_factory.mktemp("answered")
    for graph in GRAPHS:
        published_folder(folder / f"{graph}-model", graph)
        (folder / graph).mkdir()
    for num_ranks, layouts in ((1, [(1, 1)]), (2, [(1, 1), (2, 1), (1, 2)])):
        jobs = [
            [str(folder / graph), str(folder / f"{graph}-model"), *layout] for graph in GRAPHS for layout in layouts
        ]
        launch("run_harness.py", num_ranks, jobs)
    return folder


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_layout_answers_alike(answered, graph):
    results = {path.name: json.loads(path.read_text()) for path in (answered / graph).iterdir()}
    assert len(results) == 7
    (one,) = (answers for name, answers in results.items() if "tensor 1 x pipeline 1 x context 1 x data 1" in name)
    assert all(nats < 0 for nats, _ in one["loglikelihood"])
    assert len(set(one["generate_until"])) > 1
    for name, answers in results.items():
        assert answers["generate_until"] == one["generate_until"], name
        for (nats, is_greedy), (expected, is_expected) in zip(
            answers["loglikelihood"], one["loglikelihood"], strict=True
        ):
            assert math.isclose(nats, expected, rel_tol=1e-5, abs_tol=1e-4), name
            assert is_greedy == is_expected
        for nats, expected in zip(answers["loglikelihood_rolling"], one["loglikelihood_rolling"], strict=True):
            assert math.isclose(nats, expected, rel_tol=1e-5), name


def test_the_harness_runs_a_task_of_a_folder(trained, tmp_path):
    """On two ranks that share a model; the first alone prints. Six letters are less probable than their first.

    No device is named: where there is no GPU it is the CPU.
    """
    questions = [{"question": "from pathlib", "choices": ["i", "import"], "answer": 0}] * 3
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    (tmp_path / "letters.yaml").write_text(TASK.format(folder=tmp_path))
    model = ["--model", "sedd", "--model_args", f"load={trained},mc_samples=8,tensor_model_parallel_size=2"]
    task = ["--tasks", "letters", "--include_path", str(tmp_path), "--batch_size", "8"]
    done = run([*torchrun(2), "-m", "sedd_megatron.harness", *model, *task])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("|letters|") == 1
    assert re.search(r"\|acc +\|↑ +\| +1\|", done.stdout)
    assert "Monte Carlo standard error in nats: median" in done.stderr
