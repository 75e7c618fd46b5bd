"""Writes to a store without end and acknowledges each commit; run by the nursery, killed by the tests."""

import itertools
import random
from collections.abc import Callable

from life import artifact, state

from trainers.store.manifest import sha256_hex as sha
from trainers.store.store import Store


def write(store: Store, number: int, seed: int, acknowledge: Callable[..., None]) -> None:
    """Write until killed."""
    chooser = random.Random(f"{number}/{seed}")
    run, stage = f"run-{number}", "base"
    lease = store.take_lease(run, stage)
    acknowledge("ready")
    for count in itertools.count(1):
        step = lease * 1_000_000 + count
        match chooser.choice(["artifact", "shared", "state", "state", "lines"]):
            case "artifact":
                acknowledge("artifact", artifact(store, sha(f"{number}/{seed}/{count}".encode())).fingerprint)
            case "shared":  # all writers make this one
                acknowledge("artifact", artifact(store, sha(f"shared/{seed}/{count}".encode())).fingerprint)
            case "state":
                state(store, run, stage, lease, step, chooser.randbytes(5000))
                acknowledge("state", step)
                store.keep_states(run, stage, keep=2)
            case "lines":
                segments = store.run(run).writer("journal")
                segments.append({"lease": lease, "number": count})
                segments.flush()
                acknowledge("line", lease, count)
