"""One cluster for all tests here; without SLURM, or without root, they are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, can_start, started_cluster

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They come first: others have the cores while they wait."""
    for item in items:
        if item.path.is_relative_to(FOLDER):
            item.add_marker("slurm")
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if not can_start():
        pytest.skip("SLURM's daemons (slurm-wlm, munge) are not installed, or this user is not root")
    with started_cluster() as cluster:
        yield cluster
