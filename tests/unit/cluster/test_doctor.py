"""What the doctor makes of the nodes' reports."""

from dataclasses import asdict
from typing import Any

import pytest

from cluster.doctor import Finding, _skew, judge_nodes
from cluster.topology import Node
from launch.checks.doctor import per_node


def node(number: int, gpus: float = 0) -> Node:
    """A node with four CPUs."""
    return Node(f"n{number}", f"10.0.0.{number}", 4, gpus, 2**34, 4, gpus)


def report(**changes: Any) -> dict[str, Any]:
    """A healthy node's report."""
    healthy = {
        "versions": {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0"},
        "clock": 0.0,
        "shm_bytes": 2**30,
        "temporary_bytes": 2**34,
        "memory_bytes": 2**34,
        "cpus": 4,
        "gpus": 0,
        "interface": "eth0",
        "open_files": 65536,
        "has_pidfd": True,
        "sees_shared": True,
    }
    return {**healthy, **changes}


def bad(changes: dict[str, Any], skew_s: float = 0.0, trouble: str = "") -> list[Finding]:
    """Bad findings of two nodes, the second of which differs."""
    nodes = [node(1), node(2)]
    reports = {"n1": report(), "n2": report(**changes)}
    findings = judge_nodes(nodes, reports, {"n1": 0.0, "n2": skew_s}, {("n1", "n2"): trouble, ("n2", "n1"): ""}, True)
    return [finding for finding in findings if not finding.is_well]


def test_healthy_nodes_have_no_bad_finding() -> None:
    """Each check is reported once per node, pairs for the network."""
    assert bad({}) == []


@pytest.mark.parametrize(
    ("changes", "check", "detail", "advice"),
    [
        (
            {"versions": {"python": "3.11.7", "ray": "2.59.0", "torch": "2.13.0"}},
            "versions",
            "ray 2.59.0 instead of 2.60.0",
            "install the versions of node 10.0.0.1",
        ),
        ({"interface": ""}, "interface", "none has the node's address", "start Ray with --node-ip-address"),
        ({"shm_bytes": 64 * 2**20}, "shared memory", "0.1 GiB free", "free 0.25 GiB"),
        ({"cpus": 2}, "CPUs", "Ray offers 4, the machine has 2", "start Ray with --num-cpus"),
        ({"gpus": 8}, "GPUs", "Ray offers 0, the machine has 8", "start Ray with --num-gpus"),
        ({"open_files": 256}, "open files", "limit 256", "ulimit -n 1024"),
        ({"sees_shared": False}, "shared folder", "not seen", "mount the same store here"),
    ],
)
def test_each_trouble_is_one_finding_with_advice(changes: dict[str, Any], check: str, detail: str, advice: str) -> None:
    """Named by node."""
    (finding,) = bad(changes)
    assert (finding.check, finding.node) == (check, "10.0.0.2")
    assert detail in finding.detail
    assert advice in finding.advice


def test_a_node_that_does_not_answer_is_a_line() -> None:
    """The versions of the first that does are the measure; whoever asks sees one line per node."""
    nodes = [node(1), node(2), node(3)]
    reports: dict[str, Any] = {"n1": "takes no connection", "n2": report(), "n3": report(cpus=2)}
    found = judge_nodes(nodes, reports, {"n2": 0.0, "n3": 0.0}, {("n2", "n3"): "", ("n3", "n2"): ""}, False)
    assert [(item.check, item.node) for item in found if not item.is_well] == [
        ("answer", "10.0.0.1"),
        ("CPUs", "10.0.0.3"),
    ]
    lines = per_node([asdict(item) for item in found])
    assert [(line.name, line.ok) for line in lines] == [
        ("node 10.0.0.1", False),
        ("node 10.0.0.2", True),
        ("node 10.0.0.3", False),
    ]
    assert "takes no connection" in lines[0].detail
    assert judge_nodes(nodes[:1], reports, {}, {}, True)[0].is_well is False


def test_clock_and_network() -> None:
    """A clock is off in both directions; a blocked way names both ends."""
    (clock,) = bad({}, skew_s=-3.0)
    assert (clock.check, clock.detail) == ("clock", "-3.00 s from this machine")
    (network,) = bad({}, trouble="timed out")
    assert (network.check, network.node, network.detail) == ("network", "10.0.0.1", "timed out")
    assert network.advice.endswith(" 10.0.0.1 and 10.0.0.2")


@pytest.mark.parametrize(("clock", "skew"), [(10.5, 0.0), (9.0, -1.0), (13.0, 2.0)])
def test_skew_is_what_the_round_trip_cannot_explain(clock: float, skew: float) -> None:
    """A reading between question and answer says nothing against the clock."""
    assert _skew(clock, 10.0, 11.0) == skew
