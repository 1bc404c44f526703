"""Invariant 4: published weights give the published log-scores, loss and gradients, in each layout."""

import pytest

from tests.distributed.launch import launch

GRAPHS = ("absorb", "uniform")


@pytest.mark.parametrize(("tensor_size", "pipeline_size", "context_size"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_published_weights_give_published_numbers(tensor_size, pipeline_size, context_size):
    jobs = [(graph, tensor_size, pipeline_size, context_size) for graph in GRAPHS]
    launch("run_published_parity.py", tensor_size * pipeline_size * context_size, jobs)
