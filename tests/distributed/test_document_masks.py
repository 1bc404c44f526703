"""Documents that do not see each other train in every layout what they train in one process."""

from pathlib import Path

import pytest
import torch

from sedd_megatron.data.corpus import open_tokens, write_corpus
from sedd_megatron.data.tokenizers import SentencePieceTokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.evaluate import check
from tests.distributed.compare import metrics, relative_difference, whole_tensors
from tests.distributed.launch import launch
from tests.distributed.layouts import CP2, DIST_OPT, FULL_BLOCK, MODEL, PP2, SELECTIVE, SP, TP2, VPP

FLAGS = ["--reset-attention-mask", "--reset-position-ids"]
STEPS = 6
LAYOUTS = {
    "SP2": [*TP2, *SP, *FLAGS],
    "VPP2-block": [*PP2, *VPP, *FULL_BLOCK, *FLAGS],
    "CP2-dist-opt-selective": [*CP2, *DIST_OPT, *SELECTIVE, *FLAGS],
}
ONE = {"one": FLAGS, "neither": []}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Name of a run -> its folder; on documents of a few tokens, several in a window."""
    root = tmp_path_factory.mktemp("document-masks")
    words = "the quick brown fox jumps over the lazy dog and then it sleeps".split()
    documents = [" ".join(words[n % 5 : n % 5 + 2 + n % 7]) for n in range(400)]
    tokenizer = SentencePieceTokenizer.train(documents, 300)
    write_corpus(iter(documents), tokenizer, root / "data", append_eod=True)
    data = str(root / "data_text_document")
    share = (open_tokens(data) == tokenizer.eod_id).mean()
    assert 0.05 < share < 0.3, "a window has several documents, and they have several tokens"
    for ranks, layouts in ((1, ONE), (2, LAYOUTS)):
        launch("run_pretrain.py", ranks, [
            [*MODEL, "--data-path", data, "--train-iters", str(STEPS), "--eval-interval", str(STEPS),
             "--save", str(root / name), *flags] for name, flags in layouts.items()
        ])  # fmt: skip
    return {name: root / name for name in (*ONE, *LAYOUTS)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_what_one_process_trains(runs, layout):
    for name in ("loss", "grad_norm", "validation_loss"):
        torch.testing.assert_close(metrics(runs[layout], name), metrics(runs["one"], name), rtol=1e-6, atol=0)
    expected, actual = (whole_tensors(runs[run] / f"iter_{STEPS:07d}") for run in ("one", layout))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        bound = 3e-6 if name.startswith("optimizer.") else 2e-6
        assert relative_difference(actual[name], tensor) < bound, name


def test_the_comparison_would_tell_if_a_layout_had_no_mask(runs):
    expected, actual = (whole_tensors(runs[run] / f"iter_{STEPS:07d}") for run in ("one", "neither"))
    gradients = [name for name in expected if name.startswith("optimizer.state.exp_avg.") and "modulation" in name]
    assert max(relative_difference(actual[name], expected[name]) for name in gradients) > 1e-3


def test_evaluation_of_such_a_model_keeps_documents_apart(runs):
    flags = ["--load", str(runs["one"]), "--data", __file__]
    with pytest.raises(UserError, match=r"its documents were cut off from each other .* give --windowing strided"):
        check(flags)
    check([*flags, "--windowing", "separate"])
    check(["--load", str(runs["neither"]), "--data", __file__])
