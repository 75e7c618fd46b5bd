"""What there is to run on: this machine, or a cluster that is asked in a child process (its client is slow to load)."""

import json
import subprocess
import sys
from dataclasses import asdict

from cluster.session import local_nodes, start
from cluster.topology import Node
from recipes.errors import CapacityError

ASK_TIMEOUT_S = 8.0


def nodes_of(address: str | None) -> list[Node]:
    """The nodes of the cluster at an address; None: this machine. Raises CapacityError when nothing answers."""
    if address is None:
        return local_nodes()
    try:
        asked = subprocess.run(
            [sys.executable, "-m", "launch.nodes", address],
            capture_output=True,
            text=True,
            timeout=ASK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CapacityError(f"no Ray cluster answers at {address} within {ASK_TIMEOUT_S:.0f} s") from None
    if asked.returncode:
        lines = asked.stderr.strip().splitlines() or ["no reason given"]
        raise CapacityError(lines[-1])
    return [Node(**node) for node in json.loads(asked.stdout.splitlines()[-1])]


def main(address: str) -> int:
    """Print the nodes as JSON; the reason on the last line of standard error when there are none."""
    try:
        with start(address, name="question") as session:
            nodes = session.nodes()
    except CapacityError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    print(json.dumps([asdict(node) for node in nodes]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
