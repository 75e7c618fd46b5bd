"""What there is to run on: this machine, or a cluster that is asked in a child process (its client is slow to load)."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.hardware import with_processors
from cluster.session import local_nodes, start
from cluster.topology import Node, read_nodes
from launch.capacity.job_server import JobServer, is_job_server, shake_hands
from recipes.errors import CapacityError

CONNECT_TIMEOUT_S = 8.0
ASK_TIMEOUT_S = 60.0
DOCTOR_TIMEOUT_S = 120.0


def nodes_of(address: str | None) -> list[Node]:
    """The nodes of the cluster at an address; None: this machine. Raises CapacityError when nothing answers.

    At a job server's a small job asks, which also finds whether the cluster has this package.
    """
    if address is None:
        return local_nodes()
    if is_job_server(address):
        return shake_hands(JobServer(address))
    return read_nodes(_ask([address], ASK_TIMEOUT_S))


def examine_nodes(address: str, shared_folder: str | None) -> list[dict[str, Any]]:
    """What the cluster's doctor finds on every node: check, node, is_well, detail, advice."""
    answer: list[dict[str, Any]] = json.loads(_ask([address, "doctor", shared_folder or ""], DOCTOR_TIMEOUT_S))
    return answer


def _ask(arguments: list[str], timeout_s: float) -> str:
    """Run this module in a child process; returns the last line that it prints."""
    try:
        asked = subprocess.run(
            [sys.executable, "-m", "launch.capacity.nodes", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CapacityError(f"no Ray cluster answers at {arguments[0]} within {timeout_s:.0f} s") from None
    if asked.returncode:
        lines = asked.stderr.strip().splitlines() or ["no reason given"]
        raise CapacityError(lines[-1])
    return asked.stdout.splitlines()[-1]


def main(address: str, question: str = "nodes", shared_folder: str = "") -> int:
    """Print the answer as JSON; the reason on the last line of standard error when there is none."""

    def give_up() -> None:
        print(f"no Ray cluster answers at {address} within {CONNECT_TIMEOUT_S:.0f} s", file=sys.stderr, flush=True)
        os._exit(CapacityError.exit_code)

    patience = threading.Timer(CONNECT_TIMEOUT_S, give_up)
    patience.daemon = True
    patience.start()
    try:
        with start(address, name="question") as session:
            patience.cancel()
            if question == "doctor":
                from cluster.doctor import examine

                found: list[Any] = examine(session, Path(shared_folder) if shared_folder else None)
            else:
                found = with_processors(session.nodes())
    except CapacityError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    print(json.dumps([asdict(item) for item in found]))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
