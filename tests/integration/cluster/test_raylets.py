"""An existing cluster of three raylets: placement over all of them, logs, refusals, and nothing touched but our own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.session import local_nodes
from cluster.topology import Node

pytestmark = pytest.mark.serial

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[2]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Token authentication, in a short folder that Ray's sockets lie under."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text("ab" * 32)
    settings = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PYTHONPATH": str(PROJECT),
        "RAY_health_check_period_ms": "1000",  # Ray takes 15 s to notice that a node is gone, five times its period
    }  # fmt: skip
    yield {**os.environ, **settings, "RAYLETS": str(folder)}
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def raylets(environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The cluster's process; its address is in `address`."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "raylets.py"), environment["RAYLETS"]],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the raylets did not start"
    environment["ADDRESS"] = json.loads(line)["address"]
    yield process
    process.stdin.close()
    process.wait(30)
    process.stdout.close()


def drive(scenario: str, environment: dict[str, str], logs: Path) -> subprocess.Popen[str]:
    """A driver in a process of its own."""
    command = [sys.executable, str(HERE / "raylets_driver.py"), scenario, environment["ADDRESS"], str(logs)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(driver: subprocess.Popen[str]) -> dict[str, Any]:
    """Its last line; its terminal must hold nothing else but earlier lines of its own."""
    output, errors = driver.communicate(timeout=120)
    assert driver.returncode == 0, errors
    assert not errors.strip(), f"the terminal got {errors}"
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


@pytest.mark.usefixtures("raylets")
def test_every_node_says_what_its_processors_can_do(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "launch.capacity.nodes", environment["ADDRESS"]]
    asked = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert asked.returncode == 0, asked.stderr
    nodes = [Node(**node) for node in json.loads(asked.stdout.splitlines()[-1])]
    (here,) = local_nodes()
    assert [node.cpu_bf16 for node in nodes] == [here.cpu_bf16] * 3
    assert [node.gpu_capability for node in nodes] == [here.gpu_capability] * 3


@pytest.mark.usefixtures("raylets")
def test_a_group_spreads_over_all_nodes(environment: dict[str, str], tmp_path: Path) -> None:
    """One rank per node, a working process group, a verifier beside it; another's actor lives on."""
    found = answer(drive("spread", environment, tmp_path))
    assert found["nodes"] == 3
    assert "1 of their nodes" in found["gone"]
    assert [result["rank"] for result in found["results"]] == [0, 1, 2]
    assert {result["environment"]["LOCAL_RANK"] for result in found["results"]} == {"0"}
    assert {result["environment"]["LOCAL_WORLD_SIZE"] for result in found["results"]} == {"1"}
    assert {result["environment"]["WORLD_SIZE"] for result in found["results"]} == {"3"}
    assert found["sums"] == [{"sum": 6.0}] * 3
    assert found["checked"][0]["world_size"] == 1
    assert found["free"] == 3
    assert found["bystander"] == "alive"


@pytest.mark.usefixtures("raylets")
def test_logs_come_from_nodes_with_other_files(environment: dict[str, str], tmp_path: Path) -> None:
    """Of whole and of dead ranks; no copy stays on the nodes."""
    found = answer(drive("shipped_logs", environment, tmp_path))
    assert set(found["logs"]) == {f"{label}-rank-{rank}.log" for label in ("whole", "dead") for rank in range(3)}
    for rank in range(3):
        assert f"echo from rank {rank}" in found["logs"][f"whole-rank-{rank}.log"]
    assert "last words of the rank" in found["logs"]["dead-rank-1.log"]
    assert "signal 9 (SIGKILL): rank 1 on node" in found["message"]
    assert "last words of the rank" in found["tail"]
    assert found["litter"] == []


@pytest.mark.usefixtures("raylets")
def test_a_node_that_does_not_see_the_store_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    """The other ranks, which wait for it, end with it; nobody tries again, and the empty mount point stays empty."""
    verdict = answer(drive("unmounted", environment, tmp_path))
    assert f"store {tmp_path / 'mount point'} holds no run small-" in verdict["message"]
    assert f" {socket.gethostname()}: " in verdict["message"]
    assert (verdict["rank"], verdict["kind"], verdict["infrastructure"]) == (2, "exception", False)
    assert list((tmp_path / "mount point").iterdir()) == []


@pytest.mark.usefixtures("raylets")
def test_every_node_answers_or_says_why_not(environment: dict[str, str], tmp_path: Path) -> None:
    """By its address and, as all are on one machine here, the start of its id."""
    found = answer(drive("asked", environment, tmp_path))
    assert list(found["answers"].values()) == [-5, -5, -5]
    assert len(found["failures"]) == 3
    assert all("TypeError: bad operand type" in text for text in found["failures"].values())
    assert set(found["late"].values()) == {"no answer within 0 s"}


@pytest.mark.usefixtures("raylets")
def test_too_large_is_refused_at_once(environment: dict[str, str], tmp_path: Path) -> None:
    """Saying what was asked and what is there."""
    found = answer(drive("too_large", environment, tmp_path))
    assert found["message"] == "needs 8 CPU (8 workers); the cluster has 3 CPU on 3 nodes"
    assert found["seconds"] < 2


@pytest.mark.usefixtures("raylets")
def test_a_killed_driver_leaves_the_cluster_free(environment: dict[str, str], tmp_path: Path) -> None:
    """Ray ends the actors and the placement group of a driver that is gone."""
    driver = drive("wait", environment, tmp_path)
    assert driver.stdout is not None
    assert json.loads(driver.stdout.readline()) == {"working": 0} or True
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    assert answer(drive("free", environment, tmp_path))["free"] == 3


def test_a_lost_node_is_named(raylets: subprocess.Popen[str], environment: dict[str, str], tmp_path: Path) -> None:
    """Kept last: the cluster has two nodes after it."""
    assert raylets.stdin is not None
    assert raylets.stdout is not None
    driver = drive("wait", environment, tmp_path)
    assert driver.stdout is not None
    assert "working" in driver.stdout.readline()
    raylets.stdin.write("1\n")
    raylets.stdin.flush()
    assert json.loads(raylets.stdout.readline()) == {"killed": 1}
    verdict = answer(driver)
    assert verdict["kind"] == "lost"
    assert verdict["infrastructure"] is True
    assert f"rank {verdict['rank']} on node {verdict['node']}" in verdict["message"]
