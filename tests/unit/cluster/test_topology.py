"""Placement arithmetic: what fits, where it goes, and what the refusal says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.topology import Node, Placement, Refusal, Request, fit, largest_group


def node(
    name: str, cpus: float, gpus: float = 0, *, free_cpus: float | None = None, free_gpus: float | None = None
) -> Node:
    """A node whose resources are free unless said otherwise."""
    return Node(
        id=name,
        address=f"10.0.0.{name}",
        cpus=cpus,
        gpus=gpus,
        memory_bytes=2**30,
        free_cpus=cpus if free_cpus is None else free_cpus,
        free_gpus=gpus if free_gpus is None else free_gpus,
    )


def shares(placement: Placement | Refusal) -> list[tuple[str, int]]:
    """Node and number of workers, in rank order."""
    assert isinstance(placement, Placement), placement
    return [(share.node.id, share.num_workers) for share in placement.shares]


def test_one_node_takes_all_if_one_can() -> None:
    """The tightest node that holds everything leaves the larger one to others."""
    assert shares(fit(Request(2, 1, 0), [node("1", 8), node("2", 2), node("3", 4)])) == [("2", 2)]


def test_spreads_from_the_roomiest() -> None:
    """The first ranks are on the node with the most room; the rest on the tightest that takes them."""
    nodes = [node("1", 2), node("2", 4), node("3", 1)]
    assert shares(fit(Request(5, 1, 0), nodes)) == [("2", 4), ("3", 1)]
    assert shares(fit(Request(7, 1, 0), nodes)) == [("2", 4), ("1", 2), ("3", 1)]


def test_gpu_workers_need_a_gpu_each() -> None:
    """CPU room alone does not count."""
    assert shares(fit(Request(2, 1, 1), [node("1", 64), node("2", 2, 2)])) == [("2", 2)]


@pytest.mark.parametrize(
    ("request_", "nodes", "reason"),
    [
        (
            Request(8, 1, 1, same_node=True),
            [node("1", 64, 4), node("2", 64, 4)],
            "needs 8 GPU and 8 CPU (8 workers) on one node; the largest of 2 nodes has 4 GPU and 64 CPU",
        ),
        (Request(4, 1, 0), [node("1", 2)], "needs 4 CPU (4 workers); the cluster has 2 CPU on 1 node"),
        (
            Request(1, 4, 0),
            [node("1", 2), node("2", 3)],
            "needs 4 CPU (1 worker) on one node for each worker; the largest of 2 nodes has 3 CPU",
        ),
        (
            Request(2, 1, 1),
            [node("1", 2)],
            "needs 1 GPU and 1 CPU (1 worker) on one node for each worker; the largest of 1 node has 0 GPU and 2 CPU",
        ),
        (Request(1, 1, 0), [], "needs 1 CPU (1 worker); the cluster has no nodes"),
    ],
)
def test_refusal_says_asked_and_available(request_: Request, nodes: list[Node], reason: str) -> None:
    """One line, both sides."""
    assert fit(request_, nodes) == Refusal(reason)


def test_free_resources_are_looked_at_only_when_asked() -> None:
    """What is busy is feasible, and says so with the free amount."""
    busy = [node("1", 4, free_cpus=1)]
    assert shares(fit(Request(2, 1, 0), busy)) == [("1", 2)]
    assert fit(Request(2, 1, 0), busy, free=True) == Refusal(
        "needs 2 CPU (2 workers); the cluster has 1 CPU free on 1 node"
    )


def test_a_worker_that_needs_nothing_fits_anywhere() -> None:
    """Neither CPU nor GPU asked."""
    assert shares(fit(Request(1, 0, 0), [node("1", 0)])) == [("1", 1)]


NODES = st.lists(
    st.tuples(st.integers(0, 16), st.integers(0, 4)).map(lambda pair: node(f"{pair[0]}-{pair[1]}", *pair)), max_size=6
)
REQUESTS = st.builds(Request, st.integers(1, 24), st.sampled_from([0.5, 1, 2, 3]), st.integers(0, 1), st.booleans())


@given(REQUESTS, NODES)
def test_placement_never_exceeds_a_node_and_refusal_is_right(request_: Request, nodes: list[Node]) -> None:
    """Compared with a slow count: fits if, and only if, the nodes' rooms add up; then every worker is placed once."""

    def count(one: Node) -> int:
        workers = 0
        while (workers + 1) * request_.cpus_per_worker <= one.cpus and (
            workers + 1
        ) * request_.gpus_per_worker <= one.gpus:
            workers += 1
        return workers

    rooms = [count(one) for one in nodes]
    possible = max(rooms, default=0) if request_.same_node else sum(rooms)
    placement = fit(request_, nodes)
    if isinstance(placement, Refusal):
        assert possible < request_.num_workers
    else:
        assert possible >= request_.num_workers
        assert sum(share.num_workers for share in placement.shares) == request_.num_workers
        for share in placement.shares:
            assert 0 < share.num_workers <= count(share.node)
        assert not request_.same_node or len(placement.shares) == 1
    assert largest_group(request_, nodes) == possible


@given(REQUESTS, NODES)
def test_fewest_nodes(request_: Request, nodes: list[Node]) -> None:
    """No placement uses more nodes than the largest rooms need."""
    placement = fit(request_, nodes)
    if isinstance(placement, Placement):
        rooms = sorted(
            (
                min(
                    int(one.cpus // request_.cpus_per_worker),
                    int(one.gpus // request_.gpus_per_worker) if request_.gpus_per_worker else 10**6,
                )
                for one in nodes
            ),
            reverse=True,
        )
        fewest = next(k for k in range(1, len(rooms) + 1) if sum(rooms[:k]) >= request_.num_workers)
        assert len(placement.shares) == fewest
