"""The check that people run on a new cluster passes where it should, and finds mistakes that train without an error."""

import re

import pytest

from tests.distributed.launch import start
from tests.distributed.layouts import CP2, DIST_OPT, MODEL, OVERLAP, PP2, SP, TP2, VPP


def verify(world_size: int, corpus, flags: list[str], way: str = "none") -> tuple[list[int], str]:
    arguments = [*MODEL, "--data-path", str(corpus), "--verify-layout", "--verify-layout-steps", "4", *flags]
    codes, outputs = start("run_verify_layout.py", world_size, [(way, arguments)])
    return codes, outputs[0]


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [(2, [*TP2, *SP]), (4, [*PP2, *VPP, *DIST_OPT, *OVERLAP]), (2, [*CP2, "--bf16"]), (1, [])],
    ids=["SP2", "VPP2-DP2-dist-opt-overlap", "CP2-bf16", "one"],
)
def test_sound_layouts_pass(world_size, flags, byte_corpus):
    codes, output = verify(world_size, byte_corpus, flags)
    assert codes == [0] * world_size, output
    assert "agree bit for bit" in output
    assert "PASSED" in output
    differences = [float(number) for number in re.findall(r"\d\.\de[+-]\d\d(?=  \()", output)]
    assert len(differences) == 3, output
    assert max(differences) < (2e-2 if "--bf16" in flags else 1e-6)


@pytest.mark.parametrize(
    ("way", "flags"),
    [("sequence-parallel gradients not summed", [*TP2, *SP]), ("stages not summed", PP2)],
)
def test_silent_mistakes_are_found(way, flags, byte_corpus):
    codes, output = verify(2, byte_corpus, flags, way)
    assert codes == [1, 1], output
    assert "FAILED: the tolerance is 1e-05" in output
    assert re.search("replicas +differ in .*sigma_embedding", output), output


def test_a_tolerance_that_is_given_counts(byte_corpus):
    codes, output = verify(2, byte_corpus, [*TP2, "--verify-layout-tolerance", "1e-12"])
    assert codes == [1, 1], output
    assert "agree bit for bit" in output
