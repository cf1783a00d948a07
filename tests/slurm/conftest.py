"""Tests with Slurm itself: ``make test-slurm``. They are skipped, by name, where Slurm is not
installed or this machine permits no hosts of namespaces.
"""

from collections.abc import Iterator

import pytest

from tests.netns.hosts import why_not
from tests.slurm.cluster import Cluster, missing_programs, slurm_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"Slurm is not installed: there is no {', '.join(missing)}")
    if reason := why_not():
        pytest.skip(reason)
    with slurm_cluster() as cluster:
        yield cluster
