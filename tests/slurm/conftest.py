"""The Slurm that the tests of this folder share."""

import pytest

from tests.slurm.cluster import running_cluster, why_not_here


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    reason = why_not_here()
    if reason is not None:
        pytest.skip(reason)
    with running_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
