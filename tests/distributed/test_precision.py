"""bfloat16 trains what float32 trains: 200 steps of the tiny preset on the source text of Python's standard library."""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sedd_megatron.data.corpus import write_corpus
from sedd_megatron.data.tokenizers import ByteTokenizer
from tests.distributed.compare import metrics
from tests.distributed.launch import REPOSITORY, launch

PRECISIONS = {"float32": [], "bf16": ["--bf16"]}
# The published learning rate. At the preset's own, ten times higher, training amplifies any rounding: there two float32
# runs whose initial weights differ by 1e-3 are 2 percent apart after 200 steps, more than bfloat16 and float32 are.
FLAGS = (
    f"--config {REPOSITORY}/examples/configs/tiny.yaml --train-iters 200 --lr 3e-4 --min-lr 0 --lr-decay-iters 1200 "
    "--eval-interval 25 --log-interval 100 --device cpu"
).split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("precision")
    sources = sorted(Path(argparse.__file__).parent.glob("*.py"))[:60]
    write_corpus((p.read_text(errors="ignore") for p in sources), ByteTokenizer(), root / "text", append_eod=False)
    corpus = ["--data-path", str(root / "text_text_document")]

    def train(name: str) -> None:
        launch("run_pretrain.py", 1, [[*FLAGS, *corpus, "--log-dir", str(root / name), *PRECISIONS[name]]])

    with ThreadPoolExecutor() as pool:
        list(pool.map(train, PRECISIONS))
    return {name: root / name for name in PRECISIONS}


def test_bf16_and_float32_curves_agree(runs):
    # Means over the curves: from step 125 on the loss leaves a plateau, a little sooner or later with every rounding. A
    # single validation moves by 0.6 percent there if the learning rate does by 0.1, and by 1 if bf16's sums are taken
    # in another order (--loss-chunk-rows).
    for name in ("validation_loss", "loss"):
        float32, bf16 = (metrics(runs[p], name) for p in PRECISIONS)
        assert abs(bf16.mean() / float32.mean() - 1) < 0.01, (name, bf16, float32)
        # They are two runs, and until there they are as near as bf16 is.
        difference = (bf16 - float32).abs() / float32
        assert difference.max() > 0
        before_plateau_ends = difference[: len(difference) // 2]
        assert before_plateau_ends.max() < 0.005, (name, difference)
    assert bf16[-20:].mean() < 0.8 * bf16[:20].mean()
