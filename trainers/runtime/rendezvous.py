"""Where the ranks of a group find each other: a key-value store on rank 0, on one address and for these ranks only.

torch's own `env://` listens on every interface of the node, for anybody, for as long as the group lives. The keys are
the addresses to which ranks connect, so whoever writes one first could redirect a rank.
"""

import ctypes
import ipaddress
import os
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

KEY_VARIABLE = "TRAINWRIGHT_GROUP_KEY"
"""Random text that the launcher gives to the ranks of one run: the prefix of their keys. Absent under torchrun."""
SO_ATTACH_FILTER = 26
_DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)
"""A socket filter of one instruction, `ret 0`: keep no byte of any packet (Linux, networking/filter.rst)."""


@dataclass(frozen=True)
class Rendezvous:
    """The store of a group and, on rank 0, the socket that it listens on."""

    store: Store
    listener: socket.socket | None

    def complete(self, *, lets_others_in: bool) -> None:
        """Give the socket up once the ranks are connected, as they are when the store is built.

        Unless it lets others in, every further attempt to connect is dropped. (Closing the socket for good would leave
        torch's thread turning on the error.) A kernel without filters changes nothing.
        """
        if self.listener is None:
            return
        code = ctypes.create_string_buffer(_DROP_ALL)
        with self.listener, suppress(OSError):
            if not lets_others_in:
                program = struct.pack("HP", 1, ctypes.addressof(code))
                self.listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def meet(rank: int, world_size: int, timeout: timedelta) -> Rendezvous:
    """Build the store of the group that torchrun's variables describe; rank 0 listens on MASTER_ADDR alone.

    Raises RuntimeError where rank 0 cannot listen there, or where other nodes could not reach it there.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listener = None
    if rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agent listens in rank 0's place
        store = TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    else:
        listener = _listen(address, port)
        port, handle = listener.getsockname()[1], os.dup(listener.fileno())
        store = TCPStore(address, port, world_size, is_master=True, timeout=timeout, master_listen_fd=handle)
    key = os.environ.get(KEY_VARIABLE)
    return Rendezvous(PrefixStore(key, store) if key else store, listener)


def use_loopback() -> None:
    """Keep gloo's sockets on the loopback interface where MASTER_ADDR says that all ranks share this machine."""
    if is_loopback(os.environ["MASTER_ADDR"]):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def is_loopback(address: str) -> bool:
    """Return whether an address, or the word localhost, is this machine's own."""
    with suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return address == "localhost"


def _listen(address: str, port: int) -> socket.socket:
    try:
        family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise RuntimeError(f"MASTER_ADDR {address} is not known on rank 0's node: {error}") from error
    has_other_nodes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])) < int(os.environ["WORLD_SIZE"])
    # Launchers that give a loopback address know that all ranks are on this machine; a host's name may mislead them.
    if has_other_nodes and is_loopback(str(place[0])) and not is_loopback(address):
        raise RuntimeError(
            f"MASTER_ADDR {address} is {place[0]} on rank 0's node, where other nodes cannot reach it: set it to the "
            f"address of the node"
        )
    try:
        return socket.create_server(place[:2], family=family, backlog=socket.SOMAXCONN)
    except OSError as error:
        raise RuntimeError(f"rank 0 cannot listen on MASTER_ADDR {address}, port {port}: {error}") from error
