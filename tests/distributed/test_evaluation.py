"""Bounds on the likelihood do not depend on the layout, and training goes on from published weights in any."""

import json
import math
import random

import pytest

from sedd_megatron.parallel import cpu_backend
from tests.distributed.compare import metrics
from tests.distributed.launch import launch

cpu_backend.install()

from tests.training.test_convert import published_folder  # noqa: E402


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_every_layout_bounds_alike(tmp_path, graph):
    model = published_folder(tmp_path / "model", graph)
    found = tmp_path / "found"
    found.mkdir()
    launch("run_evaluation.py", 1, [[str(found), str(model), 1, 1]])
    launch("run_evaluation.py", 2, [[str(found), str(model), 2, 1], [str(found), str(model), 1, 2]])
    results = {path.name: json.loads(path.read_text()) for path in found.iterdir()}
    assert len(results) == 5
    (one,) = (units for name, units in results.items() if name.startswith("tensor 1 x pipeline 1"))
    assert [unit["num_tokens"] for unit in one] == [7, 40]
    for units in results.values():
        for unit, expected in zip(units, one, strict=True):
            for name, value in unit.items():
                assert math.isclose(value, expected[name], rel_tol=1e-5), name


def test_training_goes_on_from_published_weights(tmp_path):
    """Losses and gradient norms of the first steps in three layouts are those of one process."""
    from sedd_megatron import convert
    from sedd_megatron.data.corpus import write_corpus
    from sedd_megatron.data.tokenizers import CharTokenizer

    model = published_folder(tmp_path / "model", "absorb")
    convert.from_published(str(model), tmp_path / "checkpoint")
    letters = "abcdefghijklmnopqrstuvwxyzABCD"
    text = "".join(random.Random(0).choices(letters, k=4000))
    write_corpus([text], CharTokenizer(letters), tmp_path / "data", append_eod=False, key="text")
    flags = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --cond-dim 16 --seq-length 16 --hidden-dropout 0 "
        f"--micro-batch-size 4 --global-batch-size 8 --train-iters 3 --lr 1e-3 --lr-warmup-iters 0 --log-interval 1 "
        f"--eval-interval 0 --device cpu --data-path {tmp_path}/data_text_document --load {tmp_path}/checkpoint"
    ).split()
    layouts = {"one": [], "tensor": ["--tensor-model-parallel-size", "2"],
               "pipeline": ["--pipeline-model-parallel-size", "2"]}  # fmt: skip
    jobs = {name: [*flags, *layout, "--log-dir", str(tmp_path / name)] for name, layout in layouts.items()}
    launch("run_pretrain.py", 1, [jobs["one"]])
    launch("run_pretrain.py", 2, [jobs["tensor"], jobs["pipeline"]])
    for measure in ("loss", "grad_norm"):
        one = metrics(tmp_path / "one", measure)
        assert len(one) == 3
        for name in ("tensor", "pipeline"):
            assert (metrics(tmp_path / name, measure) / one - 1).abs().max() < 1e-5
