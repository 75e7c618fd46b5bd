"""A cluster of three hosts, and a fourth from which users work."""

from collections.abc import Iterator

import pytest

from tests.cluster.hosts import Lab, built, why_not

NODES = ("head", "node1", "node2")
CLIENT = "client"


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Three hosts of one CPU that hold a Ray cluster, and the client."""
    if reason := why_not():
        pytest.skip(reason)
    with built() as lab:
        for name in (*NODES, CLIENT):
            lab.add(name)
        head = lab.hosts[NODES[0]]
        head.ray()
        for name in NODES[1:]:
            lab.hosts[name].ray(head)
        yield lab
