"""What the tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.slurm_cluster import SlurmCluster, slurm_cluster, why_not_here


@pytest.fixture(scope="package")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A real Slurm of two nodes, which share the tests' temporary folders. Skips where none can be made."""
    if reason := why_not_here():
        pytest.skip(reason)
    with slurm_cluster(tmp_path_factory.getbasetemp()) as cluster:
        yield cluster
