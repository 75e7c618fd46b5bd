"""Where a group's store listens, and whom it turns away."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from trainers.runtime.rendezvous import KEY_VARIABLE, meet, use_loopback

TIMEOUT = timedelta(seconds=10)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free port, in torchrun's variables for one rank on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found = int(probe.getsockname()[1])
    for name in ("TORCHELASTIC_USE_AGENT_STORE", KEY_VARIABLE, "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", found), ("WORLD_SIZE", 1)):
        monkeypatch.setenv(name, str(value))
    return found


def can_connect(address: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


def test_the_store_listens_on_the_given_address_alone(port: int) -> None:
    """Another address of the same machine reaches nobody, as it would if rank 0 listened everywhere."""
    found = meet(0, 1, TIMEOUT)
    found.complete(lets_others_in=True)
    found.store.set("a", "1")
    assert can_connect("127.0.0.1", port)
    assert not can_connect("127.0.0.2", port)


def test_a_client_without_the_key_reads_and_writes_other_keys(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is the prefix of all that the group writes."""
    monkeypatch.setenv(KEY_VARIABLE, "0123abcd")
    found = meet(0, 1, TIMEOUT)
    found.complete(lets_others_in=True)
    found.store.set("default_pg/0", "here")
    stranger = dist.TCPStore("127.0.0.1", port, None, False, TIMEOUT, wait_for_workers=False)
    assert not stranger.check(["default_pg/0"])
    stranger.set("default_pg/0", "elsewhere")
    assert found.store.get("default_pg/0") == b"here"


def test_once_the_ranks_are_in_nobody_else_gets_in(port: int) -> None:
    """A connection of before goes on to work, and more keys can be written over it."""
    found = meet(0, 1, TIMEOUT)
    member = dist.TCPStore("127.0.0.1", port, None, False, TIMEOUT, wait_for_workers=False)
    found.complete(lets_others_in=False)
    assert not can_connect("127.0.0.1", port)
    found.store.set("a", "1")
    assert member.get("a") == b"1"
    assert sorted(member.list_keys()) == sorted(found.store.list_keys())


def test_under_torchrun_the_agents_store_is_used(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its agent listens before any rank starts; rank 0 is a client of it as every other."""
    agent = dist.TCPStore("127.0.0.1", port, 1, True, TIMEOUT)
    agent.set("from", "the agent")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert meet(0, 1, TIMEOUT).store.get("from") == b"the agent"


@pytest.fixture
def other_nodes(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchrun's variables of one rank of two, each on a node of its own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")


@pytest.mark.usefixtures("other_nodes")
def test_a_name_that_other_nodes_cannot_reach_is_refused(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host name that is 127.0.0.1 on its own node would leave the other nodes waiting."""
    monkeypatch.setenv("MASTER_ADDR", "127.1")  # no address as one writes it, and known to every resolver
    with pytest.raises(RuntimeError, match=r"MASTER_ADDR 127\.1 is 127\.0\.0\.1 on rank 0's node"):
        meet(0, 2, TIMEOUT)


@pytest.mark.usefixtures("other_nodes")
def test_several_nodes_on_one_machine_meet_on_its_loopback_address(port: int) -> None:
    """Raylets on one machine are nodes to Ray; the launcher knows that they share it."""
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda rank: meet(rank, 2, TIMEOUT), range(2))
    first.complete(lets_others_in=False)
    first.store.set("a", "1")
    assert second.store.get("a") == b"1"
    assert second.listener is None


def test_an_address_of_another_machine_is_refused(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 listens at its own address; 192.0.2.1 is nobody's (RFC 5737)."""
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    with pytest.raises(RuntimeError, match=f"rank 0 cannot listen on MASTER_ADDR 192.0.2.1, port {port}"):
        meet(0, 1, TIMEOUT)


@pytest.mark.parametrize(("address", "interface"), [("127.0.0.1", "lo"), ("localhost", "lo"), ("10.0.0.4", None)])
def test_gloo_stays_on_the_machine_where_all_ranks_do(
    port: int, monkeypatch: pytest.MonkeyPatch, address: str, interface: str | None
) -> None:
    """Without the variable gloo listens where the host's name leads."""
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    use_loopback()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == interface
