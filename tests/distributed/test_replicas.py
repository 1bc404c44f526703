"""A bit that differs between ranks which should hold the same is found, in whatever they keep, and its rank named."""

import json
import re

import pytest

from tests.distributed.launch import launch
from tests.distributed.layouts import DIST_OPT, MODEL, PP2, TP2, VPP

LAYOUTS = {
    "DP4": (4, []),
    "TP2-DP2": (4, TP2),
    "VPP2-DP2-dist-opt": (4, [*PP2, *VPP, *DIST_OPT]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_flipped_bit_is_found_where_others_hold_the_same(name, tmp_path, byte_corpus):
    num_ranks, flags = LAYOUTS[name]
    output = tmp_path / "found.json"
    arguments = [*MODEL, *flags, "--data-path", str(byte_corpus), "--check-replicas-interval", "2"]
    launch("run_replicas.py", num_ranks, [(arguments, 40, str(output))])
    found = json.loads(output.read_text())
    assert {flip["holders"] > 1 for flip in found} == ({True, False} if name.endswith("dist-opt") else {True})
    for flip in found:
        if flip["holders"] == 1:
            # Nobody has another copy: no comparison can tell.
            assert flip["message"] is None
            continue
        named = re.match(
            rf"the tensor {flip['key']} is not the same where it should be at iteration 2: (.*?); nothing is saved "
            "from here on: start again from a checkpoint of iteration 0 or before",
            flip["message"],
        )
        assert named, flip
        ranks = re.findall(r"rank (\d+) on", named[1])
        is_alone = flip["holders"] > 2
        assert str(flip["rank"]) in ranks, flip
        assert len(ranks) == (1 if is_alone else 2), flip
        assert ("of which either may be wrong" in named[1]) != is_alone
