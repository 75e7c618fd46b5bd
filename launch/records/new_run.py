"""A new run's folder: the recipe's inputs in the store, and everything that a resume needs."""

from typing import Any

from launch.capacity.room import check_disk
from launch.inputs.external import take_in
from launch.inputs.resolved import Resolved
from launch.records.record import RunRecord
from trainers.store.store import Store


def new_record(store: Store, resolved: Resolved) -> RunRecord:
    """Take the recipe's inputs into the store, and write a new run's folder with everything that a resume needs."""
    store.probe_writable()
    planned = resolved.plan(store)
    check_disk(planned, store)
    take_in(resolved.recipe, resolved.base_dir, resolved.external, store)
    return RunRecord.create(store, resolved.recipe.name, record_of(resolved))


def record_of(resolved: Resolved) -> dict[str, Any]:
    """The description of what a run computes, as its folder stores it."""
    planned = resolved.plan(None)
    return {
        **resolved.to_json(),
        "plan": [{"name": s.name, "kind": s.kind, "fingerprint": s.fingerprint} for s in planned.stages],
        "meanings": resolved.meanings(planned),
    }
