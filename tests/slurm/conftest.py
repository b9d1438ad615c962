"""The Slurm that the tests of this folder run in."""

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import SlurmCluster, unavailable


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """Two nodes of four CPUs each. Where REQUIRE_SLURM=1, as in continuous integration, missing it is a failure."""
    reason = unavailable()
    if reason and os.environ.get("REQUIRE_SLURM") == "1":
        pytest.fail(f"REQUIRE_SLURM=1, but {reason}")
    if reason:
        pytest.skip(f"no Slurm here: {reason}")
    with SlurmCluster() as running:
        yield running
