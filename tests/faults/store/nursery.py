"""A process that has imported the store and forks writers from it: a writer starts in milliseconds, not in a second.

Commands on stdin, one JSON object a line: {"do": "write" | "live", ...}; the answer is the child's process id. A child
writes acknowledgements to the file `acks` after each call has returned, and errors to `errors`. With `go` it waits
until that file is there: time to attach a tracer. Children are reaped at once; who sent the command kills them.
"""

import json
import os
import signal
import sys
import time
import traceback
from typing import Any

from trainers.store import collection, local_files, store  # noqa: F401
from trainers.store.store import Store

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))

import life
import writer


def child(order: dict[str, Any]) -> None:
    """Do the order; never returns."""
    code = 1
    try:
        sys.stdin.close()
        acks = os.open(order["acks"], os.O_WRONLY | os.O_CREAT, 0o600)

        place = 0

        def acknowledge(*words: object) -> None:
            nonlocal place  # not os.write: the tests that inject faults into writes spare this one
            place += os.pwrite(acks, (" ".join(map(str, words)) + "\n").encode(), place)

        while "go" in order and not os.path.exists(order["go"]):
            time.sleep(0.002)
        if order.get("no_sync"):
            os.fsync = lambda descriptor: None  # type: ignore[assignment]
        if order["do"] == "write":
            opened = Store.open(order["store"])
            if "patience_s" in order:
                opened.wait_for_room(order["patience_s"], lambda text: None)
            writer.write(opened, order["number"], order["seed"], acknowledge)
        else:
            life.live(Store.open(order["store"]), acknowledge)
        code = 0
    except BaseException:
        with open(order["errors"], "w") as file:
            traceback.print_exc(file=file)
    finally:
        os._exit(code)


def main() -> None:
    """Serve until stdin ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(order)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
